"""The process backend keeps the contract; and what is its own: environment, supervision, its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from contract.backend_contract import BackendContract, finish, until
from trimtab.backends import process
from trimtab.backends.base import Listable, Preflight, Removable, Reporting, Resumable, RunHandle, RunState
from trimtab.backends.process import ProcessBackend
from trimtab.errors import BackendError, BackendUnavailable, StagingError
from trimtab.spec import JobSpec, TrainSpec


class TestProcess(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory):
        return ProcessBackend(tmp_path_factory.mktemp("place") / "my runs, größer 家")

    def kill(self, backend, handle):
        os.killpg(json.loads((backend.home / "runs" / handle.id / "process.json").read_text())["pid"], signal.SIGKILL)

    def environment(self, backend):
        return {**os.environ, "TRIMTAB_HOME": str(backend.home)}


def script(folder: Path, text: str) -> str:
    """A program that stands where Python would, for what the runtime never does."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


ANY_JOB = JobSpec(train=TrainSpec(model="smollm2-135m-instruct"), data=("notes.txt",))


@pytest.fixture
def run_script(tmp_path):
    """Start a shell script as a run: (backend, handle)."""
    channels = {name: tmp_path / name for name in ("train", "model")}
    for folder in channels.values():
        folder.mkdir()

    def start(text: str) -> tuple[ProcessBackend, RunHandle]:
        backend = ProcessBackend(tmp_path / "home", python=script(tmp_path, text))
        return backend, backend.submit(ANY_JOB, channels)

    return start


def test_it_has_every_ability():
    backend = ProcessBackend()
    for ability in (Preflight, Reporting, Resumable, Listable, Removable):
        assert isinstance(backend, ability)


