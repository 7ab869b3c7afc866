"""Pages that mean harm, or are broken: from a real server, through `load`, each ends in a clear error or in the right text, and in time.

What one layer alone decides stands with it: test_data_fetch.py (connections, redirects, compression), test_data_decode.py (charsets),
test_data_addresses.py (private addresses), test_data_extract.py (markup), test_data_hostile_rows.py (from the page to the rows).
"""

from __future__ import annotations

import base64
import gzip
import io
import random
import time
import zipfile
from collections.abc import Iterator

import pytest

from support.site_server import Reply, SiteServer, page, redirect
from trimtab.data import FetchLimits, Loaded, load
from trimtab.data.clean import collapse
from trimtab.data.extract import extract
from trimtab.data.fetch import fetch_page
from trimtab.data.plain import markdown, text_lines
from trimtab.errors import DataError

SECONDS = 25.0  # of computing, for what takes one or two; what it guards against took minutes
QUICK = FetchLimits(backoff_s=0.01)
PROSE = "The ferry Astrid Vane was built in 1974 at the yard in Osterhaven and has carried passengers across the sound ever since."
JAPANESE = "港の渡し船は一九七四年に建造され、二百四十人の乗客を運ぶことができます。船長の名前は田中です。"
WESTERN = "The café isn’t “open” – naïve coöperation costs 5 €."


@pytest.fixture
def site() -> Iterator[SiteServer]:
    with SiteServer({"/fine": page("The Vane", PROSE)}) as server:
        yield server


def read(site: SiteServer, *paths: str, limits: FetchLimits = QUICK, on_error: str = "fail") -> Loaded:
    urls = [site.url(path) for path in paths]
    return load(urls, on_error=on_error, allow_private_hosts=True, limits=limits, say=lambda line: None)  # type: ignore[arg-type]


def text(site: SiteServer, reply: Reply) -> str:
    """The one document of a page that is answered so."""
    site.pages["/page"] = reply
    (document,) = read(site, "/page").documents
    return document.text


def refusal(site: SiteServer, reply: Reply, limits: FetchLimits = QUICK) -> str:
    """Why a page that is answered so is refused. A page beside it is read, and nothing of the refused one is."""
    site.pages["/page"] = reply
    loaded = read(site, "/fine", "/page", limits=limits, on_error="skip")
    assert [document.title for document in loaded.documents] == ["The Vane"]
    (skipped,) = loaded.skipped
    assert skipped.source == site.url("/page")
    return skipped.reason


# where an address leads


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST.", "0.0.0.0", "0", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "%31%32%37.0.0.1"),
        *("[::]", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254"),
        *("[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "10.0.0.1", "192.168.1.1", "100.100.100.200", "[fd00:ec2::254]"),
    ],
)
@pytest.mark.parametrize("by", ["itself", "a redirect"])
def test_no_spelling_of_a_private_address_is_connected_to(site: SiteServer, monkeypatch: pytest.MonkeyPatch, host: str, by: str):
    """The redirect comes from a host that counts as public: 127.0.0.2, where the same server listens, is let through."""
    import trimtab.data.addresses as addresses

    judge = addresses.kind_of_private
    monkeypatch.setattr("trimtab.data.addresses.kind_of_private", lambda address: None if address == "127.0.0.9" else judge(address))
    with SiteServer({"/": redirect(f"http://{host}:{site.port}/fine")}, host="127.0.0.9") as public:
        url = f"http://{host}:{site.port}/fine" if by == "itself" else public.url("/", host="127.0.0.9")
        with pytest.raises(DataError, match=r"(loopback|unspecified|link-local|private|carrier-grade NAT) address.*; pass allow_private"):
            fetch_page(url, QUICK)
        assert len(public.requests) == (by == "a redirect")
    assert site.requests == []


@pytest.mark.parametrize(
    "host", ["①②⑦.0.0.1", "127。0。0。1", "[::1%25lo]", "[fe80::1%25lo]", "x..y", "a" * 70 + ".test", "-", "xn--", "[]", "[:]"]
)
def test_hosts_that_are_none_are_an_error_like_others(site: SiteServer, host: str):
    with pytest.raises(DataError, match="the source could not be read"):
        load(f"http://{host}:{site.port}/fine", limits=QUICK, say=lambda line: None)
    assert site.requests == []


