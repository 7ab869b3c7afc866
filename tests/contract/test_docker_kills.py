"""Runs in containers that are killed at random moments: nothing is lost; and two clients that resume one run at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from docker import DockerClient

from contract.backend_contract import finish
from support import kills
from support.kills import Killer
from support.script_runs import printed
from trimtab.backends.base import RunHandle
from trimtab.backends.docker import DockerBackend
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged

pytestmark = pytest.mark.usefixtures("volumes_before")

SEED = 20_261_122
KILLS = 10
STEPS, EVERY = 120, 3


def test_ten_kills_at_random_moments_lose_nothing(
    client: DockerClient, xeon_image: str, small_job: JobSpec, staged: Staged, tmp_path: Path
) -> None:
    changed = {"max_steps": STEPS, "epochs": 10_000, "save_every_steps": EVERY, "lora_dropout": 0.1}
    job = small_job.model_copy(update={"train": staged.train.model_copy(update=changed)})
    backend = DockerBackend(tmp_path / "home", image=xeon_image, client=client)
    straight, run = (Run(backend.submit(job, staged.channels), backend) for _ in range(2))
    killer = Killer(run, backend, lambda: client.api.kill(run.handle.id), random.Random(SEED), EVERY, STEPS * 3 // 4)
    print(f"seed {SEED}")
    try:
        for _ in range(KILLS):
            killer.one()
        kills.lost_nothing(run, straight)
    finally:
        print("\n".join(killer.said))
        for one in (straight, run):
            if not one.status().done:
                client.api.kill(one.handle.id)
                one.status()
    assert len(killer.said) == KILLS


def test_of_two_who_resume_a_run_at_once_one_does(
    run_script: Callable[[str], tuple[DockerBackend, RunHandle]], channels: dict[str, Path]
) -> None:
    backend, handle = run_script("exit 1")
    finish(backend, handle)
    over = channels["train"] / "over"
    (channels["train"] / "script").write_text("echo life; while [ ! -e /opt/ml/input/data/train/over ]; do sleep 0.1; done")
    environment = {**os.environ, "TRIMTAB_HOME": str(backend.home)}
    command = [sys.executable, "-m", "trimtab", "resume", str(handle), "--detach"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [one.communicate(timeout=120)[1] for one in both]
    finally:
        over.touch()  # so long that life lasts, however slow the slower one is
    assert sorted(one.returncode for one in both) == [0, 1], said
    assert f"{handle} is still running. Watch it:  trimtab logs -f {handle}" in "".join(said)
    finish(backend, handle)
    assert printed(backend, handle).count("life") == 1


def test_nothing_is_left_behind(left_behind) -> None:
    assert left_behind() == []
