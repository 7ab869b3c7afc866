"""How sure a share of right answers is: intervals that hold the truth in 95 of 100 such tests, also for few answers."""

from __future__ import annotations

import math

Z = 1.959964  # of the normal distribution, two-sided 95 %


def share(right: int, of: int) -> tuple[float, float]:
    """The interval of a share, `right` of `of` (Wilson 1927); (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    rate, zz = right / of, Z * Z
    middle = (rate + zz / (2 * of)) / (1 + zz / of)
    half = Z / (1 + zz / of) * math.sqrt(rate * (1 - rate) / of + zz / (4 * of * of))
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))  # the ends at 0 and 1 are exact


def difference(gained: int, lost: int, of: int) -> tuple[float, float]:
    """The interval of the difference of two shares over the same `of` questions: `gained` only the one has right, `lost` only the other.

    Wald's interval with half an answer added to each of the four cells (Agresti and Min 2005, "Simple improved confidence intervals for
    comparing matched proportions"); (-1, 1) of nothing.
    """
    if not of:
        return -1.0, 1.0
    n, b, c = of + 2, gained + 0.5, lost + 0.5
    middle = (b - c) / n
    half = Z * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)
