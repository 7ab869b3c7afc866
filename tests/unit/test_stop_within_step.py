"""A run that is asked to stop, or whose time is up, between the passes of one optimiser step: it stops as after the step before."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.job_tree import losses, make_job, run, train_here
from trimtab.events import Checkpoint, EventLog, read
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import recipe
from trimtab_runtime.rows import PackedRows

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

PASSES = 4
STEPS = 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    """A run of `STEPS` steps of `PASSES` passes each, with dropout, so that each pass draws random numbers."""
    options = {"accumulation": PASSES, "max_steps": STEPS, "epochs": 10, "lora_dropout": 0.1, "max_seq_len": 48}
    job = make_job(tmp_path_factory.mktemp("straight") / "job", tiny_model, **options)
    run(job, "prepare")
    assert len(PackedRows(job.channel("train"))) >= PASSES
    (job.root / "before").mkdir()
    shutil.copytree(job.root / "input", job.root / "before" / "input", symlinks=True)
    train_here(job)
    assert len(losses(job)) == STEPS
    return job


def train(job: JobDir, stop: Callable[[], bool], **changed: float) -> str:
    spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    events = EventLog(job.events)
    try:
        return recipe.train(job, spec.model_copy(update=changed), events, lambda line: None, stop)
    finally:
        events.close()


def fresh(straight: JobDir, root: Path) -> JobDir:
    shutil.copytree(straight.root / "before", root, symlinks=True)
    return JobDir(root).make()


@pytest.mark.parametrize("looks", [0, 1, PASSES - 1, PASSES + 2, 2 * PASSES + 1])
def test_a_stop_within_a_step_drops_it_and_the_next_life_takes_it_whole(straight: JobDir, tmp_path: Path, looks: int) -> None:
    job, asked = fresh(straight, tmp_path / "job"), list[bool]()

    def stop() -> bool:
        asked.append(True)
        return len(asked) == looks + 1  # the flag is looked at before the first step, between passes, and after the step

    done = looks // PASSES
    assert train(job, stop) == "stopped"
    assert len(asked) == looks + 1
    assert list(losses(job)) == list(range(1, done + 1))
    saved = [event for event in read(job.events) if isinstance(event, Checkpoint)]
    assert [(event.step, event.reason) for event in saved] == [(done, "asked to stop")]
    metrics = json.loads((job.model / "trimtab.json").read_text())["metrics"]
    assert (metrics["steps"], metrics["ended_by"]) == (done, f"asked to stop after step {done} of {STEPS}")
    assert metrics["last_loss"] == losses(job).get(done)

    assert train(job, lambda: False) == "succeeded"
    assert losses(job) == losses(straight)
    for name in ("adapter_model.safetensors", "README.md"):
        assert (job.model / name).read_bytes() == (straight.model / name).read_bytes()


def test_a_stop_right_after_a_resume_leaves_the_checkpoint_that_is_there(straight: JobDir, tmp_path: Path) -> None:
    job = fresh(straight, tmp_path / "job")
    looks = iter([False] * (1 + PASSES) + [True])
    assert train(job, lambda: next(looks), keep_checkpoints=1) == "stopped"
    (checkpoint,) = job.checkpoints.iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert train(job, lambda: True, keep_checkpoints=1) == "stopped"
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == written


def test_time_that_is_up_ends_each_life_after_its_first_step_so_that_all_get_on(straight: JobDir, tmp_path: Path) -> None:
    """Loading may take longer than the limit: then every life takes one whole step, the first after a resume, too."""
    job = fresh(straight, tmp_path / "job")
    for life in range(1, STEPS):
        assert train(job, lambda: False, max_minutes=1e-6) == "succeeded"
        assert list(losses(job)) == list(range(1, life + 1))
        ended = json.loads((job.model / "trimtab.json").read_text())["metrics"]["ended_by"]
        assert ended == f"time limit of 1e-06 minutes after step {life} of {STEPS}"
    assert train(job, lambda: False, max_minutes=1e-6) == "succeeded"
    assert losses(job) == losses(straight)
    assert (job.model / "adapter_model.safetensors").read_bytes() == (straight.model / "adapter_model.safetensors").read_bytes()


def test_time_that_is_up_within_a_later_step_gives_that_step_up(straight: JobDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, looks, ahead, clock = fresh(straight, tmp_path / "job"), list[bool](), [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])

    def stop() -> bool:  # asked right after each look at the clock: before the first step, between its passes, and after it
        looks.append(True)
        if len(looks) == PASSES + 1:
            ahead[0] = 7200.0
        return False

    assert train(job, stop, max_minutes=60) == "succeeded"
    assert list(losses(job)) == [1]
    assert len(looks) == PASSES + 2, "the second step is given up after its first pass"
