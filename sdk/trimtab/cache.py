"""Where things that can be made again are kept on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from trimtab.layout import NF4_CACHE_VARIABLE

_SHARE = 10  # of the disk, of which a folder of records takes one part in so many, as the NF4 cache does
_IN_USE_S = 24 * 3600.0  # seconds for which what was written may still be read by the job that it was written for


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, else `$XDG_CACHE_HOME/trimtab`, else `~/.cache/trimtab`. The folder is not made here.

    A relative XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification asks.
    """
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "trimtab"


def nf4_cache() -> Path | None:
    """The folder of quantised bases (trimtab_runtime/nf4_cache.py), in full, for runs work in other folders: `$TRIMTAB_NF4_CACHE`, else one
    beside the weights' cache. None where the variable is set to nothing: then no base is kept. The folder is not made here.
    """
    asked = os.environ.get(NF4_CACHE_VARIABLE)
    if asked is None:
        return cache_dir() / "nf4"
    return Path(asked).expanduser().absolute() if asked else None


def prune(folder: Path, limit: int | None = None) -> None:
    """Remove the .jsonl files of `folder` that were written longest ago, as far as all together take more than `limit` bytes (by default
    a tenth of the disk). What was written in the last day stays, however large; what cannot be removed stays, too.
    """
    found = []
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):  # another client removed it
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    most = shutil.disk_usage(folder).total // _SHARE if limit is None else limit
    taken = 0
    for written, size, path in sorted(found, reverse=True):
        taken += size
        if taken > most and time.time() - written > _IN_USE_S:
            with contextlib.suppress(OSError):
                path.unlink()
