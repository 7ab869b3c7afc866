"""Several ranks on one machine train as one run: in one tree, with one log, one reason, one end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.job_tree import losses, run, start, train_here
from support.two_nodes import HOSTS, five_rows, free_port, tree
from trimtab.errors import SpecError
from trimtab.events import Checkpoint, Choice, Finished, Step, read
from trimtab.layout import JobDir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    return five_rows(tmp_path_factory.mktemp("prepared") / "job", tiny_model)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test started; none of them, nor of their ranks, outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of the ranks, the first one first."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        given = re.search(rb'TRIMTAB_RANK={"number": (\d+)', Path(f"/proc/{pid}/environ").read_bytes())
        if given:
            found[int(given[1])] = int(pid)
    return [found[number] for number in sorted(found)]


def until_step(job: JobDir, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while max(losses(job), default=0) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def gone(pids: list[int]) -> bool:
    """Whether none is left, but for those that nobody has waited for yet, within seconds."""
    deadline = time.monotonic() + 10
    while True:
        left = [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()]
        if not left or time.monotonic() > deadline:
            return not left
        time.sleep(0.02)


def finished(job: JobDir) -> Finished:
    """The run's last word, which is said once."""
    (last,) = [event for event in read(job.events) if isinstance(event, Finished)]
    return last


def test_two_ranks_learn_what_one_learns_with_twice_the_rows(tmp_path: Path, prepared: JobDir) -> None:
    job = tree(tmp_path / "ranks", prepared, ranks=2, epochs=4, accumulation=2)
    said = run(job, "train")
    alone = tree(tmp_path / "alone", prepared, epochs=4, batch_rows=2, accumulation=2)
    train_here(alone)
    assert len(losses(job)) == 8
    assert list(losses(job).values()) == pytest.approx(list(losses(alone).values()), abs=1e-5)
    ours, theirs = (load_file(one.model / "adapter_model.safetensors") for one in (job, alone))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-4

    steps = [event.step for event in read(job.events) if isinstance(event, Step)]
    assert steps == list(range(1, 9))  # one of the two writes
    assert said.count("step=1/8") == 1
    assert "[rank 1]" not in said
    assert "ranks 2: asked for" in said
    assert re.search(r"rank 0: 1 thread, (processors|not bound)", said)
    assert "steps 8: 5 rows, 4 a step" in said
    assert "in each of 2 ranks" in next(
        event.value for event in read(job.events) if isinstance(event, Choice) and event.name == "peak_memory"
    )
    metrics = json.loads((job.model / "trimtab.json").read_text())["metrics"]
    assert (metrics["nodes"], metrics["ranks"]) == (1, 2)
    assert finished(job).state == "succeeded"
    assert not list(job.root.glob("output/*rank*"))


def test_a_stop_writes_a_checkpoint_and_only_as_many_ranks_go_on_from_it(
    tmp_path: Path, prepared: JobDir, started: list[subprocess.Popen[str]]
) -> None:
    job = tree(tmp_path / "job", prepared, ranks=2, epochs=20, lora_dropout=0.1)
    started.append(start(job, "train"))
    until_step(job, 5, started[0])
    ranks = ranks_of(started[0])
    assert len(ranks) == 2
    started[0].terminate()
    said, _ = started[0].communicate(timeout=60)
    assert started[0].returncode == 143, said
    assert gone(ranks)
    saved = [event for event in read(job.events) if isinstance(event, Checkpoint)][-1]
    assert (saved.step, saved.reason) == (max(losses(job)), "asked to stop")
    assert (finished(job).state, finished(job).reason) == ("stopped", "stopped by SIGTERM, after a checkpoint")

    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps(pairs | {"ranks": "1"}))
    with pytest.raises(SpecError, match=rf"step-0*{saved.step} was written with --ranks 2, and this run has --ranks 1"):
        train_here(job)
    job.hyperparameters.write_text(json.dumps(pairs))
    assert f"going on after step {saved.step}" in run(job, "train")
    assert sorted(losses(job)) == list(range(1, 61))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_is_named_and_the_other_ends(
    tmp_path: Path, prepared: JobDir, started: list[subprocess.Popen[str]], killed: int
) -> None:
    job = tree(tmp_path / "job", prepared, ranks=2, epochs=10_000)
    started.append(start(job, "train"))
    until_step(job, 3, started[0])
    ranks = ranks_of(started[0])
    os.kill(ranks[killed], signal.SIGKILL)
    began = time.monotonic()
    said, _ = started[0].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert started[0].returncode == 1
    assert gone(ranks)
    assert re.match(rf"rank {killed} was killed by SIGKILL with 0\.\d GB of memory in use: out of memory\.", job.cause())
    assert said.rstrip().endswith(job.cause())
    assert (finished(job).state, finished(job).reason) == ("failed", job.cause())


def test_when_the_run_itself_is_killed_its_ranks_end_and_then_the_folder_is_free(
    tmp_path: Path, prepared: JobDir, started: list[subprocess.Popen[str]]
) -> None:
    job = tree(tmp_path / "job", prepared, ranks=2, epochs=10_000)
    started.append(start(job, "train"))
    until_step(job, 3, started[0])
    ranks = ranks_of(started[0])
    started[0].kill()
    started[0].wait()
    assert gone(ranks)
    with (job.root / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_two_machines_of_two_ranks_learn_what_one_learns_with_four_times_the_rows(tmp_path: Path, prepared: JobDir) -> None:
    jobs = []
    for host in HOSTS:
        job = tree(tmp_path / host, prepared, ranks=2, epochs=4)
        job.resources.write_text(json.dumps({"current_host": host, "hosts": HOSTS, "network_interface_name": "lo"}))
        jobs.append(job)
    port = str(free_port())
    processes = [start(job, "train", MASTER_PORT=port) for job in jobs]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    alone = tree(tmp_path / "alone", prepared, epochs=4, batch_rows=4)
    train_here(alone)
    assert list(losses(jobs[0]).values()) == pytest.approx(list(losses(alone).values()), abs=1e-5)
    assert losses(jobs[1]) == {}
    assert not [*jobs[1].model.iterdir(), *jobs[1].checkpoints.iterdir()]
    metrics = json.loads((jobs[0].model / "trimtab.json").read_text())["metrics"]
    assert (metrics["nodes"], metrics["ranks"]) == (2, 2)


def test_a_failure_of_all_is_said_once_with_its_traceback(tmp_path: Path, prepared: JobDir) -> None:
    job = tree(tmp_path / "job", prepared, ranks=2)
    (job.root / "input" / "data" / "model").unlink()
    (job.root / "input" / "data" / "model").symlink_to(tmp_path / "nowhere")
    said = run(job, "train", expect=1)
    assert "Traceback" in job.failure.read_text()
    assert said.count(job.cause().splitlines()[0]) == 1
    assert finished(job).reason == job.cause()
