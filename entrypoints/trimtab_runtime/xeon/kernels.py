"""The only door to the compiled kernels (`trimtab-xeon`): each function here works with and without them.

Without them, or with TRIMTAB_XEON=off, plain torch computes the same within the tolerance that each docstring states.
TRIMTAB_XEON=amx, avx512 or portable forces a path; unset, the best that this processor runs is taken.
Tensors are bf16 or fp32 on the CPU and contiguous where nothing else is said; n is a number of tokens. None is seen by autograd.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import SpecError
from trimtab_runtime.choices import Choice, cpu_flags

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

VARIABLE = "TRIMTAB_XEON"
PATHS = ("amx", "avx512", "portable", "off")  # each takes what those after it have, where it has nothing better
STREAM_FROM = 8 << 20  # bytes of a dequantised weight from which it is written past the caches (measured: trimtab_xeon/README.md)
_NAMES = {"amx": "AMX (TILE, BF16)", "avx512": "AVX-512 (F, BW, DQ, VL)"}
_REFUSED = "Linux does not let this process use the processor's AMX, as it does from 5.16 on where nothing forbids it"
_Op = Callable[..., Any]


@cache
def path() -> Choice:
    """Which path the kernels take, `amx`, `avx512`, `portable` or `off`, and why. Decided once.

    Raises SpecError for another name in TRIMTAB_XEON, or one that this machine cannot take.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", *PATHS):
        raise SpecError(f"{VARIABLE}={asked} is no path of the kernels: set it to {', '.join(PATHS[:-1])} or {PATHS[-1]}, or unset it")
    if asked == "off":
        return Choice("off", f"{VARIABLE}=off")
    try:
        library = import_module("trimtab_xeon")
        best: str = library.best()
    except (ImportError, AttributeError, OSError) as exc:  # AttributeError: the folder of its sources is importable as a namespace
        if asked:
            raise SpecError(f"{VARIABLE}={asked}, and trimtab-xeon cannot be loaded ({exc}): install it, or unset {VARIABLE}") from exc
        loaded = "not installed" if not isinstance(exc, OSError) else f"not loadable ({exc})"
        return Choice("off", f"trimtab-xeon is {loaded}: plain torch computes")
    if asked and PATHS.index(asked) < PATHS.index(best):
        refused = _REFUSED if asked == "amx" and "amx_bf16" in cpu_flags() else f"this processor has no {_NAMES[asked]}"
        raise SpecError(f"{VARIABLE}={asked}, and {refused}: set it to {best}, or unset it")
    library.use(asked or best)
    if asked:
        return Choice(asked, f"{VARIABLE}={asked}")
    if best == "portable":
        return Choice(best, f"this processor has no {_NAMES['avx512']}")
    lost = f"; {_REFUSED}" if best == "avx512" and "amx_bf16" in cpu_flags() else ""
    return Choice(best, f"this processor has {_NAMES[best]}{lost}")


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Take another path in this process for a while, as TRIMTAB_XEON would; for tests and benchmarks."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    _forget()
    try:
        path()
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
        _forget()
        path()


def _forget() -> None:
    path.cache_clear()
    _op.cache_clear()


@cache
def _op(name: str) -> _Op | None:
    """The compiled operator of this name, or None where torch is to compute."""
    if path().value == "off" or not hasattr(torch.ops.trimtab_xeon, name):
        return None
    found: _Op = getattr(torch.ops.trimtab_xeon, name).default
    return found


def _fits(*tensors: Tensor) -> bool:
    """Whether the kernels take them: on the CPU, contiguous, bf16 or fp32."""
    return all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)


# NF4 (Dettmers et al. 2023, arXiv:2305.14314) in bitsandbytes' storage format: owner weights.py


