"""A run of this machine through what interrupts one: nothing is lost, and it says what to type next.

Clients, disks and clocks are in test_interrupted_clients.py, test_full_disks.py and test_clock.py, kills at random moments in
test_kills.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import PATIENCE, fresh, goes_on_to_the_end, is_phase, is_step, nothing_half_made, until
from support.job_tree import losses, run, start, train_here
from support.kills import whole
from trimtab.backends.base import RunState
from trimtab.backends.process import ProcessBackend
from trimtab.errors import SpecError, StagingError
from trimtab.events import Checkpoint, Choice, Event, Finished, read
from trimtab.layout import JobDir
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import stage

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.mark.parametrize(
    ("wanted", "number", "times", "ending"),
    [
        (is_phase("start"), signal.SIGTERM, 2, "stopped"),
        (is_phase("load"), signal.SIGHUP, 1, "stopped"),
        (is_step(3), signal.SIGINT, 2, "stopped"),
        (lambda event: isinstance(event, Checkpoint), signal.SIGTERM, 1, "stopped"),
        (is_phase("save"), signal.SIGTERM, 2, "succeeded"),
    ],
    ids=["start", "load", "step", "checkpoint", "artifact"],
)
def test_who_asks_a_run_to_end_gets_a_checkpoint_and_an_artifact(
    straight: JobDir, tmp_path: Path, wanted: Callable[[Event], bool], number: int, times: int, ending: str
) -> None:
    """SIGTERM, a terminal that is closed (SIGHUP), and Ctrl-C, which the whole process group gets; also twice in a row."""
    job = fresh(straight, tmp_path / "job")
    (job.root / ".lock").write_text(f"{os.getpid()} 1999-12-31\n")  # of a process that held it once and lives: it is nobody's lock
    process = start(job, "train", start_new_session=True)
    until(job, process, wanted)
    for _ in range(times):
        os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=PATIENCE)
    last = list(read(job.events))[-1]
    assert isinstance(last, Finished), said
    assert last.state == ending, said
    nothing_half_made(job)
    assert not job.failure.exists()
    if ending == "succeeded":
        assert process.returncode == 0
        assert losses(job) == losses(straight)
    else:
        assert process.returncode == 128 + number
        assert last.reason == f"stopped by {signal.Signals(number).name}, after a checkpoint"
        assert whole(job.checkpoints)[-1] == max(losses(job), default=0)
        goes_on_to_the_end(job, straight)


def test_a_second_process_in_a_folder_is_told_who_works_there(straight: JobDir, tmp_path: Path) -> None:
    job = fresh(straight, tmp_path / "job")
    process = start(job, "train", start_new_session=True)
    try:
        until(job, process, is_phase("start"))
        said = run(job, "train", expect=1)
        assert f"another trimtab process works in {job.root} (process {process.pid}, since 20" in said
        assert f"UTC): wait for it, or end it, with a checkpoint, by  kill {process.pid}" in said
    finally:
        process.kill()
        process.communicate()
    assert "works in" not in train_here(job)  # a dead process holds nothing
    assert losses(job) == losses(straight)


# memory


def test_a_run_out_of_memory_says_so_and_can_go_on_with_more(tiny_model: Path, small_job: JobSpec, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"The {n}th ship came in at dawn and left at dusk." for n in range(4_000)))
    options = {"max_seq_len": 512, "batch_rows": 24, "max_steps": 1, "views": ("document",)}
    spec = small_job.model_copy(update={"train": small_job.train.model_copy(update=options), "data": (str(text),)})
    staged = stage(spec, say=lambda line: None)
    backend = ProcessBackend(tmp_path / "home")
    big = Run(backend.submit(spec.model_copy(update={"train": staged.train}), staged.channels), backend)
    pid = json.loads((backend.home / "runs" / big.handle.id / "process.json").read_text())["pid"]
    while not any(is_phase("load")(event) for event in big.events()):
        assert not big.status().done, big.status().reason
        time.sleep(0.005)
    size = next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmSize:"))
    resource.prlimit(pid, resource.RLIMIT_AS, ((size << 10) + (250 << 20), resource.RLIM_INFINITY))
    while not big.status().done:
        time.sleep(0.05)
    reason = big.status().reason
    expected = next(event.value for event in big.events() if isinstance(event, Choice) and event.name == "peak_memory")
    assert reason.startswith("out of memory in the phase train: the process held "), reason
    assert f"it was expected to take {expected}" in reason
    assert "its address space is limited to " in reason
    assert f"trimtab resume {big.handle} ; or start a new run" in reason
    assert "--batch-rows 1 --accumulation 24 (the same steps), --max-seq-len 256, --method qlora" in reason
    assert big.resume().wait(PATIENCE).state is RunState.SUCCEEDED


# damaged checkpoints


def test_damaged_checkpoints_are_said_aloud_and_when_none_is_left_nothing_begins_again(straight: JobDir, tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job")
    shutil.copytree(straight.root, job.root, symlinks=True)
    older, newer = sorted(job.checkpoints.iterdir())
    with (newer / "optimizer.safetensors").open("r+b") as file:
        file.seek(200)
        byte = file.read(1)
        file.seek(200)
        file.write(bytes([byte[0] ^ 4]))
    said = train_here(job)
    reason = f"checkpoint {newer.name} is passed over: {newer.name}/optimizer.safetensors does not match its digest: truncated or changed"
    assert reason in said
    told = [event for event in read(job.events) if isinstance(event, Choice) and event.name == "checkpoint"]
    assert [(event.value, event.reason) for event in told] == [(older.name, reason)]
    assert losses(job) == losses(straight)

    before = losses(job)
    for path in job.checkpoints.iterdir():
        os.truncate(path / "parameters.safetensors", 50)
    kept = sorted(path.name for path in job.checkpoints.iterdir())
    with pytest.raises(StagingError, match=rf"no checkpoint in {job.checkpoints} is whole: .*rm -r {job.checkpoints}/step-\*  and then"):
        train_here(job)
    assert sorted(path.name for path in job.checkpoints.iterdir()) == kept
    for path in job.checkpoints.iterdir():
        shutil.rmtree(path)
    train_here(job)  # as the message said
    assert losses(job) == before


def test_a_checkpoint_of_another_job_is_neither_used_nor_removed(straight: JobDir, tmp_path: Path) -> None:
    """Whose it is nobody knows: with the one before it would be thrown away at the next save."""
    job = fresh(straight, tmp_path / "job", learning_rate=0.5)
    shutil.copytree(straight.checkpoints, job.checkpoints, dirs_exist_ok=True)
    with pytest.raises(SpecError, match=r"was written by another job \(spec differs\): start a new run, or repeat the old options"):
        train_here(job)
    assert whole(job.checkpoints) == whole(straight.checkpoints)
