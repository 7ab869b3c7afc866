"""Rows of parquet files, and of the arrow files that `datasets.save_to_disk` writes, a batch at a time; pyarrow is imported when used."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from trimtab.data.forms import KNOWN
from trimtab.data.parts import Broken, Numbered, Part
from trimtab.errors import DataError

REMEDY = "pip install 'trimtab[parquet]'"
UNREAD = ...
"""The value of a column that no form reads, such as an image: its name is told, its bytes are not read."""
_BATCH = 512  # rows


def rows(part: Part) -> Iterator[Numbered]:
    """The rows of a file, numbered from 1, with `UNREAD` in the columns that no form knows.

    Nulls inside lists and objects are dropped: a column of objects has every object's names, null where one lacked it.

    Raises DataError when pyarrow is missing.
    """
    pyarrow = needed(part.name)
    number = 0
    try:
        for batch, others in _parquet(part) if part.kind == "parquet" else _arrow(part):
            for row in batch:
                number += 1
                yield number, {name: _plain(value) for name, value in row.items()} | dict.fromkeys(others, UNREAD)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as exc:
        why = " ".join(str(exc).split())[:200]
        where = "from here on" if number else "at all"
        yield number + 1, Broken(f"the file cannot be read {where} ({why}); it may be cut short: copy it again", last=True)


def needed(name: str) -> Any:
    """pyarrow. Raises DataError with the remedy when it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise DataError(f"reading {name} needs pyarrow ({exc}):  {REMEDY}") from exc
    return pyarrow


_Batch = tuple[list[dict[str, Any]], list[str]]  # rows of the known columns, and the names of the others


def _parquet(part: Part) -> Iterator[_Batch]:
    import pyarrow.parquet

    source = io.BytesIO(part.body) if part.body is not None else str(part.path)
    with pyarrow.parquet.ParquetFile(source) as file:
        names = file.schema_arrow.names
        known = [name for name in names if _known(name)]
        if not known:  # their names alone are judged
            yield [{}] * min(1, file.metadata.num_rows), names
            return
        for batch in file.iter_batches(batch_size=_BATCH, columns=known):
            yield batch.to_pylist(), [name for name in names if name not in known]


def _arrow(part: Part) -> Iterator[_Batch]:
    import pyarrow

    assert part.path is not None
    with pyarrow.memory_map(str(part.path)) as mapped, _batches(mapped) as batches:
        for whole in batches:
            names = whole.schema.names
            known = [name for name in names if _known(name)]
            picked = whole.select(known)
            for start in range(0, whole.num_rows, _BATCH):
                yield picked.slice(start, _BATCH).to_pylist(), [name for name in names if name not in known]


def _batches(mapped: Any) -> Any:
    """Of the stream that `datasets` writes, or of an arrow file."""
    import pyarrow

    head = mapped.read(6)
    mapped.seek(0)
    if head != b"ARROW1":
        return pyarrow.ipc.open_stream(mapped)
    raise ValueError("it is an arrow file and not the stream that datasets.save_to_disk writes; save it as parquet")


def _known(name: str) -> bool:
    return name.strip().lower() in KNOWN


def _plain(value: Any) -> Any:
    """`value` without the nulls inside it; a top-level one stays."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value
