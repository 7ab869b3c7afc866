"""JSON lines files: an object to each line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import StagingError


def read_json_lines(file: Path, problem: Callable[[object], str]) -> Iterator[dict[str, Any]]:
    """The objects of a file, in its order. Raises StagingError that names file and line for what is not JSON, and where `problem` says
    what is wrong with a line; of what is no object it must say so."""
    try:
        lines = file.open("rb")
    except OSError as exc:
        raise StagingError(f"{file} cannot be read ({exc.strerror}): stage the documents first") from exc
    with lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise StagingError(f"{file}, line {number} is not JSON: {exc}. Correct or remove the line") from exc
            if found := problem(record):
                raise StagingError(f"{file}, line {number} {found}. Correct or remove the line")
            yield record
