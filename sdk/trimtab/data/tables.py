"""Table rows as readable lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def row_lines(rows: Sequence[Sequence[str]], *, has_header: bool) -> Iterator[str]:
    """One line for each row: "Ferry: Vane; Built: 1974" under a header, "Built: 1974" in two columns, else "a | b | c".

    A cell without a heading, or that repeats it, stands alone; a row of one repeated text is one cell that spans the table.
    """
    header: Sequence[str] = rows[0] if has_header and rows else ()
    for row in rows[1:] if has_header else rows:
        if len(set(row)) == 1:
            yield row[0]
        elif has_header:
            names = [*header, *[""] * len(row)]
            yield "; ".join(_labelled(name, cell) for name, cell in zip(names, row, strict=False) if cell)
        elif len(row) == 2 and all(row):
            yield _labelled(*row)
        else:
            yield " | ".join(cell for i, cell in enumerate(row) if cell and (i == 0 or cell != row[i - 1]))


def _labelled(name: str, cell: str) -> str:
    name = name.rstrip(" :")
    return f"{name}: {cell}" if name and name != cell else cell
