from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from support.served import END, Answer, asked, engine_on
from trimtab.errors import WeightsError
from trimtab_runtime.engines.families import Sizes, refusal
from trimtab_runtime.engines.mapped import map_folder
from trimtab_runtime.engines.rope import frequencies, rope_settings

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}
LENGTH = 40
PROMPTS = [
    [1, 5, 9],
    list(range(20, 120)),
    [7],
    [int(token) for token in np.random.default_rng(0).integers(2, 320, 45)],
    [1, 5, 9, 200, 201],
]


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, a head of its own": lambda: llama(tie_word_embeddings=False),
    "llama, tied, biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, a query head for each key": lambda: llama(num_key_value_heads=4, head_dim=32),
    "llama, one key for all": lambda: llama(num_key_value_heads=1),
    "llama 3's rotation": lambda: llama(rope_parameters=ROPES["llama3"] | {"rope_theta": 500_000.0}),
    "yarn": lambda: llama(rope_parameters=ROPES["yarn"] | {"rope_theta": 10_000.0}),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=24)),
}


def saved(folder: Path, model: PreTrainedModel, **how: Any) -> Path:
    """A random model whose answers depend on what was said, with norms and biases that are not all ones and noughts."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.25)
    model.save_pretrained(folder, **how)
    return folder


def greedy(folder: Path, answers: list[Answer]) -> list[Answer]:
    """The answers again, as transformers gives them: at each place the likeliest token, when everything before it is as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[Answer] = []
    for prompt, (ids, reason) in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            likeliest = model(torch.tensor([prompt + ids])).logits[0].argmax(-1).tolist()[len(prompt) - 1 :]
        found.append((likeliest[: len(ids)], "stop" if likeliest[len(ids)] == END and len(ids) < LENGTH else "length"))
        assert reason == "stop" or len(ids) == LENGTH
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_of_each_family_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = saved(tmp_path / "model", FAMILIES[family]())
    engine = engine_on(tmp_path, folder)
    answers = asked(engine, [(prompt, LENGTH, "base") for prompt in PROMPTS])  # all at once
    assert answers == greedy(folder, answers)
    assert len({tuple(ids) for ids, _ in answers}) == len(PROMPTS), "the answers must depend on the prompts for this to mean anything"


def test_shards_and_half_precision_weights_load_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = llama(tie_word_embeddings=False).to(torch.bfloat16)
    folder = saved(tmp_path / "model", model, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert {one.dtype for one in map_folder(folder).values()} == {"BF16"}
    answers = asked(engine_on(tmp_path, folder), [(prompt, LENGTH, "base") for prompt in PROMPTS])
    assert answers == greedy(folder, answers)


@pytest.mark.parametrize("kind", ["default", *ROPES])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    settings = {"rope_theta": 50_000.0} | (ROPES.get(kind) or {"rope_type": "default"})
    config = LlamaConfig(**SMALL | {"head_dim": 64}, rope_parameters=settings)
    ours, strength = frequencies(rope_settings(config.to_dict()), 64)
    if kind == "default":
        theirs, factor = 1.0 / (50_000.0 ** (torch.arange(0, 64, 2).float() / 64)), 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert strength == pytest.approx(factor)
    if kind in ("linear", "llama3", "yarn"):
        assert not np.allclose(ours, frequencies({"rope_type": "default", "rope_theta": 50_000.0}, 64)[0])


def test_rotations_are_read_as_transformers_4_wrote_them() -> None:
    old = {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 64}
    assert rope_settings(old) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0, "original_max_position_embeddings": 64}
    assert rope_settings({})["rope_type"] == "default"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "no architecture"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
    ],
)
def test_a_model_that_it_cannot_be_is_named(change: dict[str, Any], named: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SMALL}
    assert refusal(config) == ""
    assert named in refusal(config | change)


def test_a_window_limits_the_context() -> None:
    config = {"architectures": ["MistralForCausalLM"], **SMALL, "sliding_window": 100}
    assert Sizes.of(config).context == 100
    assert Sizes.of(config | {"use_sliding_window": False}).context == 512
    assert Sizes.of(config | {"sliding_window": None}).context == 512
    with pytest.raises(WeightsError, match="hidden_size"):
        Sizes.of({key: value for key, value in config.items() if key != "hidden_size"})


def test_missing_and_wrong_tensors_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama(tie_word_embeddings=False))
    config = json.loads((folder / "config.json").read_text())
    for change, named in (
        ({"num_hidden_layers": 4}, r"model\.layers\.3\."),
        ({"vocab_size": 330}, "embed_tokens"),
        ({"head_dim": 8}, "q_proj"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=named):
            engine_on(tmp_path, folder)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, named in (whole[: len(whole) // 2], "no whole safetensors"), (b"", "no whole"), (b"\xff" * 64, "no whole"):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=named):
            map_folder(folder)
    file.unlink()
    with pytest.raises(WeightsError, match="no safetensors weights"):
        map_folder(folder)
