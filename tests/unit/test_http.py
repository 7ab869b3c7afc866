"""The server's own HTTP: what it allows a client to send, and how slowly; with limits of a fraction of a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from trimtab_runtime.http import Connection, Incoming, Limits, Refusal, Server

SHORT = Limits(
    head_bytes=2000,
    body_bytes=5000,
    discarded_bytes=20_000,
    request_seconds=0.4,
    idle_seconds=0.6,
    unread_seconds=0.5,
    linger_seconds=0.5,
    connections=8,
)
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
PIECE = b"data: " + b"x" * 50_000 + b"\n\n"


class Served:
    """A server of this process, and what happened in it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.cancelled = 0
        self.server = Server(self.admit, self.answer, self.log.append, SHORT)

    def admit(self, head: Incoming) -> int | None:
        if head.path == "/secret":
            raise Refusal(401, "no")
        return 10 if head.path == "/ping" else None

    async def answer(self, asked: Incoming, client: Connection) -> None:
        try:
            await getattr(self, asked.path.strip("/"))(asked, client)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def ping(self, _: Incoming, client: Connection) -> None:
        client.send(200, b"{}")

    async def echo(self, asked: Incoming, client: Connection) -> None:
        client.send(200, asked.body)

    async def wait(self, _: Incoming, __: Connection) -> None:
        await asyncio.sleep(30)

    async def fault(self, asked: Incoming, _: Connection) -> None:
        raise ValueError(asked.headers["own"])

    async def silent(self, _: Incoming, __: Connection) -> None:
        """Answers nothing."""

    async def pour(self, _: Incoming, client: Connection) -> None:
        while True:
            client.write(PIECE)
            await asyncio.sleep(0)
            while client.blocked:
                await asyncio.sleep(0.01)


def serving(test: Callable[[Served, int], Awaitable[None]]) -> None:
    async def run() -> None:
        served = Served()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await served.server.start(listener)
            try:
                async with asyncio.timeout(20):
                    await test(served, listener.getsockname()[1])
            finally:
                await served.server.close()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def whole(port: int, *sent: bytes, pause: float = 0.0) -> bytes:
    """What comes back until the server closes."""
    async with connected(port) as (reader, writer):
        found = b""
        with contextlib.suppress(OSError):
            for part in sent:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        with contextlib.suppress(OSError):
            while block := await reader.read(65_536):
                found += block
        return found


def test_one_byte_after_the_other_is_too_slow() -> None:
    async def test(served: Served, port: int) -> None:
        body = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n"
        for slow in ([bytes([byte]) for byte in PING[:12]], [body, *[b"a"] * 12]):
            found = await whole(port, *slow, pause=0.05)
            assert found.startswith(b"HTTP/1.1 408 "), found
            assert b"not whole within 0.4 s" in found
        assert not served.cancelled, "nothing was begun for them"

    serving(test)


