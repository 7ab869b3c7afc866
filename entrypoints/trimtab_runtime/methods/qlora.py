"""A 4-bit base under the adapters (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314): NF4, double quantisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab_runtime.methods.lora import linear_layers

if TYPE_CHECKING:
    from peft import PeftModel

BLOCK = 64
Factors = tuple[Tensor, Tensor]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def input_scales(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Tensor]:
    """For every linear layer but the head: the root mean square [in] of each of its inputs over one forward of `given`."""
    scales = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            scales[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).float().square().mean(0).sqrt()

        return note

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model).items()]
    with torch.no_grad():
        model.get_decoder()(**given)
    for hook in hooks:
        hook.remove()
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

    Returns for each layer (of those `restored`) the `rank` largest parts of what quantisation took away (none for rank 0), where an
    input counts as much as it varies: the rank-`rank` product that changes the layer's output least when inputs do not correlate
    (Zhang et al. 2024, "QERA", arXiv:2410.06040, the approximate form).
    """
    lost = {}
    for name, layer in linear_layers(model).items():
        small = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
        small.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=BLOCK, module=small
        )
        if layer.bias is not None:
            small.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        small = small.to(layer.weight.device)
        # else the first forward in eval mode repacks the weights in place, and later gradients are wrong or missing
        small.support_avx512bf16_for_cpu = False
        if rank and (restored is None or name in restored):
            kept = dequantize_4bit(small.weight.data, small.weight.quant_state)
            lost[name] = largest_parts(layer.weight.data.float() - kept.float(), rank, (scales or {}).get(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
    return lost


def largest_parts(matrix: Tensor, rank: int, scale: Tensor | None = None) -> Factors:
    """B [out, rank] and A [rank, in] whose product is nearest to `matrix` [out, in], columns weighed by `scale` [in].

    Zeros beyond the matrix's own rank.
    """
    size = min(rank, *matrix.shape)
    if scale is not None:
        scale = scale.clamp_min(scale.max() * 1e-4 + 1e-8)  # an input that was never seen still counts a little
        matrix = matrix * scale
    left, values, right = torch.svd_lowrank(matrix, q=min(size + 16, *matrix.shape), niter=2)
    root = values[:size].sqrt()
    b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    b[:, :size], a[:size] = left[:, :size] * root, (right[:, :size] * root).T
    return b, a if scale is None else a / scale


def begin_with(model: PeftModel, lost: dict[str, Factors]) -> None:
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
    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    restored: Tensor = dequantize_4bit(packed, state)
    return restored.to(dtype or weight.dtype)
