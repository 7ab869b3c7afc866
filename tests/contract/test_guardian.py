"""The process that ends an endpoint of SageMaker, by itself: what it waits for, and what does not stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.hosting import until
from trimtab.aws import guardian
from trimtab.errors import EndpointError


def test_a_guardian_waits_for_its_limit_and_for_a_word():
    def guard(seconds, *words, tell=False):
        (ours, theirs), (told, teller) = os.pipe(), os.pipe()
        try:
            with os.fdopen(ours, "rb", buffering=0) as stream:
                os.write(theirs, b"".join(words))
                if tell:
                    os.write(teller, b"x")
                until = None if seconds is None else time.time() + seconds
                return guardian.guard(guardian.Charge("a", "", None, until, ""), stream, told)
        finally:
            for end in (theirs, told, teller):
                os.close(end)

    began = time.monotonic()
    assert guard(0.5) is guardian.Word.DELETE
    assert time.monotonic() - began > 0.45
    assert guard(None, b"keep\n") is guardian.Word.KEPT
    assert guard(60, b"done\n") is guardian.Word.DONE
    assert guard(60, tell=True) is guardian.Word.DELETE
    assert guard(60, b"keep\n", tell=True) is guardian.Word.LEFT
    assert guard(0.5, b"keep\n") is guardian.Word.DELETE


def test_a_time_limit_that_nobody_would_keep_is_told(tmp_path):
    log = tmp_path / "logs" / "a.log"
    found = guardian.Guardian(guardian.Charge("trim-ep-00000000", "us-east-1", None, time.time() + 600, str(log)))
    assert guardian.lives(log)
    os.kill(found.pid, signal.SIGKILL)
    until(lambda: guardian.lives(log) is False)
    with pytest.raises(EndpointError, match="would end trim-ep-00000000 at its time has died: deploy again"):
        found.keep()
    found.leave()
    found._process.wait()


def test_a_full_disk_does_not_stop_a_guardian():
    with Path("/dev/full").open("wb") as full:
        words = "from trimtab.aws import guardian; guardian.say('it is not deleted yet')"
        assert subprocess.run([sys.executable, "-c", words], stdout=full, check=False).returncode == 0