def test_who_says_nothing_is_closed_in_time_and_who_asks_again_is_not() -> None:
    async def test(served: Served, port: int) -> None:
        assert await whole(port) == b""
        async with connected(port) as (reader, writer):
            asked_until = asyncio.get_running_loop().time() + 2 * SHORT.idle_seconds
            while asyncio.get_running_loop().time() < asked_until:
                writer.write(PING)
                await reader.readuntil(b"{}")
                await asyncio.sleep(0.01)
        assert await whole(port, PING) != b"", "closed when it asks no more"

    serving(test)


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async def test(served: Served, port: int) -> None:
        async with connected(port) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /pour HTTP/1.1\r\nHost: a\r\n\r\n")
            while not served.cancelled:
                await asyncio.sleep(0.02)
            assert max((one.unsent for one in served.server.connections), default=0) == 0
        async with connected(port) as (reader, writer):
            writer.write(b"GET /pour HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(8):  # slowly is no offence
                await reader.readexactly(200_000)
                await asyncio.sleep(0.1)
            assert served.cancelled == 1

    serving(test)


def test_the_task_of_a_client_that_went_away_is_cancelled() -> None:
    async def test(served: Served, port: int) -> None:
        async with connected(port) as (_, writer):
            writer.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.sleep(0.7)
            assert served.server.answering == 1, "an answer may take longer than a request"
        while not served.cancelled:
            await asyncio.sleep(0.01)
        assert served.server.answering == 0

    serving(test)


def test_a_fault_is_told_without_the_clients_words() -> None:
    async def test(served: Served, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"GET /fault HTTP/1.1\r\nHost: a\r\nOwn: tell-nobody\r\n\r\n" + PING)
            found = await reader.readuntil(b"\r\n\r\n{}")
            assert found.startswith(b"HTTP/1.1 500 ")
            assert b"nobody" not in found
        assert "ValueError" in served.log[0]
        assert "in fault" in served.log[0]
        assert "nobody" not in served.log[0]
        assert await whole(port, b"GET /silent HTTP/1.1\r\nHost: a\r\n\r\n") == b"", "no answer is an end, not a wait"

    serving(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_up_to_the_limit_and_over_it(chunked: bool) -> None:
    async def test(_: Served, port: int) -> None:
        for size, status in ((5000, 200), (5001, 413), (19_000, 413), (60_000, 413)):
            length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"a" * size) if chunked else b"a" * size
            found = await whole(port, b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%b\r\n\r\n" % length + data)
            assert found.startswith(b"HTTP/1.1 %d " % status) or (size == 60_000 and not found), (size, found[:80])
            assert (found.endswith(b"\r\n\r\n" + b"a" * 5000)) == (status == 200)

    serving(test)


def test_who_may_not_ask_is_told_after_its_body() -> None:
    async def test(_: Served, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST /secret HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789" + PING)
            found = await reader.readuntil(b"\r\n\r\n{}")
            assert found.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
            assert found.count(b"HTTP/1.1 200 OK\r\n") == 1

    serving(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_nobody_looks_at_is_not_kept(chunked: bool) -> None:
    async def test(served: Served, port: int) -> None:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 4000"
        async with connected(port) as (reader, writer):
            writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % length + (b"fa0\r\n" if chunked else b"") + b"a" * 3900)
            await writer.drain()
            (connection,) = served.server.connections
            while connection._refusal is None:
                await asyncio.sleep(0.01)
            assert len(connection._body) == 0
            writer.write(b"a" * 100 + (b"\r\n0\r\n\r\n" if chunked else b"") + PING)
            found = await reader.readuntil(b"\r\n\r\n{}")
            assert found.startswith(b"HTTP/1.1 413 ")
            assert b"takes no body" in found

    serving(test)


def test_thousands_of_requests_in_a_row_are_refused_one_by_one() -> None:
    async def test(served: Served, port: int) -> None:
        refused = b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n"
        async with connected(port) as (reader, writer):
            writer.write(refused * 5000 + PING.replace(b"Host", b"Connection: close\r\nHost"))
            found = await reader.read(-1)
        assert found.count(b"HTTP/1.1 401 ") == 5000
        assert found.endswith(b"\r\n\r\n{}")

    serving(test)


def test_who_takes_no_answers_is_not_read_on() -> None:
    async def test(served: Served, port: int) -> None:
        async with connected(port) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n" * 200_000)
            while not served.server.connections:
                await asyncio.sleep(0)
            most = 0
            while served.server.connections:  # until it has taken nothing for too long
                most = max([most, *(one.unsent for one in served.server.connections)])
                await asyncio.sleep(0)
            assert 0 < most < 200_000, "a few answers beyond what the transport holds"

    serving(test)


def test_the_oldest_that_asks_nothing_makes_room_for_a_new_one() -> None:
    async def test(served: Served, port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            waiting = [await stack.enter_async_context(connected(port)) for _ in range(4)]
            for _, writer in waiting:
                writer.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            while served.server.answering < 4:
                await asyncio.sleep(0.01)
            idle = [await stack.enter_async_context(connected(port)) for _ in range(4)]
            assert (await whole(port, PING.replace(b"Host", b"Connection: close\r\nHost"))).startswith(b"HTTP/1.1 200 ")
            assert await idle[0][0].read() == b"", "the first of them"
            for _, writer in idle[1:]:
                writer.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            more = await stack.enter_async_context(connected(port))
            more[1].write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            while served.server.answering < 8:
                await asyncio.sleep(0.01)
            assert (await whole(port, PING)).startswith(b"HTTP/1.1 503 ")

    serving(test)


def test_refusals_have_openais_form() -> None:
    content: Any = json.loads(json.dumps(Refusal(429, "later", 3).content))
    assert content == {"error": {"message": "later", "type": "invalid_request_error", "code": 429}}
    assert Refusal(503, "later").content["error"] == {"message": "later", "type": "server_error", "code": 503}
