"""How many of what, in words. Pure; both sides of the wall use it."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """Such as "1 row" and "1,200 rows"; `many` where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
