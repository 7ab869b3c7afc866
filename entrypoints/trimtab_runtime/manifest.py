"""A folder is complete when its manifest, written last, matches its files' digests. Object stores have no rename."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file of `folder` to disk, then name them with size and sha256, beside `facts`."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != NAME:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / NAME, {**facts, "files": files})


def problem(folder: Path) -> str | None:
    """Why a folder is not complete, or None when it is."""
    try:
        files = read(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.name} has no readable {NAME}: it was not finished"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != entry["bytes"] or file_digest(path) != entry["sha256"]:
            return f"{folder.name}/{name} does not match its digest: truncated or changed"
    return None


def read(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{folder / NAME} is not an object")
    return value


def write_json(path: Path, value: object) -> None:
    """Whole or not at all: a temporary file beside it, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
