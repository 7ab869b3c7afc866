"""LoRA adapters as PEFT writes them (Hu et al. 2021, arXiv:2106.09685), read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import WeightsError
from trimtab_runtime import adapter_config
from trimtab_runtime.engines.mapped import map_file

FILES = (adapter_config.NAME, "adapter_model.safetensors")
MERGE = "merge it (leave out --no-merge)"
_PREFIX = "base_model.model."

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
    settings = adapter_config.read_settings(folder)
    if why := refusal(settings):
        raise WeightsError(f"the adapter {name!r} cannot be served beside its base by this engine: {why}. Choose  --engine transformers")
    scaling = adapter_config.scaling(settings)
    tensors = map_file(folder / FILES[1])
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise WeightsError(f"{folder / FILES[1]} has {key} and no lora_B beside it: copy the artifact again")
        factors[layer] = (a.as_float32(), b.as_float32() * np.float32(scaling.scale(layer, int(a.array.shape[0]))))
    if not factors or 2 * len(factors) != len(tensors):
        raise WeightsError(f"{folder / FILES[1]} holds more or other than LoRA's factors: choose  --engine transformers")
    return Adapter(name, max(len(a) for a, _ in factors.values()), factors)


def refusal(settings: dict[str, Any]) -> str:
    """Why an adapter is more than two factors for each of the decoder's linear layers; empty where it is not."""
    if why := adapter_config.refusal(settings):
        return f"it has {why}"
    if adapter_config.is_directed(settings):
        return f"it has use_dora = True, whose rows have lengths of their own; {MERGE}"
    targets = settings.get("target_modules")
    return "it adapts lm_head" if isinstance(targets, list) and "lm_head" in targets else ""
