"""What comes from the web and from files of text: any bytes are clean lines or a DataError, in bounded time."""

from __future__ import annotations

import gzip
import io
import tempfile
import time
import zlib
from pathlib import Path

import requests
from hypothesis import assume
from hypothesis import strategies as st
from urllib3 import HTTPResponse

from fuzz.running import Target
from trimtab.data import from_jsonl
from trimtab.data.body import content_type, read
from trimtab.data.clean import collapse
from trimtab.data.decode import decode
from trimtab.data.extract import extract
from trimtab.data.fetch import _retry_after
from trimtab.data.plain import markdown, text_lines
from trimtab.data.sources import check_url, expand, public_source, public_url
from trimtab.errors import DataError

_SECONDS = 10.0  # for pages of some kilobytes

_BLOCKS = "div p main article section header footer nav aside ul ol li dl dt dd table thead tbody tr td th caption h1 h2 pre form span"
_INLINE = "a b i em ruby rt br hr img svg button select dialog math font center blockquote details figure frameset noframes body html"
_TAGS = st.sampled_from(f"{_BLOCKS} {_INLINE}".split())
_ATTRIBUTES = st.sampled_from(
    [
        *("", " class=nav", " class='share cookie-banner'", " hidden", " role=main", " role=navigation", " aria-hidden=true", " id=toc"),
        *(" style='display:none'", " rowspan=3", " colspan=99999", " rowspan=0 colspan=-1", " href=/x", " title='<p>'", ' lang="a>b"'),
    ]
)
_PIECES = st.sampled_from(
    [
        *("&amp", "&#0;", "&#xD800;", "&bogus;", "<!--", "-->", "<![CDATA[", "]]>", "<?xml version='1.0'?>", "<!DOCTYPE html>", "</", "<"),
        *(">", "\0", "\u202e", "\u200b", "\ufeff", "\u00ad", "e\u0301", "\r\n", "\t", "\u2028", "| ", "¶", "港の渡し船", "Built in 1974. "),
    ]
)
_SCRIPT = "zqscriptzq"
_HIDDEN = st.sampled_from([f"<script>{_SCRIPT}</script>", f"<style>{_SCRIPT}</style>", f"<script type=x>if (a < b) '{_SCRIPT}'</script>"])
_WORDS = st.text(max_size=20) | _PIECES


@st.composite
def _soup(draw: st.DrawFn) -> str:
    pieces = draw(st.lists(st.tuples(_TAGS, _ATTRIBUTES, _WORDS, st.booleans(), st.integers(1, 30)), max_size=30))
    return "".join((f"</{tag}>" if closes else f"<{tag}{attributes}>") * times + words for tag, attributes, words, closes, times in pieces)


