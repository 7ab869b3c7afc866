"""What placement.py planned, done to this process before torch loads: processors, memory policy, environment."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable

from trimtab_runtime.xeon.placement import Memory, Share
from trimtab_runtime.xeon.topology import as_list

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # system calls' numbers (the kernel's syscall tables)
_MODES = {"prefer": 1, "interleave": 3}  # MPOL_PREFERRED, MPOL_INTERLEAVE of linux/mempolicy.h
_NODES = 1024  # bits of a node mask; the kernel takes no more


def bind(share: Share) -> list[str]:
    """Take the share. Threads that are started later have it, too. Returns what was refused, in words; a run goes on without."""
    os.environ.update(share.environment)
    refused = []
    if share.processors and sys.platform == "linux":
        try:
            os.sched_setaffinity(0, share.processors)
        except OSError as exc:
            refused.append(f"processors {as_list(share.processors)} could not be bound to ({exc.strerror}): the kernel chooses")
    if share.memory is not None:
        refused += _set_policy(share.memory)
    return refused


def mask(nodes: Iterable[int]) -> list[int]:
    """Memory nodes as the kernel takes them: bits in unsigned longs."""
    words = [0] * (_NODES // 64)
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    return words


def _set_policy(memory: Memory) -> list[str]:
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or sys.platform != "linux":
        return []
    words = (ctypes.c_ulong * (_NODES // 64))(*mask(memory.nodes))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, ctypes.c_int(_MODES[memory.policy]), words, ctypes.c_ulong(_NODES)) == 0:
        return []
    why = os.strerror(ctypes.get_errno())
    return [
        f"memory could not be asked of node {as_list(memory.nodes)} ({why}): the kernel takes it from the node of the thread that uses it "
        "first. Docker allows it with --cap-add SYS_NICE"
    ]
