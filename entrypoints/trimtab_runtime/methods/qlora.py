"""A 4-bit base under the adapters (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314): NF4, double quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.xeon import kernels

if TYPE_CHECKING:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState
    from peft import PeftModel

BLOCK = 64
Factors = tuple[Tensor, Tensor]

_SEED = 20_090_917  # of the draws that a randomised decomposition begins with, the same for each layer
_BEYOND = 16  # columns that it takes beyond the rank asked for
_ROUNDS = 2  # of its power iteration


def library() -> Any:
    """bitsandbytes, without its warnings. It takes a second to load, so it is loaded where something is put into 4 bits, and not before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    return bitsandbytes


@contextmanager
def watched(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While it is open: the root mean square [in] of each of a layer's inputs in its last forward, by the layer's name."""
    scales: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            scales[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).float().square().mean(0).sqrt()

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield scales
    finally:
        for hook in hooks:
            hook.remove()


def input_scales(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Tensor]:
    """For every linear layer but the head: the root mean square [in] of each of its inputs over one forward of `given`."""
    with watched(linear_layers(model)) as scales, torch.no_grad():
        model.get_decoder()(**given)
    return scales


def quantise(
    model: PreTrainedModel,
    dtype: torch.dtype,
    *,
    rank: int = 0,
    scales: dict[str, Tensor] | None = None,
    restored: Collection[str] | None = None,
) -> dict[str, Factors]:
    """Replace every linear layer but the head by its NF4 form, in place. Computes in `dtype`.

    Returns for each layer (of those `restored`) what `taken_away` does for `rank` (none for rank 0).
    """
    lost = {}
    for name, layer in linear_layers(model).items():
        small = quantised(layer, dtype)
        if rank and (restored is None or name in restored):
            lost[name] = taken_away(layer.weight.data, small, rank, (scales or {}).get(name))
        put(model, name, small)
    return lost


def quantised(layer: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """The layer in NF4, which computes in `dtype`; its bias is shared."""
    packed, state = kernels.nf4_quantise(layer.weight.data.contiguous())
    return four_bit(layer, packed, state, dtype)


def four_bit(layer: nn.Linear, packed: Tensor, state: QuantState, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """What computes in the place of `layer` with the weights `packed`, as bitsandbytes stores them."""
    nn4 = library().nn
    small: bnb.nn.Linear4bit = nn4.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    small.weight = nn4.Params4bit(
        packed, requires_grad=False, quant_state=state, compress_statistics=True, quant_type="nf4", blocksize=BLOCK, module=small,
        bnb_quantized=True,
    )  # fmt: skip
    small.quant_state = state
    if layer.bias is not None:
        small.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    # else the first forward in eval mode repacks the weights in place, and later gradients are wrong or missing
    small.support_avx512bf16_for_cpu = False
    return small


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` be the model's module of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def taken_away(weight: Tensor, small: bnb.nn.Linear4bit, rank: int, scale: Tensor | None = None) -> Factors:
    """The `rank` largest parts of what quantisation took away from `weight` [out, in], where an input counts as much as its `scale` [in]:

    the product of that rank that changes the layer's output least when inputs do not correlate (Zhang et al. 2024, "QERA",
    arXiv:2410.06040, the approximate form).
    """
    kept = torch.empty_like(weight)
    kernels.nf4_dequantise(small.weight.data, small.weight.quant_state, kept)
    matrix = weight.to(torch.float32, copy=True).sub_(kept)
    del kept
    return largest_parts(matrix, rank, scale, coarse=weight.dtype is torch.bfloat16)


def largest_parts(matrix: Tensor, rank: int, scale: Tensor | None = None, *, coarse: bool = False) -> Factors:
    """B [out, rank] and A [rank, in] whose product is nearest to `matrix` [out, in] fp32, columns weighed by `scale` [in].

    Zeros beyond the matrix's own rank. A randomised method (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1); its draws
    come from a seed of their own, so that they change no other random numbers, and a layer begins as it does whatever came before it.
    With `coarse` the directions are sought by products in bf16, several times as fast; what is taken in them is computed in fp32.
    """
    size = min(rank, *matrix.shape)
    if scale is not None:
        scale = scale.clamp_min(scale.max() * 1e-4 + 1e-8)  # an input that was never seen still counts a little
        matrix = matrix * scale
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    sought = tall.bfloat16() if coarse else tall
    draws = torch.randn(tall.shape[1], min(size + _BEYOND, *matrix.shape), generator=torch.Generator().manual_seed(_SEED))

    def across(one: Tensor, other: Tensor) -> Tensor:
        return torch.linalg.qr(torch.mm(one, other.to(one.dtype)).float()).Q

    basis = across(sought, draws.to(matrix.device))
    for _ in range(_ROUNDS):
        basis = across(sought, across(sought.T, basis))
    left, values, right = torch.linalg.svd(torch.mm(basis.T, tall), full_matrices=False)
    left = torch.mm(basis, left)
    if tall is not matrix:
        left, right = right.T, left.T
    root = values[:size].sqrt()
    b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    b[:, :size], a[:size] = left[:, :size] * root, root[:, None] * right[:size]
    return b, a if scale is None else a / scale


def begin_with(model: PeftModel, lost: Mapping[str, Factors]) -> None:
    """Let the adapters begin as what quantisation took away, so that training starts nearer to the original model.

    Li et al. 2023, "LoftQ", arXiv:2310.08659.
    """
    layers = dict(model.get_base_model().named_modules())
    for name, (b, a) in lost.items():
        layer = layers[name]
        root = layer.scaling["default"] ** 0.5
        layer.lora_B["default"].weight.data.copy_(b / root)
        layer.lora_A["default"].weight.data.copy_(a / root)


def dequantised_nf4(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What the quantised layer computes with: `weight` [out, in] to NF4 and back, in `dtype` (default: the weight's)."""
    packed, state = kernels.nf4_quantise(weight)
    restored = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    kernels.nf4_dequantise(packed, state, restored)
    return restored.to(dtype or weight.dtype)
