"""Causal attention for packed rows on CPU: each sample attends to itself alone.

A dense mask would compute every pair of tokens in a row and throw most of them away. Here each sample is put to its own keys only, in
blocks of places; blocks above the diagonal or outside a window are not computed at all. Samples never meet in a matrix product, so
isolation is exact. For the backward pass only the output and each row's log-sum-exp are kept; weights are made again from them.

A kernel of trimtab-xeon computes that where there is one for the dtype (kernels.attend); else what stands here does, of torch's products,
with short samples of like length in one padded batch.

Source: T. Dao et al., "FlashAttention" (2022, arXiv:2205.14135), appendix B.2, for the backward pass from log-sum-exps; N. Shazeer,
"Fast Transformer Decoding" (2019, arXiv:1911.02150) and Ainslie et al. (2023, arXiv:2305.13245) for query heads that share a key head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from trimtab_runtime.packing import alike
from trimtab_runtime.xeon import kernels

NAME = "trimtab_packed"
_PADDED_UP_TO = 256  # tokens of samples that are attended to as one padded batch; a longer one is computed by itself
_BLOCK = 512  # rows of queries (tokens times the heads that share a key head) that are put at once to the keys that they see


@dataclass(frozen=True)
class Group:
    """Samples attended to together: `gather` [samples, length] places in the row; `scatter` the same for real tokens, which are the
    `valid` ones of the flattened `gather`. Sample i stands at `begins[i]` with `lengths[i]` tokens."""

    gather: Tensor
    scatter: Tensor
    valid: Tensor
    begins: tuple[int, ...]
    lengths: tuple[int, ...]

    def to(self, device: str) -> Group:
        return Group(self.gather.to(device), self.scatter.to(device), self.valid.to(device), self.begins, self.lengths)


def plan_groups(lengths: list[int], *, slack: float = 0.25) -> list[Group]:
    """Group the samples of one flattened row by length, padding a group by at most `slack` of its longest.

    `lengths` are the samples' tokens in the order in which they stand; their sum is the row's length.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    planned = []
    for members in alike(lengths, slack=slack):
        longest = lengths[members[0]]
        columns = torch.arange(longest)
        begin = torch.tensor([starts[i] for i in members])[:, None]
        size = torch.tensor([lengths[i] for i in members])[:, None]
        valid = columns[None, :] < size
        gather = torch.where(valid, begin + columns, begin)
        places = (tuple(starts[i] for i in members), tuple(lengths[i] for i in members))
        planned.append(Group(gather, gather[valid], valid.reshape(-1).nonzero().squeeze(1), *places))
    return planned


