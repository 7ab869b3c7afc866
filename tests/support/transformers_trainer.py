"""The losses of transformers' own Trainer on the rows of a job, to compare ours with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.spec import TrainSpec
from trimtab_runtime.recipe import rows_of_step
from trimtab_runtime.rows import PackedRows


def trainer_losses(model: Any, rows: PackedRows, spec: TrainSpec, folder: Path) -> list[float]:
    """One loss a step, for `max_steps` steps of one row each in the order of a run, at a constant rate; `model` is trained in place."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    assert all(len(rows[index].lengths) == 1 for index in range(len(rows))), "packed rows would need our attention"
    order = [rows[index] for step in range(spec.max_steps or 0) for index in rows_of_step(step, rows.ledger.rounds, spec)]
    data = [{"input_ids": row.tokens.tolist(), "labels": row.tokens.tolist(), "attention_mask": [1] * len(row.tokens)} for row in order]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, max_steps=len(order), learning_rate=spec.learning_rate, report_to=[],
        lr_scheduler_type="constant", weight_decay=spec.weight_decay, max_grad_norm=spec.max_grad_norm, logging_steps=1, use_cpu=True,
        save_strategy="no", seed=spec.seed, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> SequentialSampler:
            return SequentialSampler(data)

    trainer = InOrder(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
