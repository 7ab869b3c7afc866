"""A decoder layer as one step of the graph: what transformers and PEFT compute, forward and backward, on each sample alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.packed_rows import LENGTHS, drawn, parts, row
from support.tiny_families import SHAPES, config_of, make_config, make_model
from trimtab.errors import SpecError
from trimtab.spec import TrainSpec
from trimtab_runtime.batch import as_batch, batch_loss
from trimtab_runtime.methods.lora import add_adapters
from trimtab_runtime.model import load_model
from trimtab_runtime.xeon import kernels
from trimtab_runtime.xeon.block import fuse, set_recompute
from trimtab_runtime.xeon.merged import Maps

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

LIKE_LLAMA = [name for name in SHAPES if SHAPES[name][0] in ("llama", "mistral", "qwen2", "qwen3")]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, made when it is first asked for, its weights such as bf16 can tell; `biased` is a Llama with a bias
    on every map."""
    root = tmp_path_factory.mktemp("blocks")

    def folder(name: str) -> Path:
        grouped = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
        biased = make_config("llama", **grouped, head_dim=48, attention_bias=True, mlp_bias=True) if name == "biased" else None
        if not (root / name).is_dir():
            file = make_model(root / name, biased or config_of(name)) / "model.safetensors"
            save_file({key: weight.bfloat16().float() for key, weight in load_file(file).items()}, file, metadata={"format": "pt"})
        return root / name

    return folder


def asked(method: str = "lora", **options: Any) -> TrainSpec:
    return TrainSpec(model="tiny", method=method, max_seq_len=512, **{"lora_rank": 4, **options})


def adapted(folder: Path, spec: TrainSpec, dtype: torch.dtype) -> Any:
    """With adapters that do something, and nothing fused."""
    torch.manual_seed(0)
    model = load_model(folder, spec, dtype, fused=False).train()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def fused(model: Any, **how: Any) -> Any:
    ours = copy.deepcopy(model)
    assert fuse(ours, **how).value == "blocks"
    return ours