def attend(
    query: Tensor, key: Tensor, value: Tensor, groups: list[Group], scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """query [n, H, d], key and value [n, KV, d], which may be strided views of one tensor -> (out [n, H, d], lse [H, n] in fp32).

    KV divides H; query head h attends to key head h // (H / KV). Each token sees those of its sample up to itself, with a `window` so
    many of them at most, itself among them. bf16 or fp32 on a CPU. No autograd: see `packed_attention`.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    if kernels.attend(query, key, value, _places(groups), scale, window, out, lse):
        return out, lse
    for part in _parts(groups):
        q, k, v = _heads(query, part, key.shape[1]), _heads(key, part, key.shape[1]), _heads(value, part, key.shape[1])
        got, sums = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for rows, keys, hidden in _blocks(part.length, q.shape[1] // part.length, window, q.device):
            scores = _scores(q[:, rows], k[:, keys], scale, hidden)
            total = torch.logsumexp(scores, dim=-1)
            weights = scores.sub_(total[..., None]).exp_().to(v.dtype)
            got[:, rows] = torch.bmm(weights, v[:, keys])
            sums[:, rows] = total
        _put_back(out, got, part)
        _put_back(lse.t()[..., None], sums[..., None], part)
    return out, lse


def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: list[Group],
    scale: float,
    window: int | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as `attend` was given them, from that of its `out`: three tensors shaped like those.

    With `into` [n, (H + 2 KV) d] they are written there, one behind the other, and views of it are returned. The same threads give the
    same bits: where several share a sample's key head, its gradients are sums of theirs, in an order that depends on how many there are.
    """
    n, heads, width = query.shape
    kv_heads = key.shape[1]
    if into is None:
        into = torch.empty(n, (heads + 2 * kv_heads) * width, dtype=query.dtype, device=query.device)
    parts = into.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    dq, dk, dv = (part.view(n, -1, width) for part in parts)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    if kernels.attend_backward(d_out, query, key, value, out, lse, _places(groups), scale, window, dq, dk, dv):
        return dq, dk, dv
    for part in _parts(groups):
        q, k, v = _heads(query, part, kv_heads), _heads(key, part, kv_heads), _heads(value, part, kv_heads)
        d, got = _heads(d_out, part, kv_heads, padding=False), _heads(out, part, kv_heads)
        sums = _heads(lse.t()[..., None], part, kv_heads)
        delta = torch.linalg.vecdot(d.float(), got.float())[..., None]
        dq_part = torch.empty_like(q)
        dk_part, dv_part = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        for rows, keys, hidden in _blocks(part.length, q.shape[1] // part.length, window, q.device):
            weights = _scores(q[:, rows], k[:, keys], scale, hidden).sub_(sums[:, rows]).exp_()
            d_scores = _products(d[:, rows], v[:, keys]).sub_(delta[:, rows]).mul_(weights).mul_(scale).to(q.dtype)
            dq_part[:, rows] = torch.bmm(d_scores, k[:, keys])
            dk_part[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
            dv_part[:, keys] += torch.bmm(weights.to(v.dtype).transpose(1, 2), d[:, rows])
        _put_back(dq, dq_part, part)
        _put_back(dk, dk_part.to(k.dtype), part)
        _put_back(dv, dv_part.to(v.dtype), part)
    return dq, dk, dv


def _places(groups: list[Group]) -> Tensor:
    """[samples, 2] int64: where each begins, and its length."""
    return torch.tensor([place for group in groups for place in zip(group.begins, group.lengths, strict=True)])


@dataclass(frozen=True)
class _Part:
    """What is computed at once: a group, padded, or with `group` None the one sample of `length` tokens at `begin`."""

    group: Group | None
    begin: int
    length: int


def _parts(groups: list[Group]) -> Iterator[_Part]:
    for group in groups:
        longest = group.gather.shape[1]
        if longest <= _PADDED_UP_TO and len(group.begins) > 1:
            yield _Part(group, 0, longest)
        else:
            yield from (_Part(None, begin, length) for begin, length in zip(group.begins, group.lengths, strict=True))


def _heads(whole: Tensor, part: _Part, kv_heads: int, *, padding: bool = True) -> Tensor:
    """[n, heads, d] -> [samples * kv_heads, length * heads / kv_heads, d], contiguous: the heads that share a key head stand side by side
    as rows of one matrix. Where a sample is shorter than its group, there are copies of its first place, or without `padding` zeros."""
    heads, width = whole.shape[1:]
    if part.group is None:
        rows = whole[part.begin : part.begin + part.length]
    elif padding:
        rows = whole.index_select(0, part.group.gather.reshape(-1))
    else:
        rows = torch.zeros(part.group.gather.numel(), heads, width, dtype=whole.dtype, device=whole.device)
        rows.index_copy_(0, part.group.valid, whole.index_select(0, part.group.scatter))
    by_head = rows.view(-1, part.length, kv_heads, heads // kv_heads, width).transpose(1, 2)
    return by_head.reshape(-1, part.length * (heads // kv_heads), width)


def _put_back(whole: Tensor, by_head: Tensor, part: _Part) -> None:
    """The reverse of `_heads`: into the places of `whole` [n, heads, d]."""
    heads, width = whole.shape[1:]
    samples = 1 if part.group is None else len(part.group.begins)
    rows = by_head.view(samples, -1, part.length, by_head.shape[1] // part.length, width).transpose(1, 2)
    if part.group is None:
        whole[part.begin : part.begin + part.length].view(part.length, *rows.shape[2:]).copy_(rows[0])
    else:
        whole.index_copy_(0, part.group.scatter, rows.reshape(-1, heads, width).index_select(0, part.group.valid))


def _blocks(length: int, repeat: int, window: int | None, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blocks of a sample: rows of queries, the keys that any of them sees, and for these keys, or the last of them, 0 or minus
    infinity where a row does not see it [rows, last keys]."""
    size = max(1, _BLOCK // repeat)
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = 0 if window is None else max(0, begin - window + 1)
        hidden = _hidden(end - begin, end - begin if window is None else end - first, repeat, window, device)
        yield slice(begin * repeat, end * repeat), slice(first, end), hidden


@lru_cache(maxsize=8)
def _hidden(queries: int, keys: int, repeat: int, window: int | None, device: torch.device) -> Tensor:
    """What the last `queries` of `keys` places do not see of these [queries * repeat, keys]: minus infinity there, else 0."""
    with torch.inference_mode(False):  # whoever asks first
        place = torch.arange(keys, device=device)
        own = place[keys - queries :].repeat_interleave(repeat)[:, None]
        unseen = place > own
        if window is not None:
            unseen |= place <= own - window
        return torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))


def _scores(query: Tensor, key: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Scaled products [b, rows, keys] in fp32, minus infinity where a row does not see a key."""
    scores = _products(query, key).mul_(scale)
    scores[..., scores.shape[-1] - hidden.shape[-1] :].add_(hidden)
    return scores


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """rows [b, m, d] times keys [b, k, d] -> [b, m, k] in fp32. Of bf16 in two halves, the second what rounding took from the first:
    bf16 alone would be off by 0.4 % of a score, and a weight by as much as its score's whole error."""
    turned = keys.transpose(1, 2)
    high = torch.bmm(rows, turned)
    return high if rows.dtype is torch.float32 else high.float().add_(torch.baddbmm(high, rows, turned, beta=-1))


class _Packed(torch.autograd.Function):
    """`attend` with its gradient. Only what it is given, its output and the log-sum-exps are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: list[Group], scale: float, window: int | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out, lse = attend(query, key, value, groups, scale, window)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.given = (groups, scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        return *attend_backward(upstream[0], *ctx.saved_tensors, *ctx.given), None, None, None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_groups: list[Group] | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, width] -> ([1, tokens, heads, width], None).

    With a `sliding_window` each token sees so many of its sample, itself among them.
    """
    if packed_groups is None or query.shape[0] != 1:
        raise ValueError("packed attention takes one flattened row and its groups")
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    if query.device.type != "cpu":
        return _on_a_gpu(query, key, value, packed_groups, scale, sliding_window)[None], None
    out: Tensor = _Packed.apply(query, key.to(query.dtype), value.to(query.dtype), packed_groups, scale, sliding_window)
    return out[None], None


def _on_a_gpu(query: Tensor, key: Tensor, value: Tensor, groups: list[Group], scale: float, window: int | None) -> Tensor:
    """The same by torch's own attention, group by group, with its own gradient."""
    heads, kv_heads = query.shape[1], key.shape[1]
    pieces = []
    for group in groups:
        samples, length = group.gather.shape
        flat = group.gather.reshape(-1)
        q, k, v = (part.index_select(0, flat).unflatten(0, (samples, length)).transpose(1, 2) for part in (query, key, value))
        beyond = window if window is not None and window < length else None  # else the window holds the whole sample
        mask = None if beyond is None else _band(length, beyond, query.device)
        gqa = kv_heads != heads
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        pieces.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.valid))
    scatter = torch.cat([group.scatter for group in groups])
    return torch.empty_like(query, memory_format=torch.contiguous_format).index_copy(0, scatter, torch.cat(pieces))


@lru_cache(maxsize=2)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which places [length, length] a place sees: itself and the `window` - 1 before it. One for all layers."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def block_diagonal(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """For models that have attention of their own: 0 where a place of the row sees another, of its own sample and not after it, and
    minus infinity elsewhere. `positions` [1, n] restart with each sample -> [1, 1, n, n] in `dtype`."""
    sample = (positions[0] == 0).cumsum(0)
    seen = (sample[:, None] == sample[None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[None, None]


def register() -> None:
    """Make `attn_implementation="trimtab_packed"` known to transformers. Without a mask entry, none is built."""
    AttentionInterface.register(NAME, packed_attention)
