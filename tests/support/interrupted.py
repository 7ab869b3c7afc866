"""A job that is interrupted and goes on, and what must hold of it then. The fixture `straight` is the same job that ran to its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support.job_tree import losses, train_here
from support.kills import whole
from trimtab.artifact import Artifact
from trimtab.events import Event, Phase, Step, read
from trimtab.layout import JobDir

PATIENCE = 300.0
STEPS, EVERY = 60, 2
OPTIONS = {"max_steps": STEPS, "epochs": 1000, "save_every_steps": EVERY, "lora_dropout": 0.1, "lora_rank": 32}


def fresh(straight: JobDir, root: Path, **changed: object) -> JobDir:
    shutil.copytree(straight.root / "before", root, symlinks=True, dirs_exist_ok=True)
    job = JobDir(root).make()
    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps(pairs | {name: json.dumps(value) for name, value in changed.items()}))
    return job


def goes_on_to_the_end(job: JobDir, straight: JobDir) -> None:
    """The next life ends as the run that nothing interrupted."""
    train_here(job)
    assert losses(job) == losses(straight)
    assert Artifact(job.model) == Artifact(straight.model)


def until(job: JobDir, process: subprocess.Popen[str], wanted: Callable[[Event], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(wanted(event) for event in read(job.events)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def is_phase(name: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Phase) and event.name == name


def is_step(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Step) and event.step >= number


def nothing_half_made(job: JobDir) -> None:
    assert whole(job.checkpoints) == sorted(int(path.name[5:]) for path in job.checkpoints.iterdir())
    assert not [path for path in (*job.model.rglob("*"), *job.root.glob("output/*")) if path.name.startswith(".")]
    Artifact(job.model).verify()
