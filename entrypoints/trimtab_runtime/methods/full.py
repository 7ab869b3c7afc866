"""All parameters trained in mixed precision (Micikevicius et al. 2018, arXiv:1710.03740), norms, embeddings and the head too.

The model computes with bf16 copies; gradients are summed in fp32, and AdamW changes fp32 values from which the copies are made anew
after each step: a change of a 256th of a weight or less would be lost in bf16. Not by autocast, which leaves what runs between the
products in fp32, where it takes twice the memory's bandwidth, and casts each weight in every pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def masters_of(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(fp32 parameters by name, the model's own that are copies of them in `dtype`: none for float32, where both are the same).

    The model must hold fp32 values; a tied weight is one parameter. Each gradient goes to the fp32 parameter as soon as it is whole,
    so that those of one pass are never all there in `dtype`.
    """
    own = dict(model.named_parameters())
    if dtype is torch.float32:
        return own, {}
    masters = {}
    for name, copy in own.items():
        masters[name] = nn.Parameter(copy.data)
        copy.data = copy.data.to(dtype)
        copy.register_post_accumulate_grad_hook(_hand_on(masters[name]))
    return masters, own


def _hand_on(master: nn.Parameter) -> Callable[[Tensor], None]:
    def hand_on(copy: Tensor) -> None:
        gradient, copy.grad = copy.grad, None
        if gradient is not None:
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    return hand_on
