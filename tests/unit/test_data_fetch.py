"""Pages from a real server on the loopback."""

from __future__ import annotations

import gzip
import socket
import time
import zlib
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from support.site_server import CERTIFICATE, Reply, SiteServer, page, redirect
from trimtab.data.fetch import Page, fetch_page
from trimtab.data.limits import FetchLimits
from trimtab.errors import DataError

QUICK = FetchLimits(backoff_s=0.01, max_bytes=200_000)
VANE = page("The Vane", "The ferry Astrid Vane was built in 1974.")


@pytest.fixture
def site() -> Iterator[SiteServer]:
    with SiteServer({"/": VANE}) as server:
        yield server


def loopback(host: str, port: int) -> tuple[str, ...]:
    return ("127.0.0.1",)


def fetch(site: SiteServer, path: str = "/", limits: FetchLimits = QUICK) -> Page:
    return fetch_page(site.url(path), limits, allow_private_hosts=True)


def failure(site: SiteServer, path: str = "/", limits: FetchLimits = QUICK) -> str:
    with pytest.raises(DataError) as caught:
        fetch(site, path, limits)
    return str(caught.value)


def test_a_page(site: SiteServer):
    got = fetch(site)
    assert got.url == site.url("/")
    assert got.media_type == "text/html"
    assert got.body == str(VANE.body).encode()
    assert got.text == VANE.body
    assert got.tree.title is not None
    assert got.tree.title.get_text() == "The Vane"


def test_what_the_server_is_told(site: SiteServer):
    fetch(site)
    (request,) = site.requests
    assert request.headers["user-agent"].startswith("trimtab/")
    assert request.headers["accept"].startswith("text/html")
    assert set(request.headers) <= {"host", "user-agent", "accept", "accept-encoding", "connection"}


def test_nothing_is_taken_from_the_environment(site: SiteServer, monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    fetch(site)
    assert "authorization" not in site.requests[0].headers


def test_a_proxy_when_asked_for(site: SiteServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", site.url())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    site.pages["http://known-to-the-proxy.invalid/x"] = VANE
    got = fetch_page("http://known-to-the-proxy.invalid/x", QUICK, proxies_from_environment=True)
    assert got.text == VANE.body
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(DataError, match="proxy is neither http nor https"):
        fetch_page("https://known-to-the-proxy.invalid/x", QUICK, proxies_from_environment=True)
    with pytest.raises(DataError, match="has the loopback address"):
        fetch_page("http://intranet.test/", QUICK, proxies_from_environment=True, resolver=loopback)


def test_errors_of_the_server_are_named(site: SiteServer):
    site.pages["/gone"] = Reply("<p>gone</p>", 410)
    site.pages["/none"] = Reply("", 204)
    assert failure(site, "/missing") == "HTTP 404 Not Found; check the address"
    assert failure(site, "/gone") == "HTTP 410 Gone; check the address"
    assert failure(site, "/none") == "HTTP 204 No Content; only 200 brings a page: save it from a browser and pass the file"
    assert len(site.requests) == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_error_is_tried_again(site: SiteServer, status: int):
    site.pages["/"] = lambda count: Reply("", status) if count < 3 else VANE
    assert fetch(site).text == VANE.body
    assert len(site.requests) == 3


def test_a_lasting_error_is_given_up(site: SiteServer):
    site.pages["/"] = Reply("", 503)
    assert failure(site) == "HTTP 503 Service Unavailable; try again later"
    assert len(site.requests) == 3


def test_retry_after_is_kept_up_to_a_limit(site: SiteServer):
    site.pages["/"] = lambda count: Reply("", 429, headers={"Retry-After": "1"}) if count == 1 else VANE
    began = time.monotonic()
    fetch(site)
    assert time.monotonic() - began >= 1
    site.pages["/later"] = Reply("", 503, headers={"Retry-After": formatdate(time.time() + 3600, usegmt=True)})
    assert failure(site, "/later").startswith("HTTP 503, and it asks for a pause of 3")
    site.pages["/nonsense"] = lambda count: Reply("", 503, headers={"Retry-After": "soon"}) if count == 1 else VANE
    assert fetch(site, "/nonsense").text == VANE.body


def test_a_pause_longer_than_the_time_left_is_not_begun(site: SiteServer):
    site.pages["/"] = Reply("", 503, headers={"Retry-After": "25"})
    began = time.monotonic()
    assert "took longer than 20 s with its pauses" in failure(site, limits=QUICK.model_copy(update={"total_s": 20.0}))
    assert time.monotonic() - began < 20
    assert len(site.requests) == 1


def test_redirects_are_followed_with_cookies(site: SiteServer):
    site.pages["/old"] = Reply("x" * 500_000, 301, headers={"Location": "/new", "Set-Cookie": "seen=1"})
    site.pages["/new"] = VANE
    assert fetch(site, "/old").text == VANE.body
    assert site.requests[-1].headers["cookie"] == "seen=1"
    fetch(site)
    assert "cookie" not in site.requests[-1].headers


def test_a_loop_of_redirects_ends(site: SiteServer):
    site.pages["/a"], site.pages["/b"] = redirect("/b"), redirect("/a")
    assert failure(site, "/a") == "more than 5 redirects; open it in a browser and pass the address that it ends at"
    assert len(site.requests) == 6


def test_five_redirects_are_allowed(site: SiteServer):
    for number in range(5):
        site.pages[f"/{number}"] = redirect(f"/{number + 1}")
    site.pages["/5"] = VANE
    assert fetch(site, "/0").text == VANE.body


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://127.0.0.1/x", "neither http nor https"),
        ("http://me:secret@127.0.0.1/", "carries a user name or password"),
        ("http://[::1/", "an address that cannot be read"),
    ],
)
def test_redirects_that_are_not_followed(site: SiteServer, to: str, said: str):
    site.pages["/old"] = redirect(to)
    assert said in failure(site, "/old")
    assert "secret" not in failure(site, "/old")


