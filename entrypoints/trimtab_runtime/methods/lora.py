"""Low-rank adapters on every linear layer but the head (Hu et al. 2021, "LoRA", arXiv:2106.09685), through PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.spec import TrainSpec

if TYPE_CHECKING:
    from peft import PeftModel


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer by name, without the head that writes logits."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def add_adapters(model: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    """Freeze the base and put fp32 adapters on its linear layers; only they are trained."""
    from peft import LoraConfig, get_peft_model  # here: who only merges or serves need not wait for it

    targets = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    config = LoraConfig(
        r=spec.lora_rank, lora_alpha=spec.lora_alpha, lora_dropout=spec.lora_dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still asks transformers by an old name
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return adapted