def _element(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    inside = st.lists(children, max_size=4).map("".join)
    return st.builds(lambda tag, attributes, text: f"<{tag}{attributes}>{text}</{tag}>", _TAGS, _ATTRIBUTES, inside)


_LETTERS = st.text("abc déf. 港\n", max_size=20)
_TREES = st.recursive(_LETTERS | _HIDDEN, _element, max_leaves=30)


def _clean(lines: tuple[str, ...]) -> None:
    for line in lines:
        assert line == collapse(line)
        assert line
        assert "\n" not in line
        line.encode()


def any_html_gives_clean_lines(html: str) -> None:
    began = time.monotonic()
    try:
        found = extract(html)
    except DataError:
        return
    _clean(found.lines)
    assert time.monotonic() - began < _SECONDS


def a_script_is_never_text(html: str) -> None:
    found = extract(html)
    assert _SCRIPT not in found.title + "".join(found.lines)


def any_bytes_are_a_page_or_an_error(given: tuple[bytes, str | None]) -> None:
    body, header = given
    try:
        text = decode(body, header_charset=header).text
    except DataError:
        return
    assert "\r" not in text
    assert "\0" not in text
    any_html_gives_clean_lines(text)


def any_text_and_markdown_gives_clean_lines(text: str) -> None:
    began = time.monotonic()
    _clean(markdown(text)[1])
    _clean(text_lines(text))
    assert time.monotonic() - began < _SECONDS


def a_body_is_whole_or_an_error(given: tuple[bytes, str]) -> None:
    """What is unpacked is never larger than the limit, and never less than what was packed without saying so."""
    packed, encoding = given
    raw = HTTPResponse(io.BytesIO(packed), preload_content=False)
    try:
        body = read(raw, {"Content-Encoding": encoding}, 5_000)
    except (DataError, requests.ConnectionError):
        return
    finally:
        raw.close()
    assert len(body) <= 5_000
    if encoding == "identity":
        assert body == packed


def headers_are_read_or_an_error(given: tuple[str, str, bool]) -> None:
    type_, pause, records = given
    seconds = _retry_after(pause)
    assert seconds is None or seconds >= 0
    try:
        media_type, charset = content_type({"Content-Type": type_}, records=records)
    except DataError:
        return
    assert media_type == media_type.lower()
    decode(b"<p>text</p>", header_charset=charset)


_PASSWORD = "zqpasswordzq"


def any_source_is_taken_or_refused(given: list[str]) -> None:
    for one in given:
        assume(not _is_folder(one))
    found = expand(given)
    for source in found.sources:
        if source.url is not None:
            assert check_url(source.url) is None
            assert source.name == public_url(source.name)
    assert len(set(found.sources)) == len(found.sources)


def no_secret_of_an_address_is_shown(url: str) -> None:
    found = expand([url, url])
    shown = [source.name for source in found.sources] + [item.source + item.reason for item in found.refused] + list(found.notes)
    assert shown
    assert _PASSWORD not in "".join(shown) + public_url(url) + public_source(url)


def _is_folder(name: str) -> bool:
    """Reading the machine's folders is not what is tried here."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def any_documents_file_is_read_or_an_error(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.jsonl"
        file.write_bytes(body)
        try:
            from_jsonl(file)
        except DataError as exc:
            said = str(exc)
        else:
            return
        assert "line " in said


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "replace")


_ENCODINGS = st.sampled_from(
    ["utf-8", "utf-16", "utf-16-le", "shift_jis", "euc_jp", "cp1252", "iso2022_jp", "gb18030", "utf-8-sig", "utf-32"]
)
_CHARSETS = (
    st.none() | st.text(max_size=12) | _ENCODINGS | st.sampled_from(["rot13", "hex", "utf-7", "idna", "x-user-defined", "unicode_escape"])
)
_BODIES = st.binary(max_size=400) | st.builds(_encoded, _soup(), _ENCODINGS)
_CODINGS = st.sampled_from(["gzip", "x-gzip", "deflate", "identity", "br", "zstd", "gzip, gzip", "", "GZIP"])
_PACKED = st.binary(max_size=200) | st.builds(
    lambda body, pack, cut, times: (pack(body * times))[:cut],
    st.binary(max_size=300),
    st.sampled_from([gzip.compress, zlib.compress, lambda body: gzip.compress(body) * 2]),
    st.none() | st.integers(0, 300),
    st.integers(1, 200),
)
_ADDRESS_PARTS = st.sampled_from(
    [
        *("http://", "https://", "HTTP:", "//", "/", "@", ":", "me:word@", "?token=x", "&a=b", "#", "[", "]", "::1", "a.test", "%00", "%"),
        *("\\", " ", "..", "?", "=", "&", "hf:", "s3://", "file:///", ".jsonl", "x.html", "localhost", "é", "\0", "\n", "99999"),
    ]
)
_ADDRESSES = st.lists(_ADDRESS_PARTS | st.text(max_size=6), max_size=10).map("".join)
_WITH_SECRETS = st.builds(
    "{}{}{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTPS://"]),
    st.sampled_from(["", f"me:{_PASSWORD}@", f"{_PASSWORD}@", f"me:{_PASSWORD}@x@"]),
    st.sampled_from(["a.test", "a.test:99999", "[::1", "[::1]", "", "a b", "é.test", "a%00b"]),
    st.sampled_from(["", "/", "/x.jsonl", "/%zz", "/é"]),
    st.sampled_from(["", f"?token={_PASSWORD}", f"?a=b&api_key={_PASSWORD}&c", f"?X-Amz-Signature={_PASSWORD}"]),
    st.sampled_from(["", f"#{_PASSWORD}"]),
)
_MARKS = st.sampled_from(
    [*"*_`[]()#|<>!-=~\\", "**", "```", "---", "| a | b |", "\n", "\n\n", "http://x", "<!--", "-->", "1. ", "    ", "word"]
)

TARGETS = [
    Target("html", st.text(max_size=300) | _soup(), any_html_gives_clean_lines),
    Target("script", _TREES, a_script_is_never_text),
    Target("bytes", st.tuples(_BODIES, _CHARSETS), any_bytes_are_a_page_or_an_error),
    Target(
        "markdown",
        st.text(max_size=300) | st.lists(_MARKS | st.text(max_size=5), max_size=60).map("".join),
        any_text_and_markdown_gives_clean_lines,
    ),
    Target("compression", st.tuples(_PACKED, _CODINGS), a_body_is_whole_or_an_error),
    Target("headers", st.tuples(st.text(max_size=60), st.text(max_size=30), st.booleans()), headers_are_read_or_an_error),
    Target("sources", st.lists(_ADDRESSES | st.text(max_size=300), max_size=4), any_source_is_taken_or_refused),
    Target("secrets", _WITH_SECRETS, no_secret_of_an_address_is_shown),
    Target("documents", st.binary(max_size=300), any_documents_file_is_read_or_an_error),
]
