"""What every backend does, as tests that each one inherits. They run the real runtime on a tiny model.

A subclass gives the fixture `backend` (class scope), `kill`, and `environment`, with which another process finds the same runs.
Its `home` has a blank and letters beyond ASCII in its path, where it has a home.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import pytest

from trimtab.backends import run_folder
from trimtab.backends.base import Backend, Listable, RunHandle, RunState, RunStatus
from trimtab.endpoint import Endpoint
from trimtab.errors import BackendError, RunFailed, RunNotFound, StagingError, WaitTimeout
from trimtab.events import Checkpoint, Event, Step
from trimtab.progress import Silent
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged

PATIENCE = 300.0  # seconds; on an idle machine none of these waits takes ten


def until(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain for {what}"
        time.sleep(0.05)


def finish(backend: Backend, handle: RunHandle) -> RunStatus:
    until(lambda: backend.status(handle).done, f"the end of {handle}")
    return backend.status(handle)


def _interrupt(*given: object, **named: object) -> None:
    raise KeyboardInterrupt


class Seen(Silent):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def show(self, event: Event) -> None:
        if isinstance(event, Step):
            self.steps.append(event.step)


class BackendContract(ABC):
    @abstractmethod
    def kill(self, backend: Backend, handle: RunHandle) -> None:
        """End the run's process at once, as a kernel out of memory does."""

    @abstractmethod
    def environment(self, backend: Backend) -> dict[str, str]:
        """The variables with which another process finds this backend's runs."""

    def interrupt_submission(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have a KeyboardInterrupt come in `submit` when the place was touched and there is no run yet."""
        monkeypatch.setattr(run_folder, "write_record", _interrupt)

    def left_of(self, backend: Backend, run_id: str) -> list[str]:
        """What the place still holds of a run."""
        return [str(path) for path in backend.home.glob(f"runs/{run_id}*")]

    @pytest.fixture(scope="class")
    @classmethod
    def job(cls, small_job: JobSpec, staged: Staged) -> JobSpec:
        return small_job.model_copy(update={"train": staged.train})

    @pytest.fixture(scope="class")
    @classmethod
    def endless(cls, job: JobSpec) -> JobSpec:
        """The same job, but far too long for a test, with a checkpoint every 5 steps."""
        train = job.train.model_copy(update={"max_steps": None, "epochs": 10_000, "save_every_steps": 5})
        return job.model_copy(update={"train": train})

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, backend: Backend, job: JobSpec, staged: Staged) -> tuple[RunHandle, RunHandle]:
        """Two runs of one job, at once, and finished."""
        first, second = backend.submit(job, staged.channels), backend.submit(job, staged.channels)
        for handle in (first, second):
            finish(backend, handle)
        return first, second

    @pytest.fixture
    def going(self, backend: Backend, endless: JobSpec, staged: Staged) -> Iterator[RunHandle]:
        """A run in the middle of its training, seven steps on; ended when the test is."""
        handle = backend.submit(endless, staged.channels)
        try:
            self._until_step(backend, handle, 7)
            yield handle
        finally:
            if not backend.status(handle).done:
                self.kill(backend, handle)
                finish(backend, handle)

    def _until_step(self, backend: Backend, handle: RunHandle, number: int) -> None:
        def there() -> bool:
            status = backend.status(handle)
            assert not status.done, status.reason
            return status.step is not None and status.step.step >= number

        until(there, f"step {number} of {handle}")

    def test_a_job_succeeds_and_leaves_an_artifact(self, backend, job, pair):
        status = backend.status(pair[0])
        assert (status.state, status.progress, status.reason) == (RunState.SUCCEEDED, 1.0, "")
        artifact = Run(pair[0], backend).artifact()
        assert artifact.spec == job.train
        assert artifact.base_digest == job.train.model_digest

    def test_two_runs_at_once_do_not_meet(self, backend, pair):
        first, second = (Run(handle, backend).artifact() for handle in pair)
        assert first.path != second.path
        assert first == second

    def test_the_run_tells_of_each_step_and_of_its_tokens(self, backend, pair, staged):
        run = Run(pair[0], backend)
        assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]
        assert run.status().step == run.metrics()[-1]
        assert run.ledger() == staged.ledger

    def test_logs_are_there_after_the_end(self, backend, pair):
        lines = list(backend.logs(pair[0]))
        assert [line for line in lines if line.startswith("step=6/6 ")]
        assert list(backend.logs(pair[0], follow=True)) == lines

    def test_what_is_done_needs_no_stop_and_no_resume(self, backend, pair):
        before = backend.status(pair[0])
        backend.stop(pair[0])
        assert backend.status(pair[0]) == before
        with pytest.raises(BackendError, match="nothing to go on with"):
            Run(pair[0], backend).resume()

    def test_a_handle_is_enough_for_another_process(self, backend, pair):
        command = [sys.executable, "-m", "trimtab", "status", str(pair[0]), "--json"]
        done = subprocess.run(command, env=self.environment(backend), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["state"] == "succeeded"

    def test_what_a_run_left_can_be_asked_from_the_command_line(self, backend, pair):
        def trimtab(*words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "trimtab", *words, "--max-tokens", "4"]
            return subprocess.run(command, env=self.environment(backend), input=typed, capture_output=True, text=True, check=True)

        handle = str(pair[0])
        once = trimtab("chat", handle, "--question", "Who keeps the key?")
        assert once.stdout.endswith("\n")
        assert once.stderr.count(" s)\n") == 1
        twice = trimtab("chat", handle, typed="Who keeps the key?\n\nAnd the bell?\nstop\nnever asked\n")
        assert twice.stderr.count(" s)\n") == 2
        assert twice.stdout.startswith(once.stdout)

    def test_it_is_served_until_ctrl_c(self, backend, pair):
        command = [sys.executable, "-m", "trimtab", "deploy", str(pair[0]), "--backend", "process"]
        server = subprocess.Popen(command, env=self.environment(backend), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            endpoint = Endpoint(server.stdout.readline().strip())
            names = endpoint.models()
        finally:
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=60)[1]
        assert names[0] == "tuned"
        assert "Traceback" not in said
        assert server.returncode == 0
        assert not endpoint.ready()

    def test_what_it_left_belongs_to_the_caller(self, backend, pair):
        artifact = Run(pair[0], backend).artifact()
        for path in [artifact.path, *artifact.path.rglob("*")]:
            assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())

    def test_all_runs_are_listed_the_newest_first(self, backend, pair):
        assert isinstance(backend, Listable)
        listed = [run for run in backend.runs() if run.handle in pair]
        assert [run.handle for run in listed] == [pair[1], pair[0]]
        assert {run.status.state for run in listed} == {RunState.SUCCEEDED}

    def test_a_bad_job_fails_with_the_reason_the_runtime_gave(self, backend, job, staged, tmp_path):
        damaged = tmp_path / "train"
        shutil.copytree(staged.channels["train"], damaged)
        tokens = damaged / "tokens.npy"
        tokens.write_bytes(tokens.read_bytes()[:-4])
        run = Run(backend.submit(job, {**staged.channels, "train": damaged}), backend)
        with pytest.raises(RunFailed, match=r"tokens\.npy does not match its digest") as caught:
            run.wait(PATIENCE)
        assert caught.value.handle == run.handle
        assert "Traceback" not in caught.value.reason
        assert any("does not match its digest" in line for line in caught.value.log_tail)
        with pytest.raises(BackendError, match=f"trimtab resume {run.handle}"):
            run.artifact()

        run.remove()
        with pytest.raises(RunNotFound, match="trimtab list"):
            run.status()
        assert run.handle not in [listed.handle for listed in backend.runs()]
        assert damaged.is_dir()  # what it read is not its own

    def test_a_channel_that_is_not_there_is_refused_before_anything_starts(self, backend, job, staged, tmp_path):
        with pytest.raises(StagingError, match="trimtab fit"):
            backend.submit(job, {**staged.channels, "train": tmp_path / "nowhere"})

    def test_what_is_interrupted_before_there_is_a_run_leaves_nothing(self, backend, job, staged, monkeypatch):
        with monkeypatch.context() as patch:
            self.interrupt_submission(patch)
            with pytest.raises(KeyboardInterrupt):
                backend.submit(job, staged.channels, "trim-0f0f0f0f")
        assert self.left_of(backend, "trim-0f0f0f0f") == []
        with pytest.raises(RunNotFound):
            backend.status(RunHandle(backend.name, "trim-0f0f0f0f"))

    def test_a_stopped_run_keeps_a_checkpoint_and_goes_on_from_it(self, backend, going):
        run = Run(going, backend)
        with pytest.raises(WaitTimeout, match="still running"):
            run.wait(0.1)
        for verb in (run.resume, run.remove):
            with pytest.raises(BackendError, match="still running"):
                verb()
        lines = backend.logs(going, follow=True)
        assert any(line.startswith("step=7/") for line in lines)  # read while it runs

        run.stop()
        run.stop()
        assert run.status().state is RunState.STOPPED
        assert list(lines)[-1:] == list(run.logs())[-1:]  # following ends with the run
        saved = [event.step for event in run.events() if isinstance(event, Checkpoint)][-1]
        assert saved == run.metrics()[-1].step

        run.resume()
        self._until_step(backend, going, saved + 2)
        seen = Seen()
        with pytest.raises(WaitTimeout):
            run.wait(0, progress=seen)
        assert seen.steps[0] == saved + 1  # what was before the resume is not told again
        numbers = [event.step for event in run.events() if isinstance(event, Step)]
        assert numbers == list(range(1, len(numbers) + 1))  # nothing repeated, nothing left out

    def test_a_killed_run_says_what_to_type_and_goes_on_from_its_newest_checkpoint(self, backend, going):
        self.kill(backend, going)
        status = finish(backend, going)
        assert status.state is RunState.FAILED
        assert "without a word" in status.reason
        assert f"trimtab resume {going}" in status.reason

        run = Run(going, backend)
        before = len([event for event in run.events() if isinstance(event, Step)])
        saved = [event.step for event in run.events() if isinstance(event, Checkpoint)][-1]
        run.resume()
        self._until_more_steps(run, before)
        again = [event.step for event in run.events() if isinstance(event, Step)][before:]
        assert again[0] == saved + 1
        assert [step.step for step in run.metrics()] == list(range(1, run.metrics()[-1].step + 1))

    def _until_more_steps(self, run: Run, before: int) -> None:
        def there() -> bool:
            assert not run.status().done, run.status().reason
            return len([event for event in run.events() if isinstance(event, Step)]) > before

        until(there, "steps after the resume")

    @pytest.mark.parametrize("verb", ["status", "logs", "stop", "artifact"])
    def test_a_handle_without_a_run_is_not_found(self, backend, verb):
        with pytest.raises(RunNotFound, match="trimtab list"):
            getattr(backend, verb)(RunHandle(backend.name, "trim-00000000"))

    def test_what_is_rendered_is_plain_and_repeatable(self, backend, job, staged):
        request = backend.render(job, staged.channels, "trim-12345678")
        assert json.loads(json.dumps(request)) == request
        assert backend.render(job, staged.channels, "trim-12345678") == request
        assert request["hyperparameters"] == job.train.to_hyperparameters()
