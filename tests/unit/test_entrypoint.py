"""The container's first process, here as an ordinary one: exit codes, signals, orphans, and what it says of a child that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.layout import JobDir
from trimtab_runtime.entrypoint import USER, killed, user_for

RUN = """
import sys
from pathlib import Path
from trimtab.layout import JobDir
from trimtab_runtime.entrypoint import run
sys.exit(run([sys.executable, "-c", sys.argv[2]], JobDir(Path(sys.argv[1]))))
"""


def first_process(root: Path, program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(root), program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_its_exit_code_is_the_childs(tmp_path: Path, code: int) -> None:
    process = first_process(tmp_path, f"import sys; sys.exit({code})")
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_the_childs_to_answer(tmp_path: Path, number: signal.Signals) -> None:
    program = "import signal, sys, time\n"
    program += f"signal.signal({int(number)}, lambda n, f: sys.exit(7))\nprint('ready', flush=True)\ntime.sleep(60)"
    process = first_process(tmp_path, program)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert not (tmp_path / "output").exists()


def test_a_stop_that_the_child_does_not_catch_is_no_failure(tmp_path: Path) -> None:
    process = first_process(tmp_path, "import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "output").exists()


def test_a_child_that_was_killed_leaves_a_reason_with_its_memory(tmp_path: Path) -> None:
    process = first_process(tmp_path, "import os; block = b'x' * 300_000_000; os.kill(os.getpid(), 9)")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 137
    reason = (tmp_path / "output" / "failure").read_text()
    assert reason == killed(9, 310_000_000) + "\n"
    assert reason in said


def test_a_reason_that_the_run_gave_itself_is_kept(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "failure").write_text("the disk is full\n")
    process = first_process(tmp_path, "import os; os.abort()")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGABRT
    assert "SIGABRT" in said
    assert (tmp_path / "output" / "failure").read_text() == "the disk is full\n"


def test_it_says_when_the_reason_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file where a folder should be")
    process = first_process(tmp_path, "import os; os.kill(os.getpid(), 9)")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 137
    assert "the failure file cannot be written" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_root_gives_away_what_a_server_writes_and_nothing_else(tmp_path: Path) -> None:
    job = JobDir(tmp_path)
    for folder in (job.scratch, job.model, job.api_key.parent):
        folder.mkdir(parents=True)
    (job.model / "config.json").write_text("{}")
    assert user_for(job, serving=True) == USER
    given = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.stat().st_uid == USER}
    assert given == {"scratch", "output", "output/data"}


def test_it_needs_no_torch() -> None:
    code = "import sys, trimtab_runtime.entrypoint; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
