"""Automatic choices: facts in, decision and reason out. Nothing here looks at the machine by itself but `cpu_flags` and `gpu_flags`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.counting import counted
from trimtab.errors import SpecError
from trimtab.estimate import BF16_FLAGS, ModelFacts, RowFacts, dtype_of, peak_memory, recompute_layers
from trimtab.spec import TrainSpec

_BF16 = {
    "gpu_bf16": "this GPU multiplies bf16",
    "amx_bf16": "this processor has AMX (amx_bf16)",
    "avx512_bf16": "this processor has avx512_bf16",
}
_NO_BF16 = "this processor has no bf16 instructions; emulated bf16 would be slower"


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


def gpu_flags() -> frozenset[str]:
    """What torch's first GPU can do, as `pick_dtype` names it."""
    import torch

    return frozenset({"gpu_bf16"} if torch.cuda.is_bf16_supported() else ())


def pick_device(asked: str, gpus: int, nodes: int = 1) -> Choice:
    """Where a run computes, as torch names it. `asked` is xeon or gpu, `gpus` how many torch sees.

    Raises SpecError where a GPU was asked for and none is seen: a run that was paid for one must not crawl on without; and for
    several `nodes` with GPUs, which this version does not bring together.
    """
    if asked != "gpu":
        return Choice("cpu", "a GPU was not asked for")
    if not gpus:
        raise SpecError(
            "this run was asked to compute on a GPU and torch sees none: look with  trimtab doctor --gpu  or choose --device xeon"
        )
    if nodes > 1:
        raise SpecError(f"{nodes} nodes train together on CPUs only in this version: choose --nodes 1, or --device xeon")
    return Choice("cuda", f"asked for; torch sees {gpus}" + (", the first is used" if gpus > 1 else ""))


def pick_dtype(asked: str, flags: frozenset[str]) -> Choice:
    """What `dtype_of` says, by which a plan goes too, and why."""
    dtype = dtype_of(asked, flags)
    if asked != "auto":
        return Choice(dtype, "asked for")
    return Choice(dtype, next((_BF16[flag] for flag in BF16_FLAGS if flag in flags), _NO_BF16))


def expected_memory(
    spec: TrainSpec, config: Mapping[str, Any], dtype: str, manifest: Mapping[str, Any], device: str, ranks: int = 1, again: int = 0
) -> Choice | None:
    """The plan's estimate for these rows, by their manifest, for each of `ranks` on a machine; None for a model whose config.json does
    not name its sizes. `again`: as many layers as `recomputed` says."""
    model = ModelFacts.from_config(config)
    if model is None:
        return None
    found = peak_memory(spec, model, dtype, RowFacts.from_manifest(manifest), "cpu" if device == "cpu" else "gpu", again)
    each = f" in each of {ranks} ranks" if ranks > 1 else ""
    return Choice(f"about {found.total:,} MB{each}", f"estimated: {found}")


def short_of_memory(
    spec: TrainSpec, config: Mapping[str, Any], dtype: str, manifest: Mapping[str, Any], memory_mb: int | None, ranks: int, again: int = 0
) -> Choice | None:
    """A warning where several ranks of a machine are expected to take more than there is: `memory_mb` for each. None where they fit, or
    where nobody knows."""
    model = ModelFacts.from_config(config)
    if model is None or memory_mb is None or ranks < 2:
        return None
    each = peak_memory(spec, model, dtype, RowFacts.from_manifest(manifest), "cpu", again).total
    if each <= memory_mb:
        return None
    fit = max(1, memory_mb * ranks // each)
    return Choice(
        "memory",
        f"{ranks} ranks of about {each:,} MB take {ranks * each:,} MB, and there are {memory_mb * ranks:,} MB: the run may be killed. "
        f"Start a new one with --ranks {fit}, or one that needs less",
    )


def recomputed(
    spec: TrainSpec, config: Mapping[str, Any], dtype: str, manifest: Mapping[str, Any], memory_mb: int | None
) -> tuple[int, Choice | None]:
    """How many decoder layers do their forward pass again in the backward pass, on a processor with so much memory for this process.

    (0, None) for a model whose config.json does not name its sizes.
    """
    model = ModelFacts.from_config(config)
    if model is None:
        return 0, None
    found = recompute_layers(spec, model, dtype, RowFacts.from_manifest(manifest), memory_mb)
    return found.layers, Choice(counted(found.layers, "layer") if found.layers else "none", found.reason)


def schedule(spec: TrainSpec, steps: int, rows_per_step: int) -> Choice:
    """What `learning_rate` makes of a run of so many steps, in words."""
    warmup = math.ceil(steps * spec.warmup_ratio)
    rise = f"{counted(warmup, 'warm-up step')} to {spec.learning_rate:g}" if warmup else f"from {spec.learning_rate:g}"
    fall = f"the same up to step {steps}" if spec.lr_schedule == "constant" else f"down to 0 at step {steps}"
    return Choice(spec.lr_schedule, f"{rise}, then {fall}; rows {rows_per_step} a step (recipe {spec.recipe})")


def saved_dtype(spec: TrainSpec) -> Choice:
    """In what a wholly trained model is saved."""
    if spec.dtype == "float32":
        return Choice("float32", "dtype float32 was asked for")
    return Choice("bfloat16", "what models of this kind are served in, at half the size; --dtype float32 keeps all")


def method_line(spec: TrainSpec, trained: int, of: int, dtype: str) -> str:
    """What a run trains, of how much, and what in."""
    share = f"{trained:,} of {of:,} parameters trained"
    if spec.method == "full":
        how = "computed in float32" if dtype == "float32" else f"kept in fp32, computed in {dtype}"
        return f"method full: {share}, {how}"
    kind = f"{'rs' if spec.use_rslora else ''}{'DoRA' if spec.use_dora else 'LoRA'} of rank {spec.lora_rank}, alpha {spec.lora_alpha:g}"
    on = ", ".join(spec.lora_targets) or "every linear layer but the head"
    base = "in 4-bit NF4, " if spec.method == "qlora" else ""
    return f"method {spec.method}: {share}, in fp32: {kind} on {on}; base {base}computed in {dtype}"


def learning_rate(step: int, steps: int, *, peak: float, warmup_ratio: float, schedule: Literal["cosine", "linear", "constant"]) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear warm-up, then the schedule down to 0 (constant: no decay)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