def test_a_private_address_is_refused(site: SiteServer):
    with pytest.raises(DataError, match=r"127\.0\.0\.1 is a loopback address; pass allow_private_hosts=True"):
        fetch_page(site.url(), QUICK)
    assert site.requests == []


def test_an_address_in_brackets_is_checked_too(site: SiteServer):
    with pytest.raises(DataError, match=r"::1 is a loopback address"):
        fetch_page(f"http://[::1]:{site.port}/", QUICK)
    with pytest.raises(DataError, match=r"has the loopback address|is a loopback address"):
        fetch_page(f"http://[::ffff:127.0.0.1]:{site.port}/", QUICK)
    with pytest.raises(DataError, match=r"has the loopback address 127\.0\.0\.1"):
        fetch_page(f"http://2130706433:{site.port}/", QUICK)


def test_a_name_that_leads_to_a_private_address_is_refused(site: SiteServer):
    with pytest.raises(DataError, match=r"news\.test has the loopback address 127\.0\.0\.1"):
        fetch_page(site.url(host="news.test"), QUICK, resolver=loopback)
    assert site.requests == []


def test_a_redirect_to_a_private_address_is_refused(site: SiteServer, monkeypatch: pytest.MonkeyPatch):
    """The first hop is let through as if it were public; the second is judged as it is."""
    monkeypatch.setattr("trimtab.data.addresses.kind_of_private", lambda address: "loopback" if address == "127.0.0.2" else None)
    site.pages["/old"] = redirect(f"http://metadata.test:{site.port}/")
    asked = []

    def resolver(host: str, port: int) -> tuple[str, ...]:
        asked.append(host)
        return ("127.0.0.1",) if host == "news.test" else ("127.0.0.2",)

    with pytest.raises(DataError, match=r"metadata\.test has the loopback address 127\.0\.0\.2"):
        fetch_page(site.url("/old", host="news.test"), QUICK, resolver=resolver)
    assert asked == ["news.test", "metadata.test"]
    assert len(site.requests) == 1


def test_the_checked_address_is_the_one_connected_to(site: SiteServer, monkeypatch: pytest.MonkeyPatch):
    """A name server that answers differently the second time is not asked a second time."""
    monkeypatch.setattr("trimtab.data.addresses.kind_of_private", lambda address: None if address == "127.0.0.1" else "private")
    answers = iter([("127.0.0.1",), ("10.0.0.1",)])
    got = fetch_page(site.url(host="rebinding.test"), QUICK, resolver=lambda host, port: next(answers))
    assert got.text == VANE.body
    assert next(answers) == ("10.0.0.1",)
    assert site.requests[0].headers["host"] == f"rebinding.test:{site.port}"


