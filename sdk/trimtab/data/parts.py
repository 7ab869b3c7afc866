"""What holds records: files by their names and media types, and a record that is broken. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json.gz": "json",
    ".csv.gz": "csv",
    ".tsv.gz": "tsv",
}
"""The endings of files that hold records, and what each is."""

LONGEST = 100_000_000  # bytes of one line, field or row: more is no record but a file of another kind, and would fill the memory

RECORD_TYPES = {
    **dict.fromkeys(("application/jsonl", "application/x-jsonl", "application/jsonlines", "application/x-jsonlines"), "jsonl"),
    **dict.fromkeys(("application/x-ndjson", "application/ndjson"), "jsonl"),
    "application/json": "json",
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    **dict.fromkeys(("application/vnd.apache.parquet", "application/parquet", "application/x-parquet"), "parquet"),
}
"""Media types of records, and what each is. A server names .jsonl and .parquet as anything but a page."""


@dataclass(frozen=True)
class Part:
    """One file of records. `name` is what messages show; `body` is what was fetched, else the file lies at `path`."""

    name: str
    kind: str  # jsonl, json, csv, tsv, parquet, arrow
    path: Path | None = None
    body: bytes | None = None
    at_most: int | None = None  # bytes after unpacking, of what was fetched

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Broken:
    """A record that cannot be read, and why. `last`: nothing after it can be read either."""

    reason: str
    last: bool = False


class Counted(int):
    """The number of a record that has no line or row of its own, as inside one JSON object."""


Numbered = tuple[int, dict[str, Any] | Broken]
"""A record with the line where it begins, or, in a table, its row, or that it is `Counted`; all are counted from 1."""


def kind_of(name: str) -> str | None:
    """What a file of this name holds, by its ending; None when no records."""
    lower = name.lower()
    return next((kind for ending, kind in sorted(KINDS.items(), key=lambda pair: -len(pair[0])) if lower.endswith(ending)), None)


def too_large(at_most: int) -> str:
    """Why what was fetched is not read."""
    return (
        f"it is larger than {at_most:,} bytes; raise max_page_mb (--max-page-mb), or download it and pass the file, which may be any size"
    )


def places(part: Part, numbers: Sequence[int]) -> str:
    """Where records stand, in words."""
    word = "row" if part.kind in ("parquet", "arrow") else "record" if isinstance(numbers[0], Counted) else "line"
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
