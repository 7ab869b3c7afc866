"""Variants (b): TRL's SFTTrainer as its documentation shows it: packing=True, LoRA through peft_config, QLoRA through bitsandbytes.

Kept as it comes: gradient checkpointing on (SFTConfig's default; `recompute: false` turns it off), strategy "bfd", attention "sdpa",
AdamW fused, and in bf16 its autocast. Given besides: the dtype (by default the base would be fp32 and the autocast on, which is slower),
the row's length, rows one at a time in their order, and rates alike.
"""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig
from stepping import Pipe, sees_others, versions, work
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    pipe, asked = Pipe(), work()
    low = asked["dtype"] == "bfloat16"
    given = {"dtype": asked["dtype"]}
    if asked["method"] == "qlora":
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=asked["dtype"]
        )
    told = {"output_dir": asked["folder"], "max_steps": 10_000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = SFTConfig(
        packing=True, max_length=asked["row_tokens"], per_device_train_batch_size=1, learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant", gradient_checkpointing=asked.get("recompute", True), model_init_kwargs=given, use_cpu=True, bf16=low,
        train_sampling_strategy="sequential", dataloader_pin_memory=False, **told,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=asked["model"],
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [ids for row in asked["rows"] for ids in row]}),
        peft_config=LoraConfig(
            r=asked["rank"], lora_alpha=asked["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[pipe.callback()],
    )
    found = sees_others(
        trainer.model, trainer.data_collator, lambda one, two: {"input_ids": one + two, "seq_lengths": [len(one), len(two)]}, low
    )
    pipe.ready(
        by=versions("trl", "transformers", "peft", "bitsandbytes", "torch"),
        packing=f"strategy {arguments.packing_strategy}, {len(trainer.train_dataset)} rows, {found}",
        said=[f"attention {trainer.model.config._attn_implementation}", f"recompute {arguments.gradient_checkpointing}"],
    )
    trainer.train()


if __name__ == "__main__":
    main()
