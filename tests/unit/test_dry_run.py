"""A dry run is two steps of the very same job; it says what the whole would take, and leaves nothing."""

from __future__ import annotations

import _thread
import json
from pathlib import Path

import pytest

from trimtab import BackendError, DryRun, Job, RunFailed, SpecError
from trimtab.backends.base import RunHandle
from trimtab.backends.docker import DockerBackend
from trimtab.backends.process import ProcessBackend
from trimtab.cli import main
from trimtab.dry_run import projection, trial_of, try_out
from trimtab.estimate import ModelFacts, peak_memory
from trimtab.events import Event, Finished, Phase, Step
from trimtab.plan import Plan, plan
from trimtab.progress import Silent
from trimtab.spec import JobSpec
from trimtab.staging import Staged

PAGES = Path(__file__).parents[1] / "support" / "pages"
PLAN = Plan(rows=10, tokens=1_000, steps=50, reasons=(), memory_mb=700)


def step(number: int, of: int, *, left: float, memory: int = 500) -> Step:
    return Step(
        step=number, of=of, epoch=0, loss=3, lr=1e-3, grad_norm=1, tokens_per_second=10 * number, seconds_left=left, memory_mb=memory
    )


def trial(*steps: Step, began: float = 104, ended: float = 109) -> list[Event]:
    return [Phase(name="load", at=101), Phase(name="train", at=began), *steps, Phase(name="save", at=ended)]


def job(small_job: JobSpec, home: Path, **changes: object) -> Job:
    given = small_job.train.model_dump(exclude={"spec_version", "model_digest", "data_digest"})
    return Job(**{**given, **changes}, data=PAGES, backend=ProcessBackend(home))


def estimated(staged: Staged) -> int:
    facts = ModelFacts.from_config(json.loads((staged.model.folder / "config.json").read_text()))
    return peak_memory(staged.train, facts, staged.train.dtype).total


def test_the_second_step_stands_for_all_that_follow():
    events = trial(step(1, 2, left=3.5, memory=600), step(2, 2, left=0, memory=550))
    found = projection(events, PLAN, submitted=100, max_minutes=None)
    assert found == DryRun(
        start_seconds=4,
        first_step_seconds=3.5,
        seconds_per_step=1.5,
        tokens_per_second=20,
        peak_memory_mb=600,
        memory_mb=700,
        steps=50,
        tokens=1_000,
        seconds=4 + 50 * 1.5,
    )
    assert "600 MB at its peak" in found.lines()[3]
    assert found.lines()[3].endswith("; rows of longer samples may take it to 700")
    assert "1:19: 50 steps, 1,000 tokens" in found.lines()[-1]


def test_a_job_of_one_step_is_measured_by_it():
    found = projection(trial(step(1, 1, left=0)), Plan(1, 100, 1, ()), submitted=100, max_minutes=None)
    assert (found.first_step_seconds, found.seconds_per_step, found.seconds) == (5, 5, 9)
    assert (found.peak_memory_mb, found.memory_mb) == (500, 500)


def test_max_minutes_ends_the_projection_too_and_says_so():
    events = trial(step(1, 2, left=2), step(2, 2, left=0))
    found = projection(events, PLAN, submitted=100, max_minutes=1)
    assert found.seconds == 60
    assert "all of them would take 2:34, max_minutes ends it before" in found.lines()[-1]


@pytest.mark.parametrize("events", [[], trial(), trial(step(1, 2, left=1))[:-1], [Finished(state="succeeded", seconds=1)]])
def test_a_trial_that_does_not_say_enough_is_refused(events):
    with pytest.raises(BackendError, match="the trial run did not say"):
        projection(events, PLAN, submitted=100, max_minutes=None)


def test_the_trial_is_the_same_job_but_for_its_end(small_job):
    asked = small_job.model_copy(update={"train": small_job.train.model_copy(update={"max_minutes": 0.001, "save_every_steps": 1})})
    tried = trial_of(asked)
    ends = {"max_steps", "max_minutes", "save_every_steps", "save_every_minutes"}
    assert tried.model_dump(exclude={"train"}) == asked.model_dump(exclude={"train"})
    assert tried.train.model_dump(exclude=ends) == asked.train.model_dump(exclude=ends)
    assert tried.train.preparation_digest() == asked.train.preparation_digest()
    assert (tried.train.max_steps, tried.train.max_minutes) == (2, 60)


def test_a_dry_run_measures_two_steps_and_leaves_no_run(small_job, staged, tmp_path):
    asked = job(small_job, tmp_path, max_steps=None)
    found = asked.fit(dry_run=True, progress=False)
    whole = plan(staged.train.model_copy(update={"max_steps": None}), staged.ledger)
    assert (found.steps, found.tokens) == (whole.steps, whole.tokens)
    assert found.seconds == pytest.approx(found.start_seconds + found.steps * found.seconds_per_step)
    assert 0 < found.seconds_per_step < 30
    assert 0 < found.start_seconds < 120
    assert found.tokens_per_second > 1
    assert found.peak_memory_mb <= found.memory_mb
    assert 0.6 < found.peak_memory_mb / estimated(staged) < 1.2  # as peak_memory says
    assert asked.backend.runs() == []
    assert list((tmp_path / "runs").iterdir()) == []


