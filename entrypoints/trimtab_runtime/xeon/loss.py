"""Cross-entropy of a linear head without the full logits: chunk by chunk, the gradient taken in the forward.

A vocabulary of 49,152 at 2,048 tokens makes 400 MB of fp32 logits, written and read several times. Here a chunk of
tokens has its logits, in the head's dtype, turned into loss and gradient where they are, in memory that all chunks share,
and only rows that have a label are computed. The head's own gradient [vocabulary, width] is taken only where it is
trained: one more product a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.estimate import LOGITS_AT_ONCE
from trimtab_runtime.xeon import kernels


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, learn_: Callable[[Tensor, int], Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head: Tensor | None = None
        shared = torch.empty(min(len(hidden), LOGITS_AT_ONCE), len(head), dtype=head.dtype, device=head.device)
        for start in range(0, len(hidden), LOGITS_AT_ONCE):
            chunk = hidden[start : start + LOGITS_AT_ONCE]
            logits = torch.mm(chunk, head.t(), out=shared[: len(chunk)])
            total += learn_(logits, start)
            upstream = logits  # the gradient now stands in their place
            if of_hidden is not None:
                torch.mm(upstream, head, out=of_hidden[start : start + LOGITS_AT_ONCE])
            if ctx.needs_input_grad[1]:
                part = torch.mm(upstream.t(), chunk)
                if of_head is not None:
                    of_head.add_(part)
                else:  # the sum over chunks is kept in fp32: in bf16 the later ones would be lost
                    of_head = part.float() if len(hidden) > LOGITS_AT_ONCE else part
        if ctx.needs_input_grad[1]:
            of_head = torch.zeros_like(head) if of_head is None else of_head.to(head.dtype)
        ctx.save_for_backward(of_hidden, of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_hidden, of_head = (None if found is None else found * upstream[0].to(found.dtype) for found in ctx.saved_tensors)
        return of_hidden, of_head, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    """`scale` times the summed loss: hidden [tokens, width], head [vocabulary, width], targets [tokens] int64."""

    def cross_entropy_(logits: Tensor, start: int) -> Tensor:
        return kernels.cross_entropy_(logits, targets[start : start + len(logits)], scale)

    result: Tensor = _ChunkedLoss.apply(hidden, head, cross_entropy_)
    return result


def linear_distillation(hidden: Tensor, head: Tensor, ids: Tensor, chances: Tensor, *, scale: float) -> Tensor:
    """`scale` times the summed Kullback-Leibler divergence from a teacher known by its likeliest tokens.

    hidden [tokens, width], head [vocabulary, width], ids [tokens, k] int64 and chances [tokens, k]: the teacher's
    likeliest tokens and their probabilities. All other tokens are one event, so k + 1 events are compared.
    """

    def divergence_(logits: Tensor, start: int) -> Tensor:
        chunk = slice(start, start + len(logits))
        return kernels.divergence_(logits, ids[chunk], chances[chunk], scale)

    result: Tensor = _ChunkedLoss.apply(hidden, head, divergence_)
    return result
