"""The variant's side of benchmarks/step.py: it loads once, then takes an optimiser step whenever it is told, and says how long that took.

Speaks JSON lines: in, one line a step, and the end of the file to end; out, first `{"ready": facts}`, then for each step
`{"wall": s, "processor": s, "tokens": real ones, "places": padding counted, "memory": peak MB, "loss": float | null}`.
Runs in peers' environments too, so it imports the standard library, and what they all have when it is asked to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


class Pipe:
    """What is printed by others meanwhile goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._ready = False
        self._began = (0.0, 0.0)
        self.tokens = self.places = 0

    def ready(self, **facts: Any) -> None:
        if not self._ready:
            self._say({"ready": facts})
        self._ready = True

    def wait(self) -> None:
        """Until a step is asked for; ends the process where no more will be."""
        if not sys.stdin.readline():
            os._exit(0)
        self.tokens = self.places = 0
        self._began = (time.perf_counter(), time.process_time())

    def done(self, loss: float | None = None, took: tuple[float, float] | None = None) -> None:
        """`took`: seconds of the clock and of the processor, where they are not those since the step was asked for."""
        wall, processor = took or (time.perf_counter() - self._began[0], time.process_time() - self._began[1])
        counted = {"tokens": self.tokens, "places": self.places, "memory": peak_mb(), "loss": loss}
        self._say({"wall": wall, "processor": processor, **counted})

    def count(self, model: Any) -> None:
        """Let each forward of a torch model add up what it is given: `input_ids`, and as real what a two-dimensional mask says, or what
        has a label where the mask is of pairs."""

        def note(_: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids = named["input_ids"] if "input_ids" in named else given[0]
            mask = named.get("attention_mask")
            self.places += ids.numel()
            real = (mask > 0) if mask is not None and mask.ndim == 2 else (named["labels"] >= 0) if mask is not None else None
            self.tokens += ids.numel() if real is None else int(real.sum())

        model.register_forward_pre_hook(note, with_kwargs=True)

    def callback(self, **facts: Any) -> Any:
        """For transformers' Trainer and those made from it: its own loop, which waits before each step. `facts`, where no one said them."""
        from transformers import TrainerCallback

        pipe = self

        class Stepped(TrainerCallback):
            def on_train_begin(self, *_: object, model: Any, **__: object) -> None:
                pipe.count(model)
                pipe.ready(**facts)

            def on_step_begin(self, *_: object, **__: object) -> None:
                pipe.wait()

            def on_step_end(self, *_: object, **__: object) -> None:
                pipe.done()

        return Stepped()

    def _say(self, message: object) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def work() -> dict[str, Any]:
    """What is asked: the file that the command line names."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return found


def versions(*names: str) -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def peak_mb() -> int:
    """The process' peak resident set in MB of 2^20 bytes (proc(5), VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


def sees_others(model: Any, collate: Any, example: Any, low: bool) -> str:
    """Whether a sample's outputs change with what stands before it in a packed row: "isolated" or "samples see each other".

    `example(first, second)` is a row of two samples (lists of ids) as the trainer's data set has it, `collate` its collator.
    `low`: under bf16's autocast.
    """
    import torch

    found = []
    for first in (list(range(100, 116)), list(range(300, 316))):
        given = {name: value for name, value in collate([example(first, list(range(200, 216)))]).items() if name != "labels"}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            found.append(model(**given, use_cache=False).logits.float().reshape(-1, model.config.vocab_size)[16:32])
    far = float((found[0] - found[1]).norm() / found[0].norm())
    return "isolated" if far < 1e-3 else f"samples see each other (outputs change by {far:.0%})"