def test_a_redirect_to_nowhere_and_to_itself(site: SiteServer):
    assert refusal(site, redirect("")) == "it redirects, and says not where to; pass the address of the page itself"
    assert refusal(site, Reply("", 302)).startswith("HTTP 302 Found; only 200 brings a page: save it")
    assert refusal(site, redirect("/page")).startswith("more than 5 redirects; open it in a browser")
    assert "cannot be read" in refusal(site, Reply("", 302, headers={"Location": "http://[/"}))


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        *((401, "save it from a browser"), (403, "save it from a browser"), (451, "save it from a browser")),
        *((404, "check the address"), (418, "check the address"), (505, "check the address"), (500, "try again later")),
        *((206, "save it"), (304, "save it"), (999, "save it")),
    ],
)
def test_every_status_but_200_is_refused_with_what_to_do(site: SiteServer, status: int, advice: str):
    reason = refusal(site, Reply("<p>some text that nobody asked for</p>", status))
    assert reason.startswith(f"HTTP {status}")
    assert advice in reason


def test_an_address_of_100_kb_is_asked_for_and_named_in_an_error(site: SiteServer):
    site.pages["/" + "a" * 50_000] = page("Long", PROSE)
    assert read(site, "/" + "a" * 50_000).documents[0].title == "Long"
    with pytest.raises(DataError, match=r"HTTP 414 Request-URI Too Long; check the address|the connection failed"):
        read(site, "/" + "a" * 100_000)


def test_thousands_of_addresses_of_which_many_are_the_same(site: SiteServer):
    began = time.process_time()
    upper = f"HTTP://127.0.0.1:{site.port}"
    for number in range(600):
        site.pages[f"/{number}"] = Reply(f"<p>Page number {number} of the site.</p>")
    urls = [
        url
        for number in range(600)
        for url in (site.url(f"/{number}"), site.url(f"/{number}#top"), f"{upper}/{number}", site.url(f"/{number}"))
    ]
    said: list[str] = []
    loaded = load(urls, allow_private_hosts=True, limits=QUICK, say=said.append)
    assert [document.source for document in loaded.documents] == urls[::4]
    assert len(site.requests) == 600
    assert sum("more than once" in line for line in said) == 600
    assert time.process_time() - began < SECONDS


# what a server sends


def _zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("page.html", PROSE)
    return packed.getvalue()


@pytest.mark.parametrize("headers", [{}, {"X-Content-Type-Options": "nosniff"}], ids=["sniffed", "nosniff"])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj << >> endobj", "it is a PDF file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is a PNG image"),
        (_zip(), "it is a zip archive"),
        (gzip.compress(PROSE.encode()), "it is a gzip file"),
        (b"\0\0\0\x20ftypisom" + bytes(99), "it is binary data"),
        (b"SQLite format 3\0" + bytes(99), "it is binary data"),
        (b"<html>" + random.Random(9).randbytes(2_000), "it is binary data"),
    ],
)
def test_binary_served_as_a_page(site: SiteServer, body: bytes, kind: str, headers: dict[str, str]):
    reason = refusal(site, Reply(body, headers=headers))
    assert reason.startswith(kind)
    assert "export it as .html, .txt or .md" in reason


@pytest.mark.parametrize("type_", ["application/rss+xml", "text/xml", "application/xml", "image/svg+xml", "application/javascript", "x"])
def test_other_types_are_refused_with_what_to_do(site: SiteServer, type_: str):
    assert refusal(site, Reply("<rss><item>words</item></rss>", content_type=type_)).endswith(": save its text as .txt or .md")


def test_feeds_and_json_served_as_pages_are_their_text(site: SiteServer):
    feed = '<?xml version="1.0" encoding="utf-8"?><rss><channel><item><description>A feed of words.</description></item></channel></rss>'
    assert "A feed of words." in text(site, Reply(feed))
    assert text(site, Reply('{"text": "words in JSON"}')) == '{"text": "words in JSON"}'


