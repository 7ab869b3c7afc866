"""What a job would do, from its spec and its ledger: how many tokens and steps, and why."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.estimate import PeakMemory, optimiser_steps
from trimtab.ledger import Ledger
from trimtab.spec import TrainSpec


@dataclass(frozen=True)
class Plan:
    """`steps` optimiser steps over `rows` rows see `tokens` tokens, each pass counted; `reasons` says where the figures come from.

    `memory_mb` (2^20 bytes) is an estimate of what training takes on each machine; None where the model's sizes are not known.
    """

    rows: int
    tokens: int
    steps: int
    reasons: tuple[str, ...]
    memory_mb: int | None = None


def plan(spec: TrainSpec, ledger: Ledger, nodes: int = 1, memory: PeakMemory | None = None) -> Plan:
    """The rows of one step are `batch_rows * accumulation` on each machine; the last step of an epoch takes what is left."""
    steps, whole = optimiser_steps(spec, ledger.rounds, nodes)
    in_step, per_row = spec.batch_rows * spec.accumulation * nodes, ledger.total.trained / max(1, ledger.rows)
    rows = sum(ledger.rounds[epoch % len(ledger.rounds)] for epoch in range(spec.epochs))
    tokens = round(per_row * rows * steps / whole) if whole else 0
    reasons = [
        f"steps {steps:,}: "
        + (f"max_steps, of {whole:,}" if steps < whole else f"{spec.epochs} epochs of {whole / spec.epochs:,.3g}, {in_step} rows in each"),
        f"tokens {tokens:,}: what {steps:,} steps see, each pass counted",
    ]
    if spec.max_minutes is not None:
        reasons.append(f"time at most {spec.max_minutes:g} min: max_minutes; the run may stop before its last step")
    if memory is not None:
        reasons.append(
            f"memory about {memory.total:,} MB: model {memory.base:,}, adapters {memory.adapters:,}, activations of {spec.batch_rows} x "
            f"{spec.max_seq_len:,} tokens up to {memory.activations:,}, logits {memory.logits:,}, libraries {memory.runtime:,}; "
            "--dry-run measures it"
        )
    return Plan(ledger.rows, tokens, steps, tuple(reasons), memory.total if memory is not None else None)
