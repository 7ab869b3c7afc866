"""One of a thing is not several."""

from __future__ import annotations

import pytest

from trimtab.counting import counted


@pytest.mark.parametrize(
    ("number", "nouns", "said"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (1200, ("row",), "1,200 rows"),
        (1, ("record is", "records are"), "1 record is"),
        (2, ("record is", "records are"), "2 records are"),
    ],
)
def test_nouns_follow_their_number(number: int, nouns: tuple[str, ...], said: str) -> None:
    assert counted(number, *nouns) == said
