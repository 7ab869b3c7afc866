"""The frozen weight of a linear layer for one product. A 4-bit one is dequantised into memory that all layers share, and is gone
with the next: a weight of 5120 x 5120 made in fresh memory costs more time for its pages than for its numbers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab_runtime.choices import Choice
from trimtab_runtime.xeon import kernels

_ALIASED = 2048  # bytes: rows of so many, or a multiple, fall upon the same few places of a cache
_GAP = 64  # bytes between such rows: a line, so that rows still begin with one


def dequantiser(path: Choice, *, kept: bool) -> Choice:
    """How NF4 weights are dequantised: `path` is `kernels.path()`, `kept` whether the allocator keeps large blocks on the heap."""
    if path.value != "off":
        return Choice(f"trimtab-xeon ({path.value})", f"{path.reason}; one scratch for all layers")
    if kept:
        return Choice("bitsandbytes", f"{path.reason}; its temporaries stay on the heap")
    return Choice("bitsandbytes as it is", f"{path.reason}; each of its temporaries is mapped afresh, which takes several times as long")


class _Scratch(threading.local):
    """Each thread's memory for dequantised weights: as large as the largest that it has held."""

    memory: Tensor | None = None

    def rows(self, count: int, width: int, dtype: torch.dtype) -> Tensor:
        """[count, width] in it, over whatever was there."""
        stride = width + (_GAP // dtype.itemsize if width * dtype.itemsize % _ALIASED == 0 else 0)
        size = count * stride * dtype.itemsize
        if self.memory is None or self.memory.numel() < size:
            self.memory = None  # before the larger one is made
            with torch.inference_mode(False):  # whoever asks first
                self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).view(count, stride)[:, :width]


_scratch = _Scratch()


def weight_of(base: Any, dtype: torch.dtype) -> Tensor:
    """The frozen weight [out, in] of a linear layer in `dtype`. A 4-bit one holds until this thread's next call, and no longer.

    Its rows may lie further apart than they are long. Raises ValueError for one that bitsandbytes has packed for inference.
    """
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        plain: Tensor = base.weight.to(dtype)
        return plain
    packed: Tensor = base.weight.data
    if kernels.path().value == "off" or packed.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return kernels.by_bitsandbytes(packed, state).to(dtype)
    out = _scratch.rows(state.shape[0], state.shape[1], dtype)
    kernels.nf4_dequantise(packed, state, out)
    return out


def weights_below(bases: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The weights of layers with one input, one below another: [sum of outs, in], for one product of them all.

    Made in this thread's memory, so it holds until this thread's next call, and no longer. Raises ValueError as `weight_of`.
    """
    if len(bases) == 1:
        return weight_of(bases[0], dtype)
    if bases[0].weight.device.type != "cpu":
        return torch.cat([weight_of(base, dtype) for base in bases])
    shapes = [(getattr(base.weight, "quant_state", None) or base.weight).shape for base in bases]
    out = _scratch.rows(sum(rows for rows, _ in shapes), shapes[0][1], dtype)
    at = 0
    for base, (rows, _) in zip(bases, shapes, strict=True):
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            out[at : at + rows].copy_(base.weight.data)
        else:
            kernels.nf4_dequantise(base.weight.data, state, out[at : at + rows])
        at += rows
    return out
