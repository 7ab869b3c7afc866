"""A small process beside a client that deletes its endpoint when the client is gone, or its time is over.

`python -m trimtab.aws.guardian` reads one line of JSON, its `Charge`, and then words from its standard input, which the client holds:

    keep    the client lets the endpoint go on: the guardian stays for its time limit, or ends where there is none
    done    the endpoint is deleted already: the guardian ends
    (end)   the client has closed it, on purpose or however it died: the endpoint is deleted

SageMaker deletes nothing that is being created, so the client, too, leaves that to the guardian when it is interrupted. While AWS cannot be
reached the guardian goes on, up to `PATIENCE`; what it does stands in its log. A machine that is switched off takes the guardian with it:
then the tags tell when the endpoint should have ended, and `trimtab endpoints --close-expired` ends it from any machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Charge:
    """Whose end is guarded, and since when it may go on at the latest (`until`, seconds since 1970; None: no limit)."""

    id: str
    region: str
    profile: str | None
    until: float | None
    log: str


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
        with Path(charge.log).open("ab") as log:
            self._process = _Process(
                [sys.executable, "-m", "trimtab.aws.guardian", charge.id],  # the id is for who lists processes
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C and the end of a terminal are for the client
            )
        self.pid = self._process.pid
        self._say(json.dumps(asdict(charge)))

    def keep(self) -> None:
        """The endpoint may go on without this client."""
        self._say(KEEP)
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

    def _say(self, line: str) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended; what it had to do is then done, or in its log
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()


def guard(charge: Charge, words: IO[bytes]) -> bool:
    """Read what the client says, unbuffered. Wait for the client's word, its end, or the limit; whether the endpoint is to be deleted."""
    held = True
    with selectors.DefaultSelector() as selector:
        selector.register(words, selectors.EVENT_READ)
        while True:
            left = None if charge.until is None else charge.until - time.time()
            if left is not None and left <= 0:
                return True
            if not held:
                time.sleep(min(left or 0.0, 60.0))
                continue
            if not selector.select(left if left is None else min(left, 60.0)):
                continue
            word = words.readline().decode().strip()
            if word == DONE:
                return False
            if word == KEEP:
                if charge.until is None:
                    return False
                held = False
                selector.unregister(words)
            else:
                return True


def delete(aws: Aws, charge: Charge, say: Callable[[str], None], again: float = AGAIN) -> None:
    """Delete the endpoint, however long AWS is away; looks a second time for what appeared late."""
    wait, until, seen = SHORTEST, time.monotonic() + PATIENCE, 0
    while time.monotonic() < until:
        try:
            endpoint_life.remove(aws, charge.id, until - time.monotonic())
        except (TrimtabError, TimeoutError) as exc:
            say(f"{charge.id} is not deleted yet: {exc}")
            time.sleep(jittered(wait := min(wait * 2, LONGEST)))
            continue
        seen += 1
        say(f"{charge.id} is deleted")
        if seen > 1:
            return
        time.sleep(again)
    say(f"{charge.id} could not be deleted: end it with  trimtab close sagemaker://{charge.id}")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    words = os.fdopen(0, "rb", buffering=0, closefd=False)
    charge = Charge(**json.loads(words.readline()))
    log = Path(charge.log)
    if guard(charge, words):
        with Aws(charge.region, charge.profile) as aws:
            delete(aws, charge, lambda line: print(time.strftime("%FT%TZ", time.gmtime()), line, flush=True))
    log.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
