"""adapter_config.json of PEFT 0.21 (LoraConfig), as far as an adapter is a product of two matrices beside a weight. Without torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import WeightsError

NAME = "adapter_config.json"

# settings that leave  W + scale * B A  what it is, or (use_dora) that with its rows brought to other lengths; every other one must be unset
_HARMLESS = {
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's factors are scaled by."""

    alpha: float
    root: bool  # of the rank, as rsLoRA divides by (Kalajdzievski 2023, arXiv:2312.03732)
    alphas: dict[str, float]  # of layers, by a pattern of the end of their names

    def scale(self, layer: str, rank: int) -> float:
        """Of B A of a layer of that name and rank: alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(r)."""
        alpha = next((own for end, own in self.alphas.items() if re.match(rf"(.*\.)?({end})$", layer)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def read_settings(folder: Path) -> dict[str, Any]:
    """The file's settings as they are. Raises WeightsError where they cannot be read."""
    try:
        found: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        found.get("peft_type")
    except (OSError, ValueError, AttributeError) as exc:
        raise WeightsError(f"{folder / NAME} cannot be read ({exc}): copy the artifact there again") from exc
    return found


def refusal(settings: dict[str, Any]) -> str:
    """The setting that makes an adapter more than a product beside a weight, as `name = value`; empty where there is none."""
    if settings.get("peft_type", "LORA") != "LORA":
        return f"peft_type = {settings['peft_type']!r}"
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):  # such as pissa, which changes the base's weights, too
        return f"init_lora_weights = {settings['init_lora_weights']!r}"
    used = (name for name, value in settings.items() if name not in _HARMLESS and value not in (None, False, "none", {}, []))
    return next((f"{name} = {settings[name]!r}" for name in used), "")


def is_directed(settings: dict[str, Any]) -> bool:
    """Whether it is DoRA, whose rows have lengths of their own: m / |W + scale * B A| (W + scale * B A) (arXiv:2402.09353)."""
    return bool(settings.get("use_dora"))


def scaling(settings: dict[str, Any]) -> AdapterConfig:
    """Raises WeightsError for settings without an alpha that is a number."""
    try:
        alphas = {str(end): float(alpha) for end, alpha in (settings.get("alpha_pattern") or {}).items()}
        return AdapterConfig(float(settings["lora_alpha"]), bool(settings.get("use_rslora")), alphas)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise WeightsError(f"{NAME} holds no readable lora_alpha ({exc}): copy the artifact there again") from exc
