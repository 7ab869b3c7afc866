"""The fused adapted layer computes what PEFT's own does, forward and backward, on a plain and on a 4-bit base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trimtab.spec import TrainSpec
from trimtab_runtime.model import load_model
from trimtab_runtime.xeon.attention import plan_groups
from trimtab_runtime.xeon.block import fuse as fuse_blocks
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


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}])
@pytest.mark.parametrize("layers", [fuse, fuse_blocks])
def test_adapters_that_peft_switches_off_or_merges_are_not_added(
    tiny_model: Path, layers: Callable[[torch.nn.Module], object], kind: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    model = load_model(tiny_model, TrainSpec(model="tiny", method="lora", lora_rank=4, **kind), torch.float32, fused=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    given = {"input_ids": torch.arange(3, 40)[None], "position_ids": torch.arange(37)[None], "packed_groups": plan_groups([37])}
    with torch.no_grad():
        adapted = model(**given).logits
        with model.disable_adapter():
            base = model(**given).logits
        layers(model)
        with model.disable_adapter():
            torch.testing.assert_close(model(**given).logits, base, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(**given).logits, adapted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**given).logits, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - base).norm() > 0.01 * base.norm()


@pytest.mark.parametrize("layers", [fuse, fuse_blocks])
def test_gradients_of_gradients_are_refused(tiny_model: Path, layers: Callable[[torch.nn.Module], object]) -> None:
    model = load_model(tiny_model, TrainSpec(model="tiny", method="lora", lora_rank=4), torch.float32, fused=False)
    layers(model)
    given = {"input_ids": torch.arange(3, 40)[None], "position_ids": torch.arange(37)[None], "packed_groups": plan_groups([37])}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(model(**given).logits.square().mean(), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.square().sum() for gradient in gradients).backward()