def nf4_dequantise(packed: Tensor, state: QuantState, out: Tensor) -> None:
    """Write the weight of `packed` uint8 [(N K + 1) / 2] into `out` [N, K], bf16 or fp32; double quantisation is undone inside.

    There may be a gap between the rows of `out` where K is a multiple of 64.
    Bit-equal to bitsandbytes' dequantize_4bit(packed, state).to(out.dtype): where the state's dtype is bf16, an fp32 `out` holds
    numbers rounded to bf16. Two differences to bitsandbytes 0.50.2 are its own: its AVX-512 kernel takes wrong scales where K is a
    multiple of 32 and not of 64, and numbers under 1.2e-38 become 0 in it on some processors; both are right here.
    Raises ValueError for a weight that bitsandbytes has packed for inference, which cannot be read.
    """
    op, nested = _op("nf4_dequantise"), state.state2
    if op is None or not _plain_nf4(packed, state, out):
        out.copy_(by_bitsandbytes(packed, state))
        return
    _check_unpacked(state)
    codes = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
    of_scales = (None, None, None, 1) if nested is None else (nested.code, nested.absmax, state.offset, nested.blocksize)
    op(codes, state.absmax, *of_scales, out, state.dtype == torch.bfloat16, STREAM_FROM)


def by_bitsandbytes(packed: Tensor, state: QuantState) -> Tensor:
    """The weight [N, K] in the state's dtype as bitsandbytes makes it, in memory of its own; with K of any size its scales are right.

    Raises ValueError as `nf4_dequantise`.
    """
    from bitsandbytes.functional import dequantize_4bit

    _check_unpacked(state)
    shape = state.shape
    if shape[-1] % state.blocksize:  # laid out as one row, which its kernel gets right
        one_row = copy(state)
        one_row.shape = torch.Size((1, shape.numel()))
        state = one_row
    weight: Tensor = dequantize_4bit(packed.view(-1, 1), state)
    return weight.reshape(shape)


def _check_unpacked(state: QuantState) -> None:
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has packed this weight for inference and it cannot be trained on: load the model again")


def _plain_nf4(packed: Tensor, state: QuantState, out: Tensor) -> bool:
    """Whether the compiled operator knows this form: the one that bitsandbytes makes for training."""
    of_weight = state.quant_type == "nf4" and state.blocksize == 64 and state.dtype in (torch.bfloat16, torch.float32)
    scales = state.absmax.dtype == (torch.float32 if state.state2 is None else torch.uint8)
    return of_weight and scales and packed.device.type == "cpu" and packed.is_contiguous() and _fits(out[:1])


def nf4_quantise(weight: Tensor) -> tuple[Tensor, QuantState]:
    """Quantise `weight` [N, K] (bf16, fp16 or fp32) by blocks of 64, the blocks' scales by blocks of 256.

    Returns (packed uint8 [(N K + 1) / 2, 1], state), byte for byte what bitsandbytes' quantize_4bit(compress_statistics=True,
    quant_type="nf4") returns. Raises ValueError for a weight that holds NaN or infinity, which would spoil every block of it.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    op = _op("nf4_quantise")
    if op is None or weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    else:
        numbers = (weight.float() if weight.dtype == torch.float16 else weight).contiguous()
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        absmax = torch.empty((weight.numel() + 63) // 64, dtype=torch.float32)
        op(numbers, packed, absmax)
        offset = absmax.mean()
        of_blocks, nested = quantize_blockwise(absmax - offset, blocksize=256)
        code = get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]
        state = QuantState(of_blocks, weight.shape, code, 64, "nf4", weight.dtype, offset, nested)  # type: ignore[no-untyped-call]
    if not torch.isfinite(state.offset):
        raise ValueError(
            "a weight holds NaN or infinite numbers and cannot be quantised: look at the checkpoint, or train with method=lora"
        )
    return packed, state


# Norm


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = weight [h] * round(x rstd), and rstd fp32 = 1 / sqrt(mean(x^2) + eps), for x [n, h] (rstd [n]) or [n, heads, h] ([n, heads]).

    Rounded as transformers' LlamaRMSNorm: x is normed in fp32, rounded to its dtype, then multiplied by the weight; a number may differ
    by as many roundings, for sums are taken in another order. x may be a view whose rows lie apart; y is written to `out`, such a view
    or x itself, where one is given.
    """
    op = _op("rms_norm")
    if op is None or not _rows(x) or (out is not None and not _rows(x, out)) or weight.dtype != x.dtype:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        y = (weight * (wide * rstd[..., None]).to(x.dtype)).to(x.dtype)
        return (y if out is None else out.copy_(y)), rstd
    y = x.new_empty(x.shape) if out is None else out
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    op(x, weight.contiguous(), eps, y, rstd)
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of x from that of y, computed in fp32 and rounded once; `add`, of the same shape, is added in the same pass.

    Shapes, views and `out` as in rms_norm; `out` may be dy or `add`. The weight is frozen and takes none.
    """
    op, given = _op("rms_norm_backward"), [one for one in (add, out) if one is not None]
    if op is None or not _rows(x, dy, *given) or weight.dtype != x.dtype:
        scaled = dy.float() * weight.float()
        normed = x.float() * rstd[..., None]
        dx = rstd[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        dx = (dx if add is None else dx + add.float()).to(x.dtype)
        return dx if out is None else out.copy_(dx)
    dx = x.new_empty(x.shape) if out is None else out
    op(dy, x, rstd.contiguous(), weight.contiguous(), add, dx)
    return dx


def _rows(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take them: on the CPU, one dtype, bf16 or fp32, [n, h] or [n, heads, h], each row's numbers together."""
    known = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.dim() in (2, 3)
    return known and all(t.stride(-1) == 1 and t.dtype == x.dtype and t.shape == x.shape for t in (x, *others))


