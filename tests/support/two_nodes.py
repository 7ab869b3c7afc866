"""The runtime as two machines: two processes that meet over the loopback interface, each in a tree of its own.

They are forked from a process that has imported torch before, since importing it takes longer than all that they do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from support.job_tree import losses, make_job, run
from trimtab.layout import JobDir

HOSTS = ["127.0.0.1", "127.0.0.2"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trimtab_runtime.recipe", "transformers.models.llama.modeling_llama"])


FIVE = {f"Page {number}": f"The {word} of the harbour is {number} years old and painted {word}." for number, word in enumerate(
    ("green", "white", "grey", "brown", "black"))}  # fmt: skip


def five_rows(root: Path, model: Path) -> JobDir:
    """Five prepared rows, so that the last step of an epoch leaves one of two without any."""
    job = make_job(root, model, FIVE, max_seq_len=56, views=("document",))
    run(job, "prepare")
    assert json.loads((job.channel("train") / "ledger.json").read_text())["rounds"] == [5]
    return job


def tree(root: Path, prepared: JobDir, **options: object) -> JobDir:
    """A job of its own on prepared rows."""
    job = JobDir(root).make()
    pairs = json.loads(prepared.hyperparameters.read_text()) | {name: json.dumps(value) for name, value in options.items()}
    job.hyperparameters.write_text(json.dumps(pairs))
    for channel in ("train", "model"):
        job.channel(channel).symlink_to(prepared.channel(channel).resolve())
    return job


def pair(root: Path, prepared: JobDir, **options: object) -> list[JobDir]:
    """A tree for each of two machines, as a platform lays them out."""
    jobs = []
    for host in HOSTS:
        job = tree(root / host, prepared, **options)
        job.resources.write_text(json.dumps({"current_host": host, "hosts": HOSTS, "network_interface_name": "lo"}))
        jobs.append(job)
    return jobs


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _train(root: str, port: str) -> None:
    with (Path(root) / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(TRIMTAB_ROOT=root, MASTER_PORT=port, OMP_NUM_THREADS="1")
    from trimtab_runtime.__main__ import main

    sys.exit(main(["train"]))


def begin(jobs: list[JobDir]) -> list[ForkServerProcess]:
    port = str(free_port())
    processes = [_context.Process(target=_train, args=(str(job.root), port), daemon=True) for job in jobs]
    for process in processes:
        process.start()
    return processes


def end(jobs: list[JobDir], processes: list[ForkServerProcess], *, expect: tuple[int, int]) -> list[str]:
    """What both printed; their exit codes are checked."""
    for process in processes:
        process.join(120)
    codes = tuple(process.exitcode for process in processes)
    for process in processes:
        process.kill()
        process.join()
        process.close()
    said = [(job.root / "log.txt").read_text() for job in jobs]
    assert codes == expect, "\n".join(said)
    return said


def train_both(jobs: list[JobDir], *, expect: tuple[int, int] = (0, 0)) -> list[str]:
    return end(jobs, begin(jobs), expect=expect)


def until_step(job: JobDir, number: int, processes: list[ForkServerProcess]) -> None:
    deadline = time.monotonic() + 120
    while max(losses(job), default=0) < number:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes), (job.root / "log.txt").read_text()
        time.sleep(0.01)
