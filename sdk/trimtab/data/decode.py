"""Bytes to text: which encoding, and whether it is text at all. Pure."""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass

from trimtab.errors import DataError

# Labels that pages use for a superset of what the label says (WHATWG Encoding Standard, "Names and labels"), or that Python lacks.
_MEANT = {
    "ascii": "cp1252",
    "us-ascii": "cp1252",
    "iso-8859-1": "cp1252",
    "iso8859-1": "cp1252",
    "latin1": "cp1252",
    "latin-1": "cp1252",
    "iso-8859-9": "cp1254",
    "shift_jis": "cp932",
    "shift-jis": "cp932",
    "sjis": "cp932",
    "x-sjis": "cp932",
    "windows-31j": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "x-gbk": "gb18030",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "big5": "big5hkscs",
    "x-user-defined": "cp1252",
    "utf8": "utf-8",
    "unicode": "utf-16",
}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What undeclared pages are really in; among all of Python's encodings, rare ones win on short texts.
_DETECTABLE = [
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256"),
    *("cp1257", "koi8_r", "iso8859_2", "iso8859_7"),
]
_META = re.compile(
    rb"""<meta[^>]{0,400}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})|<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{2,40})""",
    re.I,
)
_NOT_OF_PAGES = frozenset({"idna", "punycode", "unicode-escape", "unicode_escape", "raw-unicode-escape", "raw_unicode_escape"})
# First bytes of what is sometimes served, or saved, as a page.
_BINARY = {
    b"%PDF-": "a PDF file",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a zip archive or an office document",
    b"\x1f\x8b": "a gzip file",
    b"\x7fELF": "a program",
    b"MZ\x90": "a program",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"{\\rtf": "an RTF document",
    b"RIFF": "a media file",
    b"OggS": "a media file",
    b"ID3": "a media file",
}
_NOT_TEXT = frozenset({"Cc", "Cn", "Co", "Cs"})  # Unicode categories: control, unassigned, private use, surrogate
_FOREIGN = re.compile(rb"[\x80-\xff]+")
_PAIRS_AT_LEAST = 8
_ASCII = bytes(range(128))
_REPLACED_AT_MOST = 0.1  # of the bytes outside ASCII: a stray byte in a page is common, a wrong encoding breaks most of them
_NOT_TEXT_AT_MOST = 0.05  # of the first characters


@dataclass(frozen=True)
class Decoded:
    text: str
    encoding: str