# Rotary positions (Su et al. 2021, arXiv:2104.09864)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Turn x [n, heads, d] in place by cos and sin [n, d]: x cos + rotate_half(x) sin, first half against second. Returns x.

    x may be a view whose tokens lie further apart (of qkv, say); a head's d numbers lie together. `back` applies the transpose, which
    gradients take. Each product and the sum are rounded to x's dtype, as in transformers, and bit-equal to it on every path.
    """
    op = _op("rotate_")
    if op is not None and _rows(x) and cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32):
        op(x, cos.contiguous(), sin.contiguous(), back)
        return x
    half = x.shape[-1] // 2
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if back:
        turned = x * sin
        turned = torch.cat((turned[..., half:], -turned[..., :half]), dim=-1)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    return x.mul_(cos).add_(turned)


# SwiGLU (Shazeer 2020, arXiv:2002.05202)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [n, f] of gate_up [n, 2 f], gate first; silu is rounded to the dtype before the product, as in transformers.

    Paths differ by the last bit of exp, which bf16 shows in few numbers.
    """
    op = _op("swiglu")
    if op is None or gate_up.dim() != 2 or not _rows(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    act = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    op(gate_up, act)
    return act


def swiglu_backward(d: Tensor, gate_up: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up [n, 2 f], the activation [n, f] again) from that of the activation d [n, f]; computed in fp32, rounded once.

    Where `keep` is False the gradient takes gate_up's place in memory.
    """
    op = _op("swiglu_backward")
    into = torch.empty_like(gate_up) if keep else gate_up
    if op is None or gate_up.dim() != 2 or not (_rows(gate_up) and _rows(d)) or d.dtype != gate_up.dtype:
        gate, up = gate_up.chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate) * up
        wide, slope = gate.float(), torch.sigmoid(gate.float())
        d_up = d.float() * wide * slope
        d_gate = d.float() * up.float() * slope * (1 + wide * (1 - slope))
        into[:, : gate.shape[1]] = d_gate
        into[:, gate.shape[1] :] = d_up
        return into, act
    act = d.new_empty(d.shape)
    op(d, gate_up, into, act)
    return into, act


# Losses whose gradient takes the logits' place


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """`scale` times the summed cross-entropy (fp32 scalar) of logits [n, V] and targets [n] int64, each of them in [0, V).

    The logits become its gradient, scale * (softmax - onehot). Sums are in fp32; the gradient is rounded once.
    """
    op = _op("cross_entropy_")
    if op is not None and logits.dim() == 2 and _rows(logits):
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        op(logits, targets.contiguous(), scale, losses)
        return losses.sum() * scale
    wide, wanted = logits.float(), targets[:, None]  # fp32 logits themselves, or a copy
    wide.sub_(wide.amax(-1, keepdim=True))
    of_target = wide.gather(1, wanted)
    total = wide.exp_().sum(-1, keepdim=True)
    loss = (total.log() - of_target).sum() * scale
    wide.mul_(scale / total).scatter_add_(1, wanted, torch.full_like(total, -scale))
    if wide is not logits:
        logits.copy_(wide)
    return loss


def divergence_(logits: Tensor, ids: Tensor, chances: Tensor, scale: float) -> Tensor:
    """`scale` times the summed divergence (fp32 scalar) of logits [n, V] from a teacher known by its likeliest tokens.

    ids [n, k] int64 are those tokens, each once, chances [n, k] their probabilities; all other tokens are one event, so k + 1 events
    are compared. What the student leaves to the others counts as 1e-6 at least. The logits become the gradient.
    """
    op, q = _op("divergence_"), chances.float()
    if op is not None and logits.dim() == 2 and _rows(logits):
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        op(logits, ids.contiguous(), q.contiguous(), scale, losses)
        return losses.sum() * scale
    q_rest = (1 - q.sum(-1, keepdim=True)).clamp_min(0)
    wide = logits.float()
    wide.sub_(wide.amax(-1, keepdim=True))
    of_known = wide.gather(1, ids)
    total = wide.exp_().sum(-1, keepdim=True)
    log_known = of_known - total.log()
    p_known = log_known.exp()
    p_rest = (1 - p_known.sum(-1, keepdim=True)).clamp_min(1e-6)
    loss = torch.xlogy(q, q).sum() - (q * log_known).sum()
    loss += torch.xlogy(q_rest, q_rest).sum() - torch.xlogy(q_rest, p_rest).sum()
    wide.mul_(scale * (1 - q_rest / p_rest) / total).scatter_(1, ids, scale * (p_known - q))
    if wide is not logits:
        logits.copy_(wide)
    return loss * scale


# Attention of packed rows: what computes it elsewhere is attention.py


def attend(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scale: float, window: int | None, out: Tensor, lse: Tensor) -> bool:
    """Causal attention of each sample alone, into `out` [n, H, d] and `lse` [H, n] fp32; False where no kernel takes these tensors.

    query [n, H, d], key and value [n, KV, d] may lie in one tensor; `places` [samples, 2] int64 are each sample's begin and length.
    The kernels take an even d, bf16 where the processor has AMX or AVX512-BF16, fp32 where it has AVX-512. Sums are in fp32. NaN or
    infinity stays in its sample, but may reach tokens of it that stand before: what is not seen is multiplied by 0.
    """
    op = _op("attend")
    if op is None or not _attendable(query, key, value):
        return False
    op(query, key, value, places, scale, _window(window, len(query)), out, lse)
    return True


def attend_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, places: Tensor, scale: float, window: int | None,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> bool:  # fmt: skip
    """The gradients of what `attend` was given, from that of its `out`, into dq [n, H, d], dk and dv [n, KV, d]; False as there."""
    op = _op("attend_backward")
    if op is None or not _attendable(d_out, query, key, value, out, dq, dk, dv):
        return False
    op(d_out, query, key, value, out, lse, places, scale, _window(window, len(query)), dq, dk, dv)
    return True


def _window(window: int | None, tokens: int) -> int:
    """As the kernels take it: one that reaches beyond the row is none, -1."""
    return -1 if window is None or window >= tokens else window


def _attendable(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and tensors[0].shape[-1] % 2 == 0
        and all(t.dtype is dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and bool(torch.ops.trimtab_xeon.attend_takes(dtype is torch.bfloat16))
    )
