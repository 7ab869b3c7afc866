"""What a client has started to prepare, merge or measure ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trimtab.layout import JobDir

CLIENT = """
import sys
from pathlib import Path
from trimtab.layout import JobDir
from trimtab.staging import run_verb
run_verb("prepare", JobDir(Path(sys.argv[1])), print)
"""


def test_a_command_ends_with_the_client_that_was_killed(tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job").make()
    os.mkfifo(job.hyperparameters)  # the command waits for somebody who writes
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(job.root)])
    try:
        children = Path(f"/proc/{client.pid}/task/{client.pid}/children")
        wait_for(lambda: bool(children.read_text().strip()) and (job.root / ".lock").exists())
        (child,) = map(int, children.read_text().split())
        assert runs(child)
    finally:
        client.kill()
        client.wait()
    try:
        wait_for(lambda: not runs(child))
    finally:
        if runs(child):
            os.kill(child, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
