"""Causal attention for packed rows on CPU: each sample attends to itself alone.

A dense mask would compute every pair of tokens in a row and throw most of them away. Here samples of similar length
are gathered into one padded batch and attended to without any mask but the causal one; padding stands behind a
sample's last token, where causality hides it. Samples never meet in a matrix product, so isolation is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from trimtab.estimate import EXPLICIT_UP_TO
from trimtab_runtime.packing import alike

NAME = "trimtab_packed"
_BLOCK = 512  # queries of a long sample that are put at once to what their window reaches


@dataclass(frozen=True)
class Group:
    """Samples attended to together: `gather` [samples, length] places in the row; `scatter` the same for real tokens."""

    gather: Tensor
    scatter: Tensor
    valid: Tensor


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
        planned.append(Group(gather, gather[valid], valid.reshape(-1).nonzero().squeeze(1)))
    return planned


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
    if len(packed_groups) == 1 and packed_groups[0].valid.numel() == packed_groups[0].gather.numel() == query.shape[0]:
        group = packed_groups[0]
        n, length = group.gather.shape
        parts = (part.reshape(n, length, *part.shape[1:]) for part in (query, key, value))
        return _attend(*parts, scale, sliding_window)[None].flatten(1, 2), None
    pieces = []
    for group in packed_groups:
        shape = group.gather.shape
        flat = group.gather.reshape(-1)
        parts = (part.index_select(0, flat).view(*shape, *part.shape[1:]) for part in (query, key, value))
        pieces.append(_attend(*parts, scale, sliding_window).flatten(0, 1).index_select(0, group.valid))
    scatter = torch.cat([group.scatter for group in packed_groups])
    back = torch.empty_like(scatter)
    back[scatter] = torch.arange(len(scatter), device=scatter.device)
    out = torch.cat(pieces).index_select(0, back)
    return out[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention inside each sample: [samples, length, heads, width] -> the same shape."""
    samples, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    beyond = window if window is not None and window < length else None  # else the window holds the whole sample
    if length > EXPLICIT_UP_TO:  # the flash kernel, whose memory does not grow with the square
        if beyond is not None:
            return _by_blocks(query, key, value, scale, beyond).transpose(1, 2)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=kv_heads != heads)
        return out.transpose(1, 2)
    # query heads that share a key head stand as rows of one product: [samples, kv, repeat * length, width]
    repeat = heads // kv_heads
    query = query.reshape(samples, kv_heads, repeat * length, width)
    scores = torch.matmul(query * scale, key.transpose(-1, -2)).view(samples, kv_heads, repeat, length, length)
    hidden = _hidden(length, beyond, scores.device)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1, dtype=torch.float32).to(value.dtype)
    out = torch.matmul(weights.view(samples, kv_heads, repeat * length, length), value)
    return out.view(samples, heads, length, width).transpose(1, 2)


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """Attention within a window: [samples, heads, length, width] -> the same shape. Each block of queries is put to the keys of its own
    places and of as many before it as the window reaches, so time grows with the length and not with its square."""
    length, repeat = query.shape[2], query.shape[1] // key.shape[1]
    if repeat > 1:  # once: the kernel would copy each block's keys for its heads, and keep the copies for the backward pass
        key, value = (part.repeat_interleave(repeat, dim=1) for part in (key, value))
    mask = _band(window, query.dtype, query.device)
    blocks = []
    for begin in range(0, length, _BLOCK):
        end, first = min(begin + _BLOCK, length), max(0, begin - window)
        seen = mask[: end - begin, window - (begin - first) : window + end - begin]
        places = (query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end])
        blocks.append(functional.scaled_dot_product_attention(*places, attn_mask=seen, scale=scale))
    return torch.cat(blocks, dim=2)


@lru_cache(maxsize=2)
def _band(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a block's places [_BLOCK] see of themselves and of the `window` places before them: 0, or minus infinity.

    One for all layers, each of which keeps what it was given for its backward pass.
    """
    with torch.inference_mode(False):  # whoever asks first
        row, column = torch.arange(_BLOCK, device=device)[:, None], torch.arange(window + _BLOCK, device=device)
        seen = (column > row) & (column <= row + window)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _hidden(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which places [length, length] a place does not see: those after it, and those `window` or more before it."""
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.triu(1) if window is None else whole.triu(1) | whole.tril(-window)


def block_diagonal(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """For models that have attention of their own: 0 where a place of the row sees another, of its own sample and not after it, and
    minus infinity elsewhere. `positions` [1, n] restart with each sample -> [1, 1, n, n] in `dtype`."""
    sample = (positions[0] == 0).cumsum(0)
    seen = (sample[:, None] == sample[None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[None, None]


def register() -> None:
    """Make `attn_implementation="trimtab_packed"` known to transformers. Without a mask entry, none is built."""
    AttentionInterface.register(NAME, packed_attention)
