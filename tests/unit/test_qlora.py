"""NF4 and what its adapters begin as: what quantisation took away, weighed by how much each input matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.spec import TrainSpec
from trimtab_runtime.batch import as_batch
from trimtab_runtime.examples import Sample
from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.methods.qlora import dequantised_nf4, largest_parts
from trimtab_runtime.model import load_model
from trimtab_runtime.rows import PackedRows, write_rows

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def test_the_largest_parts_are_the_nearest_product_of_that_rank() -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 8, 31):
        b, a = largest_parts(matrix, rank)
        nearest = (matrix - (left[:, :rank] * values[:rank]) @ right[:rank]).norm()
        assert nearest <= (matrix - b @ a).norm() * 1.0001 < nearest * 1.02  # the method is a randomised one
    b, a = largest_parts(matrix, 40)  # beyond its own rank: all of it, and zeros
    torch.testing.assert_close(b @ a, matrix, atol=1e-4, rtol=1e-4)
    assert (b.shape, a.shape) == ((48, 40), (40, 32))
    assert not b[:, 32:].any()


def test_weighed_by_its_inputs_a_layers_output_changes_least() -> None:
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(48, 32, generator=draw)
    scale = torch.linspace(0.01, 3, 32)
    inputs = torch.randn(4000, 32, generator=draw) * scale

    def left_over(parts: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((inputs @ (matrix - parts[0] @ parts[1]).T).square().mean())

    weighed, plain = largest_parts(matrix, 8, inputs.square().mean(0).sqrt()), largest_parts(matrix, 8)
    assert left_over(weighed) < 0.8 * left_over(plain)
    nothing_seen = torch.zeros(32)
    assert all(part.isfinite().all() for part in largest_parts(matrix, 8, nothing_seen))


def test_an_adapter_begins_with_what_restores_the_original_best(tiny_model: Path, tmp_path: Path) -> None:
    """Outputs of the quantised model: nearer to the original's with the adapters than without, and nearer still when weighed.

    Inputs differ a hundredfold, as those of trained models do and a random one's do not, or weighing them would change nothing."""
    from transformers import AutoModelForCausalLM

    order = torch.randperm(192, generator=torch.Generator().manual_seed(5))
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for layer in wide.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(torch.logspace(-1.5, 0.5, len(norm.weight))[order])
    tiny_model = tmp_path / "wide"
    wide.save_pretrained(tiny_model)

    tokens = torch.randint(10, 200, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    write_rows(tmp_path / "rows", [[Sample("document", tokens, [True] * 600)]], 256, {})
    rows = PackedRows(tmp_path / "rows")
    typical = as_batch([rows[0], rows[1]])
    ids = torch.tensor([rows[2].tokens.tolist()])

    def output(**how: object) -> torch.Tensor:
        torch.manual_seed(0)
        init = how.pop("lora_init", "qera")
        spec = TrainSpec(model="tiny", method="qlora", lora_rank=8, lora_init=init)
        model = load_model(tiny_model, spec, torch.float32, **how).get_base_model().eval()
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "packed_groups": as_batch([rows[2]]).groups}
        with torch.no_grad():
            return model.get_decoder()(**given).last_hidden_state

    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).get_decoder()(input_ids=ids).last_hidden_state
    far = [float((output(**how) - original).square().mean()) for how in ({"lora_init": "zeros"}, {}, {"typical": typical})]
    assert far[2] < 0.8 * far[1]
    assert far[1] < far[0]


def test_what_is_dequantised_is_what_the_layer_computes_with(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = linear_layers(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    quantised = load_model(tiny_model, TrainSpec(model="tiny", method="qlora", lora_rank=4, lora_init="zeros"), torch.float32)
    name, layer = next(iter(original.items()))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = quantised.get_base_model().get_submodule(name)(x)
    torch.testing.assert_close(ours, x @ dequantised_nf4(layer.weight.data).T, atol=1e-5, rtol=1e-4)
