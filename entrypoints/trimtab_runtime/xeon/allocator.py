"""glibc's malloc thresholds, set before torch loads.

By default glibc maps every block over 32 MB afresh, and the kernel fills it with zeros page by page; a training step
makes and frees such blocks by the hundred. Kept on the heap they are faulted in once (mallopt(3)).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")  # allocators that are put before glibc's by LD_PRELOAD
_TUNABLES = ("mmap_threshold", "mmap_max", "trim_threshold")
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
KEPT = "large blocks stay on the heap (no page faults for each temporary)"


def keep_large_blocks(maps: Path = Path("/proc/self/maps"), environ: Mapping[str, str] = os.environ) -> str:
    """Set the thresholds; returns what was done, for the log. What a user set, or put in glibc's place, is left as it is."""
    if not sys.platform.startswith("linux"):
        return "left as it is: not Linux"
    if other := _preloaded(maps):
        return f"left as it is: {other} is in glibc's place"
    said = [name for name in _OWN if environ.get(name)]
    said += ["GLIBC_TUNABLES"] if any(f"glibc.malloc.{name}" in environ.get("GLIBC_TUNABLES", "") for name in _TUNABLES) else []
    if said:
        return f"left as it is: {', '.join(said)} {'is' if len(said) == 1 else 'are'} set"
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = [libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30), libc.mallopt(_M_MMAP_MAX, 0), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]
    except (OSError, AttributeError):
        return "left as it is: no glibc"
    return KEPT if all(done) else "glibc refused the thresholds"


def _preloaded(maps: Path) -> str:
    """The name of another allocator that is loaded; empty for none."""
    try:
        text = maps.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((name for name in _OTHERS if f"/lib{name}" in text), "")