def decode(body: bytes, *, header_charset: str | None = None, markup: bool = True) -> Decoded:
    """`body` as text with "\\n" line ends and without NULs. Never fails on a wrong or unknown encoding name.

    Raises DataError for binary content.

    The first that fits: byte order mark, `header_charset` (of Content-Type), the page's own declaration when `markup`, UTF-8,
    detection, Windows-1252. UTF-8 goes before a declared one-byte encoding, in which any bytes are "valid".
    """
    if kind := next((kind for magic, kind in _BINARY.items() if body.startswith(magic)), None):
        raise DataError(f"it is {kind}, not a page of text; export it as .html, .txt or .md")
    decoded = _decode(body, header_charset, markup)
    head = decoded.text[:4096]
    if sum(
        char == "\ufffd" or (unicodedata.category(char) in _NOT_TEXT and char not in "\t\n\f\r\x1b\x85") for char in head
    ) > _NOT_TEXT_AT_MOST * len(head):
        raise DataError("it is binary data, not a page of text; check the address, or export it as .html, .txt or .md")
    return Decoded(decoded.text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n"), decoded.encoding)


def _decode(body: bytes, header_charset: str | None, markup: bool) -> Decoded:
    for bom, encoding in _BOMS:
        if body.startswith(bom):
            return Decoded(body.decode(encoding, errors="replace"), encoding)
    candidates = [name for name in (_known(header_charset), _declared(body) if markup else None) if name]
    if b"\0" not in body:  # two-byte encodings "read" anything of even length; in real text a blank or a tag has a zero byte
        candidates = [name for name in candidates if not name.startswith(("utf-16", "utf-32"))]
    if _in_pairs(body):  # in no text of one-byte letters do they always come in twos: a server's default again
        candidates = [name for name in candidates if not _one_byte(name)]
    candidates.sort(key=_one_byte)  # a server's default of Latin-1 is wrong more often than a page that says Shift JIS
    if b"\x1b$" in body and body.isascii():
        candidates.insert(0, "iso2022_jp")
    elif body.isascii() and b"\0" not in body and not any(name.startswith(("iso2022", "hz", "utf-7")) for name in candidates):
        return Decoded(body.decode("ascii"), "ascii")
    elif all(_one_byte(name) for name in candidates):
        candidates.insert(0, "utf-8")
    candidates += [name for name in ("utf-8", _wide(body)) if name and name not in candidates]
    best: tuple[float, Decoded] | None = None
    for name in candidates:
        share, decoded = _replaced(body, name)
        if share == 0:
            return decoded
        if best is None or share < best[0]:
            best = share, decoded
    if best and best[0] <= _REPLACED_AT_MOST and not _one_byte(best[1].encoding):  # one without the byte is the wrong one
        return best[1]
    if detected := _detected(body):
        return _replaced(body, detected)[1]
    return Decoded(body.decode("cp1252", errors="replace"), "cp1252")


def _known(label: str | None) -> str | None:
    """Python's name of an encoding, or None for one that it does not have (or that is no text encoding)."""
    if not label:
        return None
    label = label.strip().strip("\"'").lower()
    try:
        name = codecs.lookup(_MEANT.get(label, label)).name
        b" ".decode(name, errors="replace")  # codecs that are no text encoding are refused here
    except (LookupError, ValueError):
        return None
    return None if name in _NOT_OF_PAGES else name


def _declared(body: bytes) -> str | None:
    match = _META.search(body[:4096])
    name = _known((match[1] or match[2]).decode("ascii")) if match else None
    # A declaration that can be read as ASCII is not in UTF-16; the standard says to take it as UTF-8.
    return "utf-8" if name and name.startswith(("utf-16", "utf-32")) else name


def _one_byte(name: str) -> bool:
    return name.startswith(("cp125", "iso8859", "koi8", "mac", "cp437", "cp85", "cp866"))


def _in_pairs(body: bytes) -> bool:
    """Whether the bytes outside ASCII come in twos throughout, as in EUC-JP, EUC-KR and GB 2312."""
    runs = _FOREIGN.findall(body[:50_000])
    return len(b"".join(runs)) >= _PAIRS_AT_LEAST * 2 and all(len(run) % 2 == 0 for run in runs[:-1])


def _wide(body: bytes) -> str | None:
    """UTF-16 without a byte order mark: about every second byte of Western text or markup is zero."""
    head = body[:4096]
    if len(head) < 8:
        return None
    even, odd = head[0::2].count(0) / len(head[0::2]), head[1::2].count(0) / len(head[1::2])
    if odd > 0.3 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 and odd < 0.05 else None


def _replaced(body: bytes, name: str) -> tuple[float, Decoded]:
    """The share of bytes outside ASCII that `name` cannot read, and the text."""
    try:
        return 0.0, Decoded(body.decode(name), name)
    except UnicodeDecodeError:
        text = body.decode(name, errors="replace")
    foreign = len(body.translate(None, delete=_ASCII)) or len(body)
    return max(text.count("\ufffd"), 1) / foreign, Decoded(text, name)


def _detected(body: bytes) -> str | None:
    from charset_normalizer import from_bytes

    # Markup is ASCII and would drown the sign of the language; a sample is enough and bounds the time.
    sample = re.sub(rb"<[^<>]{0,2000}>", b" ", body[:200_000])[:50_000]
    matches = from_bytes(sample, cp_isolation=_DETECTABLE)
    best = matches.best()
    if best is None:
        return None
    for match in matches:  # the commonest of the one-byte encodings wins a draw
        if match.encoding == "cp1252" and match.chaos <= best.chaos and match.coherence >= best.coherence - 0.05:
            return "cp1252"
    return _known(best.encoding)
