"""Disks that fill up and folders that cannot be written: nothing is lost, and it says what is missing and what to type next."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disks import fill, mounted, need_root, read_only
from support.interrupted import PATIENCE, fresh, is_step
from support.job_tree import losses, run, train_here
from support.kills import whole
from trimtab.artifact import Artifact
from trimtab.backends.base import RunState
from trimtab.backends.process import ProcessBackend
from trimtab.errors import BackendError, StagingError, TrimtabError
from trimtab.events import Checkpoint
from trimtab.layout import JobDir
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged, stage

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.mark.parametrize(
    ("leave", "changed", "said"),
    [
        (1_000_000, {}, "the checkpoint of step "),
        (0, {"save_every_steps": 10_000}, "the disk is full: 0.0 MB of it are free."),
        (600_000, {"save_every_steps": 10_000}, "the artifact could not be written"),
    ],
    ids=["checkpoint", "events", "artifact"],
)
def test_a_full_disk_loses_nothing_and_says_what_is_missing(
    straight: JobDir, small_disk: Path, small_job: JobSpec, leave: int, changed: dict[str, int], said: str
) -> None:
    pairs = json.loads((straight.root / "before/input/config/hyperparameters.json").read_text())
    train = small_job.train.from_hyperparameters({**pairs, **{name: json.dumps(value) for name, value in changed.items()}})
    backend = ProcessBackend(small_disk / "home")
    job = small_job.model_copy(update={"train": train})
    run = Run(backend.submit(job, {name: straight.channel(name) for name in ("train", "model")}), backend)
    tree = JobDir(backend.home / "runs" / run.handle.id)
    while not any(is_step(3)(event) for event in run.events()):
        assert not run.status().done, run.status().reason
        time.sleep(0.005)
    with _between_checkpoints(tree):
        fill(small_disk, leave=leave)
    while not run.status().done:
        time.sleep(0.02)
    status = run.status()
    assert status.state is RunState.FAILED
    assert said in status.reason
    assert "See  df -h " in status.reason
    assert f"and make room, then  trimtab resume {run.handle}" in status.reason
    if leave:
        assert "the disk is full: it takes " in status.reason
        assert " are free in " in status.reason
    steps = sorted(int(path.name[5:]) for path in tree.checkpoints.iterdir())
    assert whole(tree.checkpoints) == steps
    told = [event.step for event in run.events() if isinstance(event, Checkpoint)]
    assert steps[-1:] == told[-1:]
    assert not (tree.model / "trimtab.json").exists()
    assert [path.name for path in tree.model.iterdir()] == []

    (small_disk / "ballast").unlink()
    assert run.resume().wait(PATIENCE).state is RunState.SUCCEEDED
    assert {step.step: step.loss for step in run.metrics()} == losses(straight)
    assert run.artifact() == Artifact(straight.model)


@contextlib.contextmanager
def _between_checkpoints(tree: JobDir) -> Iterator[None]:
    """The run stands still, and not in the middle of a checkpoint, which frees the room of an older one at its end."""
    pid = json.loads((tree.root / "process.json").read_text())["pid"]
    while True:
        os.killpg(pid, signal.SIGSTOP)
        time.sleep(0.02)  # until it does
        steps = sorted(int(path.name[5:]) for path in tree.checkpoints.iterdir())
        if whole(tree.checkpoints) == steps and len(steps) <= 2:
            break
        os.killpg(pid, signal.SIGCONT)
        time.sleep(0.02)
    try:
        yield
    finally:
        os.killpg(pid, signal.SIGCONT)


def test_a_disk_too_small_for_one_checkpoint_is_told_at_the_start(straight: JobDir, tmp_path: Path) -> None:
    need_root()
    job = fresh(straight, tmp_path / "job")
    told = r"^a checkpoint will not fit: it takes \d\.\d MB, and 1\.0 MB are free"
    with mounted(job.checkpoints, "size=1m"), pytest.raises(StagingError, match=told):
        train_here(job)
    assert not losses(job)


@pytest.mark.parametrize("place", ["checkpoints", "model", "output/data", "."])
def test_a_folder_that_cannot_be_written_is_told_before_training(straight: JobDir, tmp_path: Path, place: str) -> None:
    need_root()
    job = fresh(straight, tmp_path / "job")
    (job.root / "output" / "data").mkdir(exist_ok=True)
    with read_only(job.root / place):
        said = run(job, "train", expect=1)
    closed = job.root / ("output/data" if place == "." else place)
    assert f"{closed} cannot be written (Read-only file system)" in said
    assert "mend that, then  trimtab resume RUN" in said
    assert "allocator" not in said  # it has not begun to load torch
    if place != ".":
        assert job.cause().startswith(f"{job.root / place} cannot be written")


def test_a_home_and_a_cache_that_cannot_be_written_are_told_with_the_variable_to_set(
    small_job: JobSpec, staged: Staged, tmp_path: Path
) -> None:
    need_root()
    backend = ProcessBackend(tmp_path / "home")
    backend.home.mkdir()
    (tmp_path / "cache").mkdir()
    with read_only(backend.home), pytest.raises(BackendError, match=r"Read-only file system.*set TRIMTAB_HOME to"):
        backend.submit(small_job, staged.channels)
    with read_only(tmp_path / "cache"), pytest.raises(TrimtabError, match=r"Read-only file system.*set TRIMTAB_CACHE to"):
        stage(small_job, cache=tmp_path / "cache", say=lambda line: None)
