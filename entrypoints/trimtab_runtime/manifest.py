"""A folder is complete when its manifest, written last, matches its files' digests. Object stores have no rename."""

from __future__ import annotations

import contextlib
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
            flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    flush_names(folder)
    write_json(folder / NAME, {**facts, "files": files})
    flush_names(folder)


def problem(folder: Path, *, contents: bool = True) -> str | None:
    """Why a folder is not complete, or None when it is. Without `contents` the files' sizes are compared, and nothing is read."""
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in read(folder)["files"].items()}
    except FileNotFoundError:
        return f"{folder.name} has no {NAME}: it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder.name}/{NAME} cannot be read: truncated or changed"
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size or (contents and file_digest(path) != sha256):
                return f"{folder.name}/{name} does not match its digest: truncated or changed"
        except FileNotFoundError:
            return f"{folder.name}/{name} is missing"
        except (OSError, ValueError) as exc:
            return f"{folder.name}/{name} cannot be read ({exc})"
    return None


def read(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{folder / NAME} is not an object")
    return value


def write_json(path: Path, value: object) -> None:
    """Whole or not at all: a temporary file beside it, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Flush a file that was written to disk (fsync(2))."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Flush which files a folder holds, so that a power cut cannot take a name whose contents are on the disk (fsync(2))."""
    with contextlib.suppress(OSError):  # not every file system can
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
