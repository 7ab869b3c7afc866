"""A tiny random model of each family, with the tokenizer of `tiny_model`: two layers of 64, made in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.tiny_model import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WINDOW = 24  # tokens, of the one with a sliding window

_GROUPED = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"intermediate_size": 128, "num_attention_heads": 4}),
    "llama3": ("llama", {**_GROUPED, "rope_parameters": _LLAMA3}),
    "smollm2": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "falcon": ("falcon", {"num_attention_heads": 4, "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False}),
    "falcon-40b": ("falcon", {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-window": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "glm": ("glm", {**_GROUPED, "head_dim": 16}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 16}),
}
"""By name: the model_type, and what its configuration has beside the common sizes."""


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model of `SHAPES`."""
    model_type, shape = SHAPES[name]
    return make_config(model_type, **shape)


def make_config(model_type: str, **shape: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of any type that names its sizes as Llama does."""
    from transformers import AutoConfig

    common = {"vocab_size": len(make_tokenizer()), "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return AutoConfig.for_model(model_type, **{**common, **tokens, **shape})


def make_model(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> Path:
    """Write a random model of that configuration, its weights wide enough that its answers depend on the text; return `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)  # biases begin as zeros, and would not be seen
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
