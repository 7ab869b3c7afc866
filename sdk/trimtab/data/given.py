"""Data that a program holds in memory, as a file of records: what comes after is the same as for a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab import half_made
from trimtab.cache import cache_dir, prune
from trimtab.errors import DataError

_STALE_S = 24 * 3600.0  # after which a half-made folder without a lock has no maker any more


def as_sources(given: Any, cache: Path | None = None) -> list[str]:
    """`given` as sources: addresses and paths as they are; records in memory as a .jsonl file in `cache` (by default `cache_dir()`),
    written once and named by its content; the oldest of them go when they take too much of the disk (`cache.prune`).

    Records are a list of dictionaries, a `datasets.Dataset`, a pandas or polars data frame, or a pyarrow table; `given` may also be a
    list of such things and of sources. Nothing is imported to tell them apart. Raises DataError for anything else, for a dictionary
    of splits, and for a value that no JSON can hold.
    """
    if isinstance(given, str | os.PathLike):
        return [str(given)]
    if isinstance(given, Sequence):
        rows = [isinstance(item, Mapping) for item in given]
        if not any(rows):
            return [source for item in given for source in as_sources(item, cache)]
        if not all(rows):
            raise DataError("the data is a list of dictionaries and of other things; pass the records as a list of their own")
    return [_written(_rows(given), (cache or cache_dir()) / "given")]


def _rows(given: Any) -> Iterable[Mapping[str, Any]]:
    if isinstance(given, Sequence):
        return given
    if isinstance(given, Mapping):
        parts = ", ".join(map(str, list(given)[:5]))
        raise DataError(f"the data is a dictionary of {parts}; pass one split of it, or a list with one dictionary for each record")
    if hasattr(given, "to_batches"):  # a pyarrow table
        return (row for batch in given.to_batches(max_chunksize=1000) for row in batch.to_pylist())
    if hasattr(given, "iter_rows"):  # polars
        rows: Iterable[Mapping[str, Any]] = given.iter_rows(named=True)
        return rows
    if hasattr(given, "to_dict") and hasattr(given, "iloc"):  # pandas, a thousand rows at a time
        return (row for start in range(0, len(given), 1000) for row in given.iloc[start : start + 1000].to_dict("records"))
    if hasattr(given, "column_names") and hasattr(given, "__iter__"):  # a dataset, one that is streamed too
        dataset: Iterable[Mapping[str, Any]] = given
        return dataset
    raise DataError(f"data of type {type(given).__name__} is not read; pass paths, addresses, or a list with a dictionary for each record")


def _written(rows: Iterable[Mapping[str, Any]], folder: Path) -> str:
    digest, count = hashlib.sha256(), 0
    try:
        with half_made.making(folder, ".given.", stale=_STALE_S) as making:
            with (making / "records.jsonl").open("wb") as file:
                for line in _lines(rows):
                    count += 1
                    digest.update(line)
                    file.write(line)
            if not count:
                raise DataError("the data holds no records; pass at least one")
            path = folder / f"records-{digest.hexdigest()[:16]}.jsonl"
            (making / "records.jsonl").replace(path)
            prune(folder)
    except OSError as exc:
        raise DataError(f"the data cannot be written to {folder} ({exc.strerror or exc}); set TRIMTAB_CACHE to another folder") from exc
    return str(path)


def _lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    for number, row in enumerate(rows, start=1):
        try:
            yield json.dumps(_plain(dict(row)), allow_nan=False, default=_from_array).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as exc:
            raise DataError(f"record {number} cannot be written as JSON ({exc}); leave that column out, or make it a text") from exc


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Data frames hold NaN where there is nothing."""
    return {str(name): None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _from_array(value: Any) -> Any:
    """The numbers and arrays of numpy, which have `tolist`, as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value is of type {type(value).__name__}")
