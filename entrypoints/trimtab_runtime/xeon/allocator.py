"""glibc's malloc thresholds, set before torch loads.

By default glibc maps every block over 32 MB afresh, and the kernel fills it with zeros page by page; a training step
makes and frees such blocks by the hundred. Kept on the heap they are faulted in once (mallopt(3)).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_large_blocks() -> str:
    """Set the thresholds; returns what was done, for the log."""
    if not sys.platform.startswith("linux"):
        return "left as it is: not Linux"
    try:
        libc = ctypes.CDLL("libc.so.6")
        done = [libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30), libc.mallopt(_M_MMAP_MAX, 0), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]
    except (OSError, AttributeError):
        return "left as it is: no glibc"
    return "large blocks stay on the heap (no page faults for each temporary)" if all(done) else "glibc refused the thresholds"
