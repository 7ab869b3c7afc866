"""The base model, from its folder into the form that a method trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from trimtab.errors import SpecError
from trimtab.families import refusal
from trimtab.spec import TrainSpec
from trimtab_runtime import families
from trimtab_runtime.batch import Batch
from trimtab_runtime.loading import open_base
from trimtab_runtime.memory import give_back
from trimtab_runtime.methods import train_by
from trimtab_runtime.methods.lora import linear_layers

if TYPE_CHECKING:
    from trimtab_runtime.methods.qlora import Factors

# heads that do something to their logits, which the chunked loss does not know
_OWN_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a model's config.json; empty where there is none that can be read, which `load_model` refuses in its own words."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_model(
    folder: Path,
    spec: TrainSpec,
    dtype: torch.dtype,
    *,
    typical: Batch | None = None,
    fused: bool = True,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    to_write: int | None = None,
) -> PeftModel | PreTrainedModel:
    """The base from a local folder, frozen (in NF4 for qlora), with fresh adapters; for full itself, in fp32 (methods/full.py).

    Raises SpecError where it does not load.

    From `typical` rows qlora learns which inputs matter, to restore with its adapters what quantisation took from them.
    What is in NF4 then is kept for later runs (nf4_cache.py) where `to_write`, the bytes that this run has yet to write, have room beside
    it; None: it is not. With `fused`, adapted layers without dropout compute in one step (xeon/lora.py); the others need autocast for bf16.
    """
    config = read_config(folder)
    _refuse(refusal(config, spec.max_seq_len))
    logging.disable_progress_bar()
    lost: dict[str, Factors] | None = None
    try:
        found = open_base(folder, spec, dtype, typical, say=say, to_write=to_write) if device == "cpu" and spec.method != "full" else ""
        if isinstance(found, str):
            if found:
                say(f"base loaded as a whole, not layer by layer: {found}")
            base = _whole(folder, config, torch.float32 if spec.method == "full" else dtype)
        else:
            base, lost = found
    except (OSError, ValueError, KeyError) as exc:
        if isinstance(exc, SpecError):
            raise
        raise SpecError(f"the base model in {folder} does not load: {exc}") from exc
    changes = [name for name in _OWN_LOGITS if getattr(base.config, name, None) not in (None, 1, 1.0)]
    if changes:
        raise SpecError(f"this model changes its logits ({changes[0]}), which this version does not train: choose another base model")
    _refuse(refusal(base.config.to_dict(), spec.max_seq_len))  # with what config.json leaves to transformers
    base.config.use_cache = False
    if device != "cpu":
        base.to(device)
    if families.is_masked(base):
        families.prove(base)
    if spec.method != "full" and not linear_layers(base):
        raise SpecError(f"models of type {base.config.model_type} have no linear layers that adapters could go on: choose --method full")
    for line in families.sayings(base, spec.method, dtype):
        say(line)
    given = typical.to(device).inputs(families.mask_dtype(base)) if typical else None
    model = train_by(base, spec, dtype, given, lost=lost, fused=fused, say=say)
    give_back()  # what a layer's original weights lay on, and weights that were put below one another
    return model


def _whole(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=families.implementation(config), local_files_only=True,
        use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    return found


def _refuse(why: str) -> None:
    if why:
        raise SpecError(why)
