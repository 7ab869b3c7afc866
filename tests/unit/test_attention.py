"""Samples that share a row never see each other, and each is what it would be alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from trimtab.spec import TrainSpec
from trimtab_runtime.batch import Batch, as_batch, batch_loss
from trimtab_runtime.model import load_model
from trimtab_runtime.rows import Row
from trimtab_runtime.xeon.attention import packed_attention, plan_groups

LENGTHS = [37, 5, 1, 90, 36, 5, 64]


def row(tokens: np.ndarray, lengths: list[int]) -> Row:
    none = np.zeros((0, 1), dtype=np.int32)
    return Row(tokens.astype(np.int32), np.ones(len(tokens), bool), lengths, np.full(len(tokens), -1, np.int32), none, none.astype("f2"))


def hidden(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    base = model.get_base_model()
    with torch.inference_mode():
        return base(input_ids=batch.tokens, position_ids=batch.positions, packed_groups=batch.groups).logits[0]


@pytest.fixture(scope="module", params=[("lora", "float32"), ("lora", "bfloat16"), ("qlora", "float32"), ("qlora", "bfloat16")])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> torch.nn.Module:
    method, dtype = request.param
    torch.manual_seed(0)
    loaded = load_model(tiny_model, TrainSpec(model="tiny", method=method, lora_rank=4), getattr(torch, dtype))
    for name, parameter in loaded.named_parameters():
        if "lora_B" in name:  # they begin as zeros; then adapters would not be tested
            torch.nn.init.normal_(parameter, std=0.02)
    return loaded.train()


def test_changing_all_of_one_sample_leaves_the_others_bit_identical(model: torch.nn.Module) -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, 300, sum(LENGTHS))
    before = hidden(model, as_batch([row(tokens, LENGTHS)]))
    for changed in range(len(LENGTHS)):
        start = sum(LENGTHS[:changed])
        end = start + LENGTHS[changed]
        other = tokens.copy()
        other[start:end] = (tokens[start:end] + 7) % 297 + 3
        after = hidden(model, as_batch([row(other, LENGTHS)]))
        assert torch.equal(torch.cat([before[:start], before[end:]]), torch.cat([after[:start], after[end:]]))
        assert not torch.equal(before[start:end], after[start:end])


def test_a_packed_sample_equals_the_sample_alone(model: torch.nn.Module) -> None:
    tokens = np.random.default_rng(1).integers(3, 300, sum(LENGTHS))
    together = hidden(model, as_batch([row(tokens, LENGTHS)]))
    bound = 1e-4 if together.dtype == torch.float32 else 2e-2
    start = 0
    for length in LENGTHS:
        alone = hidden(model, as_batch([row(tokens[start : start + length], [length])]))
        part = together[start : start + length]
        assert float((part - alone).norm() / alone.norm()) < bound
        start += length


def test_two_rows_in_one_batch_are_the_rows_one_by_one(model: torch.nn.Module) -> None:
    tokens = np.random.default_rng(2).integers(3, 300, 120)
    rows = [row(tokens[:50], [20, 30]), row(tokens[50:], [70])]
    both = hidden(model, as_batch(rows))
    one = torch.cat([hidden(model, as_batch([each])) for each in rows])
    assert float((both - one).norm() / one.norm()) < (1e-4 if both.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("lengths", [[7, 3, 600, 12], [1], [40, 40, 40], [513, 2], [1100, 1024, 1000]])
@pytest.mark.parametrize("window", [None, 1, 30, 511, 512, 513, 1023, 4096])
def test_attention_and_its_gradients_equal_a_masked_reference(lengths: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    query, key, value = (torch.randn(1, heads, total, 16, requires_grad=True) for heads in (6, 2, 2))
    out, _ = packed_attention(torch.nn.Identity(), query, key, value, None, packed_groups=plan_groups(lengths), sliding_window=window)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), upstream)

    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (sample[:, None] == sample[None, :]) & torch.ones(total, total, dtype=torch.bool).tril()
    if window is not None:
        place = torch.arange(total)
        mask &= place[:, None] - place[None, :] < window
    reference = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    theirs = torch.autograd.grad(reference, (query, key, value), upstream)
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_what_a_window_keeps_grows_with_the_length_and_not_its_square(kv_heads: int) -> None:
    """Of three layers, for the backward pass: twice as long, about twice as much, and less than one mask of all pairs takes."""
    kept = []
    for length in (4096, 8192):
        query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
        places: dict[int, int] = {}

        def keep(tensor: torch.Tensor, places: dict[int, int] = places) -> torch.Tensor:
            places[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        given = {"packed_groups": plan_groups([length]), "sliding_window": 600}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layers = [packed_attention(torch.nn.Identity(), query, key, value, None, **given) for _ in range(3)]
        assert len(layers) == 3  # alive until here, so that no place was given twice
        kept.append(sum(places.values()))
    assert kept[1] < 2.1 * kept[0]
    assert kept[1] < 8192**2


def test_groups_hold_each_place_once_and_little_padding() -> None:
    lengths = np.random.default_rng(3).integers(1, 300, 40).tolist()
    groups = plan_groups(lengths)
    assert sorted(torch.cat([group.scatter for group in groups]).tolist()) == list(range(sum(lengths)))
    assert sum(group.gather.numel() for group in groups) < 1.35 * sum(lengths)


def test_an_evaluation_in_between_does_not_spoil_the_gradients(tiny_model: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode, and gradients behind them are lost."""
    torch.manual_seed(0)
    model = load_model(tiny_model, TrainSpec(model="tiny", method="qlora", lora_rank=4), torch.bfloat16)
    tokens = torch.arange(3, 40)[None]
    batch = as_batch([row(tokens[0].numpy(), [37])])

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            hidden = (
                model.get_base_model()
                .get_decoder()(input_ids=batch.tokens, position_ids=batch.positions, packed_groups=batch.groups)
                .last_hidden_state
            )
        hidden.float().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=batch.tokens, position_ids=batch.positions, packed_groups=batch.groups)
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(before, gradient(), strict=True))


@pytest.mark.parametrize("lengths", [LENGTHS, [sum(LENGTHS)], [sum(LENGTHS) // 2] * 2])
def test_a_batch_moved_to_another_device_is_computed_there_and_nowhere_else(tiny_model: Path, lengths: list[int]) -> None:
    """The meta device computes shapes alone, and like a GPU it refuses to be mixed with the CPU."""
    spec = TrainSpec(model="tiny", method="lora", lora_rank=4)
    model = load_model(tiny_model, spec, torch.float32, device="meta")
    batch = as_batch([row(np.random.default_rng(0).integers(3, 300, sum(lengths)), lengths)]).to("meta")
    loss = batch_loss(model, batch, scale=1.0)
    loss.backward()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {loss.device.type, *(parameter.grad.device.type for parameter in adapters)} == {"meta"}
    assert batch.inputs()["packed_groups"][0].valid.device.type == "meta"
