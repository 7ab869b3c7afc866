"""LLaMA-Factory: LoRA with packing and neat_packing, as its examples have it (gradient checkpointing on, its default).

Rows are cut off at 7 tokens more than others' 2,048: one place longer they are padded to a multiple of 8, and their positions are not,
so 2,048 itself fails in 0.9.5 ("size of tensor a (2056) must match the size of tensor b (2049)"). Its packer gets token ids in the place
of text, and its result goes in through `tokenized_path`. It imports torchaudio, of which PyPI has CUDA builds only and which text does
not need: an empty module stands in its place.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from stepping import Pipe, versions, work

sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from datasets import Dataset, DatasetDict  # noqa: E402
from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402


def main() -> None:
    pipe, asked = Pipe(), work()
    data = Path(asked["folder"]) / "data"
    cutoff = asked["row_tokens"] + 7
    rows = packed([ids for row in asked["rows"] for ids in row], cutoff)
    DatasetDict({"train": rows}).save_to_disk(str(data))
    arguments = {
        "stage": "sft", "do_train": True, "model_name_or_path": asked["model"], "template": "empty",
        "dataset": "given", "tokenized_path": str(data),
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": asked["rank"], "lora_alpha": asked["alpha"], "lora_dropout": 0.0,
        "cutoff_len": cutoff, "packing": True, "neat_packing": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "learning_rate": asked["learning_rate"], "lr_scheduler_type": "constant",
        "bf16": asked["dtype"] == "bfloat16",
        "use_cpu": True, "max_steps": 10_000, "save_strategy": "no", "report_to": "none", "output_dir": str(data.with_name("out")),
        "dataloader_pin_memory": False, "disable_tqdm": True, "logging_steps": 10_000,
    }  # fmt: skip
    facts = {"by": versions("llamafactory", "transformers", "peft", "torch"), "said": ["attention sdpa, dense mask", "recompute True"]}
    run_exp(arguments, callbacks=[pipe.callback(packing=f"neat_packing, {len(rows)} rows, isolated by a dense mask", **facts)])


def packed(documents: list[list[int]], row_tokens: int) -> Dataset:
    """Rows as its own packer makes them."""

    class OfIds(PackedSupervisedDatasetProcessor):
        def _encode_data_example(self, prompt: Any, **_: Any) -> tuple[list[int], list[int]]:
            return prompt[0], prompt[0]

    settings = SimpleNamespace(cutoff_len=row_tokens, neat_packing=True)
    packer = OfIds(template=None, tokenizer=SimpleNamespace(pad_token_id=2), processor=None, data_args=settings)
    nothing = [None] * len(documents)
    named: dict[str, Any] = {f"_{name}": nothing for name in ("system", "tools", "images", "videos", "audios")}
    return Dataset.from_dict(
        packer.preprocess_dataset({"_prompt": [[ids] for ids in documents], "_response": [[""]] * len(documents), **named})
    )


if __name__ == "__main__":
    main()
