"""Linear maps of one input as one product, with what their adapters add: forward, and backward written by hand.

q, k and v (or gate and up) take the same input, so their weights stand one below another and one product with the frozen weights
serves all, and their A factors do the same. Each B has a product of its own: a block-diagonal one for all would be as many numbers again
that are zero, which took longer wherever it was measured (README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trimtab_runtime.xeon.weights import weight_of, weights_below

_ALIASED = 4096  # bytes: rows of so many, or a multiple, fall upon the same places of a cache


class Factors(NamedTuple):
    """The adapters of `Maps` in the compute dtype, transposed: a [in, ranks], and each b [rank, out] times its scale; None for none.

    So a product with few columns takes up to a third less time (README.md)."""

    a: Tensor | None
    b: tuple[Tensor | None, ...]


class Maps:
    """y = x [W1; W2; ...]' + bias + the adapters' s (x A') B', for x [n, in] and y [n, out]: each map its columns of y.

    The maps are linear layers or PEFT's adapted ones; these stay the holders of all parameters.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.adapters = [layer if isinstance(layer, LoraLayer) else None for layer in layers]
        self.bases: list[Any] = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
        self.columns = _slices([base.out_features for base in self.bases])
        self.ranks = _slices([adapter.r["default"] if adapter else 0 for adapter in self.adapters])
        self.out, self.rank = self.columns[-1].stop, self.ranks[-1].stop
        join(self.bases)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter, in the order in which `backward` returns their gradients."""
        found: list[Any] = []
        for adapter in self.adapters:
            if adapter is not None:
                found += [adapter.lora_A["default"].weight, adapter.lora_B["default"].weight]
        return found

    def factors(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Factors:
        """The adapters in the compute dtype, from `parameters` as above."""
        if not parameters:
            return Factors(None, (None,) * len(self.bases))
        a = torch.cat(list(parameters[::2])).to(dtype).t().contiguous()
        b, left = [], iter(parameters[1::2])
        for adapter in self.adapters:
            b.append(None if adapter is None else (next(left) * adapter.scaling["default"]).to(dtype).t().contiguous())
        return Factors(a, tuple(b))

    def forward(self, x: Tensor, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """(y, x A' [n, ranks])."""
        weight, bias = self.weight(x.dtype).t(), _joined_biases(self.bases)
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        inner = self.inner(x, factors)
        if inner is None:
            return y, None
        for columns, ranks, b in zip(self.columns, self.ranks, factors.b, strict=True):
            if b is not None:
                y[:, columns].addmm_(inner[:, ranks], b)
        return y, inner

    @staticmethod
    def inner(x: Tensor, factors: Factors) -> Tensor | None:
        """x A' [n, ranks]."""
        return None if factors.a is None else torch.mm(x, factors.a)

    def upstream(self, dy: Tensor, factors: Factors) -> Tensor | None:
        """The gradient [n, ranks] of x A'."""
        if factors.a is None:
            return None
        found = dy.new_empty(len(dy), self.rank)
        for columns, ranks, b in zip(self.columns, self.ranks, factors.b, strict=True):
            if b is not None:
                torch.mm(dy[:, columns], b.t(), out=found[:, ranks])
        return found

    def backward(self, dy: Tensor, d_inner: Tensor | None, factors: Factors) -> Tensor:
        """The gradient [n, in] of x."""
        dx = torch.mm(dy, self.weight(dy.dtype))
        return dx if d_inner is None or factors.a is None else dx.addmm_(d_inner, factors.a.t())

    def gradients(self, dy: Tensor, x: Tensor, inner: Tensor | None, d_inner: Tensor | None) -> list[Tensor]:
        """Those of `parameters()`, in fp32 and their shapes."""
        if inner is None or d_inner is None:
            return []
        of_a = torch.mm(d_inner.t(), x).float()
        found = []
        for adapter, columns, ranks in zip(self.adapters, self.columns, self.ranks, strict=True):
            if adapter is not None:
                low = torch.mm(inner[:, ranks].t(), dy[:, columns])
                of_b = torch.empty(low.shape[::-1]).copy_(low.t())
                found += [of_a[ranks], of_b.mul_(adapter.scaling["default"])]
        return found

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[W1; W2; ...] [out, in]: a view where they stand so in memory, else made for this one product, and gone with the next."""
        if len(self.bases) == 1:
            return weight_of(self.bases[0], dtype)
        parts = [base.weight for base in self.bases]
        if parts[0].dtype == dtype and _stand_below(parts):
            joined: Tensor = parts[0].data.as_strided((self.out, parts[0].shape[1]), parts[0].stride())
            return joined
        return weights_below(self.bases, dtype)


def join(bases: Sequence[Any]) -> None:
    """Let the plain weights of `bases` be views of one storage, one below another; nothing is kept twice. 4-bit ones stay as they are.

    Rows of 4,096 bytes get 64 more between them: `dy @ W` then takes 5 to 7 % less time (README.md).
    """
    weights = [base.weight for base in bases]
    if any(getattr(weight, "quant_state", None) is not None for weight in weights) or len({weight.dtype for weight in weights}) > 1:
        return
    width, each = weights[0].shape[1], weights[0].element_size()
    gap = 64 // each if width * each % _ALIASED == 0 else 0
    if len(bases) == 1 and not gap:
        return
    storage = weights[0].new_empty(sum(len(weight) for weight in weights), width + gap)
    at = 0
    for weight in weights:
        part = storage[at : at + len(weight), :width]
        part.copy_(weight.data)
        weight.data = part
        at += len(part)


def _stand_below(parts: Sequence[Tensor]) -> bool:
    at, first = parts[0].data_ptr(), parts[0]
    for part in parts:
        if part.data_ptr() != at or part.stride() != first.stride() or part.shape[1] != first.shape[1]:
            return False
        at += len(part) * part.stride(0) * part.element_size()
    return first.untyped_storage().data_ptr() == parts[-1].untyped_storage().data_ptr()


def _joined_biases(bases: Sequence[Any]) -> Tensor | None:
    """[out], or None where no layer has one. Made for each product: a copy that is kept would not be what is loaded into them later."""
    found = [getattr(base, "bias", None) for base in bases]
    some = next((bias for bias in found if bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(base.out_features) if bias is None else bias.data for base, bias in zip(bases, found, strict=True)])


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return [slice(begin, end) for begin, end in pairwise(ends)]
