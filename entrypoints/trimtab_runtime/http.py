"""HTTP/1.1 on asyncio: requests come whole, answers go out whole or in pieces, and nobody can hold what is not theirs.

h11 reads and checks what clients send (RFC 9112); a piece of an answer is framed by hand, since with many clients that is what a server
does all day. A client has `Limits` for what it sends and how slowly, and for how long it may leave an answer unread. A request's answer
is a task: it is cancelled as soon as the client has gone, or has closed its side of the connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
import struct
import termios
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

import h11

JSON = "application/json"


@dataclass(frozen=True)
class Limits:
    """Bytes and seconds. A body that is too big is read on and thrown away up to `discarded`: who still sends would see no answer."""

    head_bytes: int = 32 << 10
    body_bytes: int = 6 << 20  # what SageMaker's runtime passes on at most
    discarded_bytes: int = 64 << 20
    ahead_bytes: int = 64 << 10  # sent behind a request that is being answered
    request_seconds: float = 60.0  # from a request's first byte to its last
    idle_seconds: float = 75.0  # between requests
    unread_seconds: float = 20.0  # an answer of which the client takes nothing
    linger_seconds: float = 2.0  # to read why, while it still sends
    in_a_row: int = 16  # requests of one client that are refused before the others have their turn
    connections: int = 512


@dataclass(frozen=True)
class Incoming:
    """A whole request. Names of headers are in lower case; the path is without its query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)


class Refusal(Exception):
    """A request that is not answered as asked. `retry_after` seconds it may be worth trying again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        self.status, self.message, self.retry_after = status, message, retry_after
        super().__init__(message)

    @property
    def content(self) -> dict[str, object]:
        """In the form of OpenAI's interface."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.status}}


class Server:
    """Accepts connections. `answer` answers a request, each in a task of its own.

    `admit` sees it before its body: it raises Refusal, or returns how many bytes the body may have, None for what `limits` say.
    """

    def __init__(
        self,
        admit: Callable[[Incoming], int | None],
        answer: Callable[[Incoming, Connection], Awaitable[None]],
        say: Callable[[str], None],
        limits: Limits | None = None,
    ) -> None:
        self.admit, self.answer, self.say, self.limits = admit, answer, say, limits or Limits()
        self.connections: set[Connection] = set()
        self.closing = False  # answers that end now end their connections
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self, listener: socket.socket) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=listener, backlog=256)
        self._sweeping = asyncio.ensure_future(self._sweep())

    async def close(self) -> None:
        """Listen no more, and break off whatever is not answered."""
        if self._server is not None:
            self._server.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for connection in list(self.connections):
            connection.drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def answering(self) -> int:
        """Requests whose answers are not yet with their clients."""
        return sum(connection.task is not None or connection.unsent > 0 for connection in self.connections)

    def make_room(self) -> bool:
        """One more connection: where there are too many, the one goes that has brought no whole request for longest."""
        if len(self.connections) < self.limits.connections:
            return True
        free = [connection for connection in self.connections if connection.task is None]
        if free:
            min(free, key=lambda connection: connection.since).drop()
        return bool(free)

    async def _sweep(self) -> None:
        pause = min(1.0, self.limits.request_seconds / 4, self.limits.unread_seconds / 4)
        while True:
            await asyncio.sleep(pause)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.look(now)


