"""Low-rank adapters on linear layers, but never on the head (Hu et al. 2021, "LoRA", arXiv:2106.09685), through PEFT."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.errors import SpecError
from trimtab.spec import TrainSpec

if TYPE_CHECKING:
    from peft import PeftModel


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer by name, without the head that writes logits."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def adapted_layers(model: PreTrainedModel, targets: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers that get adapters: those that end as one of `targets`, else all but the head.

    Raises SpecError for an end that no such layer has, with the nearest that there is.
    """
    names = list(linear_layers(model))
    for target in targets:
        if not any(_ends(name, target) for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(target.rsplit(".", 1)[-1], ends, n=1)
            why = "; the head gets no adapters" if target.endswith(("lm_head", "embed_out")) else ""
            hint = f"did you mean {near[0]}? " if near else ""
            raise SpecError(f"lora_targets: no linear layer ends in {target!r}{why}; {hint}There are: {', '.join(ends)}")
    return [name for name in names if not targets or any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_adapters(model: PreTrainedModel, spec: TrainSpec, layers: Sequence[str] | None = None) -> PeftModel:
    """Freeze the base and put fp32 adapters on its `layers` (default: `adapted_layers`); only they are trained."""
    from peft import LoraConfig, get_peft_model  # here: who only merges or serves need not wait for it

    names = adapted_layers(model, spec.lora_targets) if layers is None else layers
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=sorted(spec.lora_targets or {name.rsplit(".", 1)[-1] for name in names}),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still asks transformers by an old name
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return adapted


@torch.no_grad()
def begin_magnitudes(model: PeftModel) -> None:
    """Let DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353) be the norms of each output's weights with the adapter as it begins,
    in fp32: so the model begins as it is, adapters that restore a quantised base included."""
    from peft.tuners.lora import LoraLayer

    from trimtab_runtime.xeon.lora import weight_of

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            whole = torch.addmm(weight_of(layer.base_layer, torch.float32), b, a, alpha=layer.scaling["default"])
            layer.lora_magnitude_vector["default"].weight.data.copy_(torch.linalg.vector_norm(whole, dim=1))
