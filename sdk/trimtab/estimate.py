"""What a spec costs before it runs, from facts alone. Pure; both sides of the wall use it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trimtab.spec import TrainSpec


def optimiser_steps(spec: TrainSpec, rounds: Sequence[int], nodes: int = 1) -> tuple[int, int]:
    """(steps of the run, steps of all its epochs); they differ by max_steps. `rounds`: packed rows of each round."""
    whole = sum(epoch_steps(spec, rounds, epoch, nodes) for epoch in range(spec.epochs))
    return (whole if spec.max_steps is None else min(whole, spec.max_steps)), whole


def epoch_steps(spec: TrainSpec, rounds: Sequence[int], epoch: int, nodes: int = 1) -> int:
    """Steps of an epoch (from 0), which takes the next round in turn.

    A step takes `batch_rows * accumulation` rows on each of `nodes` machines; the last one of an epoch takes what is left.
    """
    return math.ceil(rounds[epoch % len(rounds)] / (spec.batch_rows * spec.accumulation * nodes))
