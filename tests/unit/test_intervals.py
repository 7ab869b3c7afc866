"""The intervals against published values, and against chance itself."""

from __future__ import annotations

import random

import pytest

from trimtab.intervals import difference, share


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_wilsons_interval(right: int, of: int, low: float, high: float) -> None:
    assert share(right, of) == pytest.approx((low, high), abs=5e-5)


def test_nothing_asked_says_nothing() -> None:
    assert share(0, 0) == (0.0, 1.0)
    assert difference(0, 0, 0) == (-1.0, 1.0)


def test_intervals_mirror_and_stay_within_their_bounds() -> None:
    for of in (1, 2, 20, 1000):
        for right in {0, 1, of // 3, of}:
            low, high = share(right, of)
            assert 0 <= low <= right / of <= high <= 1
            assert share(of - right, of) == pytest.approx((1 - high, 1 - low))
            low, high = difference(right, 0, of)
            assert -1 <= low <= high <= 1
            assert difference(0, right, of) == pytest.approx((-high, -low))


def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says() -> None:
    draw, held, of = random.Random(0), 0, 40
    for _ in range(1000):
        cells = draw.choices(["gained", "lost", "same"], [0.30, 0.10, 0.60], k=of)
        low, high = difference(cells.count("gained"), cells.count("lost"), of)
        held += low <= 0.20 <= high
    assert 930 <= held <= 985
