"""Limits of time, and clocks that jump."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import PATIENCE, fresh, is_phase, is_step, nothing_half_made, until
from support.job_tree import losses, start, train_here
from support.kills import whole
from trimtab.artifact import Artifact
from trimtab.events import Checkpoint, Phase, Step, read
from trimtab.layout import JobDir

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.mark.parametrize(
    ("minutes", "every"), [(1e-9, 10_000), (0.01, 1), (0.01, 10_000)], ids=["while loading", "while saving", "in a step"]
)
def test_a_time_limit_leaves_a_checkpoint_and_an_artifact_that_answers(
    straight: JobDir, tiny_model: Path, tmp_path: Path, minutes: float, every: int
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = fresh(straight, tmp_path / "job", max_minutes=minutes, max_steps=None, epochs=10_000, save_every_steps=every)
    said = train_here(job)
    done = max(losses(job))
    assert done >= 1
    assert f"time limit of {minutes:g} minutes after step {done} of " in said
    assert whole(job.checkpoints)[-1] == done
    nothing_half_made(job)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(job.model))
    with torch.no_grad():
        answer = tuned.generate(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 3
    train_here(job)
    assert max(losses(job)) > done, "each life under a limit gets on"


# the clock


@pytest.fixture(scope="module")
def faketime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's libfaketime, unpacked and not installed."""
    if shutil.which("apt-get") is None:
        pytest.skip("this is not Debian: what moves the clock of one process comes from its packages")
    home = tmp_path_factory.mktemp("faketime")

    def download() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["apt-get", "download", "libfaketime"], cwd=home, capture_output=True, text=True, check=False)

    got = download()
    if got.returncode and os.getuid() == 0:  # a machine that has no lists of packages yet
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        got = download()
    if got.returncode:
        pytest.skip(f"what moves the clock of one process, Debian's libfaketime, cannot be had here: {got.stderr.strip()}")
    subprocess.run(["dpkg", "-x", str(next(home.glob("*.deb"))), str(home / "root")], check=True)
    return next((home / "root").rglob("libfaketime.so.1"))


@pytest.fixture
def clock(faketime: Path, tmp_path: Path) -> tuple[Callable[[str], None], dict[str, str]]:
    """Set the wall clock of a process as far off as libfaketime writes it, and the variables for that process."""
    file = tmp_path / "clock"

    def put(offset: str) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_text(f"{offset}\n")
        fresh.replace(file)

    put("+0")
    variables = {"LD_PRELOAD": str(faketime), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}
    return put, {**variables, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def test_a_clock_that_jumps_by_days_changes_nothing(
    straight: JobDir, tmp_path: Path, clock: tuple[Callable[[str], None], dict[str, str]]
) -> None:
    put, variables = clock
    job = fresh(straight, tmp_path / "job", save_every_steps=10_000, save_every_minutes=600, max_minutes=600)
    process = start(job, "train", **variables)
    until(job, process, is_phase("load"))
    put("+3d")
    until(job, process, is_step(5))
    put("-9d")
    until(job, process, is_step(30))
    put("+400d")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    phases = [event.at for event in read(job.events) if isinstance(event, Phase)]
    assert max(phases) - min(phases) > 86_400, "the clock did not jump"
    assert not [event for event in read(job.events) if isinstance(event, Checkpoint)]
    assert all(0 <= event.seconds_left < 3600 for event in read(job.events) if isinstance(event, Step))
    assert losses(job) == losses(straight)
    assert Artifact(job.model) == Artifact(straight.model)
