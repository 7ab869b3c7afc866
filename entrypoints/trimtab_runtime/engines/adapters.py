"""LoRA adapters as PEFT writes them (Hu et al. 2021, arXiv:2106.09685), read without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import WeightsError
from trimtab_runtime.engines.mapped import map_file

FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."
_UNKNOWN = ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "megatron_config", "layer_replication", "trainable_token_indices")

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Adapter:
    """`factors` of each adapted layer by the layer's name in the base: A [rank, in], and B [out, rank] with the scale in it."""

    name: str
    rank: int
    factors: dict[str, Factors] = field(repr=False)


def read_adapter(folder: Path, name: str) -> Adapter:
    """The adapter in a folder. Raises WeightsError for one that is damaged, or does what only PEFT can."""
    for file in FILES:
        if not (folder / file).is_file():
            raise WeightsError(f"{folder} holds no {file}: give the model folder of a run that succeeded")
    try:
        config: dict[str, Any] = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    except ValueError as exc:
        raise WeightsError(f"{folder / FILES[0]} is damaged ({exc}): copy the artifact again") from exc
    if why := refusal(config):
        raise WeightsError(f"the adapter {name!r} cannot be served beside its base by this engine: {why}. Choose  --engine transformers")
    tensors = map_file(folder / FILES[1])
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise WeightsError(f"{folder / FILES[1]} has {key} and no lora_B beside it: copy the artifact again")
        rank = int(a.array.shape[0])
        alpha = float(_of_layer(config.get("alpha_pattern"), layer, config.get("lora_alpha", rank)))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[layer] = (a.as_float32(), b.as_float32() * np.float32(scale))
    if not factors or 2 * len(factors) != len(tensors):
        raise WeightsError(f"{folder / FILES[1]} holds more or other than LoRA's factors: choose  --engine transformers")
    return Adapter(name, max(len(a) for a, _ in factors.values()), factors)


def refusal(config: dict[str, Any]) -> str:
    """Why an adapter is more than two factors a layer; empty where it is not."""
    if config.get("peft_type", "LORA") != "LORA":
        return f"it is {config['peft_type']}, not LORA"
    if config.get("bias", "none") != "none":
        return "it trains biases"
    used = [name for name in _UNKNOWN if config.get(name)]
    return f"it uses {used[0]}" if used else ""


def _of_layer(pattern: dict[str, Any] | None, layer: str, otherwise: Any) -> Any:
    """PEFT's patterns name a layer by the end of its name."""
    return next((value for end, value in (pattern or {}).items() if layer == end or layer.endswith(f".{end}")), otherwise)
