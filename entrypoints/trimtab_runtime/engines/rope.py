"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): the frequencies of each kind that config.json can name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import WeightsError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding as transformers 5 writes them (`rope_parameters`) or 4 did (`rope_theta`, `rope_scaling`)."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return found


def frequencies(settings: Mapping[str, Any], width: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies [width / 2] for heads of `width`, and the factor on cosine and sine.

    `dynamic` changes nothing within the context that the model was made for, and no longer one is served. Raises WeightsError
    for a kind that is not known. Sources: linear, Chen et al. 2023, arXiv:2306.15595; yarn, Peng et al. 2023,
    arXiv:2309.00071; llama3, Llama 3.1's config.json and transformers' `modeling_rope_utils`.
    """
    kind = settings["rope_type"]
    base = float(settings["rope_theta"])
    plain = (1.0 / base ** (np.arange(0, width, 2, dtype=np.float32) / width)).astype(np.float32)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return (plain / float(settings["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(plain, settings), 1.0
    if kind == "yarn":
        return _yarn(plain, base, width, settings)
    raise WeightsError(f"rotary embedding {kind!r} is not known here; known are: {', '.join(KINDS)}")


def _llama3(plain: NDArray[np.float32], settings: Mapping[str, Any]) -> NDArray[np.float32]:
    """Long waves are slowed down by the factor, short ones stay, those between are blended."""
    factor, low, high = (float(settings[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = settings["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the original context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - share) * plain / factor + share * plain).astype(np.float32)


def _yarn(plain: NDArray[np.float32], base: float, width: int, settings: Mapping[str, Any]) -> tuple[NDArray[np.float32], float]:
    original, factor = float(settings["original_max_position_embeddings"]), float(settings["factor"])

    def place(turns: float) -> float:
        """The dimension whose wave turns so often in the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = place(settings.get("beta_fast") or 32), place(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    share = 1 - np.clip((np.arange(width // 2, dtype=np.float32) - first) / ((last - first) or 0.001), 0.0, 1.0)
    found = (plain / factor * (1 - share) + plain * share).astype(np.float32)

    def strength(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given, over, under = (settings.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return found, float(given)
    return found, strength(over) / strength(under) if over and under else strength()
