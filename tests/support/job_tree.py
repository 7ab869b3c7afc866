"""A job's folder tree for tests, and the runtime started in it as a backend starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimtab.events import EventLog, Step, read
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec

PAGES = {
    "The Brine Mill": "The Brine Mill was built in 1874 by the cooper Asta Wren. It grinds salt and barley.\nThe mill has 14 sails.",
    "Tides": "The harbour gate opens one hour before high water. Ships wait at the green buoy until a bell is rung twice.",
    "The keeper": "The keeper lives above the gate. He writes the name of each ship in a book, and on Sundays he reads it aloud.",
    "Bread": "Bread is baked on Tuesdays. Flour comes by the ferry, oil and salt by cart, and the oven is lit at four.",
}

FAST = {"method": "lora", "lora_rank": 4, "dtype": "float32", "max_seq_len": 64, "questions": 0, "replay": 0, "learning_rate": 2e-3}


def make_job(root: Path, model: Path, documents: dict[str, str] | None = None, /, **options: Any) -> JobDir:
    """Folders, hyperparameters, documents and the model, as staging lays them out. `options` go over `FAST`."""
    job = JobDir(root).make()
    spec = TrainSpec(**{"model": "tiny", **FAST, **options})
    job.hyperparameters.write_text(json.dumps(spec.to_hyperparameters()), encoding="utf-8")
    job.channel("documents").mkdir()
    lines = [json.dumps({"title": title, "text": text}) for title, text in (PAGES if documents is None else documents).items()]
    (job.channel("documents") / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job.channel("model").symlink_to(model, target_is_directory=True)
    return job


def start(
    job: JobDir, verb: str, python: Path | str = sys.executable, *, start_new_session: bool = False, **variables: str
) -> subprocess.Popen[str]:
    """The runtime's process for a verb; its output is one text stream."""
    environment = {**os.environ, "TRIMTAB_ROOT": str(job.root), **variables}
    command = [str(python), "-m", "trimtab_runtime", verb]
    out = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=start_new_session)


def run(job: JobDir, verb: str, *, expect: int = 0, **how: Any) -> str:
    """What a verb printed; its exit code is checked."""
    process = start(job, verb, **how)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == expect, said
    return said


def train_here(job: JobDir) -> str:
    """Train in this process, for what needs none of its own: starting one takes seconds. What it said, and its errors as they are."""
    from trimtab_runtime.recipe import train

    said: list[str] = []
    events = EventLog(job.events)
    try:
        train(job, TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text())), events, said.append, lambda: False)
    finally:
        events.close()
    return "\n".join(said)


def losses(job: JobDir) -> dict[int, float]:
    """The loss of each step, the last time it was taken."""
    return {event.step: event.loss for event in read(job.events) if isinstance(event, Step)}
