"""Which models the OpenVINO graph can be, by their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import WeightsError
from trimtab_runtime.engines.rope import KINDS, rope_settings

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class Sizes:
    """What of config.json decides the graph. `context` is the longest prompt and answer that the model was made for."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    epsilon: float
    tied: bool
    context: int
    rope: dict[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Raises WeightsError for a config.json that lacks a size."""
        try:
            heads = int(config["num_attention_heads"])
            window = sliding_window(config)
            context = int(config["max_position_embeddings"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                width=int(config.get("head_dim") or config["hidden_size"] // heads),
                vocabulary=int(config["vocab_size"]),
                epsilon=float(config.get("rms_norm_eps", 1e-6)),
                tied=bool(config.get("tie_word_embeddings", False)),
                context=min(context, window or context),
                rope=rope_settings(config),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise WeightsError(f"config.json lacks a size that the model needs: {exc}; copy the model again") from exc


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """How far back a layer of the model looks, where it does not look back to the beginning."""
    if "use_sliding_window" in config and not config["use_sliding_window"]:
        return None
    window = config.get("sliding_window")
    return int(window) if window else None


def refusal(config: Mapping[str, Any]) -> str:
    """Why this graph cannot be the model of that config.json; empty where it can."""
    name = next(iter(config.get("architectures") or ["no architecture"]))
    if name not in FAMILIES:
        return f"{name} is not one of its families ({', '.join(FAMILIES)})"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}, not silu"
    if config.get("quantization_config"):
        return "its weights are quantised"
    settings = rope_settings(config)
    if settings["rope_type"] not in KINDS or any(isinstance(value, dict) for value in settings.values()):
        return f"its rotary embedding is {settings['rope_type']!r}, not one of: {', '.join(KINDS)}"
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "only a part of each head is rotated"
    return ""
