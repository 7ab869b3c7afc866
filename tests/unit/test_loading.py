"""Bases put together layer by layer: the same model, bit for bit, as one loaded as a whole, and clear words where files do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.tiny_families import SHAPES, config_of, make_config, make_model
from trimtab.errors import SpecError, WeightsError
from trimtab.spec import TrainSpec
from trimtab_runtime import families
from trimtab_runtime.batch import Batch, as_batch
from trimtab_runtime.examples import Sample
from trimtab_runtime.loading import Shards, open_base
from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.methods.qlora import Factors, input_scales, quantise
from trimtab_runtime.model import load_model, read_config
from trimtab_runtime.rows import PackedRows, write_rows

LAYERED = [name for name in SHAPES if name != "mixtral"]

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_model(tmp_path_factory.mktemp(name), config_of(name)) for name in SHAPES}


@pytest.fixture(scope="module")
def typical(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("rows")
    tokens = torch.randint(10, 200, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    write_rows(folder, [[Sample("document", tokens[:70], [True] * 70), Sample("document", tokens[70:], [True] * 50)]], 64, {})
    rows = PackedRows(folder)
    return as_batch([rows[0], rows[1]])


def qlora(**options: Any) -> TrainSpec:
    return TrainSpec(model="tiny", max_seq_len=128, **{"method": "qlora", "lora_rank": 4} | options)


def as_a_whole(
    folder: Path, spec: TrainSpec, dtype: torch.dtype, typical: Batch | None
) -> tuple[PreTrainedModel, dict[str, Factors], dict[str, torch.Tensor] | None]:
    """The base with all its weights in memory, then put into NF4; and its inputs' scales."""
    implementation = families.implementation(read_config(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation)
    base.config.use_cache = False
    scales = input_scales(base, typical.inputs(families.mask_dtype(base))) if typical else None
    return base, quantise(base, dtype, rank=spec.lora_rank, scales=scales), scales


def refuse_difference(one: PreTrainedModel, other: PreTrainedModel) -> None:
    theirs = other.state_dict()
    assert set(one.state_dict()) == set(theirs)
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    for (name, buffer), (_, its) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(buffer, its), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LAYERED)
def test_layer_by_layer_is_as_a_whole(folders: dict[str, Path], typical: Batch, name: str, dtype: torch.dtype) -> None:
    """Packed weights, their scales, the beginnings of adapters and the random numbers left to draw: all bit-equal."""
    torch.manual_seed(1)
    found = open_base(folders[name], qlora(), dtype, typical)
    assert not isinstance(found, str), found
    base, lost = found
    drawn = torch.rand(3)
    torch.manual_seed(1)
    whole, theirs, _ = as_a_whole(folders[name], qlora(), dtype, typical)
    assert torch.equal(drawn, torch.rand(3))
    refuse_difference(base, whole)
    assert lost is not None
    assert list(lost) == list(theirs)
    for layer, factors in lost.items():
        assert all(torch.equal(one, other) for one, other in zip(factors, theirs[layer], strict=True)), layer
    assert base.config.to_dict() == whole.config.to_dict()
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    assert (head is embedding) == (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight)


