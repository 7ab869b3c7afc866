"""Folders that are being made: whoever makes one holds a lock in it, and what a maker that died has left is swept by the next.

Whether a maker lives is asked of the kernel, and not of the clock, which may jump by days.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

NAME = ".making"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """This process is making the folder. The lock's file goes at the end, unless the folder was renamed: then it is the caller's."""
    path = folder / NAME
    fresh = path.with_name(f"{NAME}.new")
    with fresh.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(path)  # so that nobody ever finds it without its lock
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def making(parent: Path, prefix: str, *, stale: float) -> Iterator[Path]:
    """A new folder in `parent` to make something in, which is then moved away: at the end the folder goes. Those of makers that have died
    go first, as `sweep` with `stale` says. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent.glob(f"{prefix}*"), stale=stale)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folders: Iterable[Path], *, stale: float | None = None, made: str = "") -> None:
    """Remove those whose maker has died before there was a file `made` in them; with `stale` also those that have no lock and were not
    changed for so many seconds.
    """
    for folder in folders:
        with contextlib.suppress(OSError):  # another client finished or swept it meanwhile, or it is another user's
            if _abandoned(folder, stale) and not (made and (folder / made).exists()):
                shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path, stale: float | None) -> bool:
    try:
        with (folder / NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return stale is not None and time.time() - folder.stat().st_mtime > stale
