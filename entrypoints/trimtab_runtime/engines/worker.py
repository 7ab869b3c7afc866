"""`python -P -m trimtab_runtime.engines.worker`: one engine in a process of its own, asked over its standard input and output.

Lines of JSON. In: `{"ask": {...}}`, a Request, and `{"cancel": id}`. Out: `{"failed": why}` or, once every model has answered,
`{"facts": {...}}`; then `{"new": [[id, ids, reason], ...]}` after a step, or after several that are quick, with `"cache"`, the share
taken, now and then; and `{"refused": [id, why]}`. It ends when its standard input closes, or with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

from trimtab.errors import EndpointError, TrimtabError
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.engines import Engine, Reason, Request

USAGE_SECONDS = 0.5
TELL_SECONDS = 0.03  # between two messages: each wakes the server and its client up, on the processors that the engine computes on
_PR_SET_PDEATHSIG = 1
_BLOCK = 1 << 16  # bytes read at once


class Channel:
    """The two pipes to the server. Whatever a library prints goes to standard error: `take` it before anything else is imported."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._begun = b""
        self._poll = select.poll()
        self._poll.register(reading, select.POLLIN)

    @classmethod
    def take(cls) -> Channel:
        """Make standard input and output ours alone: what is printed goes to standard error, what is read from stdin is empty."""
        reading, writing = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        return cls(reading, writing)

    def say(self, **message: object) -> None:
        left = memoryview(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        while left:
            left = left[os.write(self._writing, left) :]

    def hear(self, *, wait: bool) -> list[dict[str, Any]]:
        """What came since. Raises EOFError once nobody is there to send more."""
        lines: list[bytes] = []
        while self._poll.poll(None if wait and not lines else 0):
            block = os.read(self._reading, _BLOCK)
            if not block:
                raise EOFError
            *whole, self._begun = (self._begun + block).split(b"\n")
            lines += whole
        return [json.loads(line) for line in lines]


def main() -> int:
    channel = Channel.take()
    _end_with_parent()
    # no library may look for a hub, or tell one that it is used
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server, which then ends this
    try:
        try:
            engine = _load()
            warm_up(engine)
        except TrimtabError as exc:
            channel.say(failed=str(exc))
            return 1
        channel.say(facts=asdict(engine.facts))
        run(engine, channel)
    except (EOFError, BrokenPipeError):
        return 0  # the server is gone
    except BaseException as exc:  # noqa: BLE001  the border: the log gets what failed and where, and nothing of what was asked
        print("".join(traceback.format_tb(exc.__traceback__)) + told(exc), file=sys.stderr, flush=True)
        return 1
    return 0


def _load() -> Engine:
    from trimtab_runtime.engines.choose import load

    return load(JobDir.from_environment(), ServeSpec.from_text(os.environ.get(SERVE_VARIABLE) or "{}"))


def warm_up(engine: Engine) -> None:
    """Have each model really answer with one token. Raises EndpointError where one does not."""
    waiting: set[int] = set()

    def emit(id: int, _: list[int], reason: Reason | None) -> None:
        if reason is not None:
            waiting.discard(id)

    for number, name in enumerate(engine.facts.names):
        waiting.add(-1 - number)
        engine.add(Request(id=-1 - number, ids=[0], model=name, max_new_tokens=1))
        while waiting:
            if not engine.step(emit):
                raise EndpointError(f"the model {name} gives no token: look at the lines above, and try another engine")


class News:
    """What is to be told: at once where an answer begins or ends, otherwise what several quick steps brought together."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[int, list[int], Reason | None]] = {}
        self._begun: set[int] = set()
        self._urgent = False
        self._told_at = 0.0

    def emit(self, id: int, ids: list[int], reason: Reason | None) -> None:
        earlier = self._new[id][1] if id in self._new else []
        self._new[id] = (id, earlier + ids, reason)
        self._urgent = self._urgent or reason is not None or id not in self._begun
        self._begun.add(id)
        if reason is not None:
            self._begun.discard(id)

    def forget(self, id: int) -> None:
        self._new.pop(id, None)
        self._begun.discard(id)

    def take(self, *, last: bool) -> list[tuple[int, list[int], Reason | None]]:
        """What should be told now; `last`: nothing more comes for now."""
        now = time.monotonic()
        if not (self._urgent or last or now - self._told_at >= TELL_SECONDS):
            return []
        found = list(self._new.values())
        self._new.clear()
        self._urgent, self._told_at = False, now
        return found


def run(engine: Engine, channel: Channel) -> None:
    """Hear, step, say; for ever. Raises EOFError when the server is gone."""
    news = News()
    busy, told_at = False, 0.0
    while True:
        for message in channel.hear(wait=not busy):
            if "cancel" in message:
                engine.cancel(message["cancel"])
                news.forget(message["cancel"])
                continue
            request = Request(**message["ask"])
            try:
                engine.add(request)
            except EndpointError as exc:
                channel.say(refused=[request.id, str(exc)])
            except Exception as exc:  # noqa: BLE001  a library's: this request's end, no other's; its words may quote it
                print("".join(traceback.format_tb(exc.__traceback__)) + type(exc).__name__, file=sys.stderr, flush=True)
                channel.say(refused=[request.id, f"the engine cannot take this request ({type(exc).__name__}): ask with other settings"])
        busy = engine.step(news.emit)
        new = news.take(last=not busy)
        if time.monotonic() - told_at > USAGE_SECONDS or not busy:
            told_at = time.monotonic()
            channel.say(new=new, cache=engine.usage())
        elif new:
            channel.say(new=new)


def told(exc: BaseException) -> str:
    """An exception for the log. Lists of numbers in it may be somebody's prompt."""
    return f"{type(exc).__name__}: " + re.sub(r"-?\d+(?:\s*,\s*-?\d+){3,}", "...", str(exc))[:1000]


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, also in the middle of a step."""
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
