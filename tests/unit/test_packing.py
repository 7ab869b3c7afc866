"""No token is lost, no row overflows, and the rows are about as few as can be."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_runtime.packing import pack, split


@given(st.lists(st.integers(1, 64), max_size=300), st.just(64))
def test_every_sample_is_in_one_row_and_no_row_overflows(lengths: list[int], row_tokens: int) -> None:
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_tokens for row in rows)


@given(st.integers(1, 5_000), st.integers(1, 700))
def test_splitting_loses_and_repeats_nothing(length: int, row_tokens: int) -> None:
    pieces = split(length, row_tokens)
    assert [place for piece in pieces for place in piece] == list(range(length))
    assert all(len(piece) <= row_tokens for piece in pieces)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_each_sample_goes_into_the_fullest_row_with_room(lengths: list[int]) -> None:
    """Against the definition, slowly: best-fit decreasing by looking at every row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(100 - length)
    packed = pack(lengths, 100)
    assert sorted(100 - sum(lengths[index] for index in row) for row in packed) == sorted(free)


def test_rows_are_nearly_full_over_a_whole_data_set() -> None:
    draw = random.Random(0)
    lengths = [min(2048, max(8, int(draw.lognormvariate(math.log(150), 1)))) for _ in range(40_000)]
    began = time.perf_counter()
    rows = pack(lengths, 2048)
    assert time.perf_counter() - began < 5
    assert sum(lengths) / (len(rows) * 2048) > 0.995


def test_a_sample_longer_than_a_row_must_be_split_first() -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        pack([17], 16)
