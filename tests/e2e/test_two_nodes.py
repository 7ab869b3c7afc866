"""Two machines train as one, stop as one, and end when the other does. Here they are two processes; test_docker_nodes.py has containers."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.job_tree import losses, start, train_here
from support.two_nodes import HOSTS, begin, end, five_rows, free_port, pair, train_both, tree, until_step
from trimtab.errors import SpecError
from trimtab.events import Checkpoint, Finished, Step, read
from trimtab.layout import JobDir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    return five_rows(tmp_path_factory.mktemp("prepared") / "job", tiny_model)


def test_two_machines_learn_what_one_learns_with_twice_the_rows(tmp_path: Path, prepared: JobDir) -> None:
    first, second = jobs = pair(tmp_path, prepared, epochs=4, accumulation=2)
    port = str(free_port())
    processes = [start(job, "train", MASTER_PORT=port) for job in jobs]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    alone = tree(tmp_path / "alone", prepared, epochs=4, batch_rows=2, accumulation=2)
    train_here(alone)
    assert len(losses(first)) == 8
    assert list(losses(first).values()) == pytest.approx(list(losses(alone).values()), abs=1e-5)
    ours, theirs = (load_file(job.model / "adapter_model.safetensors") for job in (first, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=0)

    assert "steps 8: 5 rows, 4 a step" in said[1]
    assert json.loads((first.model / "trimtab.json").read_text())["metrics"]["nodes"] == 2
    events = list(read(second.events))
    assert events[-1] == Finished(state="succeeded", seconds=events[-1].seconds)
    assert not any(isinstance(event, Step | Checkpoint) for event in events)
    assert not [*second.model.iterdir(), *second.checkpoints.iterdir()]
    assert "step=" not in said[1]
    assert "[c10d]" not in "".join(said)


LONG = {"epochs": 20, "lora_dropout": 0.1, "save_every_steps": 4}


@pytest.mark.parametrize(
    ("asked", "accumulation"),
    [(0, 1), (1, 1), pytest.param(0, 8, id="within a step, of three passes on one machine and two on the other")],
)
def test_a_stop_asked_of_one_machine_stops_both_after_the_same_step(
    tmp_path: Path, prepared: JobDir, asked: int, accumulation: int
) -> None:
    options = {**LONG, "accumulation": accumulation}
    first, second = jobs = pair(tmp_path / "stopped", prepared, **options)
    processes = begin(jobs)
    until_step(first, 5, processes)
    processes[asked].terminate()
    end(jobs, processes, expect=(143, 143))
    saved = [event for event in read(first.events) if isinstance(event, Checkpoint)][-1]
    assert (saved.step, saved.reason) == (max(losses(first)), "asked to stop")
    assert [event.state for job in jobs for event in read(job.events) if isinstance(event, Finished)] == ["stopped", "stopped"]
    assert not list(second.checkpoints.iterdir())

    if asked:  # once is enough for what follows
        return
    with pytest.raises(SpecError, match=rf"step-0*{saved.step} was written with --nodes 2, and this run has --nodes 1"):
        train_here(JobDir(shutil.copytree(first.root, tmp_path / "alone", symlinks=True)))
    said = train_both(jobs)
    assert all(f"going on after step {saved.step}" in text for text in said)
    straight = pair(tmp_path / "straight", prepared, **options)
    train_both(straight)
    assert losses(first) == losses(straight[0])
    names = ("model/adapter_model.safetensors",)
    assert all((first.root / name).read_bytes() == (straight[0].root / name).read_bytes() for name in names)


def test_a_checkpoint_of_one_machine_is_not_gone_on_with_by_two(tmp_path: Path, prepared: JobDir) -> None:
    jobs = pair(tmp_path, prepared, max_steps=3, save_every_steps=1)
    train_here(jobs[0])
    train_both(jobs, expect=(1, 1))
    reason = jobs[0].cause()
    assert reason == jobs[1].cause()
    assert "step-00000002 was written with --nodes 1, and this run has --nodes 2" in reason


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_machine_dies_the_other_ends_and_names_it(tmp_path: Path, prepared: JobDir, killed: int) -> None:
    jobs = pair(tmp_path, prepared, epochs=10_000)
    processes = begin(jobs)
    until_step(jobs[0], 3, processes)
    processes[killed].kill()
    began = time.monotonic()
    processes[1 - killed].join(60)
    assert time.monotonic() - began < 30  # well below the minutes that silence is borne
    codes = (-signal.SIGKILL, 1) if killed == 0 else (1, -signal.SIGKILL)
    said = end(jobs, processes, expect=codes)[1 - killed]
    left = jobs[1 - killed]
    assert left.cause().startswith(f"lost {HOSTS[killed]}: its connection was closed")
    assert left.cause() in said
    last = list(read(left.events))[-1]
    assert isinstance(last, Finished)
    assert (last.state, last.reason) == ("failed", left.cause())


@pytest.mark.parametrize("failing", [0, 1])
def test_when_a_machine_fails_the_other_says_why(tmp_path: Path, prepared: JobDir, failing: int) -> None:
    jobs = pair(tmp_path, prepared)
    damaged = tmp_path / "train"
    shutil.copytree(prepared.channel("train"), damaged)
    (damaged / "tokens.npy").write_bytes((damaged / "tokens.npy").read_bytes()[:-4])
    jobs[failing].channel("train").unlink()
    jobs[failing].channel("train").symlink_to(damaged)
    train_both(jobs, expect=(1, 1))
    assert "tokens.npy does not match its digest" in jobs[failing].cause()
    assert jobs[1 - failing].cause() == f"{HOSTS[failing]} failed: {jobs[failing].cause()}"


def test_a_loss_that_is_no_number_stops_both_for_the_same_reason(tmp_path: Path, prepared: JobDir) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(prepared.channel("model").resolve(), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    jobs = pair(tmp_path, prepared)
    for job in jobs:
        job.channel("model").unlink()
        job.channel("model").symlink_to(broken)
    train_both(jobs, expect=(1, 1))
    assert re.match(r"the loss is nan at step 1, row \d: try a smaller learning_rate", jobs[0].cause())
    assert jobs[0].cause() == jobs[1].cause()


def test_a_time_limit_is_agreed_on(tmp_path: Path, prepared: JobDir) -> None:
    first, second = jobs = pair(tmp_path, prepared, epochs=10_000, max_minutes=0.001)
    train_both(jobs)
    assert "time limit" in json.loads((first.model / "trimtab.json").read_text())["metrics"]["ended_by"]
    assert not list(second.model.iterdir())
