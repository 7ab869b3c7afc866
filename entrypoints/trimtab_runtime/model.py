"""The base model in the form that a method trains it, and the loss of packed rows under it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from trimtab.errors import SpecError
from trimtab.spec import TrainSpec
from trimtab_runtime.methods.lora import add_adapters
from trimtab_runtime.rows import Row
from trimtab_runtime.xeon import attention
from trimtab_runtime.xeon.lora import fuse
from trimtab_runtime.xeon.loss import linear_cross_entropy, linear_distillation

# heads that do something to their logits, which the chunked loss does not know
_OWN_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")

# a divergence is small beside the cross-entropy of new text; the runs with other weights are in README.md
TEACHER_WEIGHT = 8.0


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a model's config.json; empty where there is none that can be read, which `load_model` refuses in its own words."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_model(
    folder: Path, spec: TrainSpec, dtype: torch.dtype, *, typical: Batch | None = None, fused: bool = True, device: str = "cpu"
) -> PeftModel:
    """The base from a local folder, frozen (in NF4 for qlora), with fresh adapters. Raises SpecError where it does not load.

    From `typical` rows qlora learns which inputs matter, to restore with its adapters what quantisation took from them.
    With `fused`, adapted layers without dropout compute in one step (xeon/lora.py); the others need autocast for bf16.
    """
    attention.register()
    logging.disable_progress_bar()
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as exc:
        raise SpecError(f"the base model in {folder} does not load: {exc}") from exc
    changes = [name for name in _OWN_LOGITS if getattr(base.config, name, None) not in (None, 1, 1.0)]
    if changes:
        raise SpecError(f"this model changes its logits ({changes[0]}), which this version does not train: choose another base model")
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and spec.max_seq_len > limit:
        raise SpecError(f"max_seq_len {spec.max_seq_len} is beyond this model's {limit} positions: choose {limit} or less")
    base.config.use_cache = False
    base.to(device)
    if spec.method == "qlora":
        from trimtab_runtime.methods.qlora import begin_with, input_scales, quantise

        restoring = spec.lora_init == "qera"
        scales = input_scales(base, typical.to(device).inputs()) if typical and restoring else None
        lost = quantise(base, dtype, rank=spec.lora_rank if restoring else 0, scales=scales)
        model = add_adapters(base, spec)
        begin_with(model, lost)
    else:
        model = add_adapters(base, spec)
    if fused:
        fuse(model)
    return model


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
        groups = [attention.Group(*(part.to(device) for part in (group.gather, group.scatter, group.valid))) for group in self.groups]
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.to(device) for name, value in named.items() if name != "groups"}, groups=groups)

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.tokens, "position_ids": self.positions, "packed_groups": self.groups}


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


def batch_loss(model: PeftModel, batch: Batch, *, scale: float) -> Tensor:
    """`scale` times what is summed over the batch: cross-entropy of targets, divergence from the base model's predictions."""
    base = model.get_base_model()
    head = base.get_output_embeddings().weight
    hidden = base.get_decoder()(**batch.inputs()).last_hidden_state[0]
    loss = linear_cross_entropy(hidden.index_select(0, batch.places).to(head.dtype), head, batch.targets, scale=scale)
    if len(batch.taught):
        loss = loss + linear_distillation(
            hidden.index_select(0, batch.taught).to(head.dtype), head, batch.ids, batch.chances, scale=scale * TEACHER_WEIGHT
        )
    return loss
