"""Where things that can be made again are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$TRIMTAB_CACHE`, else `$XDG_CACHE_HOME/trimtab`, else `~/.cache/trimtab`. The folder is not made here.

    A relative XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification asks.
    """
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "trimtab"
