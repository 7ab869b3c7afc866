"""Fifty kills at random moments of a run's lives, by SIGKILL as a kernel out of memory does: nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

from support import kills
from support.kills import Killer
from trimtab.backends.process import ProcessBackend
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged

SEED = 20_261_122
KILLS, IN_THE_ARTIFACT = 50, 5
STEPS, EVERY = 400, 3  # more than the lives before the last ones take, even where a step takes ten milliseconds


def test_fifty_kills_at_random_moments_lose_nothing(small_job: JobSpec, staged: Staged, tmp_path: Path) -> None:
    changed = {"max_steps": STEPS, "epochs": 10_000, "save_every_steps": EVERY, "lora_dropout": 0.1}
    job = small_job.model_copy(update={"train": staged.train.model_copy(update=changed)})
    backend = ProcessBackend(tmp_path / "home")
    straight, run = (Run(backend.submit(job, staged.channels), backend) for _ in range(2))

    def kill(one: Run = run) -> None:
        os.killpg(json.loads((backend.home / "runs" / one.handle.id / "process.json").read_text())["pid"], signal.SIGKILL)

    killer = Killer(run, backend, kill, random.Random(SEED), EVERY, STEPS * 3 // 4)
    print(f"seed {SEED}")
    try:
        for _ in range(KILLS):
            killer.one()
        for _ in range(IN_THE_ARTIFACT):
            if not killer.one("save", within=0.02):
                break
        kills.lost_nothing(run, straight)
    finally:
        print("\n".join(killer.said))
        for one in (straight, run):
            if not one.status().done:
                kill(one)
    assert len(killer.said) >= KILLS
