"""The base model in the form that a method trains it, and the loss of packed rows under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.errors import SpecError
from trimtab.spec import TrainSpec
from trimtab_runtime.methods.lora import add_adapters
from trimtab_runtime.rows import Row
from trimtab_runtime.xeon import attention
from trimtab_runtime.xeon.loss import linear_cross_entropy

# heads that do something to their logits; their loss is taken from the model's own forward
_OWN_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")


def load_model(folder: Path, spec: TrainSpec, dtype: torch.dtype) -> PeftModel:
    """The base from a local folder, frozen (in NF4 for qlora), with fresh adapters. Raises SpecError where it does not load."""
    attention.register()
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as exc:
        raise SpecError(f"the base model in {folder} does not load: {exc}") from exc
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and spec.max_seq_len > limit:
        raise SpecError(f"max_seq_len {spec.max_seq_len} is beyond this model's {limit} positions: choose {limit} or less")
    base.config.use_cache = False
    if spec.method == "qlora":
        from trimtab_runtime.methods.qlora import quantise

        quantise(base, dtype)
    return add_adapters(base, spec)


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end as one: `tokens`, `positions` [1, n]; `places` [m] whose next tokens `targets` [m] are learned."""

    tokens: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor
    groups: list[attention.Group]


def as_batch(rows: Sequence[Row]) -> Batch:
    """Positions restart with each sample; a sample's last token predicts nothing, nor does another sample's first."""
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows])).long()
    learned = torch.from_numpy(np.concatenate([row.learned for row in rows]))
    lengths = [length for row in rows for length in row.lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    wanted = torch.zeros(len(tokens), dtype=torch.bool)
    wanted[:-1] = learned[1:] & (positions[1:] != 0)
    places = wanted.nonzero().squeeze(1)
    return Batch(tokens[None], positions[None], places, tokens[places + 1], attention.plan_groups(lengths))


def batch_loss(model: PeftModel, batch: Batch, *, scale: float) -> Tensor:
    """`scale` times the summed cross-entropy of the batch's targets."""
    base = model.get_base_model()
    given = {"input_ids": batch.tokens, "position_ids": batch.positions, "packed_groups": batch.groups}
    if any(getattr(base.config, name, None) not in (None, 1, 1.0) for name in _OWN_LOGITS):
        logits = base(**given).logits[0, batch.places].float()
        return functional.cross_entropy(logits, batch.targets, reduction="sum") * scale
    hidden = base.get_decoder()(**given).last_hidden_state[0]
    head = base.get_output_embeddings().weight
    return linear_cross_entropy(hidden.index_select(0, batch.places).to(head.dtype), head, batch.targets, scale=scale)
