"""The server's side of an engine: a child process that is started, asked, watched, and started again once.

At most `max_running` requests are with the engine; the others wait here in the order they came, so that one whose client goes away
while it waits costs nothing, and it is known how many run and how many wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

from trimtab.errors import EndpointError
from trimtab_runtime.engines import Facts, Reason, Request

COMMAND = (sys.executable, "-P", "-m", "trimtab_runtime.engines.worker")
PATIENCE = 60.0  # seconds that an engine at work may say nothing, and for each token of the prompts it works on
PER_TOKEN = 0.1
MOST_PATIENCE = 600.0
LAST_LINES = 20  # of the engine's log, told when it ends
_LINE = 500  # characters of each
_LEAVE = 3.0  # seconds from closing its standard input to SIGKILL

State = Literal["loading", "ready", "ended"]


class Listener(Protocol):
    """Who waits for an answer. Called in the event loop, for one request in order."""

    def new(self, ids: list[int], reason: Reason | None) -> None:
        """More tokens, and why it ended, None while it goes on."""
        ...

    def failed(self, problem: Exception) -> None:
        """No more comes: the engine refused the request (EndpointError), ended while it worked on it (EngineGone), or `new` raised this."""
        ...


class EngineGone(Exception):
    """The engine ended before the answer did, or is not there yet."""


class EngineProcess:
    """One engine as the server sees it. `run` keeps it alive; all else is called in the same event loop.

    An engine says something after each step, or twice a second where steps are short. One that works and says nothing for as long as a
    step can take hangs: it is not ready, and is killed when it says nothing for as long again.
    """

    def __init__(self, max_running: int, say: Callable[[str], None], command: Sequence[str] = COMMAND, patience: float = PATIENCE) -> None:
        self.max_running, self._say, self._command = max_running, say, command
        self.state: State = "loading"
        self.facts: Facts | None = None
        self.cache = 0.0  # share of the memory for keys and values that is taken
        self.restarts = 0
        self.cause = ""  # why it ended last
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._running: dict[int, tuple[Request, Listener]] = {}
        self._waiting: dict[int, tuple[Request, Listener]] = {}
        self._child: asyncio.SubprocessTransport | None = None
        self._closing = False
        self._told = ""  # what it said of its own failure
        self._patience = patience
        self._silent = 0.0  # seconds that it has owed a word
        self._owes = False  # it was told something after its last word

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def hangs(self) -> bool:
        """Whether it has said nothing for longer than a step takes."""
        return self._silent > self._allowed()

    def ask(self, request: Request, listener: Listener) -> None:
        """Have it answered, now or in its turn. Raises EngineGone while there is no engine."""
        if self.state != "ready":
            raise EngineGone(self.cause or "the model is loading")
        if len(self._running) < self.max_running:
            self._send(request, listener)
        else:
            self._waiting[request.id] = (request, listener)

    def cancel(self, id: int) -> None:
        """Nobody waits for it any more; its listener is not called again. Quiet for a request that has ended."""
        if self._waiting.pop(id, None) is None and self._running.pop(id, None) is not None:
            self._write({"cancel": id})
            self._fill()

    def break_off(self, why: str) -> None:
        """Tell all who wait that nothing more comes."""
        lost = [listener for _, listener in [*self._running.values(), *self._waiting.values()]]
        self._running.clear()
        self._waiting.clear()
        for listener in lost:
            listener.failed(EngineGone(why))

    async def run(self, ready: Callable[[Facts], None]) -> None:
        """Keep an engine alive: started again once when it dies after having answered. `ready` is called each time it can answer.

        Returns after `close`. Raises EndpointError with the cause when it has ended for good.
        """
        while True:
            await self._live(ready)
            answered, self.state = self.state == "ready", "ended"
            if self._closing:
                return
            self.break_off(self.cause)
            if not answered or self.restarts:
                raise EndpointError(self.cause if not self.restarts else f"{self.cause}. It had been started again once already")
            self.restarts, self.state = 1, "loading"
            self._say(f"{self.cause}. It is started again")

    async def close(self) -> None:
        """End the engine; what it works on is lost."""
        self._closing = True
        if self._child is not None and (stdin := self._child.get_pipe_transport(0)) is not None:
            stdin.close()
            await asyncio.wait([self._pipes.over], timeout=_LEAVE)
            _kill(self._child)

    async def _live(self, ready: Callable[[Facts], None]) -> None:
        """One life of it, from start to end; `cause` says why it ended."""
        self._told, self.cache, self._silent, self._owes = "", 0.0, 0.0, False
        self._pipes = _Pipes(lambda line: self._heard(json.loads(line), ready), self._log)
        try:
            # in a session of its own, so that whatever it starts in turn can be ended with it
            start = asyncio.get_running_loop().subprocess_exec(lambda: self._pipes, *self._command, start_new_session=True)
            self._child, _ = await start
        except OSError as exc:
            self.cause = f"the engine cannot be started ({exc.strerror or exc}): look at the memory and the number of processes"
            return
        try:
            if not self._closing:
                watching = asyncio.ensure_future(self._watch(self._child))
                try:
                    await self._pipes.silent
                finally:
                    watching.cancel()
                await asyncio.wait([self._pipes.over], timeout=_LEAVE)
        finally:
            _kill(self._child)
            await asyncio.wait([self._pipes.over], timeout=_LEAVE)
            code, peak = self._child.get_returncode(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            self._child.close()
            self.cause = self._told or ended(-signal.SIGKILL if code is None else code, peak, next(reversed(self.last_lines), ""))

    async def _watch(self, child: asyncio.SubprocessTransport) -> None:
        """Kill it when it hangs. What counts is time in which this process was awake, too: both may have been stopped."""
        pause = min(1.0, self._patience / 4)
        while True:
            await asyncio.sleep(pause)
            self._silent = self._silent + pause if self._running or self._owes else 0.0
            if self._silent > 2 * self._allowed():
                self._told = (
                    f"the engine said nothing for {self._silent:.0f} s in the middle of its work and was killed: look at its last lines"
                )
                _kill(child)
                return

    def _allowed(self) -> float:
        """Seconds that a step may take: an engine may read all prompts in one."""
        tokens = sum(len(request.ids) for request, _ in self._running.values())
        return min(self._patience * (1 + PER_TOKEN / PATIENCE * tokens), max(self._patience, MOST_PATIENCE))

    def _heard(self, message: dict[str, Any], ready: Callable[[Facts], None]) -> None:
        self._silent, self._owes = 0.0, False
        if "new" in message:
            running, ends = self._running, False
            for id, ids, reason in message["new"]:
                if id not in running:
                    continue
                listener = running[id][1]
                if reason is not None:
                    del running[id]
                    ends = True
                try:
                    listener.new(ids, reason)
                except Exception as exc:  # noqa: BLE001  its own, not the others'
                    self.cancel(id)
                    listener.failed(exc)
            self.cache = message.get("cache", self.cache)
            if ends:
                self._fill()
        elif "refused" in message:
            id, why = message["refused"]
            if id in self._running:
                self._running.pop(id)[1].failed(EndpointError(why))
                self._fill()
        elif "facts" in message:
            values = message["facts"]
            self.facts = Facts(**values | {"names": tuple(values["names"]), "choices": tuple(values["choices"])})
            self.state = "ready"
            ready(self.facts)
        else:
            self._told = str(message["failed"])

    def _send(self, request: Request, listener: Listener) -> None:
        self._running[request.id] = (request, listener)
        self._write({"ask": asdict(request)})

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            request, listener = self._waiting.pop(next(iter(self._waiting)))
            self._send(request, listener)

    def _write(self, message: dict[str, Any]) -> None:
        stdin = None if self._child is None else self._child.get_pipe_transport(0)
        if isinstance(stdin, asyncio.WriteTransport) and not stdin.is_closing():
            self._owes = True
            stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _log(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.last_lines.append(text[:_LINE])
        self._say(text)


class _Pipes(asyncio.SubprocessProtocol):
    """What comes from the child, line by line as it comes: messages on its standard output, its log on the other."""

    def __init__(self, message: Callable[[bytes], None], log: Callable[[bytes], None]) -> None:
        self._told = {1: message, 2: log}
        self._begun = {1: b"", 2: b""}
        loop = asyncio.get_running_loop()
        self.silent: asyncio.Future[None] = loop.create_future()  # it says no more
        self.over: asyncio.Future[None] = loop.create_future()  # it has ended, and all that it said has been heard

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._begun[fd] = (self._begun[fd] + data).split(b"\n")
        for line in lines:
            self._told[fd](line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1 and not self.silent.done():
            self.silent.set_result(None)

    def process_exited(self) -> None:
        self.pipe_connection_lost(1, None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


def ended(code: int, peak: int, last_line: str) -> str:
    """Why an engine's process is no more, from its exit code (minus the signal's number). `peak` is its largest memory in bytes."""
    if code < 0:
        said = f"the engine was killed by {signal.Signals(-code).name} with {peak / 1e9:.1f} GB of memory in use"
        if -code == signal.SIGKILL:
            return f"{said}: out of memory, unless someone did it. Give it more, or lower cache_gb, max_running or max_context"
        return f"{said}: look at its last lines"
    return f"the engine ended with exit code {code}{f', its last words: {last_line}' if last_line else ''}: look at its log"


def _kill(child: asyncio.SubprocessTransport) -> None:
    """It and whatever it started."""
    pid = child.get_pid()
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.killpg(pid, signal.SIGKILL)
