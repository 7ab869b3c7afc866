"""A decoder layer of Llama's kind as one step of the graph, its backward pass written by hand.

transformers and PEFT make some forty steps of it, each of which reads and writes all activations and keeps what it was given. Here q, k, v
and gate, up are one product each (merged.py), and only these are kept for the backward pass: the input, the reciprocal norms, q, k, v,
attention's output with its log-sum-exp, the middle of the layer, gate and up, and the adapters with their inner products. The normed
inputs and the activation are made again. A layer that is recomputed keeps its input alone.

Llama, Mistral, Qwen2 and Qwen3 (whose q and k are normed head by head) are such models. PEFT's modules stay the holders of all
parameters; without packed groups (generation) a layer computes as before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from trimtab_runtime.choices import Choice
from trimtab_runtime.xeon import attention, kernels, lora
from trimtab_runtime.xeon.merged import Factors, Maps

LIKE_LLAMA = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


class Places(NamedTuple):
    """Of the row's n places: cos and sin [n, width] of their rotation, and which samples they belong to."""

    cos: Tensor
    sin: Tensor
    groups: list[attention.Group]


class Attended(NamedTuple):
    """What the attention half keeps: rstd [n], qkv [n, (heads + 2 kv) width], out [n, heads width], lse, and x A' of both products."""

    rstd: Tensor
    qkv: Tensor
    inner: Tensor | None
    out: Tensor
    lse: Tensor
    inner_out: Tensor | None


class Gated(NamedTuple):
    """What the MLP half keeps: rstd [n], gate and up [n, 2 f], and x A' of both products."""

    rstd: Tensor
    gate_up: Tensor
    inner: Tensor | None
    inner_down: Tensor | None


class Lows(NamedTuple):
    """The adapters in the compute dtype."""

    qkv: Factors
    o: Factors
    gate_up: Factors
    down: Factors


