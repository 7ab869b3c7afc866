"""A small process beside a client that deletes its endpoint when the client is gone, or its time is over.

`python -m trimtab.aws.guardian` reads one line of JSON, its `Charge`, and then words from its standard input, which the client holds:

    keep    the client lets the endpoint go on: the guardian stays for its time limit, or ends where there is none
    done    the endpoint is deleted already: the guardian ends
    (end)   the client has closed it, on purpose or however it died: the endpoint is deleted

SageMaker deletes nothing that is being created, so the client, too, leaves that to the guardian when it is interrupted. While AWS cannot be
reached the guardian goes on, up to `PATIENCE`; what it does stands in its log, which it keeps locked while it lives and removes when there
is nothing left to do. SIGTERM, as a logout or a shutdown sends it, makes it delete what it holds. A machine that is switched off takes the
guardian with it: then tags and log tell that the endpoint should have ended, and `trimtab endpoints --close-orphans` ends it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from trimtab.aws import endpoint_life
from trimtab.aws.logs import jittered
from trimtab.aws.session import Aws
from trimtab.errors import EndpointError, TrimtabError

KEEP, DONE = "keep", "done"
PATIENCE = 24 * 3600.0  # seconds for which it tries to delete
SHORTEST, LONGEST = 2.0, 120.0  # seconds between two tries
AGAIN = 15.0  # seconds after which it looks once more: what was asked for may have appeared late
_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


@dataclass(frozen=True)
class Charge:
    """Whose end is guarded, and until when it may go on at the latest (`until`, seconds since 1970; None: no limit).

    `scales` is what changes its number of instances, as `endpoint_life.remove` takes it; `again` are the seconds until the second look.
    """

    id: str
    region: str
    profile: str | None
    until: float | None
    log: str
    scales: str | None = None
    again: float = AGAIN


class Word(StrEnum):
    """What ends a guardian's watch: the endpoint is to be deleted, is deleted already, is to go on, or goes on without being watched."""

    DELETE = "delete"
    DONE = "done"
    KEPT = "kept"
    LEFT = "left"


class _Process(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """It outlives this process where it has something to do; Popen's own would warn of it."""


class Guardian:
    """The client's end: the process is started, told, and let go of."""

    def __init__(self, charge: Charge) -> None:
        """Raises EndpointError where it cannot be started, and nothing is to be deployed without it."""
        try:
            self._start(charge)
        except OSError as exc:
            raise EndpointError(
                f"nothing was deployed, because the process that would end it cannot be started ({exc}): make room for {charge.log}, or "
                "name another place with  export TRIMTAB_HOME=FOLDER"
            ) from exc

    def _start(self, charge: Charge) -> None:
        Path(charge.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(charge.log).open("ab") as log, _deferred():
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the guardian's as long as it lives
            self._process = _Process(
                [sys.executable, "-m", "trimtab.aws.guardian", charge.id],  # the id is for who lists processes
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C and the end of a terminal are for the client
            )
        self.pid, self._charge = self._process.pid, charge
        self._say(json.dumps(asdict(charge)))

    def keep(self) -> None:
        """The endpoint may go on without this client. Raises EndpointError where its time limit would have nobody who keeps it."""
        heard = self._say(KEEP) and self._process.poll() is None
        if not heard and self._charge.until is not None:
            raise EndpointError(
                f"the process that would end {self._charge.id} at its time has died: deploy again; its last words are in {self._charge.log}"
            )
        self.leave()

    def done(self, patience: float = 10.0) -> None:
        """The endpoint is gone: the guardian ends."""
        self._say(DONE)
        self.leave()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)

    def leave(self) -> None:
        """Let go of it: unless it was told otherwise it deletes the endpoint now."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _say(self, line: str) -> bool:
        """Whether it can have been heard."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended; what it had to do is then done, or in its log
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()
                return True
        return False


def lives(log: Path) -> bool | None:
    """Whether the guardian with this log lives; None where there is no such log: it was started elsewhere, or has done its work."""
    try:
        with log.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """What is started inside gets no signal before it is ready for one: it inherits the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard(charge: Charge, words: IO[bytes], told: int) -> Word:
    """Wait for the client's word or end (`words`, unbuffered), for the limit, or for a signal (`told` is readable after one)."""
    held = True
    with selectors.DefaultSelector() as selector:
        selector.register(words, selectors.EVENT_READ)
        selector.register(told, selectors.EVENT_READ)
        while True:
            left = None if charge.until is None else charge.until - time.time()
            if left is not None and left <= 0:
                return Word.DELETE
            ready = {key.fileobj for key, _ in selector.select(left if left is None else min(left, 60.0))}
            if words in ready:  # first: who has let go of it may end the session in the same moment
                word = words.readline().decode().strip()
                if word == DONE:
                    return Word.DONE
                if word != KEEP:
                    return Word.DELETE
                if charge.until is None:
                    return Word.KEPT
                held = False
                selector.unregister(words)
            elif told in ready:
                return Word.DELETE if held else Word.LEFT


def delete(charge: Charge, say: Callable[[str], None]) -> bool:
    """Delete the endpoint, however long AWS is away, and look a second time for what appeared late; whether nothing is left.

    Credentials are read anew for each try: they may have been renewed.
    """
    wait, until, seen = SHORTEST, time.monotonic() + PATIENCE, 0
    while time.monotonic() < until:
        try:
            with Aws(charge.region, charge.profile) as aws:
                endpoint_life.remove(aws, charge.id, until - time.monotonic(), scales=charge.scales)
        except (TrimtabError, TimeoutError) as exc:
            say(f"{charge.id} is not deleted yet: {exc}")
            time.sleep(jittered(wait := min(wait * 2, LONGEST)))
            continue
        seen += 1
        say(f"{charge.id} is deleted")
        if seen > 1:
            return True
        time.sleep(charge.again)
    say(f"{charge.id} could not be deleted: end it with  trimtab close sagemaker://{charge.id}")
    return False


def say(line: str) -> None:
    """Into its log, unbuffered. A full disk keeps nobody from deleting."""
    with contextlib.suppress(OSError):
        os.write(1, f"{time.strftime('%FT%TZ', time.gmtime())} {line}\n".encode())


def signals() -> int:
    """From here on a signal only says so: what is readable after SIGTERM. SIGINT and SIGHUP are for the client."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return told


def main() -> None:
    told = signals()
    words = os.fdopen(0, "rb", buffering=0, closefd=False)
    try:
        charge = Charge(**json.loads(words.readline()))
    except ValueError:  # the client died before it said whose end it is, and has sent nothing yet
        return
    word = guard(charge, words, told)
    if word is Word.LEFT:
        say(f"{charge.id} goes on, and nothing here ends it at its time any more: then use  trimtab endpoints --close-orphans")
    elif word is not Word.DELETE or delete(charge, say):
        Path(charge.log).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
