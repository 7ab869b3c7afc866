"""An adapter folded into its base: what PEFT makes of the same two, but for one rounding, file by file as the base has them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.errors import SpecError, StagingError, WeightsError
from trimtab.layout import JobDir
from trimtab_runtime.engine import Engine
from trimtab_runtime.engines.adapters import read_adapter as read_beside
from trimtab_runtime.engines.adapters import refusal
from trimtab_runtime.engines.mapped import map_folder
from trimtab_runtime.engines.openvino_graph import build
from trimtab_runtime.losses import variant
from trimtab_runtime.merge import merge, read_adapter
from trimtab_runtime.methods.qlora import dequantised_nf4
from trimtab_runtime.shards import read_header, rewrite

# PEFT 0.21 asks transformers 5.23 for a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16 and in several files, as large models are stored."""
    folder = make_lively_model(tmp_path_factory.mktemp("base"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact") / "qlora", base, method="qlora")


def merged_into(root: Path, base: Path, artifact: Path, onto: str) -> Path:
    job = JobDir(root)
    for folder in (job.channel("merge"), job.adapters, job.model):
        folder.mkdir(parents=True)
    job.channel("model").symlink_to(base)
    (job.adapters / "tuned").symlink_to(artifact)
    (job.channel("merge") / "request.json").write_text(json.dumps({"onto": onto}))
    seen: list[tuple[int, int]] = []
    merge(job, lambda line: None, lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    return job.model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_peft(base: Path, artifact: Path, *, nf4: bool) -> dict[str, torch.Tensor]:
    """PEFT's own merge in fp32, of the base or of what NF4 makes of it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if nf4:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "_proj" in name:
                    weight.copy_(dequantised_nf4(weight))
    merged = PeftModel.from_pretrained(model, str(artifact)).merge_and_unload()
    return {name: tensor for name, tensor in merged.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("onto", ["original", "dequantised"])
def test_equals_pefts_merge_but_for_one_rounding_to_the_bases_type(base: Path, artifact: Path, tmp_path: Path, onto: str) -> None:
    found = tensors(merged_into(tmp_path, base, artifact, onto))
    expected = by_peft(base, artifact, nf4=onto == "dequantised")
    original = tensors(base)
    assert set(found) == set(expected) == set(original)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16), rtol=2**-8, atol=1e-6)  # the last bit of bf16
        exact = (tensor == expected[name].to(torch.bfloat16)).float().mean()
        assert exact > 0.999, "fp32 sums in another order differ in the last bit of one weight in thousands"
        assert torch.equal(tensor, original[name]) == ("_proj" not in name), name


def directed(folder: Path, base: Path, method: str) -> Path:
    """PEFT's files of a DoRA adapter with rsLoRA's scale and magnitudes that were moved, on some of the layers."""
    torch.manual_seed(4)
    kind = {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=3, init_lora_weights=False, task_type="CAUSAL_LM", **kind),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "trimtab.json").write_text(json.dumps({"spec": {"method": method, "dtype": "float32"}}))
    return folder


@pytest.mark.parametrize("onto", ["original", "dequantised"])
def test_dora_and_rslora_are_merged_as_peft_does(base: Path, tmp_path: Path, onto: str) -> None:
    tuned = directed(tmp_path / "tuned", base, "lora" if onto == "original" else "qlora")
    found, expected = tensors(merged_into(tmp_path / "job", base, tuned, onto)), by_peft(base, tuned, nf4=onto == "dequantised")
    original = tensors(base)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16), rtol=2**-7, atol=1e-6, msg=name)
        assert (tensor == expected[name].to(torch.bfloat16)).float().mean() > 0.99, name
        adapted = any(end in name for end in ("q_proj", "o_proj", "down_proj"))
        assert torch.equal(tensor, original[name]) == (not adapted and (onto == "original" or "_proj" not in name)), name


def test_a_dora_adapter_beside_its_base_is_what_it_is_merged(base: Path, tmp_path: Path) -> None:
    """As what merging costs is measured; PEFT, which the transformers engine asks, says the same."""
    tuned = directed(tmp_path / "tuned", base, "lora")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tuned))(ids).logits
        ours = variant(base, read_adapter(tuned), "unmerged", None, torch.float32)(ids).logits
        served = Engine.load(base, tuned, dtype="float32").model("tuned")(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(WeightsError, match=r"use_dora = True.*merge it"):
        read_beside(tuned, "tuned")


def test_the_folder_is_laid_out_as_the_base_is(base: Path, artifact: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tuned = tmp_path / "tuned"
    shutil.copytree(artifact, tuned)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tuned)
    folder = merged_into(tmp_path / "job", base, tuned, "original")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()} | {"trimtab.json"}
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    for shard in base.glob("*.safetensors"):
        assert read_header(folder / shard.name) == read_header(shard)
        with safe_open(folder / shard.name, "pt") as ours, safe_open(shard, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template, "the artifact's"
    told = json.loads((folder / "trimtab.json").read_text())
    assert told["merged"]["onto"] == "original"
    assert told["spec"]["method"] == "qlora"
    names = {path.name for path in folder.iterdir()} - {"trimtab.json"}
    assert told["files"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_only_what_a_model_needs_is_copied(base: Path, artifact: Path, tmp_path: Path) -> None:
    whole = tmp_path / "base"
    shutil.copytree(base, whole)
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", "Notice", "vocab.json"):
        (whole / name).write_text(name)
    folder = merged_into(tmp_path / "job", whole, artifact, "original")
    found = {path.name for path in folder.iterdir()}
    assert {"LICENSE", "LICENSE.txt", "USE_POLICY.md", "Notice", "vocab.json", "tokenizer.json"} <= found
    assert not found & {"pytorch_model.bin", "tf_model.h5", "README.md"}
    assert found - {"trimtab.json"} == set(json.loads((folder / "trimtab.json").read_text())["files"])


def test_it_answers_as_base_and_adapter_do(base: Path, artifact: Path, tmp_path: Path) -> None:
    """Onto dequantised weights: the model that was trained, to the last bits of bf16."""
    both, alone = Engine.load(base, artifact), Engine.load(merged_into(tmp_path, base, artifact, "dequantised"), dtype="float32")
    ids = torch.tensor([both.encode("The keeper of the tower counts ships at dawn and")])
    with torch.inference_mode():
        trained, merged, original = (model(ids).logits for model in (both.model(), alone.model(), both.model("base")))
    assert (merged - trained).abs().max() < 0.05 * (original - trained).abs().max()


def test_the_losses_are_those_of_the_models_that_serve(base: Path, artifact: Path, tmp_path: Path) -> None:
    from trimtab_runtime.losses import Passage, Scores, score, states, variant

    def scored(model: PreTrainedModel, passage: Passage, trained: torch.Tensor | None) -> Scores:
        (hidden,) = states(model, [passage])
        return score(model, passage, hidden, trained)

    adapter = read_adapter(artifact)
    served = Engine.load(base, artifact)
    ids = served.encode("The keeper of the tower counts ships at dawn and then he writes each name")
    passage = Passage(0, ids, [True] * (len(ids) - 1))
    wholes = {"unmerged": served.model(), "base": served.model("base")} | {
        onto: Engine.load(merged_into(tmp_path / onto, base, artifact, onto), dtype="float32").model()
        for onto in ("original", "dequantised")
    }
    with torch.inference_mode():
        trained = scored(variant(base, adapter, "unmerged", torch.float32, torch.float32), passage, None).hidden
        for name, whole in wholes.items():
            found = scored(variant(base, adapter, name, torch.float32, torch.float32), passage, trained)
            said, wanted = (model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in (whole, wholes["unmerged"]))
            nats = -said.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
            assert found.nats == pytest.approx(nats, rel=1e-4), name
            assert found.divergence == pytest.approx((wanted.exp() * (wanted - said)).sum().item(), abs=2e-3), name
            assert found.agree == int((said.argmax(-1) == wanted.argmax(-1)).sum()), name
            assert found.tokens == len(ids) - 1
    counted = scored(whole, Passage(0, ids, [place < 3 for place in range(len(ids) - 1)]), None)
    assert counted.tokens == 3
    assert counted.nats < found.nats


def test_long_text_is_cut_into_passages_and_beyond_the_most_left_out(base: Path) -> None:
    from trimtab_runtime.losses import MOST, WINDOW, held_out
    from trimtab_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(base)
    long, short = "The keeper counts ships. " * 9000, "Tides turn."
    passages, left_out = held_out([long, short, ""], tokenizer)
    assert {one.document for one in passages} == {0, 1}
    assert all(len(one.ids) <= WINDOW and one.ids[0] == tokenizer.document_start for one in passages)
    assert left_out > 0
    kept = sum(len(one.counts) for one in passages)
    assert kept <= MOST
    assert kept + left_out == len(tokenizer.text(long)) + len(tokenizer.text(short))


def test_biases_and_a_head_of_its_own_stay(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=300, tie_word_embeddings=False, max_position_embeddings=128, **sizes)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tmp_path / "base" / name)
    artifact = make_adapter(tmp_path / "artifact", tmp_path / "base")
    folder = merged_into(tmp_path / "job", tmp_path / "base", artifact, "original")
    found, before = tensors(folder), tensors(tmp_path / "base")
    assert sum(name.endswith("bias") for name in found) == 6
    for name in found:
        assert torch.equal(found[name], before[name]) == ("_proj.weight" not in name), name
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(artifact))
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_not_a_plain_product_is_refused_by_the_setting(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "adapter_config.json").read_text())
    shutil.copytree(artifact, tmp_path / "tuned")
    for name, value in {
        "bias": "all",
        "modules_to_save": ["lm_head"],
        "init_lora_weights": "pissa",
        "a_setting_of_tomorrow": 3,
    }.items():
        (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(SpecError, match=rf"{name} = .*merge=False"):
            read_adapter(tmp_path / "tuned")
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(SpecError, match="PREFIX_TUNING"):
        read_adapter(tmp_path / "tuned")


def test_scales_and_ranks_of_each_layer_are_pefts(base: Path, tmp_path: Path) -> None:
    """As both readers take them: what is merged, and what the OpenVINO engine puts beside the base."""
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False, use_rslora=True,
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path)
    (tmp_path / "trimtab.json").write_text("{}")
    theirs, ours, beside = by_peft(base, tmp_path, nf4=False), read_adapter(tmp_path), read_beside(tmp_path, "a")
    before = {name: tensor.float() for name, tensor in tensors(base).items()}
    assert set(ours.factors) == set(beside.factors)
    assert len(set(ours.scales.values())) == 4
    for layer in ours.factors:
        start, wanted = before[f"{layer}.weight"], theirs[f"{layer}.weight"]
        a, b = (torch.from_numpy(factor) for factor in beside.factors[layer])
        torch.testing.assert_close(ours.merged(layer, start), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(start + b @ a, wanted, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_the_embeddings_is_not_merged_and_not_left_out(base: Path, artifact: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(artifact, tuned)
    width, vocabulary = 192, json.loads((base / "config.json").read_text())["vocab_size"]
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, width),
        "base_model.model.lm_head.lora_B.weight": torch.ones(vocabulary, 4),
    }
    save_file(load_file(artifact / "adapter_model.safetensors") | head, tuned / "adapter_model.safetensors")
    with pytest.raises(SpecError, match=r"changes lm_head, which this base model shares with its embeddings .*merge=False"):
        merged_into(tmp_path / "job", base, tuned, "original")
    with pytest.raises(WeightsError, match="changes lm_head, which this engine does not adapt: choose  --engine transformers"):
        build(json.loads((base / "config.json").read_text()), map_folder(base), [read_beside(tuned, "a")])
    settings = json.loads((tuned / "adapter_config.json").read_text())
    assert refusal(settings | {"target_modules": ["q_proj", "lm_head"]}) == "it adapts lm_head"


def test_another_models_adapter_and_one_that_diverged_are_refused(base: Path, artifact: Path, tmp_path: Path) -> None:
    weights = load_file(artifact / "adapter_model.safetensors")
    shutil.copytree(artifact, tmp_path / "tuned")

    def refused(change: dict[str, torch.Tensor], message: str) -> None:
        save_file(change, tmp_path / "tuned" / "adapter_model.safetensors")
        with pytest.raises(WeightsError, match=message):
            merged_into(tmp_path / f"job-{message[:4]}", base, tmp_path / "tuned", "original")

    refused({name.replace("layers.3", "layers.9"): tensor for name, tensor in weights.items()}, r"stores no model\.layers\.9")
    refused({name: tensor[:, :7].clone() if "_A" in name else tensor for name, tensor in weights.items()}, "192 x 7")
    refused({name: tensor * float("nan") for name, tensor in weights.items()}, "not finite")
    refused({name: tensor for name, tensor in weights.items() if "layers.0.self_attn.q_proj.lora_A" not in name}, "and not A and B")


def test_a_request_that_is_none_is_refused(base: Path, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(StagingError, match="onto is 'both'"):
        merged_into(tmp_path, base, artifact, "both")


def test_a_file_that_is_cut_short_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.arange(600, dtype=torch.int32), "b": torch.ones(3, 4)}, whole)
    target = tmp_path / "target.safetensors"
    digest = rewrite(whole, target, frozenset(), lambda name, tensor: tensor)
    assert target.read_bytes() == whole.read_bytes()
    assert len(digest) == 64
    data = whole.read_bytes()
    for broken in (data[:-1], data + b"x", data[:40], b"", b"\xff" * 100, data.replace(b'"a"', b'"a,', 1)):
        (tmp_path / "broken.safetensors").write_bytes(broken)
        with pytest.raises(WeightsError, match=r"broken\.safetensors is not a whole safetensors file"):
            rewrite(tmp_path / "broken.safetensors", target, frozenset(), lambda name, tensor: tensor)
    with pytest.raises(WeightsError, match="stored as I32"):
        rewrite(whole, target, frozenset({"a"}), lambda name, tensor: tensor)
