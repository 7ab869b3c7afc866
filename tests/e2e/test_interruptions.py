"""A run of this machine through everything that interrupts one: nothing is lost, and it says what to type next.

Kills at random moments are in test_kills.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.disks import fill, mounted, need_root, read_only
from support.job_tree import losses, make_job, run, start, train_here
from support.kills import whole
from trimtab.artifact import Artifact
from trimtab.backends.base import RunState
from trimtab.backends.process import ProcessBackend
from trimtab.errors import BackendError, SpecError, StagingError, TrimtabError
from trimtab.events import Checkpoint, Choice, Event, Finished, Phase, Step, read
from trimtab.layout import JobDir
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged, stage

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

PATIENCE = 300.0
STEPS, EVERY = 60, 2
OPTIONS = {"max_steps": STEPS, "epochs": 1000, "save_every_steps": EVERY, "lora_dropout": 0.1, "lora_rank": 32}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    """A job that ran to its end; what it was before lies in `before`."""
    job = make_job(tmp_path_factory.mktemp("straight") / "job", tiny_model, **OPTIONS)
    run(job, "prepare")
    shutil.copytree(job.root / "input", job.root / "before" / "input", symlinks=True)
    train_here(job)
    return job


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


# clients that are interrupted


def client(*words: str, home: Path, **how: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "TRIMTAB_HOME": str(home / "runs"), "TRIMTAB_CACHE": str(home / "cache")}
    command = [sys.executable, "-m", "trimtab", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_client_that_ends_while_the_data_is_prepared_leaves_nothing_half_made(tiny_model: Path, tmp_path: Path, number: int) -> None:
    pages = tmp_path / "pages.txt"
    pages.write_text("\n".join(f"Sentence number {n} is about the harbour and its {n} bells." for n in range(60_000)))
    words = ("fit", str(pages), "--model", str(tiny_model), "--replay", "0", "--questions", "0", "--detach")
    fit = client(*words, home=tmp_path)
    made = tmp_path / "cache" / "data"
    deadline = time.monotonic() + PATIENCE
    while not any(made.glob(".*/output/data/events.jsonl")):
        assert fit.poll() is None, fit.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fit.send_signal(number)
    said = fit.communicate(timeout=60)[0]
    assert not (tmp_path / "runs").exists()
    if number == signal.SIGKILL:
        [left] = made.glob(".*")
        while _works_in(left):
            assert time.monotonic() < deadline, "the preparing process outlives its client"
            time.sleep(0.05)
        (made / ".older").mkdir()
        pages.write_text("The bell is rung twice.")
        assert client(*words, "--dry-run=render", home=tmp_path).communicate(timeout=PATIENCE)[0]
        assert [path.name for path in made.glob(".*")] == [".older"]  # that one has no lock and is young: it may be just beginning
    else:
        assert fit.returncode == 130, said
        assert said.endswith("Nothing was started. Begin again by repeating the command.\n\ntrimtab: interrupted\n")
        assert list(made.glob(".*")) == []


def _works_in(folder: Path) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.samefile(folder):
                return True
    return False


DIES = """
import os, signal, sys
from pathlib import Path
from trimtab.backends import process, run_folder
from trimtab.backends.process import ProcessBackend
from trimtab.spec import JobSpec, TrainSpec

when, home, python, channels = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "before the record":
    run_folder.write_record = die
elif when == "before the start":
    process._start = die
else:  # when the process lives and nobody has noted its id
    write = process.write_json
    process.write_json = lambda path, value: die() if value.get("pid") else write(path, value)
job = JobSpec(train=TrainSpec(model="smollm2-135m-instruct"), data=("notes.txt",))
ProcessBackend(home, python=python).submit(job, {name: Path(channels) / name for name in ("train", "model")}, "trim-0d0d0d0d")
"""


@pytest.mark.parametrize("when", ["before the record", "before the start", "before the id is noted"])
def test_a_client_that_is_killed_while_it_submits_leaves_a_run_that_can_be_gone_on_with_or_none(tmp_path: Path, when: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap 'echo bye; exit' TERM; echo here; while :; do sleep 0.05; done\n")
    python.chmod(0o755)
    for name in ("train", "model"):
        (tmp_path / name).mkdir()
    backend = ProcessBackend(tmp_path / "home", python=str(python))
    done = subprocess.run([sys.executable, "-c", DIES, when, backend.home, python, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    folder = backend.home / "runs" / "trim-0d0d0d0d"
    job = JobSpec.model_validate({"train": {"model": "smollm2-135m-instruct"}, "data": ["notes.txt"]})
    channels = {name: tmp_path / name for name in ("train", "model")}
    if when == "before the record":
        assert folder.exists()
        assert backend.runs() == []
        other = backend.submit(job, channels)
        assert not folder.exists()  # the next run swept it
        backend.stop(other)
        return
    [listed] = backend.runs()
    if when == "before the start":
        assert listed.status.state is RunState.FAILED
        assert f"died before it could start it; start it with:  trimtab resume {listed.handle}" in listed.status.reason
        backend.resume(listed.handle)
    assert not backend.status(listed.handle).done
    deadline = time.monotonic() + PATIENCE
    while list(backend.logs(listed.handle)) != ["here"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    backend.stop(listed.handle)
    assert list(backend.logs(listed.handle))[-1] == "bye"
    assert backend.status(listed.handle).state is RunState.STOPPED


def test_of_two_who_resume_a_run_at_once_one_does(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho life; sleep 2\n")
    python.chmod(0o755)
    channels = {name: tmp_path / name for name in ("train", "model")}
    for folder in channels.values():
        folder.mkdir()
    backend = ProcessBackend(tmp_path / "home", python=str(python))
    handle = backend.submit(JobSpec.model_validate({"train": {"model": "smollm2-135m-instruct"}, "data": ["notes.txt"]}), channels)
    while not backend.status(handle).done:
        time.sleep(0.01)
    environment = {**os.environ, "TRIMTAB_HOME": str(backend.home)}
    command = [sys.executable, "-m", "trimtab", "resume", str(handle), "--detach"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=60)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 1], said
    assert f"{handle} is still running. Watch it:  trimtab logs -f {handle}" in "".join(said)
    while not backend.status(handle).done:
        time.sleep(0.01)
    assert list(backend.logs(handle)) == ["life", "life"]


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


# disks and folders


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
        os.truncate(path / "adapter.safetensors", 50)
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


# limits of time


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
    assert got.returncode == 0, f"libfaketime could not be had: run apt-get update, or see the message: {got.stderr}"
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