def test_a_name_server_that_turns_private_at_the_redirect(site: SiteServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trimtab.data.addresses.kind_of_private", lambda address: None if address == "127.0.0.1" else "private")
    site.pages["/old"] = redirect("/")
    answers = iter([("127.0.0.1",), ("10.0.0.1",)])
    with pytest.raises(DataError, match=r"rebinding\.test has the private address 10\.0\.0\.1"):
        fetch_page(site.url("/old", host="rebinding.test"), QUICK, resolver=lambda host, port: next(answers))


def test_the_second_address_is_tried_when_the_first_does_not_answer(site: SiteServer):
    got = fetch_page(site.url(host="two.test"), QUICK, allow_private_hosts=True, resolver=lambda host, port: ("127.0.0.3", "127.0.0.1"))
    assert got.text == VANE.body


def test_tls_checks_the_name_not_the_address():
    with SiteServer({"/": VANE}, tls=True) as site:
        got = fetch_page(site.url(host="site.test"), QUICK, allow_private_hosts=True, resolver=loopback, verify=str(CERTIFICATE))
        assert got.text == VANE.body
        with pytest.raises(DataError, match="its certificate or its TLS is not accepted"):
            fetch_page(site.url(host="other.test"), QUICK, allow_private_hosts=True, resolver=loopback, verify=str(CERTIFICATE))
        with pytest.raises(DataError, match="its certificate or its TLS is not accepted"):
            fetch_page(site.url(host="site.test"), QUICK, allow_private_hosts=True, resolver=loopback)
        assert len(site.requests) == 1


def test_authorities_named_by_the_environment_are_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with SiteServer({"/": VANE}, tls=True) as site:
        assert fetch_page(site.url(host="site.test"), QUICK, allow_private_hosts=True, resolver=loopback).text == VANE.body


def test_nobody_there(site: SiteServer):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="the connection failed \\(Connection refused\\)"):
            fetch_page(f"http://127.0.0.1:{closed.getsockname()[1]}/", QUICK, allow_private_hosts=True)
    with pytest.raises(DataError, match="its host name does not resolve"):
        fetch_page("http://no-such-host.invalid/?token=secret", QUICK)


def test_too_large(site: SiteServer):
    site.pages["/declared"] = Reply("x" * 200_001)
    site.pages["/undeclared"] = Reply("x" * 200_001, with_length=False)
    site.pages["/fits"] = Reply("x" * 200_000)
    assert failure(site, "/declared") == "it is larger than 200,000 bytes; raise max_page_mb (--max-page-mb) if it is worth it"
    assert failure(site, "/undeclared").startswith("it is larger than 200,000 bytes")
    assert len(fetch(site, "/fits").body) == 200_000


def test_compressed_pages(site: SiteServer):
    body = str(VANE.body).encode()
    raw = zlib.compressobj(wbits=-15)
    site.pages["/gzip"] = Reply(gzip.compress(body), headers={"Content-Encoding": "gzip"})
    site.pages["/members"] = Reply(gzip.compress(body[:50]) + gzip.compress(body[50:]) + b"\0\0", headers={"Content-Encoding": "x-gzip"})
    site.pages["/zlib"] = Reply(zlib.compress(body), headers={"Content-Encoding": "deflate"})
    site.pages["/raw"] = Reply(raw.compress(body) + raw.flush(), headers={"Content-Encoding": "deflate"})
    for path in ("/gzip", "/members", "/zlib", "/raw"):
        assert fetch(site, path).body == body


def test_a_bomb(site: SiteServer):
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 200_000
    site.pages["/"] = Reply(bomb, headers={"Content-Encoding": "gzip"})
    site.pages["/members"] = Reply(gzip.compress(b"a" * 100_000) * 40, headers={"Content-Encoding": "gzip"})
    assert failure(site).startswith("it is larger than 200,000 bytes")
    assert failure(site, "/members").startswith("it is larger than 200,000 bytes")


def test_damaged_compression(site: SiteServer):
    packed = gzip.compress(str(VANE.body).encode())
    site.pages["/cut"] = Reply(packed[:-12], headers={"Content-Encoding": "gzip"})
    site.pages["/broken"] = Reply(packed[:30] + b"\xff\xff\xff" + packed[33:], headers={"Content-Encoding": "gzip"})
    site.pages["/not"] = Reply(VANE.body, headers={"Content-Encoding": "gzip"})
    site.pages["/br"] = Reply(b"\x0b", headers={"Content-Encoding": "br"})
    site.pages["/once"] = lambda count: Reply(packed[:-12] if count == 1 else packed, headers={"Content-Encoding": "gzip"})
    assert failure(site, "/cut") == "the connection failed (the compressed body ends early); check the address, or try again later"
    assert failure(site, "/broken").startswith("the connection failed (the compressed body is damaged)")
    assert failure(site, "/not").startswith("the connection failed (the compressed body is damaged)")
    assert failure(site, "/br").startswith("it is compressed with br")
    assert fetch(site, "/once").text == VANE.body


