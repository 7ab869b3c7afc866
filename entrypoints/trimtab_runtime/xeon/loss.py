"""Cross-entropy of a linear head without the full logits: chunk by chunk, the gradient taken in the forward.

A vocabulary of 49,152 at 2,048 tokens makes 400 MB of fp32 logits, written and read several times. Here a chunk of
tokens has its logits, loss and gradient while they are in cache, and only rows that have a label are computed.
The head is frozen: its own gradient is not taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 512


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), _CHUNK):
            part, wanted = hidden[start : start + _CHUNK], targets[start : start + _CHUNK, None]
            logits = torch.mm(part, head.t()).float()
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            if grad is not None:
                # softmax minus one-hot, in place of the logits
                logits.sub_(log_sum).exp_().scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
                torch.mm(logits.mul_(scale).to(head.dtype), head, out=grad[start : start + _CHUNK])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[0].to(grad.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    """`scale` times the summed loss: hidden [tokens, width], head [vocabulary, width] (frozen), targets [tokens] int64."""
    result: Tensor = _ChunkedLoss.apply(hidden, head, targets, scale)
    return result