class Connection(asyncio.Protocol):
    """One client: its requests one after the other, and the answer to the one at hand."""

    def __init__(self, server: Server) -> None:
        self._server, self._limits = server, server.limits
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.head_bytes)
        self.task: asyncio.Task[None] | None = None
        self.since = time.monotonic()  # of the state that it is in
        self.blocked = False  # the client takes nothing: what can wait should
        self._written = self._taken = 0  # bytes of answers, and how many of them the client's side has acknowledged
        self._taken_at = self.since
        self._lingering = False  # all is said; what the client still sends is thrown away, so that it can read why
        self._reading = False  # in the middle of a request
        self._ahead = 0
        self._refused = 0  # requests in a row
        self._refusal: Refusal | None = None
        self._begun = self._chunked = False

    # what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._server.make_room():
            self._server.connections.add(self)
        else:
            transport.write(b"HTTP/1.1 503 Too many connections\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing() or self._lingering:
            return
        if self.task is not None:
            self._ahead += len(data)
            if self._ahead > self._limits.ahead_bytes:
                self.drop()
                return
        elif not self._reading:
            self._reading, self.since = True, time.monotonic()
        try:
            self._h11.receive_data(data)
        except h11.RemoteProtocolError as exc:
            self._refuse(_nonsense(exc))
        self._go_on()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        self._go_on()

    # a request

    def _go_on(self) -> None:
        """Read on, as far as what has come goes. Who takes no answers, or has been refused often, sends no more meanwhile."""
        if self.task is not None or self._transport.is_closing():
            return
        self._refused = 0
        try:
            self._advance()
        except h11.RemoteProtocolError as exc:
            self._refuse(_nonsense(exc))
        if self.task is None and self.blocked and not self._lingering:
            self._transport.pause_reading()
        elif self._refused >= self._limits.in_a_row:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)
        else:
            self._transport.resume_reading()

    def _advance(self) -> None:
        most = self._limits.in_a_row
        while self.task is None and not (self._transport.is_closing() or self._lingering or self.blocked) and self._refused < most:
            event = self._h11.next_event()
            if isinstance(event, h11.Request):
                self._begin(event)
            elif isinstance(event, h11.Data):
                self._size += len(event.data)
                if self._refusal is None:
                    self._body += event.data
                    if self._size > self._most:
                        self._refusal = self._too_big()
                elif self._size > self._discarded:
                    return self._refuse(self._refusal)
            elif isinstance(event, h11.EndOfMessage):
                self._reading, self._ahead = False, len(self._h11.trailing_data[0])
                if self._refusal is not None:
                    self._refuse(self._refusal)
                    continue
                incoming = Incoming(self._head.method, self._head.path, self._head.headers, bytes(self._body))
                self._body.clear()
                self.task = asyncio.ensure_future(self._server.answer(incoming, self))
                self.task.add_done_callback(self._done)
            else:
                if isinstance(event, h11.ConnectionClosed):
                    self._transport.close()
                elif self._h11.they_are_waiting_for_100_continue:
                    if self._refusal is not None:
                        return self._refuse(self._refusal)
                    self._put(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                return None
        return None

    def _begin(self, event: h11.Request) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        path = event.target.decode("latin-1").partition("?")[0]
        self._head = Incoming(event.method.decode("latin-1"), path, headers, b"")
        self._body, self._size, self._refusal = bytearray(), 0, None
        self._most = self._discarded = self._limits.body_bytes
        try:
            if event.http_version not in (b"1.0", b"1.1"):
                raise Refusal(505, "this server speaks HTTP/1.1")
            limit = self._server.admit(self._head)
            if limit is None:
                self._discarded = self._limits.discarded_bytes
            else:
                self._most = min(self._most, limit)
            if int(headers.get("content-length", 0)) > self._most:
                raise self._too_big()
        except Refusal as refusal:
            self._refusal = refusal

    def _too_big(self) -> Refusal:
        self._body.clear()
        if self._most < self._limits.body_bytes:
            return Refusal(413, f"this request takes no body, and this one has over {self._most} bytes: leave it out")
        return Refusal(413, f"the body is over {self._most >> 20} MB: send less text")

    def _refuse(self, refusal: Refusal) -> None:
        """Answer instead of the application. Where the request did not end, the connection does."""
        self._reading = False
        self._refused += 1
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.refuse(refusal)
            self._next()
        else:
            self.drop()

    def _done(self, task: asyncio.Task[None]) -> None:
        """The application has answered, or failed to."""
        self.task = None
        if self._transport.is_closing():
            return
        if not task.cancelled() and (problem := task.exception()) is not None:
            # nothing of what was asked: an exception's own words may quote it
            where = "".join(traceback.format_tb(problem.__traceback__))
            self._server.say(f"{where}{type(problem).__name__} while a request was answered")
            if self._h11.our_state is h11.SEND_RESPONSE:
                self.refuse(Refusal(500, "the server has a fault: see its log"))
        if self._h11.our_state not in (h11.DONE, h11.MUST_CLOSE):
            self.drop()
            return
        self._next()
        self._go_on()

    def _next(self) -> None:
        """The answer is written: be ready for the next request, or close."""
        self.since = time.monotonic()
        self._begun = False
        if self._h11.their_state in (h11.IDLE, h11.SEND_BODY, h11.ERROR) and self._transport.can_write_eof():
            self._lingering = True
            self._transport.write_eof()
            return
        if self._server.closing or self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            self._transport.close()
            return
        self._h11.start_next_cycle()
        self._reading = bool(self._h11.trailing_data[0])

    # an answer

    def send(self, status: int, body: bytes, content_type: str = JSON, retry_after: int | None = None) -> None:
        """A whole answer."""
        head = self._start(status, content_type, retry_after, len(body))
        data = body if self._method != b"HEAD" else b""
        end = (self._h11.send(h11.Data(data=data)) or b"") + (self._h11.send(h11.EndOfMessage()) or b"")
        self._put(head + end)

    def refuse(self, refusal: Refusal) -> None:
        self.send(refusal.status, json.dumps(refusal.content).encode(), retry_after=refusal.retry_after)

    def write(self, piece: bytes) -> None:
        """A piece of an answer of server-sent events. The first brings the head with it."""
        if not self._begun:
            self._begun = True
            head = self._start(200, "text/event-stream", None, None)
            self._chunked = b"chunked" in head.lower()
            self._put(head + self._framed(piece))
        else:
            self._put(self._framed(piece))

    def finish(self, piece: bytes) -> None:
        """The last piece."""
        self.write(piece)
        self._put(self._h11.send(h11.EndOfMessage()) or b"")

    def _put(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def drop(self) -> None:
        """Break off, whatever is still to be sent."""
        self._transport.abort()

    @property
    def begun(self) -> bool:
        """Whether a piece has been written: from then on the status cannot be changed."""
        return self._begun

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken."""
        return self._transport.get_write_buffer_size()

    def look(self, now: float) -> None:
        """Drop a client that takes too long."""
        taken = self._written - self.unsent - self._queued()
        if taken > self._taken or not self.unsent:
            self._taken, self._taken_at = taken, now
        waited, limits = now - self.since, self._limits
        if now - self._taken_at > limits.unread_seconds:
            self.drop()
        elif self.task is not None:
            return
        elif self._lingering:
            if waited > limits.linger_seconds:
                self.drop()
        elif not self._reading:
            if waited > limits.idle_seconds and not self.unsent:
                self._transport.close()
        elif waited > limits.request_seconds:
            self._refuse(Refusal(408, f"the request was not whole within {limits.request_seconds:g} s: send it faster"))

    def _queued(self) -> int:
        """Bytes that the kernel has and the client's does not (SIOCOUTQ of tcp(7))."""
        connection = self._transport.get_extra_info("socket")
        try:
            return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
        except (OSError, ValueError):  # it is closed
            return 0

    @property
    def _method(self) -> bytes:
        return self._head.method.encode() if hasattr(self, "_head") else b""

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece

    def _start(self, status: int, content_type: str, retry_after: int | None, length: int | None) -> bytes:
        headers = [("Date", formatdate(usegmt=True)), ("Content-Type", content_type)]
        if length is not None:
            headers.append(("Content-Length", str(length)))
        else:
            headers.append(("Cache-Control", "no-cache"))
        if retry_after is not None:
            headers.append(("Retry-After", str(retry_after)))
        if status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        if self._server.closing or status in (408, 505):
            headers.append(("Connection", "close"))
        return self._h11.send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())) or b""


def _nonsense(exc: h11.RemoteProtocolError) -> Refusal:
    return Refusal(exc.error_status_hint, f"this is no HTTP request: {exc}")
