"""The intervals against published values, and against chance itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from trimtab.intervals import difference, mean, share, student


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


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (7, 2.365), (11, 2.201), (23, 2.069), (100, 1.984)])
def test_students_t_is_the_one_of_the_tables(freedom: int, value: float) -> None:
    assert student(freedom) == pytest.approx(value, rel=0.003)


@pytest.mark.parametrize("units", [5, 8, 12, 24])
@pytest.mark.parametrize("skew", [0, 1, -1])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(units: int, skew: int) -> None:
    """Of normal and of skewed units (exponential, to either side), whose lengths differ."""
    draw = random.Random(units)
    one: Callable[[], float] = (lambda: skew * (draw.expovariate(1) - 1)) if skew else (lambda: draw.gauss(0, 1))
    held, tests = 0, 3000
    for _ in range(tests):
        low, high = mean([(0.2 * size + 9 * one(), size) for size in draw.choices(range(60, 140), k=units)])
        held += low <= 0.2 <= high
    assert 0.93 <= held / tests <= 0.985


def test_the_interval_of_a_mean_knows_its_ends() -> None:
    assert mean([(3.0, 10)] * 6) == (0.3, 0.3)
    assert mean([(2.0, 10), (4.0, 10)] * 12) == pytest.approx((0.2569, 0.3431), abs=1e-4)  # 0.3 -+ 2.0687 * 0.1021505 / sqrt(24)
    low, high = mean([(0.0, 10)] * 7 + [(9.0, 10)])
    assert high - 0.1125 > 0.1125 - low, "there may be more such units than were seen"
    with pytest.raises(ValueError, match="at least 5"):
        mean([(1.0, 1)] * 4)