@pytest.mark.parametrize("charset", ["", "; charset=utf-8", "; charset=ISO-8859-1", "; charset=no-such"])
@pytest.mark.parametrize("meta", ["", "utf-8", "true"])
@pytest.mark.parametrize("encoding", ["shift_jis", "euc_jp", "iso2022_jp", "utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_japanese_whatever_header_and_page_say(site: SiteServer, encoding: str, meta: str, charset: str):
    declared = f"<meta charset={encoding if meta == 'true' else meta}>" if meta else ""
    html = f"<html><head>{declared}<title>渡し船</title></head><body><p>{JAPANESE}</p></body></html>"
    assert text(site, Reply(html.encode(encoding), content_type=f"text/html{charset}")) == JAPANESE


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
@pytest.mark.parametrize("header", ["", "; charset=utf-8", "; charset=iso-8859-1", "; charset=shift_jis"])
@pytest.mark.parametrize("meta", ["", "<meta charset=utf-8>", "<meta charset=windows-1252>"])
def test_western_text_whatever_header_and_page_say(site: SiteServer, encoding: str, header: str, meta: str):
    assert text(site, Reply(f"{meta}<p>{WESTERN}</p>".encode(encoding), content_type=f"text/html{header}")) == WESTERN


def test_lengths_that_lie(site: SiteServer):
    assert text(site, Reply(f"<p>{PROSE}</p>EXTRA", headers={"Content-Length": str(len(PROSE) + 7)})) == PROSE
    for said in ("-1", "many", "1e9", ""):
        assert text(site, Reply(f"<p>{PROSE}</p>", headers={"Content-Length": said})) == PROSE
    assert refusal(site, Reply(PROSE, headers={"Content-Length": "9, 5"})).startswith("its headers contradict each other")
    assert refusal(site, Reply(PROSE, headers={"Content-Length": "999999"})).startswith("the connection failed (")


@pytest.mark.parametrize(
    "body", [b"zz\r\n<p>", b"FFFFFFFFFFFFFFFFFF\r\n<p>\r\n0\r\n\r\n", b"-5\r\n<p>x\r\n0\r\n\r\n", b"3\r\n<p>", b"", b"3\r\n<p>x\r\n"]
)
def test_chunks_that_lie(site: SiteServer, body: bytes):
    reply = Reply(body, headers={"Transfer-Encoding": "chunked"}, with_length=False)
    assert refusal(site, reply).startswith("the connection failed (")


def test_headers_without_end(site: SiteServer):
    assert "got more than 100 headers" in refusal(site, Reply(PROSE, headers={f"X-{n}": "y" for n in range(150)}))
    assert "header line" in refusal(site, Reply(PROSE, headers={"X-Long": "y" * 100_000}))


def test_a_page_of_50_mb(site: SiteServer):
    began = time.process_time()
    words = b"<p>" + b"The ferry is late. " * 2_700_000 + b"</p>"
    site.pages["/large"] = Reply(words)
    site.pages["/packed"] = Reply(gzip.compress(words, 1), headers={"Content-Encoding": "gzip"})
    for path in ("/large", "/packed"):
        with pytest.raises(DataError, match=r"it is larger than 10,000,000 bytes; raise max_page_mb \(--max-page-mb\)"):
            read(site, path)
    assert time.process_time() - began < SECONDS


def test_a_page_of_12_mb_when_asked_for(site: SiteServer):
    """One text longer than the parser takes by default (10 MB)."""
    site.pages["/large"] = Reply(b"<p>" + b"The ferry is late. " * 650_000 + b"</p>")
    got = fetch_page(site.url("/large"), QUICK.model_copy(update={"max_bytes": 20_000_000}), allow_private_hosts=True)
    assert len(got.tree.get_text()) == 650_000 * 19 + 1


def test_nothing_but_script_or_space(site: SiteServer):
    for body in (
        "<script>var x = 'words';</script>" * 9,
        "<style>p {}</style>",
        "<!-- words -->",
        "<template><p>words</p></template>",
        "\u200b\u202e",
    ):
        assert refusal(site, Reply(body)).startswith("it holds no text; if a browser shows some, a script writes it: save the page")
    for body in ("", " \r\n\t ", "\n" * 100_000):
        assert refusal(site, Reply(body)) == "it is empty"


# what a page holds


def test_invisible_characters_are_left_out(site: SiteServer):
    body = "<p>\u202eThe \u2066fer\u200bry\u2069 \ufeffis\u00ad late\u0000, s\u0007he said.\u202c</p>"
    assert text(site, Reply(body + f"<p>{PROSE}</p>" * 2)).startswith("The ferry is late, she said.")


def test_entities_that_are_none(site: SiteServer):
    body = f"<p>Fish &amp chips &bogus; &#xD800;&#0;&#99999999999; &lt;b&gt; &#x1F6A2; {PROSE}</p>"
    found = text(site, Reply(body))
    assert found.startswith("Fish & chips &bogus;")
    assert found.endswith(f"<b> 🚢 {PROSE}")
    assert found.encode() == found.encode("utf-8", "replace")


END = f"<p>{PROSE}</p>"
LARGE = {
    "20,000 elements deep": ("<div>" * 20_000 + "deep down" + END, "deep down"),
    "20,000 bold deep": ("<b>" * 20_000 + "deep down" + END, "deep down"),
    "lists in lists": ("<ul><li>item" * 10_000 + END, "item"),
    "tables in tables": ("<table><tr><td>cell" * 5_000 + END, "cell"),
    "articles in articles": ("<article>piece" * 10_000 + END, "piece"),
    "headings deep down": ("<div>" * 3_000 + "<h2>Head</h2><ul><li><a>x</a></li></ul>" * 3_000 + END, "Head"),
    "landmarks deep down": ("<div>" * 3_000 + "<article>piece</article>" * 3_000 + END * 400, "piece"),
    "rows deep down": ("<table>" + "<span>" * 2_000 + "<tr><td>a</td><td>b</td></tr>" * 5_000 + "</table>" + END, "a: b"),
    "20,000 cells": ("<table>" + ("<tr>" + "<td>one<td>two" * 25) * 400 + "</table>" + END, "one | two"),
    "20,000 cells in a row": ("<table><tr>" + "<td>one<td>two" * 10_000 + "</table>" + END, "one | two"),
    "cells that span": ("<table>" + "<tr><td rowspan=99 colspan=99>cell<td>x" * 500 + "</table>" + END, "cell"),
    "100,000 attributes": ("<p " + " ".join(f"a{n}=b" for n in range(100_000)) + ">words</p>" + END, "words"),
    "20,000 breaks": ("one line<br>" * 20_000 + END, "one line"),
    "a title of a megabyte": (f"<title>{'long ' * 200_000}</title>" + END, "ferry"),
    "a line of a megabyte": (f"<p>{'long ' * 200_000}</p>" + END, "long long"),
    "a megabyte in base64": (f'<p><img src="data:image/png;base64,{base64.b64encode(bytes(750_000)).decode()}"></p>' + END, "ferry"),
    "marks on one letter": ("<p>" + "a" + "\u0315\u0300\u05ae" * 100_000 + " words</p>" + END * 9, "words"),
    "comments": ("<!-- x -->" * 100_000 + END, "ferry"),
    "openings of tags": ("<" * 500_000 + END, "ferry"),
    "hidden in style": (f"<p style='{';display ' * 100_000}'>words</p>" + END, "ferry"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_and_deep_markup_takes_seconds(name: str):
    html, wanted = LARGE[name]
    began = time.thread_time()
    found = extract(html)
    assert time.thread_time() - began < SECONDS
    assert any(wanted in line for line in found.lines)
    assert any(PROSE in line for line in found.lines)
    assert len(found.title) <= 1_000
    assert all(line == collapse(line) for line in found.lines[:100])


def test_more_tags_than_memory(site: SiteServer):
    reason = refusal(site, Reply("<b>" * 300_001 + "words"))
    assert reason.startswith("it has 300,001 tags, and 300,000 are read of one page; save it in parts")


@pytest.mark.parametrize(
    "unit",
    [
        *("[", "![", "[a](", "[a][", "__a ", "**a ", "*a ", "`", "<http:", "<a", "# ", " ", "|-", "a|b\n---", "<!--", "* ", "> ", "1. "),
        *("~~~\n", "---\n", "[a](x '", "\\", "a\n\n"),
    ],
)
def test_markdown_of_nothing_but_opening_marks_takes_seconds(unit: str):
    began = time.thread_time()
    for body in (unit * 10_000, "# " + unit * 10_000 + "x", "words\n" + unit * 10_000 + "x"):
        markdown(body)
        text_lines(body)
    assert time.thread_time() - began < SECONDS


def test_a_rule_that_opens_a_text_is_no_front_matter():
    assert markdown("---\n\nText above.\n\n---\n\nText below.")[1] == ("Text above.", "Text below.")
    assert markdown("---\ntitle: a\n---\nText.")[1] == ("Text.",)
    assert markdown("---\n---\nText.")[1] == ("Text.",)


def test_a_comment_that_nothing_closes_is_text():
    assert markdown("One. <!-- gone -->\n\nTwo. <!-- three\n\nFour.")[1] == ("One.", "Two. <!-- three", "Four.")


def test_a_heading_may_end_in_a_hash():
    assert markdown("# Written in C#\n\n## Fares ##\n") == ("Written in C#", ("Written in C#", "Fares"))
