"""A proxy in front of a real service that goes wrong on request: it refuses, hangs, and cuts connections as networks and AWS do.

    with FaultyProxy("http://127.0.0.1:4566") as proxy:
        proxy.fault(slow_down(), on="UploadPart", times=3)
        ...  # a client at proxy.url
        assert proxy.count("UploadPart") > 3

What no fault is for goes through unchanged, both ways, as it comes. Every request is noted in `proxy.seen`.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from support.faults import Fault

_BLOCK = 1 << 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade", "proxy-connection"}

# operations of S3 by method and by a parameter of the query that tells them apart; the first that fits counts
_S3 = [
    ("PUT", "partNumber", "UploadPart"),
    ("PUT", "publicAccessBlock", "PutPublicAccessBlock"),
    ("PUT", "lifecycle", "PutBucketLifecycleConfiguration"),
    ("POST", "uploads", "CreateMultipartUpload"),
    ("POST", "uploadId", "CompleteMultipartUpload"),
    ("POST", "delete", "DeleteObjects"),
    ("DELETE", "uploadId", "AbortMultipartUpload"),
    ("GET", "uploadId", "ListParts"),
    ("GET", "uploads", "ListMultipartUploads"),
    ("GET", "list-type", "ListObjectsV2"),
]


@dataclass
class Seen:
    """A request as it came: `received` bytes of its body were read, `status` was answered (0: nothing was)."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    received: int = 0
    status: int = 0

    @property
    def operation(self) -> str:
        """The name of the operation: of a JSON service as it says, of S3 (path style) by method and query; else the method."""
        if target := self.headers.get("x-amz-target"):
            return target.rpartition(".")[2]
        for method, parameter, name in _S3:
            if self.method == method and parameter in self.query:
                return name
        level = "Object" if "/" in self.path.strip("/") else "Bucket"
        return {"GET": "Get", "PUT": "Put", "HEAD": "Head", "DELETE": "Delete"}.get(self.method, self.method) + level


@dataclass
class _Rule:
    fault: Fault
    fits: Callable[[Seen], bool]
    times: float
    after: int