class Elsewhere(ProcessBackend):
    """A place with types of machines; each of its runs keeps the name of the type in a file beside it."""

    kind = "the cheapest"

    def on(self, instance: str) -> Elsewhere:
        other = Elsewhere(self.home, python=self.python)
        other.kind = instance
        return other

    def submit(self, spec, channels, run_id=None):
        (self.home / f"{run_id}.kind").write_text(self.kind)
        return super().submit(spec, channels, run_id)

    def remove(self, handle):
        raise BackendError(f"{handle} is held: let it go")


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_trial_runs_on_the_whole_jobs_machine_and_what_cannot_be_removed_is_said(small_job, staged, tmp_path):
    screen = Heard()
    spec = small_job.model_copy(update={"train": staged.train})
    whole = Plan(rows=10, tokens=1_000, steps=50, reasons=(), memory_mb=700, instance="the middle one")
    found = try_out(Elsewhere(tmp_path), spec, staged.channels, "trim-00000001", whole, screen)
    assert (tmp_path / "trim-00000001.kind").read_text() == "the middle one"
    assert found.steps == 50
    assert "the trial run process://trim-00000001 is still there: process://trim-00000001 is held: let it go" in screen.said
    ProcessBackend(tmp_path).remove(RunHandle("process", "trim-00000001"))


def test_a_dry_run_in_the_image_leaves_no_container_and_no_run(small_job, staged, tmp_path, client, xeon_image):
    asked = job(small_job, tmp_path)
    asked.backend = DockerBackend(tmp_path, image=xeon_image, client=client)
    before = {container.id for container in client.containers.list(all=True)}
    found = asked.fit(dry_run=True, progress=False)
    assert 0.6 < found.peak_memory_mb / estimated(staged) < 1.2
    assert found.seconds >= found.start_seconds > 0
    assert asked.backend.runs() == []
    assert list((tmp_path / "runs").iterdir()) == []
    left = [container for container in client.containers.list(all=True) if container.id not in before]
    assert [container.name for container in left if str(tmp_path) in json.dumps(container.attrs)] == []


def test_a_trial_that_fails_is_kept_so_that_its_log_can_be_read(small_job, staged, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no luck; exit 7\n")
    program.chmod(0o755)
    asked = job(small_job, tmp_path)
    asked.backend = ProcessBackend(tmp_path, python=str(program))
    with pytest.raises(RunFailed, match="no luck") as caught:
        asked.fit(dry_run=True, progress=False)
    assert list(asked.backend.logs(caught.value.handle)) == ["no luck"]


class Watched(ProcessBackend):
    """Calls `meanwhile` with each look at the run."""

    meanwhile = staticmethod(lambda backend, handle: None)

    def status(self, handle):
        found = super().status(handle)
        if not found.done:
            self.meanwhile(self, handle)
        return found


def sleeper(folder: Path, meanwhile) -> Watched:
    program = folder / "python"
    program.write_text("#!/bin/sh\ntrap 'exit 0' TERM; while :; do sleep 0.05; done\n")
    program.chmod(0o755)
    backend = Watched(folder, python=str(program))
    backend.meanwhile = meanwhile
    return backend


def test_ctrl_c_ends_the_trial_and_removes_it(small_job, staged, tmp_path, capsys):
    seen: list[RunHandle] = []

    def interrupt(backend: ProcessBackend, handle: RunHandle) -> None:
        seen.append(handle)
        if len(seen) == 1:
            _thread.interrupt_main()  # what the terminal does

    asked = job(small_job, tmp_path)
    asked.backend = sleeper(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        asked.fit(dry_run=True)
    assert seen
    assert asked.backend.runs() == []
    said = capsys.readouterr().err
    assert f"ending the trial run {seen[0]}" in said
    assert "The run goes on" not in said


def test_a_trial_that_someone_stops_says_so(small_job, staged, tmp_path):
    asked = job(small_job, tmp_path)
    asked.backend = sleeper(tmp_path, lambda backend, handle: ProcessBackend.stop(backend, handle))
    with pytest.raises(BackendError, match="was stopped before its end"):
        asked.fit(dry_run=True, progress=False)


def test_a_place_without_events_cannot_try(small_job, staged, tmp_path):
    class Silent:
        """A backend of five verbs, none of which is reached."""

        name = "silent"

    asked = job(small_job, tmp_path)
    asked.backend = Silent()
    with pytest.raises(BackendError, match="does not hand on events: see what would be sent with  --dry-run=render"):
        asked.fit(dry_run=True, progress=False)


def test_another_word_than_render_is_refused_before_anything_is_fetched(small_job, tmp_path):
    with pytest.raises(SpecError, match=r"there is no dry_run='rendr'"):
        job(small_job, tmp_path).fit(dry_run="rendr")


@pytest.fixture
def line(small_job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    options = ["--model", small_job.train.model, "--method", "lora", "--lora-rank", "4", "--dtype", "float32", "--max-seq-len", "128"]
    return [*options, "--questions", "0", "--replay", "0", "--learning-rate", "1e-3"]


def test_the_command_prints_a_line_for_each_figure_and_one_json_value(line, staged, capsys):
    assert main(["fit", "--dry-run", str(PAGES), *line]) == 0  # the data is not taken for the option's value
    out = capsys.readouterr().out
    assert [said.split("  ")[0] for said in out.splitlines()] == ["start", "step", "speed", "memory", "whole job"]
    assert main(["fit", str(PAGES), *line, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == set(DryRun.__dataclass_fields__)


@pytest.mark.parametrize("form", [["--dry-run=rendr"], ["--dry-run="]])
def test_a_dry_run_of_another_kind_is_no_command_line(form, line, capsys):
    assert main(["fit", *form, str(PAGES), *line]) == 2
    assert "is not one of 'run', 'render'" in capsys.readouterr().err


def test_what_follows_two_dashes_is_data(line, capsys):
    assert main(["fit", *line, "--", "--dry-run"]) == 1
    assert "--dry-run" in capsys.readouterr().err