def test_a_run_sees_no_secret_and_no_hub(run_script, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN", "SOMETHING_NEW"):
        monkeypatch.setenv(name, "s3cret")
    backend, handle = run_script("env; pwd; exit 0")
    finish(backend, handle)
    lines = list(backend.logs(handle))
    assert "s3cret" not in "\n".join(lines)
    assert "HF_HUB_OFFLINE=1" in lines
    assert f"PATH={os.environ['PATH']}" in lines
    assert lines[-1] == str(backend.home / "runs" / handle.id)


def test_the_request_that_was_printed_is_the_one_that_is_kept_and_run(run_script, tmp_path):
    backend, handle = run_script('echo "$@"')
    request = backend.render(ANY_JOB, {name: tmp_path / name for name in ("train", "model")}, handle.id)
    finish(backend, handle)
    assert json.loads((backend.home / "runs" / handle.id / "run.json").read_text())["request"] == request
    assert list(backend.logs(handle)) == [" ".join(request["command"][1:])]


@pytest.mark.parametrize(("asked", "seen"), [(None, "{cache}/nf4"), ("kept/here", "{here}/kept/here"), ("", "")])
def test_quantised_bases_stay_where_the_caller_wants_them(run_script, tmp_path, monkeypatch, asked, seen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    if asked is None:
        monkeypatch.delenv("TRIMTAB_NF4_CACHE", raising=False)
    else:
        monkeypatch.setenv("TRIMTAB_NF4_CACHE", asked)
    backend, handle = run_script("env; exit 0")
    finish(backend, handle)
    assert f"TRIMTAB_NF4_CACHE={seen.format(cache=tmp_path / 'cache', here=tmp_path)}" in list(backend.logs(handle))


def test_no_secret_of_an_address_is_kept(run_script):
    backend, first = run_script("exit 0")
    addresses = ("https://me:s3cret@example.com/a?token=s3cret&page=2", "notes #1?.txt")
    handle = backend.submit(ANY_JOB.model_copy(update={"data": addresses}), json_channels(backend, first))
    for run in (first, handle):
        finish(backend, run)
    kept = (backend.home / "runs" / handle.id / "run.json").read_text()
    assert "s3cret" not in kept
    assert json.loads(kept)["job"]["data"] == ["https://example.com/a?token=***&page=2", "notes #1?.txt"]


def test_a_process_that_just_ends_is_a_failure_with_its_last_lines(run_script):
    backend, handle = run_script("echo one; echo two; exit 0")
    status = finish(backend, handle)
    assert status.state is RunState.FAILED
    assert status.reason.endswith("\n  one\n  two")


def test_an_ended_run_leaves_no_zombie(run_script):
    backend, handle = run_script("exit 0")
    finish(backend, handle)
    pid = json.loads((backend.home / "runs" / handle.id / "process.json").read_text())["pid"]
    until(lambda: backend.status(handle).done and not Path(f"/proc/{pid}").exists(), "the end of the process")


def test_a_process_deaf_to_sigterm_is_killed_when_its_grace_is_over(run_script, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.3)
    backend, handle = run_script("trap '' TERM; echo deaf; while :; do sleep 0.05; done")
    until(lambda: list(backend.logs(handle)) == ["deaf"], "its word")
    backend.stop(handle)
    status = backend.status(handle)
    assert status.state is RunState.STOPPED
    assert f"trimtab resume {handle}" in status.reason


def test_looking_at_a_run_from_many_sides_never_takes_it_for_dead(run_script):
    backend, handle = run_script("while :; do sleep 0.05; done")
    seen = set()

    def look() -> None:
        for _ in range(100):
            seen.add(backend.status(handle).state)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.stop(handle)
    assert seen == {RunState.PENDING}


def test_the_run_outlives_the_client_that_started_it(run_script, tmp_path):
    backend, first = run_script("trap 'echo bye; exit' TERM; while :; do sleep 0.05; done")
    backend.stop(first)
    code = (
        "import os, sys; from pathlib import Path; from trimtab.spec import JobSpec; from trimtab.backends.process import ProcessBackend\n"
        "home, python, model, train, job = sys.argv[1:]\n"
        "backend = ProcessBackend(Path(home), python=python)\n"
        "handle = backend.submit(JobSpec.model_validate_json(job), {'model': Path(model), 'train': Path(train)})\n"
        "print(handle, flush=True); os._exit(1)"
    )
    arguments = [str(backend.home), backend.python, str(tmp_path / "model"), str(tmp_path / "train"), ANY_JOB.model_dump_json()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    handle = RunHandle.parse(done.stdout.strip())
    assert not backend.status(handle).done
    backend.stop(handle)
    assert backend.status(handle).state is RunState.STOPPED


def test_who_only_looks_at_a_run_without_a_noted_id_is_not_taken_for_it(run_script):
    """Their lowest number comes first in /proc, so also one who was there before the run."""
    look = "import sys, time; file = open(sys.argv[1], 'rb'); print('open', flush=True); time.sleep(600)"
    backend, handle = run_script("echo here; trap 'echo bye; exit' TERM; while :; do sleep 0.05; done")
    folder = backend.home / "runs" / handle.id
    until(lambda: list(backend.logs(handle)) == ["here"], "its word")
    record = json.loads((folder / "process.json").read_text())
    (folder / "process.json").write_text(json.dumps({**record, "pid": None}))  # the client died before it could note it
    command = [sys.executable, "-c", look, str(folder / "alive.lock")]
    looking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=folder) for _ in range(3)]
    try:
        for one in looking:
            assert one.stdout.readline() == "open\n"
        assert process._group(folder) == record["pid"]
        os.killpg(record["pid"], signal.SIGKILL)
        until(lambda: backend.status(handle).done, "its end")
        assert process._group(folder) is None
    finally:
        for one in looking:
            one.kill()
            one.communicate()


def test_runs_are_listed_newest_first_with_model_and_state(run_script):
    backend, first = run_script("exit 0")
    finish(backend, first)
    second = backend.submit(ANY_JOB, json_channels(backend, first))
    finish(backend, second)
    assert [(run.handle, run.model, run.status.state) for run in backend.runs()] == [
        (second, ANY_JOB.train.model, RunState.FAILED),
        (first, ANY_JOB.train.model, RunState.FAILED),
    ]


def json_channels(backend: ProcessBackend, handle: RunHandle) -> dict[str, Path]:
    request = json.loads((backend.home / "runs" / handle.id / "run.json").read_text())["request"]
    return {name: Path(path) for name, path in request["channels"].items()}


def test_a_resume_after_the_data_was_removed_says_so(run_script, tmp_path):
    backend, handle = run_script("exit 0")
    finish(backend, handle)
    (tmp_path / "train").rmdir()
    with pytest.raises(StagingError, match="repeating  trimtab fit"):
        backend.resume(handle)


def test_a_folder_that_cannot_be_written_names_the_variable_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    backend = ProcessBackend(tmp_path / "file" / "home")
    with pytest.raises(BackendError, match="TRIMTAB_HOME"):
        backend.submit(ANY_JOB, {})


def test_a_gpu_is_refused_before_staging():
    with pytest.raises(BackendUnavailable, match="--device xeon"):
        ProcessBackend().check(ANY_JOB.model_copy(update={"device": "gpu"}))
