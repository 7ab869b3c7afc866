"""A property, tried on examples of Hypothesis for a given time. What fails is kept under .hypothesis and tried first the next time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

_FIRST_ROUND, _ROUND_AT_MOST, _ROUND_SECONDS = 20, 1_000, 3.0


@dataclass(frozen=True)
class Target:
    """`check` holds for every value of `values`: it returns, or raises what shows that it does not."""

    name: str
    values: SearchStrategy[Any]
    check: Callable[[Any], None]


def run_for(target: Target, seconds: float, first_seed: int) -> int:
    """How many examples were tried; a round takes the next seed. Raises what `check` raised, for the smallest example found."""
    tried = 0

    def counted(value: Any) -> Any:
        nonlocal tried
        tried += 1
        return value

    end = time.monotonic() + seconds
    examples, round_ = _FIRST_ROUND, 0
    while (left := end - time.monotonic()) > 0 or not tried:
        began, before = time.monotonic(), tried
        limited = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
        limited(seed(first_seed + round_)(given(target.values.map(counted))(target.check)))()
        speed = (tried - before) / max(time.monotonic() - began, 1e-6)
        examples = max(5, min(_ROUND_AT_MOST, int(speed * min(_ROUND_SECONDS, left))))
        round_ += 1
    return tried