class FaultyProxy:
    """An HTTP proxy on a free port of the loopback interface. A context manager."""

    def __init__(self, upstream: str) -> None:
        self.seen: list[Seen] = []
        self.ending = threading.Event()
        self._upstream = urlsplit(upstream).netloc
        self._rules: list[_Rule] = []
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fault(self, fault: Fault, *, on: str | Callable[[Seen], bool], times: float = 1, after: int = 0) -> None:
        """Let the next `times` requests for the operation `on` (or for which it is true) go wrong; the first `after` of them do not."""
        fits = (lambda seen: seen.operation == on) if isinstance(on, str) else on
        with self._changed:
            self._rules.append(_Rule(fault, fits, times, after))

    def heal(self) -> None:
        """From now on nothing goes wrong, and `seen` is empty."""
        with self._changed:
            self._rules.clear()
            self.seen.clear()

    def count(self, operation: str) -> int:
        with self._changed:
            return sum(seen.operation == operation for seen in self.seen)

    def received(self, *operations: str) -> int:
        """Bytes of the bodies of requests for these operations that were answered with success."""
        with self._changed:
            return sum(seen.received for seen in self.seen if seen.operation in operations and 200 <= seen.status < 300)

    def wait(self, until: Callable[[], bool], seconds: float = 30.0) -> bool:
        """Wait until something is true, looked at after each request that ended; False when it does not become so."""
        deadline = time.monotonic() + seconds
        while not until():
            with self._changed:
                self._changed.wait(0.05)
            if time.monotonic() > deadline:
                return False
        return True

    def note(self, seen: Seen) -> Fault | None:
        """Note a request; the fault that is for it, if any."""
        with self._changed:
            self.seen.append(seen)
            for rule in self._rules:
                if rule.times > 0 and rule.fits(seen):
                    if rule.after > 0:
                        rule.after -= 1
                        continue
                    rule.times -= 1
                    return rule.fault
        return None

    def ended(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def upstream(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._upstream, timeout=120)

    @contextlib.contextmanager
    def held(self, connection: socket.socket) -> Iterator[None]:
        """A client's connection, which ends with the proxy at the latest."""
        with self._changed:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._changed:
                self._open.discard(connection)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the connections' threads


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultyProxy

    def handle(self) -> None:
        with self.owner.held(self.connection), contextlib.closing(self.owner.upstream()) as self.service:
            super().handle()

    def answer(self) -> None:
        split = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, split.path, parse_qs(split.query, keep_blank_values=True), headers)
        fault = self.owner.note(seen) or Fault()
        try:
            if fault.gate is not None:
                fault.gate.wait(60)
            if fault.wait and self.owner.ending.wait(fault.wait):
                self._cut()
                return
            if fault.cut_request is not None:
                self._read(seen, fault.cut_request)
                self._cut()
            elif fault.status:
                self._read(seen)
                self._send(fault.status, fault.headers, fault.body)
                seen.status = fault.status
            else:
                self._pass_on(seen, fault.cut_answer)
        finally:
            self.owner.ended()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def handle_expect_100(self) -> bool:
        """The invitation to send the body is given when it is read."""
        return True

    def _read(self, seen: Seen, most: int | None = None) -> bytes:
        length = int(seen.headers.get("content-length", 0))
        if seen.headers.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = bytearray()
        while len(body) < min(length, length if most is None else most):
            block = self.rfile.read1(min(_BLOCK, length - len(body)))
            if not block:
                raise ConnectionResetError("the client went away")
            body += block
            seen.received = len(body)
        return bytes(body)

    def _pass_on(self, seen: Seen, cut_after: int | None) -> None:
        body = self._read(seen)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        with self._ask(headers, body) as answer:
            if cut_after == -1:
                answer.read()
                seen.status = answer.status
                self._cut()
                return
            self._begin(answer)
            left, chunked = cut_after, answer.getheader("Content-Length") is None and self._has_body(answer.status)
            while block := answer.read1(_BLOCK):
                block = block if left is None else block[:left]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked and block else block)
                if left is not None and (left := left - len(block)) == 0:
                    self._cut()
                    return
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
            seen.status = answer.status
            if answer.will_close:
                self.service.close()

    def _ask(self, headers: dict[str, str], body: bytes) -> http.client.HTTPResponse:
        """The service's answer, which may come before it has read the body.

        A service closes a connection that idles, and a request may cross that: what ends on a used connection without one byte of an answer
        is sent once more. Nothing else is, because the service may have done what it was asked.
        """
        used = self.service.sock is not None
        try:
            left = self._send_on(headers, body)
            begun = self.service.sock.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            if not used:
                raise
            begun = b""
        if used and not begun:
            self.service.close()
            left = self._send_on(headers, body)
        answer = self.service.getresponse()
        if left:
            answer.will_close = True  # the rest of the body is in the way of another request
        return answer

    def _send_on(self, headers: dict[str, str], body: bytes) -> memoryview:
        """What is left of the body when the service has begun to answer, or nothing."""
        self.service.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            self.service.putheader(name, value)
        self.service.endheaders()
        left, line = memoryview(body), self.service.sock
        while left:
            answered, ready, _ = select.select([line], [line], [], 60)
            if answered:
                break
            if ready:
                left = left[line.send(left[:_BLOCK]) :]
        return left

    def _begin(self, answer: http.client.HTTPResponse) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None and self._has_body(answer.status):
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _has_body(self, status: int) -> bool:
        return self.command != "HEAD" and status not in (204, 304)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = self.close_connection or headers.get("Connection") == "close"

    def _cut(self) -> None:
        """End the connection as a broken line does: by a reset, not by a farewell."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass
