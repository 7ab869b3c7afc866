"""Variant (a): `python -m trimtab_runtime train` from its first line on, which waits where it tells of a step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stepping import Pipe, work

from trimtab import events
from trimtab.layout import ROOT_VARIABLE, JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import __main__ as runtime
from trimtab_runtime.xeon import pages


def main() -> int:
    pages.begin_again(["train"])  # as the command's first line does
    pipe, asked = Pipe(), work()
    os.environ[ROOT_VARIABLE] = asked["folder"]
    job = JobDir(Path(asked["folder"])).make()
    options = {"lora_rank": asked["rank"], "lora_alpha": asked["alpha"], "lora_init": "zeros", "dtype": asked["dtype"]}
    steady = {"lr_schedule": "constant", "warmup_ratio": 0, "learning_rate": asked["learning_rate"], "save_every_minutes": 1e6}
    spec = TrainSpec(
        model=asked["model"], method=asked["method"], max_seq_len=asked["row_tokens"], epochs=10_000, replay=0, save_every_steps=10**6,
        **options, **steady,
    )  # fmt: skip
    job.hyperparameters.write_text(json.dumps(spec.to_hyperparameters()), encoding="utf-8")
    job.channel("model").symlink_to(asked["model"], target_is_directory=True)
    write(job, spec, asked["rows"])
    said: list[str] = []

    class Stepped(events.EventLog):
        tokens = 0  # of the next step, counted outside its time

        def write(self, event: Any) -> None:
            super().write(event)
            if isinstance(event, events.Choice):
                said.append(f"{event.name} {event.value}")
            if isinstance(event, events.Phase) and event.name == "train":
                pipe.ready(by="trimtab", packing="rows of whole documents, isolated by attention", said=said)
                self.tokens = tokens_of(job, spec, 0)
                pipe.wait()
            elif isinstance(event, events.Step):
                pipe.tokens = pipe.places = self.tokens
                pipe.done(event.loss)
                self.tokens = tokens_of(job, spec, event.step)
                pipe.wait()

    runtime.EventLog = Stepped  # type: ignore[misc]
    sys.argv = ["trimtab_runtime", "train"]
    return runtime.main(["train"])


def write(job: JobDir, spec: TrainSpec, rows: list[list[list[int]]]) -> None:
    """The documents of each row as a round of their own, which the product packs into that row: so steps take the rows in their order."""
    from trimtab_runtime.examples import Sample
    from trimtab_runtime.rows import write_rows

    rounds = [[Sample("document", ids, [True] * len(ids)) for ids in row] for row in rows]
    write_rows(job.channel("train"), rounds, spec.max_seq_len, {"preparation_digest": spec.preparation_digest()})


def tokens_of(job: JobDir, spec: TrainSpec, step: int) -> int:
    from trimtab_runtime.recipe import rows_of_step
    from trimtab_runtime.rows import PackedRows

    rows = PackedRows(job.channel("train"))
    return sum(len(rows[index].tokens) for index in rows_of_step(step, rows.ledger.rounds, spec))


if __name__ == "__main__":
    sys.exit(main())
