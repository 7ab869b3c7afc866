"""Which kinds of models there are, and what of a model's config.json decides whether it can be trained and how long a text may be.

A family is what transformers calls a `model_type`. Pure; crosses the wall: the client refuses with it before hours pass, the runtime trains
and serves by it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Engine = Literal["openvino", "vllm", "transformers"]

_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = _GATED[:4]
_EVERYWHERE: tuple[Engine, ...] = ("openvino", "vllm", "transformers")


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`. `architecture` is the class that config.json names, `targets` the ends of the names of the layers that
    get adapters unless others are asked for, `engines` what serves it on processors, the best first (on a GPU vLLM serves all of them).
    `positions` is what transformers takes for a config.json that does not say how many positions the model has. `note` is said aloud
    before such a model is trained.
    """

    model_type: str
    architecture: str
    known_as: str
    targets: tuple[str, ...]
    engines: tuple[Engine, ...]
    positions: int
    note: str = ""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "Llama 2 and 3, SmolLM2", _GATED, _EVERYWHERE, 2048),
        Family("mistral", "MistralForCausalLM", "Mistral 7B", _GATED, _EVERYWHERE, 131_072),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "Mixtral 8x7B",
            _ATTENTION,
            _EVERYWHERE[1:],
            131_072,
            "adapters go on the attention layers alone; router and experts stay as they are, with qlora too, which puts the attention "
            "layers into 4 bits and leaves the experts in the compute dtype",
        ),
        Family("qwen2", "Qwen2ForCausalLM", "Qwen2.5", _GATED, _EVERYWHERE, 32_768),
        Family("qwen3", "Qwen3ForCausalLM", "Qwen3", _GATED, _EVERYWHERE, 32_768),
        Family("glm", "GlmForCausalLM", "GLM-4 of 2024", (*_ATTENTION, "gate_up_proj", "down_proj"), _EVERYWHERE[1:], 131_072),
        Family("glm4", "Glm4ForCausalLM", "GLM-4 of 2025", (*_ATTENTION, "gate_up_proj", "down_proj"), _EVERYWHERE[1:], 131_072),
        Family(
            "falcon",
            "FalconForCausalLM",
            "Falcon 7B",
            ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            _EVERYWHERE[1:],
            2048,
        ),
    )
}
"""Families whose packed samples are proven to be apart, by model_type (tests/unit/test_families.py trains each)."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None for one that is not known, which may be trained all the same: the runtime tries it out."""
    return FAMILIES.get(str(config.get("model_type")))


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model of this config.json was made for, at most; None where it does not say.

    Of a rotary embedding that is stretched (`linear`, arXiv:2306.15595; `yarn`, arXiv:2309.00071) the stretched length: these two
    kinds may name the length from before. Others (`llama3`, `longrope`) name the length that they reach.
    """
    named = (config.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"))
    found = next((value for value in named if isinstance(value, int) and value > 0), None)
    if found is None:
        family = family_of(config)
        return family.positions if family else None
    rope = _rope(config)
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings") or found
    if rope["rope_type"] in ("linear", "yarn") and isinstance(factor, int | float) and isinstance(before, int):
        return max(found, int(before * factor))
    return found


def refusal(config: Mapping[str, Any], max_seq_len: int) -> str:
    """Why a model of this config.json cannot be trained on rows of `max_seq_len` tokens, with what to do; empty where nothing is known
    against it."""
    name = config.get("model_type") or "without a model_type"
    if config.get("is_encoder_decoder"):
        return (
            f"models of type {name} read with an encoder and write with a decoder (sequence to sequence), which is not there yet: choose "
            "a decoder, such as qwen2.5-3b-instruct"
        )
    if config.get("alibi") and name == "falcon":
        return "this Falcon has ALiBi positions, which count on through a packed row: choose one with rotary positions, such as falcon-7b"
    limit, rope = context_of(config), _rope(config)
    if limit is not None and max_seq_len > limit:
        return f"max_seq_len {max_seq_len:,} is beyond this model's {limit:,} positions: choose {limit} or less  (--max-seq-len {limit})"
    before = rope.get("original_max_position_embeddings") or limit
    if rope["rope_type"] in ("longrope", "su") and isinstance(before, int) and max_seq_len > before:
        return (
            f"max_seq_len {max_seq_len:,} is beyond {before:,}, where this model's rotary embedding ({rope['rope_type']}) becomes another "
            f"for the whole row, whatever else is in it: choose {before} or less  (--max-seq-len {before})"
        )
    window = window_of(config)
    if window is not None and family_of(config) is None and max_seq_len > window:
        return (
            f"models of type {name} are kept apart by a mask, which does not know their sliding window of {window:,} tokens: choose "
            f"{window} or less  (--max-seq-len {window})"
        )
    return ""


def missing_target(config: Mapping[str, Any], targets: Sequence[str]) -> str:
    """Why adapters cannot go on layers of these names, by their ends; empty where nothing is known against it: of a model of another type
    only the runtime sees the layers."""
    known = family.targets if (family := family_of(config)) else ()
    for target in targets if known else ():
        if (end := target.rsplit(".", 1)[-1]) not in known:
            near = difflib.get_close_matches(end, known, n=1)
            why = "; the head gets no adapters" if end in ("lm_head", "embed_out") else ""
            hint = f"did you mean {near[0]}? " if near else ""
            return f"lora_targets: no linear layer ends in {target!r}{why}; {hint}There are: {', '.join(known)}"
    return ""


def window_of(config: Mapping[str, Any]) -> int | None:
    """How far back a layer looks, in tokens, itself among them; None where every layer looks back to the beginning."""
    found = [config.get("sliding_window") if config.get("use_sliding_window", True) else None, config.get("attention_chunk_size")]
    return min((window for window in found if isinstance(window, int) and window > 0), default=None)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding, under either of the names that they have had, with `rope_type`."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    settings = dict(found) if isinstance(found, Mapping) else {}
    return {**settings, "rope_type": settings.get("rope_type") or settings.get("type") or "default"}
