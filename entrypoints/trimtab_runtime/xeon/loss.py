"""Cross-entropy of a linear head without the full logits: chunk by chunk, the gradient taken in the forward.

A vocabulary of 49,152 at 2,048 tokens makes 400 MB of fp32 logits, written and read several times. Here a chunk of
tokens has its logits, loss and gradient while they are in cache, and only rows that have a label are computed.
The head's own gradient [vocabulary, width] is taken only where it is trained: one more product a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.estimate import LOGITS_AT_ONCE


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, wanted: Callable[[Tensor, int], Tensor], scale: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head: Tensor | None = None
        for start in range(0, len(hidden), LOGITS_AT_ONCE):
            chunk = hidden[start : start + LOGITS_AT_ONCE]
            logits = torch.mm(chunk, head.t()).float()
            total += wanted(logits, start)  # and its gradient stands in the place of the logits
            if of_hidden is None and not ctx.needs_input_grad[1]:
                continue
            upstream = logits.mul_(scale).to(head.dtype)
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
        return total * scale

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_head = (None if found is None else found * upstream[0].to(found.dtype) for found in ctx.saved_tensors)
        return of_hidden, of_head, None, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    """`scale` times the summed loss: hidden [tokens, width], head [vocabulary, width], targets [tokens] int64."""

    def cross_entropy(logits: Tensor, start: int) -> Tensor:
        wanted = targets[start : start + len(logits), None]
        log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
        loss = (log_sum - logits.gather(1, wanted)).sum()
        logits.sub_(log_sum).exp_().scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))  # softmax minus one-hot
        return loss

    result: Tensor = _ChunkedLoss.apply(hidden, head, cross_entropy, scale)
    return result


def linear_distillation(hidden: Tensor, head: Tensor, ids: Tensor, chances: Tensor, *, scale: float) -> Tensor:
    """`scale` times the summed Kullback-Leibler divergence from a teacher known by its likeliest tokens.

    hidden [tokens, width], head [vocabulary, width], ids [tokens, k] int64 and chances [tokens, k]: the teacher's
    likeliest tokens and their probabilities. All other tokens are one event, so k + 1 events are compared.
    """

    def divergence(logits: Tensor, start: int) -> Tensor:
        known = ids[start : start + len(logits)]
        q = chances[start : start + len(logits)].float()
        q_rest = (1 - q.sum(-1, keepdim=True)).clamp_min(0)
        logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))
        log_known = logits.gather(1, known)
        p, p_known = logits.exp_(), log_known.exp()
        p_rest = (1 - p_known.sum(-1, keepdim=True)).clamp_min(1e-6)
        loss = torch.xlogy(q, q).sum() - (q * log_known).sum()
        loss += torch.xlogy(q_rest, q_rest).sum() - torch.xlogy(q_rest, p_rest).sum()
        p.mul_(1 - q_rest / p_rest).scatter_(1, known, p_known - q)
        return loss

    result: Tensor = _ChunkedLoss.apply(hidden, head, divergence, scale)
    return result
