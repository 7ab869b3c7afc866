"""A tiny model whose words depend on what it reads, and an artifact whose adapter changes them."""

from __future__ import annotations

import json
from pathlib import Path

from support.tiny_model import make_tiny_model
from trimtab.model_folder import chosen, digest_of, fact_of


def make_lively_model(folder: Path) -> Path:
    """The tiny model with larger weights: as made, it repeats its last token, whatever came before."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(6)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path, *, method: str = "lora", seed: int = 1) -> Path:
    """PEFT's files with random adapters on every linear layer but the head, and the part of trimtab.json that serving reads."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    spec = {"model": "tiny-lighthouse", "model_digest": digest(model), "method": method, "dtype": "float32"}
    (folder / "trimtab.json").write_text(json.dumps({"spec": spec}))
    return folder


def digest(model: Path) -> str:
    """The digest that weights.resolve gives a model's folder."""
    return digest_of({name: fact_of(model / name) for name in chosen(path.name for path in model.iterdir())})
