"""What a reader tells when lines arrive in any order, without a service: each line once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.aws import logs


class Service:
    """GetLogEvents of one stream as the API reference describes it: by time, in pages of any size, some empty, tokens as positions."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, str]] = []  # time, arrival, message

    def arrive(self, at: int, message: str) -> None:
        self.events.append((at, len(self.events), message))

    def look(self, stream: Any, sizes: Callable[[], int]) -> list[tuple[int, str]]:
        stream.begin()
        new, behind = [], (stream.start, -1)
        while left := [event for event in sorted(self.events) if event[:2] > behind and event[0] >= stream.start]:
            some = left[: sizes()]
            new += stream.take([{"timestamp": at, "message": message} for at, _, message in some])
            behind = some[-1][:2] if some else behind
        return new


@given(st.data())
def test_however_lines_arrive_each_is_told_once(data):
    service, stream, told, newest = Service(), logs._Stream("s", "algo-1"), [], 0
    for _ in range(data.draw(st.integers(1, 8))):
        for _ in range(data.draw(st.integers(0, 6))):
            at = max(0, newest + data.draw(st.integers(-logs.OVERLAP_MS, 40_000)))
            service.arrive(at, data.draw(st.sampled_from("abc")))
            newest = max(newest, at)
        sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        pages = iter(sizes)
        told += service.look(stream, lambda pages=pages: next(pages, 3))
    assert Counter(told) == Counter((at, message) for at, _, message in service.events)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_what_is_kept_stays_small(steps, bound):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "OVERLAP_LINES", bound)
        service, stream, told = Service(), logs._Stream("s", "algo-1"), []
        at = 0
        for number, step in enumerate(steps):
            at += step
            service.arrive(at, str(number))
            told += service.look(stream, lambda: 2)
        assert [int(message) for _, message in told] == list(range(len(steps)))
        largest = max(Counter(event[0] for event in service.events).values())
        assert sum(marks.total() for marks in stream.told.values()) <= bound + largest