def test_the_weights_of_one_layer_at_a_time_are_in_memory(tmp_path: Path, typical: Batch) -> None:
    """While the last of eight layers computes, those before it are in NF4 and hold nothing else."""
    folder = make_model(tmp_path, make_config("llama", intermediate_size=128, num_attention_heads=4, num_hidden_layers=8))
    seen = {}

    def look(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        layer = stack[-1]
        if inputs[0].shape[-1] == 64 and not layer.self_attn.q_proj.weight.is_meta and "originals" not in seen:
            seen["originals"] = [name for name, part in stack.named_modules() if type(part) is torch.nn.Linear and not part.weight.is_meta]

    stack: Any = None
    from torch.nn.modules.module import register_module_forward_pre_hook

    def find(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal stack
        if hasattr(module, "layers"):
            stack = module.layers
        if stack is not None and inputs:
            look(module, inputs)

    hook = register_module_forward_pre_hook(find)
    try:
        found = open_base(folder, qlora(), torch.float32, typical)
    finally:
        hook.remove()
    assert not isinstance(found, str)
    assert len(seen["originals"]) == 7
    assert all(name.startswith("7.") for name in seen["originals"])


@pytest.mark.parametrize("how", [{"lora_init": "zeros"}, {"lora_targets": ("q_proj", "down_proj")}])
def test_what_does_not_look_at_rows_goes_the_same_way(folders: dict[str, Path], typical: Batch, how: dict[str, Any]) -> None:
    spec = qlora(**how)
    torch.manual_seed(0)
    found = load_model(folders["qwen3"], spec, torch.float32, typical=typical, fused=False)
    whole, _, _ = as_a_whole(folders["qwen3"], spec, torch.float32, None)
    base = found.get_base_model()
    for name, layer in linear_layers(whole).items():
        mine = base.get_submodule(name)
        mine = getattr(mine, "base_layer", mine)
        assert torch.equal(mine.weight.data, layer.weight.data)
        assert torch.equal(mine.weight.quant_state.absmax, layer.weight.quant_state.absmax)
    adapted = {name for name, part in base.named_modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")}
    restored = [name for name in adapted if base.get_submodule(name).lora_B["default"].weight.any()]
    assert len(adapted) == (14 if "lora_init" in how else 4)
    assert len(restored) == (0 if "lora_init" in how else 4)


def test_shards_and_other_types_make_the_same_model(folders: dict[str, Path], tmp_path: Path, typical: Batch) -> None:
    """A checkpoint in three files, one in fp16: read as what they are, computed in bf16."""
    tensors = load_file(folders["llama3"] / "model.safetensors")
    half = {name: tensor.half() for name, tensor in tensors.items()}
    for copy in ("sharded", "one"):
        shutil.copytree(folders["llama3"], tmp_path / copy)
        (tmp_path / copy / "model.safetensors").unlink()
    save_file(half, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    files = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(half)}
    for file in set(files.values()):
        save_file({name: half[name] for name in half if files[name] == file}, tmp_path / "sharded" / file, metadata={"format": "pt"})
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    bases = []
    for copy in ("sharded", "one"):
        found = open_base(tmp_path / copy, qlora(), torch.bfloat16, typical)
        assert not isinstance(found, str)
        bases.append(found[0])
    refuse_difference(*bases)
    refuse_difference(bases[0], as_a_whole(tmp_path / "one", qlora(), torch.bfloat16, typical)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_is_read_so_too(folders: dict[str, Path], dtype: torch.dtype) -> None:
    found = open_base(folders["smollm2"], qlora(method="lora"), dtype, None)
    assert not isinstance(found, str)
    refuse_difference(found[0], AutoModelForCausalLM.from_pretrained(folders["smollm2"], dtype=dtype))
    assert found[1] is None


@pytest.mark.parametrize(
    ("name", "why"),
    [("mixtral", "transformers converts the tensors of type mixtral"), ("olmo2", "type olmo2 is tried out as a whole first")],
)
def test_what_is_loaded_as_a_whole_is_said(folders: dict[str, Path], tmp_path: Path, name: str, why: str) -> None:
    folder = folders.get(name) or make_model(tmp_path, make_config(name, intermediate_size=128, num_attention_heads=4))
    said: list[str] = []
    load_model(folder, qlora(), torch.float32, say=said.append)
    assert f"base loaded as a whole, not layer by layer: {why}" in said


def changed(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.third_proj.weight"] = torch.zeros(2, 2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(63)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, r"lacks model\.layers\.1\.mlp\.up_proj\.weight: copy the model there again"),
        (add, r"has, and a LlamaForCausalLM does not, model\.layers\.1\.mlp\.third_proj\.weight"),
        (reshape, r"model\.norm\.weight has the shape \[63\], config\.json asks for \[64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folders: dict[str, Path], tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        load_model(changed(folders["llama2"], tmp_path / "model", change), qlora(), torch.float32)


def test_what_a_model_computes_for_itself_may_be_in_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    def add_frequencies(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    folder = changed(folders["llama2"], tmp_path / "model", add_frequencies)
    assert not isinstance(open_base(folder, qlora(), torch.float32, None), str)


def test_a_head_beside_the_embedding_that_it_is_tied_to_is_left_to_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = changed(folders["smollm2"], tmp_path / "model", add_head)
    assert open_base(folder, qlora(), torch.float32, None) == "its tensors have other names than those of LlamaForCausalLM"


@pytest.mark.parametrize("size", [-100, -1, 60, 4, 0])
def test_a_file_cut_short_is_named(folders: dict[str, Path], tmp_path: Path, size: int) -> None:
    shutil.copytree(folders["llama2"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        SpecError, match=r"does not load: model\.safetensors is not a whole safetensors file .*copy the base model there again"
    ):
        load_model(tmp_path / "model", qlora(), torch.float32)


def test_a_file_cut_short_after_it_was_opened_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama2"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    shards = Shards(tmp_path / "model")
    file.write_bytes(file.read_bytes()[:-2])
    last = max(shards.names, key=lambda name: shards._places[name][1])
    with pytest.raises(Exception, match="ends before its last tensor"):
        shards.read(last, torch.empty(shards.shape(last)))
    shards.close()


def header_of(**tensors: Any) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": span} for name, (dtype, shape, span) in tensors.items()}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (header_of(a=("F32", [8], [0, 16]), b=("F32", [8], [16, 64])), r"a has 16 bytes, and \[8\] of F32 takes 32"),
        (header_of(a=("F32", [8], [0, 48]), b=("F32", [4], [48, 64])), "a has 48 bytes"),
        (header_of(a=("I64", [4], [0, 64])), r"a has 64 bytes, and \[4\] of I64 takes 32"),
        (header_of(a=("F32", [8], [0, 32]), b=("F32", [8], [16, 64])), "b does not begin where the tensor before it ends"),
        (header_of(a=("F32", [8], [0, 32]), b=("F32", [16], [32, 96])), "its tensors do not end where the file does"),
        (header_of(a=("F32", [24], [0, 96]), b=("X", [8], [96, 64])), r"b has the shape \[8\] and the offsets \[96, 64\]"),
        (header_of(a=("F32", [-4, -4], [0, 64])), r"the shape \[-4, -4\]"),
        (header_of(a=("F32", [16], [-64, 0]), b=("F32", [16], [0, 64])), "a does not begin"),
        (header_of(a=("F32", [16], [0, 64.0])), r"the offsets \[0, 64\.0\]"),
        (header_of(a=("F32", [16], [0, 64, 64])), "too many values"),
        (header_of(a=("F32", None, [0, 64])), "NoneType"),
    ],
)
def test_a_header_whose_tensors_are_not_as_large_as_their_shapes_is_named(tmp_path: Path, header: dict[str, Any], said: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(64)))
    with pytest.raises(WeightsError, match=rf"not a whole safetensors file \(.*{said}.*\): copy the base model there again"):
        Shards(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none_is_named(folders: dict[str, Path], tmp_path: Path, index: str) -> None:
    shutil.copytree(folders["llama2"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SpecError, match=r"model\.safetensors\.index\.json is not a readable index"):
        load_model(tmp_path / "model", qlora(), torch.float32)


def test_a_shard_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama2"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    index = {"weight_map": {str(number): name for number, name in enumerate(names)}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match=r"model-00002-of-00002\.safetensors"):
        load_model(tmp_path / "model", qlora(), torch.float32)
