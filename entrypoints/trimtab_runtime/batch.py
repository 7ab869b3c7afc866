"""Packed rows as what a model is given, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from trimtab_runtime.families import mask_dtype
from trimtab_runtime.rows import Row
from trimtab_runtime.xeon import attention
from trimtab_runtime.xeon.loss import linear_cross_entropy, linear_distillation

# a divergence is small beside the cross-entropy of new text; the runs with other weights are in README.md
TEACHER_WEIGHT = 8.0


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end as one: `tokens`, `positions` [1, n], and what is learned from which places.

    From `places` [m] the tokens `targets` [m] are learned; from `taught` [t] the base model's own predictions
    `ids`, `chances` [t, k].
    """

    tokens: Tensor
    positions: Tensor
    groups: list[attention.Group]
    places: Tensor
    targets: Tensor
    taught: Tensor
    ids: Tensor
    chances: Tensor

    @property
    def learned(self) -> int:
        return len(self.places) + len(self.taught)

    def to(self, device: str) -> Batch:
        """The same batch there; on the CPU itself."""
        if device == "cpu":
            return self
        groups = [group.to(device) for group in self.groups]
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.to(device) for name, value in named.items() if name != "groups"}, groups=groups)

    def inputs(self, mask: torch.dtype | None = None) -> dict[str, Any]:
        """What a decoder is given: the groups for our attention, or with `mask` a mask in that dtype for a model's own."""
        given = {"input_ids": self.tokens, "position_ids": self.positions}
        if mask is None:
            return {**given, "packed_groups": self.groups}
        return {**given, "attention_mask": attention.block_diagonal(self.positions, mask)}


def as_batch(rows: Sequence[Row]) -> Batch:
    """Positions restart with each sample; a sample's last token predicts nothing, nor does another sample's first."""
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows])).long()
    learned = torch.from_numpy(np.concatenate([row.learned for row in rows]))
    teacher = np.concatenate([row.teacher for row in rows])
    lengths = [length for row in rows for length in row.lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    wanted = torch.zeros(len(tokens), dtype=torch.bool)
    wanted[:-1] = learned[1:] & (positions[1:] != 0)
    next_teacher = torch.from_numpy(np.append(teacher[1:], -1))
    places = (wanted & (next_teacher < 0)).nonzero().squeeze(1)
    taught = (wanted & (next_teacher >= 0)).nonzero().squeeze(1)
    known = next_teacher[taught].numpy()
    ids = torch.from_numpy(rows[0].teacher_ids[known]).long()
    chances = torch.from_numpy(rows[0].teacher_chances[known])
    return Batch(tokens[None], positions[None], attention.plan_groups(lengths), places, tokens[places + 1], taught, ids, chances)


def batch_loss(model: PeftModel | PreTrainedModel, batch: Batch, *, scale: float) -> Tensor:
    """`scale` times what is summed over the batch: cross-entropy of targets, divergence from the base model's predictions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings().weight
    hidden = base.get_decoder()(**batch.inputs(mask_dtype(base))).last_hidden_state[0]
    loss = linear_cross_entropy(hidden.index_select(0, batch.places).to(head.dtype), head, batch.targets, scale=scale)
    if len(batch.taught):
        loss = loss + linear_distillation(
            hidden.index_select(0, batch.taught).to(head.dtype), head, batch.ids, batch.chances, scale=scale * TEACHER_WEIGHT
        )
    return loss
