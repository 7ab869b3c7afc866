"""How much memory this process has needed so far."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory_mb(device: str = "cpu", status: Path = Path("/proc/self/status")) -> int:
    """The process' peak resident set in MB (2^20 bytes), pages of mapped files included; on a GPU what torch allocated there at most.

    Linux's VmHWM, and where there is none getrusage's: that one begins at what the process that started this one held,
    because it survives exec (proc(5), getrusage(2)).
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated()) >> 20
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
