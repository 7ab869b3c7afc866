"""A folder for what is needed while a model loads, which goes whatever happens: what a killed process left, the next one removes."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "trimtab-loading-"
_LOCK = "in-use"


@contextmanager
def scratch(within: Path | None = None) -> Iterator[Path]:
    """An empty folder in TMPDIR, or in `within`, for as long as the context lasts."""
    place = within or Path(tempfile.gettempdir())
    for old in place.glob(f"{PREFIX}*"):
        with suppress(OSError), (old / _LOCK).open() as file:  # no lock yet: someone is about to take it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner is gone
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with (folder / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield folder
