"""What a response brings: its type, and its bytes within the limits."""

from __future__ import annotations

import zlib
from email.message import Message
from typing import Any, ClassVar

import requests

from trimtab.data.parts import RECORD_TYPES
from trimtab.errors import DataError

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain", "text/markdown")
_PAGE_TYPES = (*HTML_TYPES, *TEXT_TYPES)
_CHUNK = 16_384  # compressed bytes at a time


def content_type(headers: Any, *, records: bool = False) -> tuple[str, str | None]:
    """Media type ("" if there is none) and charset of a response. With `records` every type is taken but a web page's, because the
    address says what it holds. Raises DataError for a type that is not read.
    """
    message = Message()
    message["Content-Type"] = headers.get("Content-Type", "")
    media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if records and media_type in HTML_TYPES:
        raise DataError("it is a web page and not the file that its address names; look at it in a browser, and pass the file's address")
    if media_type and not records and media_type not in (*HTML_TYPES, *TEXT_TYPES, *RECORD_TYPES):
        raise DataError(f"it is {media_type}, which is not read; pages are {', '.join(_PAGE_TYPES)}: save its text as .txt or .md")
    charset = message.get_param("charset")
    return media_type, charset if isinstance(charset, str) else None


def sniffed(body: bytes) -> str:
    if body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return "text/html"
    raise DataError("it has no content type and does not look like HTML; save it as a file and pass that")


def read(raw: Any, headers: Any, max_bytes: int) -> bytes:
    """The body, decompressed here so that neither a small file that unpacks to a large one nor a cut one passes."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower() or "identity"
    if encoding not in _Inflate.WINDOW and encoding != "identity":
        raise DataError(f"it is compressed with {encoding}, which was not asked for; save it as a file and pass that")
    inflate = _Inflate(encoding) if encoding != "identity" else None
    body = bytearray()
    while chunk := _next(raw):
        body += inflate.feed(chunk, max_bytes + 1 - len(body)) if inflate else chunk
        if len(body) > max_bytes:
            raise DataError(f"it is larger than {max_bytes:,} bytes; raise max_page_mb (--max-page-mb) if it is worth it")
    if inflate and not inflate.complete:
        raise requests.ConnectionError("the compressed body ends early")
    return bytes(body)


def _next(raw: Any) -> bytes:
    try:
        chunk: bytes = raw.read(_CHUNK, decode_content=False)
    except ValueError as exc:  # a chunk of a negative size
        raise requests.ConnectionError("the body's chunks are damaged") from exc
    return chunk


class _Inflate:
    """gzip (of several members too) and deflate, a bounded number of bytes at a time."""

    WINDOW: ClassVar[dict[str, int]] = {"gzip": 31, "x-gzip": 31, "deflate": 15}

    def __init__(self, encoding: str) -> None:
        self._window = self.WINDOW[encoding]
        self._inflater = zlib.decompressobj(self._window)
        self._started = False

    @property
    def complete(self) -> bool:
        return self._inflater.eof or not self._started

    def feed(self, data: bytes, at_most: int) -> bytes:
        out = b""
        try:
            while data and len(out) < at_most:
                if self._inflater.eof:
                    if self._window != 31 or data[:1] != b"\x1f":
                        break  # padding after the end
                    self._inflater = zlib.decompressobj(self._window)
                out += self._inflate(data, at_most - len(out))
                data = self._inflater.unused_data if self._inflater.eof else b""
        except zlib.error as exc:
            raise requests.ConnectionError("the compressed body is damaged") from exc
        return out

    def _inflate(self, data: bytes, at_most: int) -> bytes:
        first, self._started = not self._started, True
        try:
            return self._inflater.decompress(data, at_most)
        except zlib.error:
            if not first or self._window != 15:
                raise
            self._inflater = zlib.decompressobj(-15)  # "deflate" without the zlib wrapper, as some servers send it
            return self._inflater.decompress(data, at_most)