@dataclass
class Block:
    """One layer's parts. `recompute`: its forward pass is done again in the backward pass."""

    norm: Any
    qkv: Maps
    head_norms: tuple[Any, Any] | None
    o: Maps
    middle_norm: Any
    gate_up: Maps
    down: Maps
    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None
    recompute: bool = False

    @classmethod
    def of(cls, layer: Any) -> Block:
        """The parts of one of `LIKE_LLAMA`, whose weights then share storage."""
        at, mlp = layer.self_attn, layer.mlp
        qkv = Maps([at.q_proj, at.k_proj, at.v_proj])
        sizes = [columns.stop - columns.start for columns in qkv.columns]
        window = at.config.sliding_window if isinstance(layer, MistralDecoderLayer) else getattr(at, "sliding_window", None)
        return cls(
            norm=layer.input_layernorm,
            qkv=qkv,
            head_norms=(at.q_norm, at.k_norm) if hasattr(at, "q_norm") else None,
            o=Maps([at.o_proj]),
            middle_norm=layer.post_attention_layernorm,
            gate_up=Maps([mlp.gate_proj, mlp.up_proj]),
            down=Maps([mlp.down_proj]),
            heads=sizes[0] // at.head_dim,
            kv_heads=sizes[1] // at.head_dim,
            width=at.head_dim,
            scale=at.scaling,
            window=window,
        )

    @property
    def maps(self) -> tuple[Maps, Maps, Maps, Maps]:
        return self.qkv, self.o, self.gate_up, self.down

    def lows(self, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> Lows:
        found, at = [], 0
        for maps in self.maps:
            count = 2 * sum(adapter is not None for adapter in maps.adapters)
            found.append(maps.factors(parameters[at : at + count], dtype))
            at += count
        return Lows(*found)

    # the attention half

    def attend(self, x: Tensor, places: Places, low: Lows) -> tuple[Tensor, Attended]:
        """x [n, hidden] + attention of the normed x, and what the backward pass needs beside x."""
        normed, rstd = _norm(x, self.norm)
        qkv, inner = self.qkv.forward(normed, low.qkv)
        del normed
        query, key, value, _rstds = self._turned(qkv, places)
        out, lse = attention.attend(query, key, value, places.groups, self.scale, self.window)
        out = out.flatten(1)
        y, inner_out = self.o.forward(out, low.o)
        return y.add_(x), Attended(rstd, qkv, inner, out, lse, inner_out)

    def attend_backward(
        self, dy: Tensor, x: Tensor, kept: Attended, places: Places, low: Lows, needs_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of x (None where it needs none) and of the adapters of q, k, v and o."""
        d_inner = self.o.upstream(dy, low.o)
        d_out = self.o.backward(dy, d_inner, low.o)
        of_o = self.o.gradients(dy, kept.out, kept.inner_out, d_inner)
        # q, k and v as they were put to attention: kept so, but where heads are normed
        query, key, value, rstds = self._turned(kept.qkv, places) if self.head_norms else (*self._heads(kept.qkv), None)
        d_qkv = torch.empty_like(kept.qkv)
        out, d_out = (part.view(query.shape) for part in (kept.out, d_out))
        attention.attend_backward(d_out, query, key, value, out, kept.lse, places.groups, self.scale, self.window, d_qkv)
        del query, key, value, out, d_out
        turned = d_qkv.view(len(x), -1, self.width)[:, : self.heads + self.kv_heads]
        kernels.rotate_(turned, places.cos, places.sin, back=True)
        if self.head_norms is not None and rstds is not None:
            for norm, columns, one in zip(self.head_norms, self.qkv.columns, rstds, strict=False):
                part, raw = (t[:, columns].reshape(-1, self.width) for t in (d_qkv, kept.qkv))
                d_qkv[:, columns] = kernels.rms_norm_backward(part, raw, one, norm.weight).view(len(x), -1)
        d_inner = self.qkv.upstream(d_qkv, low.qkv)
        normed = _norm(x, self.norm)[0] if d_inner is not None else x
        of_qkv = self.qkv.gradients(d_qkv, normed, kept.inner, d_inner)
        del normed
        if not needs_dx:
            return None, of_qkv + of_o
        d_normed = self.qkv.backward(d_qkv, d_inner, low.qkv)
        return kernels.rms_norm_backward(d_normed, x, kept.rstd, self.norm.weight, dy), of_qkv + of_o

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [n, heads, width] of q, k and v."""
        whole = qkv.view(len(qkv), -1, self.width)
        keys = self.heads + self.kv_heads
        return whole[:, : self.heads], whole[:, self.heads : keys], whole[:, keys:]

    def _turned(self, qkv: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """q, k, v [n, heads, width], q and k turned to their places: in qkv itself, or, where heads are normed, beside it, and the
        reciprocal norms [n heads] of both."""
        query, key, value = self._heads(qkv)
        keys = self.heads + self.kv_heads
        if self.head_norms is None:
            kernels.rotate_(qkv.view(len(qkv), -1, self.width)[:, :keys], places.cos, places.sin)
            return query, key, value, None
        both = [_norm(part.reshape(-1, self.width), norm) for part, norm in zip((query, key), self.head_norms, strict=True)]
        query, key = (kernels.rotate_(y.view(len(qkv), -1, self.width), places.cos, places.sin) for y, _ in both)
        return query, key, value, (both[0][1], both[1][1])

    # the MLP half

    def gate(self, x: Tensor, low: Lows) -> tuple[Tensor, Gated]:
        """x [n, hidden] + the MLP of the normed x, and what the backward pass needs beside x."""
        rstd, gate_up, inner, act = self._activated(x, low)
        y, inner_down = self.down.forward(act, low.down)
        return y.add_(x), Gated(rstd, gate_up, inner, inner_down)

    def gated(self, x: Tensor, low: Lows) -> Gated:
        """What `gate` keeps, without its output."""
        rstd, gate_up, inner, act = self._activated(x, low)
        return Gated(rstd, gate_up, inner, self.down.inner(act, low.down))

    def _activated(self, x: Tensor, low: Lows) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        normed, rstd = _norm(x, self.middle_norm)
        gate_up, inner = self.gate_up.forward(normed, low.gate_up)
        return rstd, gate_up, inner, kernels.swiglu(gate_up)

    def gate_backward(self, dy: Tensor, x: Tensor, kept: Gated, low: Lows) -> tuple[Tensor, list[Tensor]]:
        """The gradients of x and of the adapters of gate, up and down. The gradient of gate and up takes their place."""
        d_inner = self.down.upstream(dy, low.down)
        d_act = self.down.backward(dy, d_inner, low.down)
        d_gate_up, act = kernels.swiglu_backward(d_act, kept.gate_up, keep=False)
        del d_act
        of_down = self.down.gradients(dy, act, kept.inner_down, d_inner)
        del act
        d_inner = self.gate_up.upstream(d_gate_up, low.gate_up)
        if d_inner is not None:
            normed, _ = _norm(x, self.middle_norm)
            of_both = self.gate_up.gradients(d_gate_up, normed, kept.inner, d_inner)
            del normed
        else:
            of_both = []
        d_normed = self.gate_up.backward(d_gate_up, d_inner, low.gate_up)
        del d_gate_up
        return kernels.rms_norm_backward(d_normed, x, kept.rstd, self.middle_norm.weight, dy), of_both + of_down


class _Layer(torch.autograd.Function):
    """x [n, hidden] -> the layer's output [n, hidden]. `parameters` are the adapters' in the order of `Block.maps`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, places: Places, *parameters: Tensor) -> Tensor:
        low = block.lows(parameters, x.dtype)
        middle, attended = block.attend(x, places, low)
        y, gated = block.gate(middle, low)
        ctx.save_for_backward(x, *parameters)
        ctx.block, ctx.places = block, places
        ctx.kept = None if block.recompute else [low, middle, attended, gated]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        block, places, dy = ctx.block, ctx.places, upstream[0].contiguous()
        if ctx.kept == []:
            raise RuntimeError("a fused decoder layer keeps nothing for a second backward pass: do the forward pass again")
        if ctx.kept is None:
            low = block.lows(tuple(parameters), x.dtype)
            middle, attended = block.attend(x, places, low)
            gated = block.gated(middle, low)
        else:
            low, middle, attended, gated = ctx.kept
            ctx.kept.clear()  # each is freed after its use, and gate and up become their gradient: there is no second backward pass
        dy, of_mlp = block.gate_backward(dy, middle, gated, low)
        del middle, gated
        dx, of_attention = block.attend_backward(dy, x, attended, places, low, ctx.needs_input_grad[0])
        return dx, None, None, *of_attention, *of_mlp


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
    """A decoder layer's forward on a packed row; as its class computes it where there is no such row."""
    groups: list[attention.Group] | None = given.get("packed_groups")
    position: tuple[Tensor, Tensor] | None = given.get("position_embeddings")
    plain = bool(args) or given.get("past_key_values") is not None
    if (
        plain
        or groups is None
        or position is None
        or hidden_states.shape[0] != 1
        or hidden_states.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or any(adapter is not None and lora.set_aside(adapter) for maps in self.block.maps for adapter in maps.adapters)
    ):
        own: Tensor = type(self).forward(self, hidden_states, *args, **given)
        return own
    block: Block = self.block
    places = Places(position[0][0].contiguous(), position[1][0].contiguous(), groups)
    x = hidden_states[0].contiguous()
    parameters = tuple(parameter for maps in block.maps for parameter in maps.parameters())
    if not torch.is_grad_enabled():
        low = block.lows(parameters, x.dtype)
        return block.gate(block.attend(x, places, low)[0], low)[0][None]
    y: Tensor = _Layer.apply(x, block, places, *parameters)  # type: ignore[no-untyped-call]
    return y[None]


def fuse(model: nn.Module, recompute: Collection[int] = ()) -> Choice:
    """Let an adapted model's decoder layers compute in one step each, or, where one is not of that kind, each adapted linear layer.

    Returns `blocks` or `maps`, and why. `recompute`: as in `set_recompute`.
    """
    one_by_one = lora.fuse(model)
    layers = _decoder_layers(model)
    why = _why_not(layers, model)
    if not why:
        for layer in layers:
            layer.block = Block.of(layer)
            layer.forward = partial(_forward, layer)  # no method: see lora.fuse
    set_recompute(model, recompute)
    if why:
        return Choice("maps", f"{why}; {one_by_one} adapted linear layers compute in one step each")
    return Choice("blocks", f"all {len(layers)} decoder layers are of Llama's kind: one step each, backward written by hand")


def set_recompute(model: nn.Module, layers: Collection[int]) -> None:
    """Let the decoder layers of these numbers (from 0) keep their input alone, and do their forward pass again in the backward pass.

    The others keep what they need. Layers that are not fused do it in training mode, with the same random numbers for dropout.
    """
    for number, layer in enumerate(_decoder_layers(model)):
        again = number in layers
        if hasattr(layer, "block"):
            layer.block.recompute = again
        else:
            layer.gradient_checkpointing = again
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)


def _decoder_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _why_not(layers: list[Any], model: nn.Module) -> str:
    """Why decoder layers are not one step each; empty where they are."""
    other = next((type(layer).__name__ for layer in layers if type(layer) not in LIKE_LLAMA), "" if layers else type(model).__name__)
    if other:
        return f"{other} is none of {', '.join(kind.__name__ for kind in LIKE_LLAMA)}"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "this is not the CPU"
    config = layers[0].self_attn.config
    if config._attn_implementation != attention.NAME:
        return f"attention {config._attn_implementation} knows no packed samples"
    if config.hidden_act not in ("silu", "swish"):
        return f"the MLP's activation is {config.hidden_act}, not silu"
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            if not isinstance(layer.lora_dropout["default"], nn.Identity):
                return "adapters have dropout"
            if "default" in layer.lora_magnitude_vector:
                return "adapters are DoRA's"
    frozen = all("lora_" in name or not parameter.requires_grad for name, parameter in model.named_parameters())
    return "" if frozen else "more than adapters is trained"
