"""The fused adapted layer computes what PEFT's own does, forward and backward, on a plain and on a 4-bit base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from trimtab.spec import TrainSpec
from trimtab_runtime.model import load_model
from trimtab_runtime.xeon.attention import plan_groups
from trimtab_runtime.xeon.lora import fuse


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_same_output_and_same_gradients_as_peft(tiny_model: Path, method: str, kind: dict[str, bool]) -> None:
    torch.manual_seed(0)
    theirs = load_model(tiny_model, TrainSpec(model="tiny", method=method, lora_rank=4, **kind), torch.float32, fused=False).train()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 28
    given = {"input_ids": torch.arange(3, 40)[None], "position_ids": torch.arange(37)[None], "packed_groups": plan_groups([37])}
    results = []
    for model in (theirs, ours):
        logits = model(**given).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-7, msg=name)


def test_a_layer_with_dropout_keeps_pefts_own_forward(tiny_model: Path) -> None:
    model = load_model(tiny_model, TrainSpec(model="tiny", method="lora", lora_rank=4, lora_dropout=0.1), torch.float32, fused=False)
    assert fuse(model) == 0
