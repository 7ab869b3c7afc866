"""One file per training method; `train_by` puts a base model into the form that a spec's method trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.spec import TrainSpec
from trimtab_runtime.methods.full import masters_of
from trimtab_runtime.methods.lora import adapted_layers, add_adapters, begin_magnitudes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train_by(
    base: PreTrainedModel,
    spec: TrainSpec,
    dtype: torch.dtype,
    typical: dict[str, Any] | None,
    *,
    lost: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    fused: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> PeftModel | PreTrainedModel:
    """The base, frozen (in NF4 for qlora), with fresh adapters; for full the base itself, in fp32.

    `typical` is what one forward of the base may be given; `lost` what qlora's adapters begin as, of a base that is in NF4 already.
    With `fused` its layers compute as xeon/block.py chooses, which is said. Raises SpecError for `lora_targets` that it does not have.
    """
    if spec.method == "full":
        return base
    if spec.method == "qlora":
        from trimtab_runtime.methods.qlora import begin_with, input_scales, quantise

        targets = adapted_layers(base, spec.lora_targets)
        restoring = spec.lora_init == "qera"
        if lost is None:
            scales = input_scales(base, typical) if typical and restoring else None
            lost = quantise(base, dtype, rank=spec.lora_rank if restoring else 0, scales=scales, restored=targets)
        model = add_adapters(base, spec, targets)
        begin_with(model, lost)
    else:
        model = add_adapters(base, spec)
    if spec.use_dora:
        begin_magnitudes(model)
    if fused:
        from trimtab_runtime.xeon.block import fuse  # here, as PEFT is: who only merges or serves need not wait for it

        steps = fuse(model)
        say(f"fused {steps.value}: {steps.reason}")
    return model


@dataclass(frozen=True)
class Trained:
    """What the optimiser changes: `parameters` by name, in fp32. `copies` are the model's own where those are not the same."""

    parameters: dict[str, nn.Parameter]
    copies: dict[str, nn.Parameter]
    of: int  # numbers in the whole model, tied ones once; of a 4-bit base as many as it stands for

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups: matrices decay, embeddings too; what has one dimension (norms, biases, DoRA's magnitudes) does not."""
        matrices = [parameter for parameter in self.parameters.values() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters.values() if parameter.ndim <= 1]
        groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def write_back(self) -> None:
        """After the parameters changed: let the model compute with them."""
        for name, copy in self.copies.items():
            copy.copy_(self.parameters[name])


def trained_parts(model: PeftModel | PreTrainedModel, spec: TrainSpec, dtype: torch.dtype) -> Trained:
    """What is trained of the model that `train_by` made, which from then on computes in `dtype`."""
    if spec.method == "full":
        parameters, copies = masters_of(model, dtype)
        return Trained(parameters, copies, sum(parameter.numel() for parameter in parameters.values()))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Trained(parameters, {}, model.get_nb_trainable_parameters()[1])