def test_chunks(site: SiteServer):
    headers = {"Transfer-Encoding": "chunked"}
    site.pages["/whole"] = Reply(b"6\r\n<p>One\r\n4\r\n two\r\n0\r\n\r\n", headers=headers, with_length=False)
    site.pages["/cut"] = Reply(b"6\r\n<p>One\r\n4\r\n t", headers=headers, with_length=False)
    assert fetch(site, "/whole").text == "<p>One two"
    assert failure(site, "/cut").startswith("the connection failed (")


def test_a_body_shorter_than_said(site: SiteServer):
    site.pages["/"] = Reply("<p>half", headers={"Content-Length": "500"})
    assert failure(site).startswith("the connection failed (")


@pytest.mark.parametrize(
    "reply", [Reply("x" * 60, byte_s=0.2), Reply("x" * 60, byte_s=0.2, with_length=False), Reply("x", header_byte_s=0.2)]
)
def test_a_page_that_drips(site: SiteServer, reply: Reply):
    site.pages["/"] = reply
    began = time.monotonic()
    assert failure(site, limits=QUICK.model_copy(update={"total_s": 1.0})).startswith("it took longer than 1 s")
    assert time.monotonic() - began < 9  # of the 12 s that the page needs
    assert len(site.requests) == 1


def test_a_server_that_says_nothing(site: SiteServer):
    site.pages["/"] = Reply("x", wait_s=5)
    assert failure(site, limits=QUICK.model_copy(update={"read_s": 0.3, "retries": 0})) == "no data for 0.3 s; try again later"


def test_content_types(site: SiteServer):
    site.pages["/pdf"] = Reply("%PDF-1.7", content_type="application/pdf")
    site.pages["/xhtml"] = Reply(VANE.body, content_type="application/xhtml+xml")
    site.pages["/text"] = Reply("Just text.", content_type="text/plain")
    site.pages["/md"] = Reply("# Title", content_type="text/markdown; charset=UTF-8")
    site.pages["/none"] = Reply(VANE.body, content_type=None)
    site.pages["/what"] = Reply("word word", content_type=None)
    assert failure(site, "/pdf").startswith("it is application/pdf, which is not read; pages are text/html, ")
    assert failure(site, "/what").startswith("it has no content type")
    assert [fetch(site, path).media_type for path in ("/xhtml", "/text", "/md", "/none")] == [
        "application/xhtml+xml",
        "text/plain",
        "text/markdown",
        "text/html",
    ]


def test_binary_served_as_html(site: SiteServer):
    site.pages["/png"] = Reply(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    site.pages["/bytes"] = Reply(bytes(range(256)) * 20)
    assert failure(site, "/png").startswith("it is a PNG image, not a page of text")
    assert failure(site, "/bytes").startswith("it is binary data")


@pytest.mark.parametrize(
    "content_type", ["text/html", "text/html; charset=utf-8", "text/html; charset=nonsense", 'text/html; charset="Shift_JIS"']
)
@pytest.mark.parametrize("encoding", ["shift_jis", "utf-16", "utf-8"])
def test_charsets_missing_and_wrong(site: SiteServer, encoding: str, content_type: str):
    text = "<html><title>渡し船</title><body><p>港の渡し船は一九七四年に建造され、二百四十人の乗客を運ぶことができます。</p></body></html>"
    site.pages["/"] = Reply(text.encode(encoding), content_type=content_type)
    got = fetch(site)
    assert got.text == text
    assert got.tree.title is not None
    assert got.tree.title.get_text() == "渡し船"


def test_pages_that_make_the_parser_warn(site: SiteServer):
    site.pages["/name"] = Reply("page.html", content_type="text/plain")
    site.pages["/feed.xml"] = Reply('<?xml version="1.0"?><rss><item>An item</item></rss>', content_type="text/html")
    site.pages["/empty"] = Reply("")
    assert fetch(site, "/name").text == "page.html"
    assert "An item" in fetch(site, "/feed.xml").tree.get_text()
    assert fetch(site, "/empty").body == b""
