"""Several ranks on one machine: processes that the run's own process starts in the same tree, each on its own cores and memory.

The first rank writes what stays and speaks; of the others only what they cannot help saying is shown, each line with its rank. The run's
own process computes nothing: it passes signals on, ends the others when one has failed, and says why. However it dies, they end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.layout import PIPE_VARIABLE
from trimtab_runtime.entrypoint import killed
from trimtab_runtime.xeon.placement import Memory, Share

VARIABLE = "TRIMTAB_RANK"  # of a process that is a rank: its seat
STOPPED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))  # exit codes of a run that was asked to stop
GRACE = 15.0  # seconds that the others have when one has failed: to hear of it, and to end by themselves


class RankFailed(TrimtabError):
    """A rank failed or was killed. `trace` is its traceback, where it left one."""

    def __init__(self, cause: str, trace: str = "") -> None:
        super().__init__(cause)
        self.trace = trace


@dataclass(frozen=True)
class Seat:
    """Which of `of` ranks on this machine a process is, what it has, the file where they meet, and the one where it reports a failure."""

    number: int
    of: int
    share: Share
    meet: str
    report: str

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Seat:
        values = json.loads(text)
        share = values["share"]
        memory = share["memory"] and Memory(share["memory"]["policy"], tuple(share["memory"]["nodes"]))
        return cls(**values | {"share": Share(share["threads"], tuple(share["processors"]), memory, share["environment"])})

    def tell(self, cause: str, trace: str, *, echo: bool) -> None:
        """Leave the reason of a failure. `echo`: another rank's, or another machine's, of which this one only heard."""
        with contextlib.suppress(OSError):
            Path(self.report).write_text(json.dumps({"cause": cause, "trace": trace, "echo": echo}), encoding="utf-8")


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, negative for a signal, its peak memory in bytes, and what it reported."""

    number: int
    code: int
    peak: int
    cause: str = ""
    trace: str = ""
    echo: bool = False
    ended_here: bool = False  # because another had failed

    @property
    def fine(self) -> bool:
        return self.code == 0 or self.code in STOPPED


def lead(shares: Sequence[Share], say: Callable[[str], None], asked: list[int], stops: Sequence[int]) -> int:
    """Start a rank for each share, and return their exit code when all have ended. `asked`: signals that came before there were ranks.

    From here on the signals `stops` go to the ranks. Raises RankFailed for the one that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-ranks-") as folder:
        seats = [Seat(number, len(shares), share, f"{folder}/meet", f"{folder}/rank-{number}.json") for number, share in enumerate(shares)]
        over: queue.Queue[Ended] = queue.Queue()
        running: dict[int, subprocess.Popen[bytes]] = {}
        taken = [number for number in stops if signal.getsignal(number) is not signal.SIG_IGN]

        def pass_on(number: int, _: object) -> None:
            for process in list(running.values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

        with _held_back(taken):  # a rank takes them when it is ready to
            for seat in seats:
                running[seat.number] = _start(seat)
        for number in taken:
            signal.signal(number, pass_on)
        for early in asked:
            pass_on(early, None)
        for seat in seats:
            threading.Thread(target=follow, args=(seat, running[seat.number], say, over), daemon=True).start()
        ends = all_ends(over, running)
    return verdict(ends)


def verdict(ends: Sequence[Ended]) -> int:
    """The exit code of ranks that ended, in the order in which they did. Raises RankFailed for the one to blame. Pure.

    That is the first one where a signal ended it; else one that failed by itself, and not because another had; else one that a signal
    ended, which cannot speak, while the others' complaints came first; else the first.
    """
    failed = [one for one in ends if not one.fine and not one.ended_here]
    if not failed:
        return next((one.code for one in ends if one.code), 0)
    died = next((one for one in failed if one.code < 0), None)
    own = next((one for one in failed if one.cause and not one.echo), None)
    blamed = (died if died is failed[0] else None) or own or died or failed[0]
    who = f"rank {blamed.number}"
    if blamed.code < 0:
        raise RankFailed(killed(-blamed.code, blamed.peak, who))
    cause = blamed.cause or f"{who} ended with exit code {blamed.code} and no word: see the last lines of the log"
    raise RankFailed(f"{who}: {cause}" if blamed is own and blamed.number else cause, blamed.trace)


def take_signals(stops: Sequence[int]) -> None:
    """In a rank, once it can answer them: the signals that were held back since it was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


def _start(seat: Seat) -> subprocess.Popen[bytes]:
    """It inherits what this process was given to pass on, such as the job's lock, so that nobody else begins while it still works."""
    command = [sys.executable, "-P", "-m", "trimtab_runtime", "train"]
    environment = {**os.environ, **seat.share.environment, VARIABLE: seat.to_text(), PIPE_VARIABLE: "1"}
    out = subprocess.PIPE if seat.number else None
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT if out else None, close_fds=False
    )


def follow(seat: Seat, process: subprocess.Popen[bytes], say: Callable[[str], None], over: queue.Queue[Ended]) -> None:
    """Say what a rank prints, each line with its number, until it ends; then how it ended, whatever happened to its lines."""
    try:
        if process.stdout is not None:
            with process.stdout as lines:
                for line in lines:
                    say(f"[rank {seat.number}] {line.decode(errors='replace').rstrip()}")
    finally:  # who leads waits for this word
        over.put(_end_of(seat, process))


def _end_of(seat: Seat, process: subprocess.Popen[bytes]) -> Ended:
    """Wait for it. Where somebody else has waited already its memory is unknown, and maybe its exit code, which is a failure then."""
    peak = 0
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
    except ChildProcessError:
        process.returncode = 1 if process.returncode is None else process.returncode
    ended = Ended(seat.number, process.returncode, peak)
    with contextlib.suppress(OSError, ValueError, TypeError):
        ended = replace(ended, **json.loads(Path(seat.report).read_text(encoding="utf-8")))
    return ended


def all_ends(over: queue.Queue[Ended], running: dict[int, subprocess.Popen[bytes]], grace: float = GRACE) -> list[Ended]:
    """Wait for all; when one has failed, the others have `grace` seconds, and are killed then. In the order in which they ended."""
    ends: list[Ended] = []
    deadline: float | None = None
    ended_here: set[int] = set()
    while running:
        try:
            ended = over.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            ended_here.update(running)
            for process in running.values():  # not by kill() of Popen: that may wait for it, and then `follow` could not
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            deadline = None
            continue
        process = running.pop(ended.number)
        if process.stdin is not None:
            process.stdin.close()
        ends.append(replace(ended, ended_here=ended.number in ended_here))
        if not ended.fine and deadline is None and not ended_here:
            deadline = time.monotonic() + grace
    return ends


@contextlib.contextmanager
def _held_back(stops: Sequence[int]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
