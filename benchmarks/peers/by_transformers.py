"""Variants (c), (d) and what lies between them and us: transformers' Trainer, with PEFT or all parameters, padded or packed.

`padded`: the batch of 8 documents, padded to its longest, after one short batch that only warms up. Else rows flattened by
transformers' DataCollatorWithFlattening, whose positions let its own attention keep samples apart.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from stepping import Pipe, sees_others, versions, work
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

WARM_UP = 64  # tokens of each document in the first batch


def main() -> None:
    pipe, asked = Pipe(), work()
    low = asked["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"]))
    if asked["method"] == "lora":
        model = get_peft_model(
            model,
            LoraConfig(r=asked["rank"], lora_alpha=asked["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    told = {"output_dir": asked["folder"], "max_steps": 10_000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    if asked["padded"]:
        documents = [ids[:WARM_UP] for ids in asked["batch"]] + asked["batch"] * 100
        collate: Any = padded
    else:
        documents, collate = asked["rows"], flattened
    arguments = TrainingArguments(
        per_device_train_batch_size=len(asked["batch"]) if asked["padded"] else 1, learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant", bf16=low, use_cpu=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
        remove_unused_columns=False, **told,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate, callbacks=[pipe.callback()])
    trainer.model.train()
    found = "" if asked["padded"] else ", " + sees_others(trainer.model, flattened, lambda one, two: [one, two], low)
    pipe.ready(
        by=versions("transformers", "peft", "torch"),
        packing=(f"{len(asked['batch'])} documents padded to the longest" if asked["padded"] else "rows of whole documents") + found,
        said=[f"attention {trainer.model.config._attn_implementation}", f"dtype {asked['dtype']}", f"method {asked['method']}"],
    )
    trainer.train()


def padded(documents: list[list[int]]) -> dict[str, torch.Tensor]:
    """What DataCollatorForLanguageModeling makes of ids of unequal lengths."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, document in enumerate(documents):
        ids[place, : len(document)] = torch.tensor(document)
        mask[place, : len(document)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def flattened(rows: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = DataCollatorWithFlattening()([{"input_ids": ids} for row in rows for ids in row])
    return found


if __name__ == "__main__":
    main()
