"""The server's side of an engine, with engines of a few lines in its place: what they do that a real one should never do."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from trimtab.spec import ServeSpec
from trimtab_runtime.app import App
from trimtab_runtime.engines import Emit, Facts, Reason, Request, check
from trimtab_runtime.engines.process import EngineGone, EngineProcess
from trimtab_runtime.engines.worker import Channel, run
from trimtab_runtime.http import Server
from trimtab_runtime.prompts import Prompts

_FACTS = Facts(("base",), 512, "script")

# answers each prompt with its first id, twice; 7 stops it
_SCRIPT = """
import json, os, signal, sys
print(json.dumps({"facts": {"names": ["base"], "context": 512, "engine": "script", "choices": []}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line).get("ask")
    if asked and asked["ids"][0] == 7:
        os.kill(os.getpid(), signal.SIGSTOP)
    new = [[asked["id"], asked["ids"][:1] * 2, "length"]] if asked else []
    print(json.dumps({"new": new}), flush=True)
"""


class Waits:
    """Who waits for an answer; `spoils` raises at its first tokens."""

    def __init__(self, spoils: Exception | None = None) -> None:
        self.done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._spoils = spoils

    def new(self, ids: list[int], reason: Reason | None) -> None:
        if self._spoils is not None:
            raise self._spoils
        if reason is not None:
            self.done.set_result(ids)

    def failed(self, problem: Exception) -> None:
        self.done.set_exception(problem)


def with_engine(test: Callable[[EngineProcess], Awaitable[None]], script: str = _SCRIPT, patience: float = 60.0) -> list[str]:
    log: list[str] = []

    async def go() -> None:
        engine = EngineProcess(4, log.append, (sys.executable, "-c", script), patience)
        ready = asyncio.Event()
        running = asyncio.ensure_future(engine.run(lambda _: ready.set()))
        try:
            async with asyncio.timeout(60):
                await ready.wait()
                await test(engine)
        finally:
            await engine.close()
            await running

    asyncio.run(go())
    return log


async def until(so: Callable[[], object]) -> None:
    while not so():
        await asyncio.sleep(0.01)


def asked(id: int, first: int = 3) -> Request:
    return Request(id=id, ids=[first], model="base", max_new_tokens=2)


def test_an_engine_that_hangs_is_not_ready_and_then_started_again(tiny_model: Path) -> None:
    pings: list[int] = []

    async def test(engine: EngineProcess) -> None:
        app = App(engine, Prompts({"base": tiny_model}), ServeSpec(), lambda _: None)
        server = Server(app.admit, app.answer, lambda _: None)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await server.start(listener)
            try:

                async def ping() -> int:
                    reader, writer = await asyncio.open_connection(*listener.getsockname())
                    writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    answer = await reader.read()
                    writer.close()
                    await writer.wait_closed()
                    pings.append(int(answer.split()[1]))
                    return pings[-1]

                assert await ping() == 200
                lost, gone = Waits(), Waits()
                engine.ask(asked(1, first=7), lost)
                await until(lambda: engine.hangs)
                assert engine.state == "ready", "it is not killed yet"
                assert await ping() == 503
                with pytest.raises(EngineGone, match=r"said nothing for .* was killed"):
                    await lost.done
                await until(lambda: engine.state == "ready")
                assert await ping() == 200
                assert engine.restarts == 1
                engine.ask(asked(2), gone)
                assert await gone.done == [3, 3]
            finally:
                await server.close()
                app.prompts.close()

    log = with_engine(test, patience=1.0)
    assert any("It is started again" in line for line in log)


def test_an_engine_hangs_whoever_has_gone_meanwhile() -> None:
    async def test(engine: EngineProcess) -> None:
        engine.ask(asked(1, first=7), Waits())
        engine.cancel(1)
        assert engine.running == 0
        await until(lambda: engine.hangs)
        await until(lambda: engine.restarts)

    with_engine(test, patience=0.2)


def test_an_engine_with_nothing_to_do_does_not_hang() -> None:
    async def test(engine: EngineProcess) -> None:
        first, second = Waits(), Waits()
        engine.ask(asked(1), first)
        await first.done
        await asyncio.sleep(2.5)
        assert not engine.hangs
        engine.ask(asked(2), second)
        assert await second.done == [3, 3]
        assert engine.restarts == 0

    with_engine(test, patience=1.0)


def test_who_cannot_hear_spoils_nobody_elses_answer() -> None:
    """Two answers in one message of the engine's."""
    script = _SCRIPT.replace(
        "for line in sys.stdin:",
        """
new = []
for line in sys.stdin:
    asked = json.loads(line).get("ask")
    new += [[asked["id"], [4, 4], "length"]] if asked else []
    if len(new) == 2:
        print(json.dumps({"new": new}), flush=True)
for line in []:""",
    )

    async def test(engine: EngineProcess) -> None:
        spoilt, other = Waits(ValueError("Zanzibar")), Waits()
        engine.ask(asked(1), spoilt)
        engine.ask(asked(2), other)
        assert await other.done == [4, 4]
        with pytest.raises(ValueError, match="Zanzibar"):
            await spoilt.done
        assert engine.running == 0

    assert "Zanzibar" not in "".join(with_engine(test, script))


class Fragile:
    """An engine whose library does not take some requests, and says so with the prompt in its words."""

    facts = _FACTS

    def __init__(self) -> None:
        self._new: list[Request] = []

    def add(self, request: Request) -> None:
        check(request, self.facts)
        if request.ids[0] == 7:
            raise RuntimeError(str(request.ids * 3))
        self._new.append(request)

    def cancel(self, id: int) -> None:
        pass

    def step(self, emit: Emit) -> bool:
        for request in self._new:
            emit(request.id, request.ids, "length")
        had, self._new = bool(self._new), []
        return had

    def usage(self) -> float:
        return 0.0


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, Channel]]:
    """To the worker, from it, and its own side."""
    reading, to = os.pipe()
    back, writing = os.pipe()
    try:
        yield to, back, Channel(reading, writing)
    finally:
        for one in (reading, writing, back):
            os.close(one)


def test_a_request_that_a_library_cannot_take_is_refused_alone(pipes: tuple[int, int, Channel], capfd: pytest.CaptureFixture[str]) -> None:
    to, back, channel = pipes
    for id, first in ((1, 7), (2, 7), (3, 5)):
        os.write(to, json.dumps({"ask": {"id": id, "ids": [first], "model": "base", "max_new_tokens": 1}}).encode() + b"\n")

    def work() -> None:
        with pytest.raises(EOFError):
            run(Fragile(), channel)

    thread = threading.Thread(target=work)
    thread.start()
    said = b""
    while b'"length"' not in said and thread.is_alive():
        said += os.read(back, 65_536) if select.select([back], [], [], 0.1)[0] else b""
    os.close(to)
    thread.join()
    messages = [json.loads(line) for line in said.splitlines()]
    refused = [message["refused"] for message in messages if "refused" in message]
    assert [id for id, _ in refused] == [1, 2]
    assert all("RuntimeError" in why for _, why in refused)
    assert "7, 7" not in str(messages) + capfd.readouterr().err
    assert [3, [5], "length"] in [one for message in messages for one in message.get("new", [])]
