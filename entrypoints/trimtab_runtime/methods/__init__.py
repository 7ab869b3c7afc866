"""One file per training method; `train_by` puts a base model into the form that a spec's method trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trimtab.spec import TrainSpec
from trimtab_runtime.methods.lora import add_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train_by(
    base: PreTrainedModel, spec: TrainSpec, dtype: torch.dtype, typical: dict[str, Any] | None, *, fused: bool = True
) -> PeftModel:
    """The base, frozen (in NF4 for qlora), with fresh adapters. `typical` is what one forward of the base may be given."""
    if spec.method == "qlora":
        from trimtab_runtime.methods.qlora import begin_with, input_scales, quantise

        restoring = spec.lora_init == "qera"
        scales = input_scales(base, typical) if typical and restoring else None
        lost = quantise(base, dtype, rank=spec.lora_rank if restoring else 0, scales=scales)
        model = add_adapters(base, spec)
        begin_with(model, lost)
    else:
        model = add_adapters(base, spec)
    if fused:
        from trimtab_runtime.xeon.lora import fuse  # here, as PEFT is: who only merges or serves need not wait for it

        fuse(model)
    return model
