"""Best-fit decreasing over the whole data set: long samples first, each into the fullest row that still has room.

And which samples of a row are attended to together.

Source: D. S. Johnson, "Near-optimal bin packing algorithms" (1973), best-fit decreasing.
"""

from __future__ import annotations

from collections.abc import Sequence


def split(length: int, row_tokens: int) -> list[range]:
    """The pieces of one sample, in order and without overlap: full rows and a remainder. No token is lost."""
    return [range(start, min(start + row_tokens, length)) for start in range(0, length, row_tokens)]


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of sample indices such that no row holds more than `row_tokens` tokens.

    Equal lengths keep their order, so the result depends on the input alone. Raises ValueError for a length
    below 1 or above `row_tokens`: split first.

    A row's free room is a bit in one integer, so "the fullest row with room for n" is the lowest set bit from n on.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # free tokens -> rows
    bits = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= row_tokens:
            raise ValueError(f"sample {index} has {length} tokens; a row takes 1 to {row_tokens}")
        fitting = bits >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                bits &= ~(1 << free)
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            with_room[free - length].append(row)
            bits |= 1 << (free - length)
    return rows


def alike(lengths: Sequence[int], *, slack: float = 0.25) -> list[list[int]]:
    """The samples of one row (their indices) in groups of similar length, each group's longest first.

    None is shorter than its group's longest by more than `slack` of that and 4 tokens.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -i)):
        if groups and lengths[index] >= lengths[groups[-1][0]] * (1 - slack) - 4:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
