"""What of this machine an engine may use: processors and memory, by what the control groups of a container leave of them."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def processors(groups: Path = GROUPS) -> int:
    """How many threads can compute at once: the processors that this process may run on, within the group's share of time."""
    usable = len(os.sched_getaffinity(0))
    quota, _, period = _first(groups / "cpu.max").partition(" ")
    if not quota:
        quota, period = _first(groups / "cpu" / "cpu.cfs_quota_us"), _first(groups / "cpu" / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        return max(1, min(usable, math.ceil(int(quota) / int(period))))
    return usable


def free_memory(groups: Path = GROUPS, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can still be taken: what the system has available, within what the group may take.

    Pages of files that nobody looked at lately count for the group, and go when it needs room: they are free (cgroup-v2, memory.stat).
    """
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) << 10
    for group, limit, used, reclaimable in (
        (groups, "memory.max", "memory.current", "inactive_file"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if _first(group / limit).isdigit():
            free = min(free, int(_first(group / limit)) - int(_first(group / used) or 0) + _counted(group / "memory.stat", reclaimable))
    return max(0, free)


def cache_bytes(asked_gb: float | None, free: int, most: int) -> tuple[int, str]:
    """Bytes for keys and values, and why. `most` is what all running requests could fill; a quarter of what is free otherwise."""
    if asked_gb is not None:
        return int(asked_gb * 1e9), "asked for"
    if most <= free // 4:
        return most, "what all running requests can fill"
    return free // 4, "a quarter of the free memory"


def _counted(file: Path, name: str) -> int:
    return next((int(value) for key, _, value in (line.partition(" ") for line in _first(file).splitlines()) if key == name), 0)


def _first(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
