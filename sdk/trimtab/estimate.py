"""What a spec costs before it runs, from facts alone. Pure; both sides of the wall use it."""

from __future__ import annotations

import math

from trimtab.spec import TrainSpec


def optimiser_steps(spec: TrainSpec, rows: int) -> tuple[int, int]:
    """(steps of the whole run, steps of one epoch) for `rows` packed rows.

    A step takes `batch_rows * accumulation` rows; the last one of an epoch takes what is left.
    """
    in_epoch = math.ceil(rows / (spec.batch_rows * spec.accumulation))
    whole = in_epoch * spec.epochs
    return (whole if spec.max_steps is None else min(whole, spec.max_steps)), in_epoch
