"""What a run writes, and whether it can: tried before training starts, and explained where it fails later."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trimtab.errors import StagingError

RESERVED = 64 << 10  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT)

_PROBE = ".trimtab-probe"
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors tells what the system said


def error_number(exc: BaseException) -> int | None:
    """The errno behind an error of writing; None where it is another error."""
    from safetensors import SafetensorError  # here: what prepares data does without it

    if isinstance(exc, OSError):
        return exc.errno
    found = _RUST_ERROR.search(str(exc)) if isinstance(exc, SafetensorError) else None
    return int(found[1]) if found else None


def refuse_unwritable(folders: Iterable[Path]) -> None:
    """Write a few bytes into each folder and take them away. Raises StagingError for the first where that fails."""
    for folder in folders:
        probe = folder / _PROBE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as exc:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
            raise unwritable(folder, exc) from exc


def refuse_too_small(folder: Path, needed: int, what: str) -> None:
    """Raise StagingError where what is sure to be written has no room even now. A file system that does not tell its size is let be."""
    found = os.statvfs(folder)
    free = found.f_bfree * found.f_frsize  # what root may take, too: rather too late than wrongly
    if found.f_blocks and free < needed:
        raise StagingError(f"{what} will not fit: it {_takes(needed, folder)}. {_make_room(folder)}")


@contextlib.contextmanager
def whole_or_nothing(folder: Path, what: str, needed: int, undo: Callable[[], None]) -> Iterator[None]:
    """Where writing `what`, of `needed` bytes, into a folder fails, `undo` what is there of it, and say what is missing.

    Raises StagingError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as exc:
        number = error_number(exc)
        if number is None:
            raise
        with contextlib.suppress(OSError):
            undo()
        if number in FULL:
            raise StagingError(f"{what} could not be written, the disk is full: it {_takes(needed, folder)}. {_make_room(folder)}") from exc
        raise StagingError(f"{what} could not be written to {folder} ({os.strerror(number)}): mend that, then  trimtab resume RUN") from exc


def unwritable(folder: Path, exc: OSError) -> StagingError:
    """In words: a folder of the job into which nothing can be written."""
    if exc.errno in FULL:
        return full(folder)
    return StagingError(
        f"{folder} cannot be written ({exc.strerror or exc}): a run keeps its checkpoints, its artifact and what it says of itself there; "
        "mend that, then  trimtab resume RUN"
    )


def full(folder: Path) -> StagingError:
    """In words: a disk without room for even a few bytes."""
    return StagingError(f"the disk is full: {_free(folder)} of it are free. {_make_room(folder)}")


class Reserve:
    """A little room that is held, so that on a full disk the reason can still be written down."""

    def __init__(self, path: Path) -> None:
        """Raises StagingError where there is not even that."""
        self._path = path
        try:
            path.write_bytes(b"\0" * RESERVED)
        except OSError as exc:
            self.free()
            raise unwritable(path.parent, exc) from exc

    def free(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _takes(needed: int, folder: Path) -> str:
    return f"takes {megabytes(needed)}, and {_free(folder)} are free in {folder}"


def _free(folder: Path) -> str:
    try:
        return megabytes(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number of bytes"


def _make_room(folder: Path) -> str:
    return f"See  df -h {folder}  and make room, then  trimtab resume RUN"


def megabytes(size: int) -> str:
    """In MB of 10^6 bytes."""
    return f"{size / 1e6:,.1f} MB"
