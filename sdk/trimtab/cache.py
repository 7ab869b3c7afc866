"""Where things that can be made again are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.layout import NF4_CACHE_VARIABLE


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