def computed(model: Any, *, cast: bool = False, places: slice | None = None) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Hidden states, loss and the adapters' gradients of the drawn row, or of one sample of it."""
    tokens = drawn() if places is None else drawn()[places]
    batch = as_batch([row(tokens, LENGTHS if places is None else [len(tokens)])])
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        hidden = model.get_base_model().get_decoder()(**batch.inputs()).last_hidden_state[0].detach()
        loss = batch_loss(model, batch, scale=1.0)
    loss.backward()
    return hidden, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def furthest(ours: Gradients, theirs: Gradients) -> float:
    assert ours.keys() == theirs.keys()
    return max(distance(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", [*LIKE_LLAMA, "biased"])
def test_a_row_is_what_transformers_and_peft_make_of_each_sample_alone(name: str, folders: Callable[[str], Path]) -> None:
    """transformers' own attention, PEFT's own layers, autograd's own backward: in fp32 equal but for the order of sums."""
    base = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32, attn_implementation="eager")
    theirs = add_adapters(base, asked()).train()
    ours = adapted(folders(name), asked(), torch.float32)
    own = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        parameter.data.copy_(own[key].data)
    states, total = [], torch.zeros(())
    for places in parts():
        given = torch.from_numpy(drawn()[places])[None]
        states.append(base.get_decoder()(input_ids=given).last_hidden_state[0])
        logits = base.get_output_embeddings()(states[-1])
        total = total + torch.nn.functional.cross_entropy(logits[:-1], given[0, 1:], reduction="sum")
    total.backward()
    wanted = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    hidden, loss, gradients = computed(fused(ours))
    assert distance(hidden, torch.cat(states)) < 1e-5
    assert distance(loss, total) < 1e-6
    assert len(gradients) == 2 * 2 * 7
    assert furthest(gradients, wanted) < 1e-5


@pytest.mark.parametrize("path", kernels.PATHS)
@pytest.mark.parametrize("name", ["qwen3", "biased"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_on_every_path_of_the_kernels(method: str, name: str, path: str, folders: Callable[[str], Path]) -> None:
    """In fp32 within 1e-5 of PEFT's layers. In bf16 no further from the fp32 result than 1.2 times what PEFT's layers under autocast are,
    by norms: both round, at other places. With its forward pass done again, a layer's gradients are the same to the bit."""
    spec, exact = asked(method), adapted(folders(name), asked(method), torch.float32)
    try:
        with kernels.forced(path):
            wanted, ours = computed(exact), computed(fused(exact))
            assert distance(ours[0], wanted[0]) < 1e-5
            assert distance(ours[1], wanted[1]) < 1e-6
            assert furthest(ours[2], wanted[2]) < 1e-5

            low = adapted(folders(name), spec, torch.bfloat16)
            ours, again = computed(fused(low)), computed(fused(low, recompute=[0, 1]))
            theirs = computed(low, cast=True)
    except SpecError as exc:
        pytest.skip(str(exc))
    assert distance(ours[0], wanted[0]) < 1.2 * distance(theirs[0], wanted[0])
    assert distance(ours[1], wanted[1]) < 4e-3  # by as much bf16 rounds each logit, and each dequantised weight
    whole, theirs_whole, wanted_whole = (torch.cat([part[key].flatten() for key in wanted[2]]) for part in (ours[2], theirs[2], wanted[2]))
    assert distance(whole, wanted_whole) < 1.2 * distance(theirs_whole, wanted_whole)
    for key in wanted[2]:  # a few numbers each: chance decides more
        assert distance(ours[2][key], wanted[2][key]) < 1.6 * distance(theirs[2][key], wanted[2][key]), key
    assert torch.equal(ours[0], again[0])
    assert all(torch.equal(ours[2][key], again[2][key]) for key in again[2])


@pytest.mark.parametrize(
    "options",
    [
        {"lora_targets": ("v_proj", "down_proj"), "use_rslora": True},
        {"lora_targets": ("k_proj", "o_proj", "up_proj"), "lora_alpha": 3},
        {"lora_targets": ("gate_proj",)},
        {"lora_targets": ("layers.1.self_attn.q_proj",)},
    ],
)
def test_adapters_on_some_of_the_maps(options: dict[str, Any], folders: Callable[[str], Path]) -> None:
    theirs = adapted(folders("qwen2"), asked(**options), torch.float32)
    wanted, ours = computed(theirs), computed(fused(theirs, recompute=[1]))
    assert distance(ours[0], wanted[0]) < 1e-5
    assert furthest(ours[2], wanted[2]) < 1e-5


def test_passes_before_a_step_add_up_and_an_optimisers_step_counts(folders: Callable[[str], Path]) -> None:
    model = fused(adapted(folders("smollm2"), asked(), torch.float32))
    batch = as_batch([row(drawn(), LENGTHS)])
    _, _, once = computed(model)
    once = {key: gradient.clone() for key, gradient in once.items()}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    batch_loss(model, batch, scale=1.0).backward()
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, 2 * once[key], rtol=1e-5, atol=1e-8)
        assert parameter.grad is not None
        assert parameter.grad.is_contiguous()
    before = batch_loss(model, batch, scale=1.0).item()
    torch.optim.SGD(trained.values(), lr=1e-4).step()
    assert batch_loss(model, batch, scale=1.0).item() < before


def test_without_gradients_nothing_is_kept_and_the_states_are_the_same(folders: Callable[[str], Path]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = fused(adapted(folders("qwen3"), asked("qlora"), dtype))
        batch = as_batch([row(drawn(), LENGTHS)])
        decoder = model.get_base_model().get_decoder()
        learned = decoder(**batch.inputs()).last_hidden_state
        with torch.no_grad():
            seen = decoder.eval()(**batch.inputs()).last_hidden_state
        assert torch.equal(learned, seen)
        assert seen.grad_fn is None


def test_another_sample_changes_no_bit_of_its_neighbours_gradients(folders: Callable[[str], Path]) -> None:
    """Of the row's embedded tokens, since the adapters' own are sums over all."""
    model = fused(adapted(folders("mistral"), asked(), torch.bfloat16))
    batch, changed = as_batch([row(drawn(), LENGTHS)]), parts()[3]
    given = {key: value for key, value in batch.inputs().items() if key != "input_ids"}

    def gradient(shift: float) -> torch.Tensor:
        embedded = model.get_input_embeddings()(batch.tokens).detach()
        embedded[:, changed] += shift
        embedded.requires_grad_()
        out = model.get_base_model().get_decoder()(inputs_embeds=embedded, **given).last_hidden_state
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        assert embedded.grad is not None
        return embedded.grad[0]

    one, other = gradient(0.0), gradient(0.5)
    assert not torch.equal(one[changed], other[changed])
    for places in parts():
        if places != changed:
            assert torch.equal(one[places], other[places])


def test_a_second_backward_pass_is_refused(folders: Callable[[str], Path]) -> None:
    model = fused(adapted(folders("llama2"), asked(), torch.float32))
    loss = batch_loss(model, as_batch([row(drawn(), LENGTHS)]), scale=1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps nothing for a second backward pass"):
        loss.backward()


def test_weights_that_are_one_product_lie_in_one_storage_and_nowhere_else(folders: Callable[[str], Path]) -> None:
    model = adapted(folders("llama3"), asked(), torch.bfloat16)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    assert fuse(model).value == "blocks"
    for layer in model.get_base_model().model.layers:
        for maps in layer.block.maps:
            weights = [base.weight for base in maps.bases]
            storage = {weight.untyped_storage().data_ptr() for weight in weights}
            assert len(storage) == 1
            assert weights[0].untyped_storage().nbytes() <= 1.05 * sum(weight.nbytes for weight in weights)
            assert maps.weight(torch.bfloat16).data_ptr() == weights[0].data_ptr()
            assert torch.equal(maps.weight(torch.bfloat16), torch.cat(list(weights)))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key])


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_layer_keeps_what_it_says_and_a_recomputed_one_its_input_alone(name: str, folders: Callable[[str], Path]) -> None:
    """By token, 2 bytes each: input, middle, q with attention's output, k, v, gate, up, and a rank for each of 7 maps; 4 bytes each: two
    reciprocal norms and a log-sum-exp for each head. And the adapters, once."""
    model = fused(adapted(folders(name), asked(), torch.bfloat16), recompute=[1])
    kept: list[Any] = []
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.register_forward_hook(lambda _layer, _given, out: kept.append(out.grad_fn.next_functions[0][0]))
    model.get_base_model().get_decoder()(**as_batch([row(drawn(), LENGTHS)]).inputs())
    tokens, hidden, heads, width, keys, gated, rank = sum(LENGTHS), 64, 4, 16, 2 * 16, 128, 4
    factors = sum(p.numel() for key, p in model.named_parameters() if "layers.0." in key and "lora_" in key)
    middle, attended, of_mlp = kept[0].kept[1:]
    tensors = [kept[0].saved_tensors[0], middle, *attended, *of_mlp]
    low = [part for factor in kept[0].kept[0] for part in (factor.a, *factor.b)]
    by_token = 2 * (2 * hidden + 2 * heads * width + 2 * keys + 2 * gated + 7 * rank) + 4 * (2 + heads)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == tokens * by_token
    assert sum(tensor.untyped_storage().nbytes() for tensor in low) == 2 * factors
    assert kept[1].kept is None
    assert kept[1].saved_tensors[0].untyped_storage().nbytes() == 2 * tokens * hidden


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_fused_model_is_its_own(copied: Callable[[Any], Any], folders: Callable[[str], Path]) -> None:
    model = fused(adapted(folders("llama3"), asked(), torch.float32))
    other = copied(model)
    assert torch.equal(computed(other)[0], computed(model)[0])
    other.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight.data.zero_()
    assert not torch.equal(computed(other)[0], computed(model)[0])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_biases_that_are_loaded_after_fusing_count(method: str, folders: Callable[[str], Path]) -> None:
    plain = adapted(folders("biased"), asked(method), torch.float32)
    ours = fused(plain)
    changed = {key: torch.randn_like(value) for key, value in plain.state_dict().items() if key.endswith("base_layer.bias")}
    assert len(changed) == 2 * 7
    before = computed(ours)[0]
    for model in (plain, ours):
        model.load_state_dict(changed, strict=False)
    assert distance(computed(ours)[0], computed(plain)[0]) < 1e-5 < distance(before, computed(plain)[0])


def test_rows_of_4096_bytes_get_a_gap() -> None:
    layers = [torch.nn.Linear(1024, size, bias=False) for size in (6, 2)]
    whole = torch.cat([layer.weight.detach().clone() for layer in layers])
    maps = Maps(layers)
    assert maps.weight(torch.float32).stride() == (1040, 1)
    assert torch.equal(maps.weight(torch.float32), whole)


def test_without_packed_groups_it_generates_as_before(folders: Callable[[str], Path]) -> None:
    model = adapted(folders("qwen2"), asked(), torch.float32)
    ours = fused(model)
    for each in (model, ours):
        each.eval()
        each.get_base_model().set_attn_implementation("sdpa")
    given = {"input_ids": torch.from_numpy(drawn()[None, :9]), "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    assert ours.generate(**given).tolist() == model.generate(**given).tolist()


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("falcon", {}, "FalconDecoderLayer is none of"),
        ("mixtral", {}, "MixtralDecoderLayer is none of"),
        ("glm", {}, "GlmDecoderLayer is none of"),
        ("llama2", {"lora_dropout": 0.1}, "dropout"),
        ("llama2", {"use_dora": True}, "DoRA"),
    ],
)
def test_what_is_not_of_that_kind_computes_map_by_map_and_may_be_recomputed(
    name: str, options: dict[str, Any], why: str, folders: Callable[[str], Path]
) -> None:
    said: list[str] = []
    torch.manual_seed(0)
    model = load_model(folders(name), asked(**options), torch.float32, say=said.append).train()
    assert fuse(model).value == "maps"
    assert why in fuse(model).reason
    assert any("fused maps: " in line and why in line for line in said)
    torch.manual_seed(1)
    kept = computed(model)
    set_recompute(model, [0])
    torch.manual_seed(1)
    again = computed(model)
    assert torch.equal(kept[1], again[1])
    assert all(torch.equal(kept[2][key], again[2][key]) for key in kept[2])


def test_what_is_fused_is_said(folders: Callable[[str], Path]) -> None:
    said: list[str] = []
    load_model(folders("llama2"), asked(), torch.float32, say=said.append)
    assert said == ["fused blocks: all 2 decoder layers are of Llama's kind: one step each, backward written by hand"]
