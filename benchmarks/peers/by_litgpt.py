"""LitGPT's finetune_lora: batches of 8 padded to their longest, for it does not pack; LoRA on all linear maps of the layers.

The model is converted by its own script first. Its loop runs as it is; the batches wait until they are asked for, so a step is what it
does from one batch to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune.lora import setup
from litgpt.scripts import convert_hf_checkpoint as conversion
from stepping import Pipe, versions, work
from torch.utils.data import DataLoader, Sampler

NAMES = {576: "SmolLM2-135M-Instruct", 2048: "tiny-llama-1.1b"}


def main() -> None:
    pipe, asked = Pipe(), work()
    folder = converted(Path(asked["model"]), Path(asked["folder"]) / "model")
    batch, precision = len(asked["batch"]), "bf16" if asked["dtype"] == "bfloat16" else "32"
    pipe.ready(by=versions("litgpt", "lightning", "torch"), packing=f"{batch} documents padded to the longest", said=["recompute False"])
    turns = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    setup(
        folder, out_dir=Path(asked["folder"]) / "out", precision=f"{precision}-true", devices=1,
        lora_r=asked["rank"], lora_alpha=asked["alpha"],
        lora_dropout=0.0, data=Given(pipe, asked["batch"]), eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=0), **turns,
        train=TrainArgs(
            save_interval=10**9, log_interval=10**9, global_batch_size=batch, micro_batch_size=batch, lr_warmup_steps=1, epochs=10**6
        ),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": asked["learning_rate"]}},
    )  # fmt: skip


class Waiting(Sampler[int]):
    """The batch's places, over and over; before each batch the step before has ended, and the next is waited for."""

    def __init__(self, pipe: Pipe, documents: list[list[int]]) -> None:
        self.pipe, self.documents, self.begun = pipe, documents, False

    def __len__(self) -> int:
        return len(self.documents) * 10_000

    def __iter__(self) -> Iterator[int]:
        while True:
            if self.begun:
                self.pipe.tokens = sum(map(len, self.documents))
                self.pipe.places = len(self.documents) * max(map(len, self.documents))
                self.pipe.done()
            self.begun = True
            self.pipe.wait()
            yield from range(len(self.documents))


class Given(DataModule):
    def __init__(self, pipe: Pipe, documents: list[list[int]]) -> None:
        super().__init__()
        self.pipe, self.documents, self.prompt_style = pipe, documents, None

    def connect(self, *_: Any, **__: Any) -> None:
        self.data = []
        for ids in self.documents:
            counts = {"raw": len(ids), "raw_plus_prompt_template": len(ids)}
            self.data.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "token_counts": counts})

    def train_dataloader(self) -> DataLoader[Any]:
        waiting = Waiting(self.pipe, self.documents)
        return DataLoader(self.data, batch_size=len(self.data), sampler=waiting, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=len(self.data), collate_fn=get_sft_collate_fn())


def converted(model: Path, folder: Path) -> Path:
    """Its own form of a checkpoint."""
    sizes = json.loads((model / "config.json").read_text(encoding="utf-8"))
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    known = Config.from_name(NAMES[sizes["hidden_size"]], n_layer=sizes["num_hidden_layers"])
    from_name, Config.from_name = Config.from_name, classmethod(lambda *_, **__: known)  # else models are known by their names alone
    try:
        conversion.convert_hf_checkpoint(folder, model_name="as given")
    finally:
        Config.from_name = from_name
    return folder


if __name__ == "__main__":
    main()
