"""Automatic choices: facts in, decision and reason out. Nothing here looks at the machine by itself but `cpu_flags`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Choice:
    value: str
    reason: str


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the first processor can do, as Linux names it."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith(("flags", "Features"))), frozenset()
    )


def pick_dtype(asked: str, flags: frozenset[str]) -> Choice:
    """bf16 where the processor multiplies it; elsewhere it would be emulated and slower than fp32."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if "amx_bf16" in flags:
        return Choice("bfloat16", "this processor has AMX (amx_bf16)")
    if "avx512_bf16" in flags:
        return Choice("bfloat16", "this processor has avx512_bf16")
    return Choice("float32", "this processor has no bf16 instructions; emulated bf16 would be slower")


def learning_rate(step: int, steps: int, *, peak: float, warmup_ratio: float, schedule: Literal["cosine", "linear", "constant"]) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear warm-up, then the schedule down to 0 (constant: no decay)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
