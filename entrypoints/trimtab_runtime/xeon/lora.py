"""An adapted linear layer as one step of the graph: base product, adapter, and both gradients, without casts in between.

PEFT's own layer keeps adapters in fp32 and casts each activation to them and back; on a small model these copies and
the separate additions cost as much as the adapters' products. The mathematics is the same (a test compares both).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab_runtime.xeon.weights import weight_of


class _Adapted(torch.autograd.Function):
    """y = x W' + b + s (x A') B' for x [tokens, in], W [out, in] frozen, A [r, in] and B [out, r] in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Module, scale: float) -> Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        inner = torch.mm(x, a_low.t())
        weight = weight_of(base, x.dtype)
        bias = getattr(base, "bias", None)
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())
        y.addmm_(inner, b_low.t(), alpha=scale)
        ctx.save_for_backward(x, inner, a_low, b_low)
        ctx.base, ctx.scale = base, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, inner, a_low, b_low = ctx.saved_tensors
        dx, da, db = _through(ctx, upstream[0].contiguous(), x, inner, a_low, b_low)
        return dx, da, db, None, None


class _Directed(torch.autograd.Function):
    """y = m / |W + s B A| (x W' + s (x A') B') + b: DoRA (Liu et al. 2024, arXiv:2402.09353), m [out] in fp32.

    The norm of each output's weights takes no gradient (section 4.3 there). It needs no W + s B A: its square is
    |W|^2 + 2 s B (W A')' + s^2 B A A' B', row by row, with `squares` [out] = |W|^2, which do not change.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, base: nn.Module, scale: float, squares: Tensor) -> Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        inner = torch.mm(x, a_low.t())
        weight = weight_of(base, x.dtype)
        z = torch.mm(x, weight.t())
        z.addmm_(inner, b_low.t(), alpha=scale)
        crossed = torch.mm(weight, a_low.t()).float()
        norm = (squares + scale * (b * (2 * crossed + scale * torch.mm(b, torch.mm(a, a.t())))).sum(1)).clamp_min(1e-12).sqrt()
        gain = (magnitude / norm - 1).to(x.dtype)  # beyond 1, for bf16 would lose what is learned of it
        ctx.save_for_backward(x, inner, a_low, b_low, z, gain, norm)
        ctx.base, ctx.scale = base, scale
        bias = getattr(base, "bias", None)
        y = torch.addcmul(z, z, gain)
        return y if bias is None else y.add_(bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None, None, None]:
        x, inner, a_low, b_low, z, gain, norm = ctx.saved_tensors
        d_magnitude = (upstream[0] * z).sum(0, dtype=torch.float32) / norm
        dz = torch.addcmul(upstream[0], upstream[0], gain).contiguous()
        dx, da, db = _through(ctx, dz, x, inner, a_low, b_low)
        return dx, da, db, d_magnitude, None, None, None


def _through(ctx: Any, dy: Tensor, x: Tensor, inner: Tensor, a_low: Tensor, b_low: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, A and B from that of x W' + s (x A') B'."""
    d_inner = torch.mm(dy, b_low).mul_(ctx.scale)
    db = torch.mm(dy.t(), inner).float().mul_(ctx.scale)
    da = torch.mm(d_inner.t(), x).float()
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.mm(dy, weight_of(ctx.base, dy.dtype))
        dx.addmm_(d_inner, a_low)
    return dx, da, db


def set_aside(layer: LoraLayer) -> bool:
    """Whether PEFT has switched a layer's adapter off (`disable_adapter`) or merged it into the base: then its own forward is right."""
    return bool(layer.disable_adapters or layer.merged)


def _forward(self: LoraLayer, x: Tensor, *args: Any, **given: Any) -> Tensor:
    if set_aside(self):
        own: Tensor = type(self).forward(self, x, *args, **given)
        return own
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Adapted.apply(flat, self.lora_A["default"].weight, self.lora_B["default"].weight, self.base_layer, self.scaling["default"])
    return y.view(*x.shape[:-1], y.shape[-1])


def _directed(self: LoraLayer, x: Tensor, *args: Any, **given: Any) -> Tensor:
    if set_aside(self):
        own: Tensor = type(self).forward(self, x, *args, **given)
        return own
    flat = x.reshape(-1, x.shape[-1])
    factors = (self.lora_A["default"].weight, self.lora_B["default"].weight, self.lora_magnitude_vector["default"].weight)
    y: Tensor = _Directed.apply(flat, *factors, self.base_layer, self.scaling["default"], self.row_squares)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Frozen(torch.autograd.Function):
    """y = x W' + b of a 4-bit layer, of which nothing is kept for the backward pass: dx = dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module) -> Tensor:
        ctx.base = base
        y = torch.mm(x, weight_of(base, x.dtype).t())
        bias = getattr(base, "bias", None)
        return y if bias is None else y.add_(bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None]:
        return (torch.mm(upstream[0].contiguous(), weight_of(ctx.base, upstream[0].dtype)) if ctx.needs_input_grad[0] else None), None


def _frozen(self: Any, x: Tensor) -> Tensor:
    flat: Tensor = _Frozen.apply(x.reshape(-1, x.shape[-1]).to(self.compute_dtype or x.dtype), self)
    return flat.view(*x.shape[:-1], flat.shape[-1]).to(x.dtype)


def fuse(model: nn.Module) -> int:
    """Let every adapted linear layer compute in one step; layers with dropout stay as they are. Returns how many do.

    4-bit layers that are left, without an adapter or below one with dropout, multiply as all others here do: bitsandbytes' own
    forward makes its weight afresh each time, and takes wrong scales where a width is a multiple of 32 and not of 64.
    """
    fused = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            if not isinstance(layer.lora_dropout["default"], nn.Identity):
                continue
            directed = "default" in layer.lora_magnitude_vector
            if directed:
                layer.row_squares = weight_of(layer.base_layer, torch.float32).square().sum(1)
            layer.forward = partial(_directed if directed else _forward, layer)  # no method: pickle would look for it in the class
            fused += 1
        elif getattr(getattr(layer, "weight", None), "quant_state", None) is not None and layer.weight.device.type == "cpu":
            layer.forward = partial(_frozen, layer)
    return fused
