"""Clients that are interrupted, killed or at it twice: nothing half-made stays, and what was started can be gone on with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.interrupted import PATIENCE
from trimtab.backends.base import RunState
from trimtab.backends.process import ProcessBackend
from trimtab.spec import JobSpec


def client(*words: str, home: Path, **how: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRIMTAB_HOME": str(home / "runs"), "TRIMTAB_CACHE": str(home / "cache")}
    command = [sys.executable, "-m", "trimtab", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["fit", "--detach"], signal.SIGTERM),
        (["fit", "--detach"], signal.SIGHUP),
        (["fit", "--detach"], signal.SIGINT),
        (["fit", "--detach"], signal.SIGKILL),
        (["plan"], signal.SIGTERM),
        (["plan"], signal.SIGHUP),
        (["data", "preview"], signal.SIGHUP),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else " ".join(value),
)
def test_a_client_that_ends_while_the_data_is_prepared_leaves_nothing_half_made(
    tiny_model: Path, tmp_path: Path, command: list[str], number: int
) -> None:
    pages = tmp_path / "pages.txt"
    pages.write_text("\n".join(f"Sentence number {n} is about the harbour and its {n} bells." for n in range(60_000)))
    words = (*command, str(pages), "--model", str(tiny_model), "--replay", "0", "--questions", "0")
    fit = client(*words, home=tmp_path)
    made = tmp_path / "cache" / "data"
    deadline = time.monotonic() + PATIENCE
    while not any(made.glob(".*/output/data/events.jsonl")):
        assert fit.poll() is None, fit.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fit.send_signal(number)
    said = fit.communicate(timeout=60)[0]
    assert not (tmp_path / "runs").exists()
    if number == signal.SIGKILL:
        [left] = made.glob(".*")
        while _works_in(left):
            assert time.monotonic() < deadline, "the preparing process outlives its client"
            time.sleep(0.05)
        (made / ".older").mkdir()
        pages.write_text("The bell is rung twice.")
        assert client(*words, "--dry-run=render", home=tmp_path).communicate(timeout=PATIENCE)[0]
        assert [path.name for path in made.glob(".*")] == [".older"]  # that one has no lock and is young: it may be just beginning
    else:
        assert fit.returncode == 130, said
        begin_again = "Nothing was started. Begin again by repeating the command.\n\n" if command[0] == "fit" else "\n"
        assert said.endswith(f"{begin_again}trimtab: interrupted\n")
        assert list(made.glob(".*")) == []


def _works_in(folder: Path) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.samefile(folder):
                return True
    return False


DIES = """
import os, signal, sys
from pathlib import Path
from trimtab.backends import process, run_folder
from trimtab.backends.process import ProcessBackend
from trimtab.spec import JobSpec, TrainSpec

when, home, python, channels = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "before the record":
    run_folder.write_record = die
elif when == "before the start":
    process._start = die
else:  # when the process lives and nobody has noted its id
    write = process.write_json
    process.write_json = lambda path, value: die() if value.get("pid") else write(path, value)
job = JobSpec(train=TrainSpec(model="smollm2-135m-instruct"), data=("notes.txt",))
ProcessBackend(home, python=python).submit(job, {name: Path(channels) / name for name in ("train", "model")}, "trim-0d0d0d0d")
"""


@pytest.mark.parametrize("when", ["before the record", "before the start", "before the id is noted"])
def test_a_client_that_is_killed_while_it_submits_leaves_a_run_that_can_be_gone_on_with_or_none(tmp_path: Path, when: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap 'echo bye; exit' TERM; echo here; while :; do sleep 0.05; done\n")
    python.chmod(0o755)
    for name in ("train", "model"):
        (tmp_path / name).mkdir()
    backend = ProcessBackend(tmp_path / "home", python=str(python))
    done = subprocess.run([sys.executable, "-c", DIES, when, backend.home, python, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    folder = backend.home / "runs" / "trim-0d0d0d0d"
    job = JobSpec.model_validate({"train": {"model": "smollm2-135m-instruct"}, "data": ["notes.txt"]})
    channels = {name: tmp_path / name for name in ("train", "model")}
    if when == "before the record":
        assert folder.exists()
        assert backend.runs() == []
        other = backend.submit(job, channels)
        assert not folder.exists()  # the next run swept it
        backend.stop(other)
        return
    [listed] = backend.runs()
    if when == "before the start":
        assert listed.status.state is RunState.FAILED
        assert f"died before it could start it; start it with:  trimtab resume {listed.handle}" in listed.status.reason
        backend.resume(listed.handle)
    assert not backend.status(listed.handle).done
    deadline = time.monotonic() + PATIENCE
    while list(backend.logs(listed.handle)) != ["here"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    backend.stop(listed.handle)
    assert list(backend.logs(listed.handle))[-1] == "bye"
    assert backend.status(listed.handle).state is RunState.STOPPED


def test_of_two_who_resume_a_run_at_once_one_does(tmp_path: Path) -> None:
    python, over = tmp_path / "python", tmp_path / "over"
    python.write_text(f"#!/bin/sh\necho life; while [ ! -e '{over}' ]; do sleep 0.05; done\n")
    python.chmod(0o755)
    over.touch()
    channels = {name: tmp_path / name for name in ("train", "model")}
    for folder in channels.values():
        folder.mkdir()
    backend = ProcessBackend(tmp_path / "home", python=str(python))
    handle = backend.submit(JobSpec.model_validate({"train": {"model": "smollm2-135m-instruct"}, "data": ["notes.txt"]}), channels)
    while not backend.status(handle).done:
        time.sleep(0.01)
    over.unlink()
    environment = {**os.environ, "TRIMTAB_HOME": str(backend.home)}
    command = [sys.executable, "-m", "trimtab", "resume", str(handle), "--detach"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [one.communicate(timeout=60)[1] for one in both]
    finally:
        over.touch()  # so long that life lasts, however slow the slower one is
    assert sorted(one.returncode for one in both) == [0, 1], said
    assert f"{handle} is still running. Watch it:  trimtab logs -f {handle}" in "".join(said)
    while not backend.status(handle).done:
        time.sleep(0.01)
    assert list(backend.logs(handle)) == ["life", "life"]
