"""A 4-bit base under the adapters (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314): NF4, double quantisation."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab_runtime.methods.lora import linear_layers

BLOCK = 64

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def quantise(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every linear layer but the head by its NF4 form, in place. Computes in `dtype`."""
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
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
    return model


def dequantised_nf4(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What the quantised layer computes with: `weight` [out, in] to NF4 and back, in `dtype` (default: the weight's)."""
    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    restored: Tensor = dequantize_4bit(packed, state)
    return restored.to(dtype or weight.dtype)
