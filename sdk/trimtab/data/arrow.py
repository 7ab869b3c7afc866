"""Rows of parquet files, and of the arrow files that `datasets.save_to_disk` writes, a batch at a time; pyarrow is imported when used.

What a file says that it unpacks to, and what its rows do, is counted before any of it is made a Python object: repeated values take
next to no room in the file, and their full size as objects.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from trimtab.data.forms import READ
from trimtab.data.parts import LONGEST, Broken, Numbered, Part, too_large
from trimtab.errors import DataError

REMEDY = "pip install 'trimtab[parquet]'"
UNREAD = ...
"""The value of a column that no form reads, such as an image: its name is told, its bytes are not read."""
_BATCH = 512  # rows
_AT_ONCE = 16_000_000  # bytes of a batch that is made Python objects whole; a larger one is taken row by row


def rows(part: Part) -> Iterator[Numbered]:
    """The rows of a file, numbered from 1, with `UNREAD` in the columns that no form knows.

    Nulls inside objects are dropped: a column of objects has every object's names, null where one lacked it. Nulls in columns and in
    lists stay. A row of more than `LONGEST` bytes is `Broken`; so is all of a fetched file from where it exceeds `part.at_most`.

    Raises DataError when pyarrow is missing.
    """
    pyarrow = needed(part.name)
    number = 0
    try:
        for row in _parquet(part) if part.kind == "parquet" else _arrow(part):
            if isinstance(row, Broken) and row.last:
                yield number + 1, row
                return
            number += 1
            yield number, row
    except MemoryError:
        yield number + 1, Broken("there is not enough memory to read on; write it again in smaller row groups, or as .jsonl", last=True)
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


_Row = dict[str, Any] | Broken


def _parquet(part: Part) -> Iterator[_Row]:
    import pyarrow.parquet

    source = io.BytesIO(part.body) if part.body is not None else str(part.path)
    with pyarrow.parquet.ParquetFile(source) as file:
        metadata = file.metadata
        texts = [
            column.path
            for column in map(metadata.schema.column, range(metadata.num_columns))
            if column.physical_type == "BYTE_ARRAY" and _known(column.path.partition(".")[0])
        ]
    if part.body is not None:
        source = io.BytesIO(part.body)
    # the texts as numbers of a dictionary, so that one that is repeated is held once
    with pyarrow.parquet.ParquetFile(source, read_dictionary=texts) as file:
        names = file.schema_arrow.names
        if problem := _twice(names):
            yield problem
            return
        known = [name for name in names if _known(name)]
        others = [name for name in names if name not in known]
        if not known:  # their names alone are judged
            yield from [dict.fromkeys(others, UNREAD)] * min(1, metadata.num_rows)
            return
        if part.at_most is not None and _unpacked(metadata) > part.at_most:
            yield Broken(too_large(part.at_most), last=True)
            return
        left = part.at_most
        for batch in file.iter_batches(batch_size=_BATCH, columns=known):
            size = _size(batch)
            if left is not None:
                if size > left:
                    yield Broken(too_large(part.at_most or 0), last=True)
                    return
                left -= size
            yield from _rows(batch, size, others)


def _unpacked(metadata: Any) -> int:
    """What the columns that forms read take when they are unpacked, by what the file says of itself; a value at least one byte."""
    total = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if _known(column.path_in_schema.partition(".")[0]):
                total += max(column.total_uncompressed_size, column.num_values)
    return total


def _arrow(part: Part) -> Iterator[_Row]:
    import pyarrow

    assert part.path is not None
    with pyarrow.memory_map(str(part.path)) as mapped, _batches(mapped) as batches:
        for whole in batches:
            names = whole.schema.names
            if problem := _twice(names):
                yield problem
                return
            known = [name for name in names if _known(name)]
            others = [name for name in names if name not in known]
            picked = whole.select(known)
            for start in range(0, whole.num_rows, _BATCH):
                batch = picked.slice(start, _BATCH)
                yield from _rows(batch, _size(batch), others)


def _batches(mapped: Any) -> Any:
    """Of the stream that `datasets` writes, or of an arrow file."""
    import pyarrow

    head = mapped.read(6)
    mapped.seek(0)
    if head != b"ARROW1":
        return pyarrow.ipc.open_stream(mapped)
    raise ValueError("it is an arrow file and not the stream that datasets.save_to_disk writes; save it as parquet")


def _rows(batch: Any, size: int, others: list[str]) -> Iterator[_Row]:
    """A batch of `size` bytes as Python objects, at once where that is little memory."""
    for part in [batch] if size <= _AT_ONCE else (batch.slice(row, 1) for row in range(batch.num_rows)):
        if part is not batch and (one := _size(part)) > LONGEST:
            yield Broken(f"the row holds {one:,} bytes, and {LONGEST:,} are read of one; remove it")
            continue
        for row in part.to_pylist():
            yield {name: _plain(value) for name, value in row.items()} | dict.fromkeys(others, UNREAD)


def _size(batch: Any) -> int:
    """Bytes of a batch's values as objects of their own: a text that a dictionary holds once counts wherever it stands."""
    return sum(map(_array_size, batch.columns))


def _array_size(array: Any) -> int:
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return len(array) * 8
        return len(array) + (pyarrow.compute.sum(pyarrow.compute.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if _is_text(kind):
        return len(array) + (pyarrow.compute.sum(pyarrow.compute.binary_length(array)).as_py() or 0)
    if types.is_struct(kind):
        return len(array) + sum(map(_array_size, array.flatten()))
    if types.is_map(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if types.is_map(kind):
            array = array.cast(pyarrow.list_(pyarrow.struct([kind.key_field, kind.item_field])))
        return len(array) + _array_size(array.flatten())
    return len(array) * 8


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _twice(names: list[str]) -> Broken | None:
    """What is wrong when two columns that a form reads have one name: the second would silently take the first one's place."""
    twice = next((name for name, count in Counter(filter(_known, names)).items() if count > 1), None)
    return Broken(f"the column name {twice[:40]!r} is there twice; rename one", last=True) if twice else None


def _known(name: str) -> bool:
    return name.strip().lower() in READ


def _plain(value: Any) -> Any:
    """`value` without the nulls of the objects inside it; one at the top or in a list stays."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value
