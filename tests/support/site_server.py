"""A real web site on the loopback, for tests: pages from a folder or given as replies, well-behaved or not.

with SiteServer({"/": Reply("<p>Hello</p>"), "/old": redirect("/")}) as site:
    requests.get(site.url("/"))
"""

from __future__ import annotations

import http.server
import mimetypes
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

CERTIFICATE = Path(__file__).with_name("site_test.pem")  # for the name site.test


@dataclass(frozen=True)
class Reply:
    """What the server answers. `body` goes out as it is; Content-Length is its length unless `headers` say otherwise."""

    body: bytes | str = b""
    status: int = 200
    content_type: str | None = "text/html; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0  # before the status line
    byte_s: float = 0.0  # between two bytes of the body
    header_byte_s: float = 0.0  # between two bytes of the status line and headers
    with_length: bool = True


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]  # names in lower case


Page = Reply | Callable[[int], Reply]
"""A reply, or a function from how often the path was asked for (1, 2, ...) to the reply."""


def redirect(to: str, status: int = 302) -> Reply:
    return Reply("", status, headers={"Location": to})


def page(title: str, *paragraphs: str) -> Reply:
    """A page with a title, the same as headline, and paragraphs, between the usual navigation and footer."""
    text = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return Reply(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        '<header><nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav></header>'
        f"<main><h1>{title}</h1>{text}</main><footer><p>All rights reserved.</p></footer></body></html>"
    )


class SiteServer:
    """Serves until the `with` block ends. What is not in `pages` comes from `folder`, else it is a 404."""

    def __init__(
        self, pages: Mapping[str, Page] | None = None, *, folder: Path | None = None, tls: bool = False, host: str = "127.0.0.1"
    ) -> None:
        self.pages = dict(pages or {})
        self.folder = folder
        self.requests: list[Request] = []
        self.peak = 0  # most requests served at the same time
        self._now = 0
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server((host, 0), _handler_of(self))
        self._scheme = "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}{path}"

    def __enter__(self) -> SiteServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the server."""
        if seconds:
            self._stopped.wait(seconds)

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._asked[request.path] += 1
            count = self._asked[request.path]
        found = self.pages.get(request.path)
        if found is not None:
            return found(count) if callable(found) else found
        return self._from_folder(urlsplit(request.path).path)

    def _from_folder(self, path: str) -> Reply:
        if self.folder is not None:
            file = (self.folder / unquote(path).lstrip("/")).resolve()
            if file.is_dir():
                file /= "index.html"
            if file.is_relative_to(self.folder.resolve()) and file.is_file():
                return Reply(file.read_bytes(), content_type=mimetypes.guess_type(file.name)[0] or "application/octet-stream")
        return Reply("<h1>Not found</h1>", 404)

    def began(self) -> None:
        with self._lock:
            self._now += 1
            self.peak = max(self.peak, self._now)

    def ended(self) -> None:
        with self._lock:
            self._now -= 1


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 64

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """A client that hangs up is part of the tests."""


def _handler_of(site: SiteServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            site.began()
            try:
                self._send(site.answer(Request(self.path, {name.lower(): value for name, value in self.headers.items()})))
            finally:
                site.ended()

        def _send(self, reply: Reply) -> None:
            body = reply.body.encode() if isinstance(reply.body, str) else reply.body
            site.pause(reply.wait_s)
            headers = {"Content-Length": str(len(body))} if reply.with_length else {}
            if reply.content_type is not None:
                headers["Content-Type"] = reply.content_type
            lines = [f"HTTP/1.0 {reply.status} {http.server.BaseHTTPRequestHandler.responses.get(reply.status, ('',))[0]}"]
            lines += [f"{name}: {value}" for name, value in {**headers, **reply.headers}.items()]
            self._drip("\r\n".join([*lines, "", ""]).encode("latin-1"), reply.header_byte_s)
            self._drip(body, reply.byte_s)

        def _drip(self, data: bytes, seconds: float) -> None:
            if not seconds:
                self.wfile.write(data)
                return
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                site.pause(seconds)
                if site._stopped.is_set():
                    return

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler
