"""The runtime as a process on a small random model: it learns, ends, fails, stops and resumes as it says it does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.job_tree import PAGES, losses, make_job, run, start
from trimtab.errors import SpecError
from trimtab.events import Checkpoint, Finished, Step, read
from trimtab.ledger import Ledger
from trimtab_runtime.rows import PackedRows

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def artifact_bytes(root: Path) -> bytes:
    return (root / "model" / "adapter_model.safetensors").read_bytes()


def test_a_run_learns_and_leaves_an_artifact_that_others_can_read(tmp_path: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = make_job(tmp_path / "job", tiny_model, method="qlora", epochs=12)
    run(job, "prepare")
    said = run(job, "train")
    curve = losses(job)
    assert sum(list(curve.values())[-5:]) < 0.8 * sum(list(curve.values())[:5])
    assert "dtype float32: asked for" in said
    assert "loss=" in said

    written = json.loads((job.model / "trimtab.json").read_text())
    assert written["ledger"] == json.loads((job.channel("train") / "ledger.json").read_text())
    assert written["metrics"]["steps"] == written["metrics"]["of"] == max(curve)
    assert {"README.md", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"} <= set(written["files"])
    assert str(tmp_path) not in (job.model / "adapter_config.json").read_text() + (job.model / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = PeftModel.from_pretrained(base, str(job.model))
    assert any(parameter.abs().sum() > 0 for name, parameter in tuned.named_parameters() if "lora_B" in name)


def test_the_first_twenty_losses_are_those_of_transformers_trainer(tmp_path: Path, tiny_model: Path) -> None:
    """Same model, same unpacked samples, same order, fp32: our loop and the library's take the same steps."""
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from trimtab.spec import TrainSpec
    from trimtab_runtime.methods.lora import add_adapters
    from trimtab_runtime.recipe import rows_of_step

    text = {f"Page {number}": "".join(chr(97 + (number * 7 + place) % 26) for place in range(70)) + "." for number in range(30)}
    # rows so short that each document fills its own: nothing is packed
    options = {"views": ("document",), "lr_schedule": "constant", "warmup_ratio": 0, "max_steps": 20, "max_seq_len": 90, "lora_rank": 4}
    job = make_job(tmp_path / "job", tiny_model, text, **options)
    run(job, "prepare")
    run(job, "train")
    ours = list(losses(job).values())
    rows = PackedRows(job.channel("train"))
    assert all(len(rows[index].lengths) == 1 for index in range(len(rows)))

    spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    torch.manual_seed(spec.seed)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), spec)
    order = [rows[index] for step in range(20) for index in rows_of_step(step, len(rows), 1, spec.seed)]
    data = [{"input_ids": row.tokens.tolist(), "labels": row.tokens.tolist(), "attention_mask": [1] * len(row.tokens)} for row in order]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=1, max_steps=20, learning_rate=spec.learning_rate, report_to=[],
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=spec.max_grad_norm, logging_steps=1, save_strategy="no", use_cpu=True,
        seed=spec.seed, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> SequentialSampler:
            return SequentialSampler(data)

    trainer = InOrder(model=model, args=arguments, train_dataset=data)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_killed_run_resumes_with_the_very_same_losses(tmp_path: Path, tiny_model: Path) -> None:
    options = {"epochs": 8, "save_every_steps": 3, "lora_dropout": 0.1}
    straight = make_job(tmp_path / "straight", tiny_model, **options)
    run(straight, "prepare")
    run(straight, "train")
    expected = losses(straight)

    killed = make_job(tmp_path / "killed", tiny_model, **options)
    run(killed, "prepare")
    draw = random.Random(5)
    for _ in range(3):
        process = start(killed, "train")
        goal = max(losses(killed), default=0) + draw.randint(2, 6)
        deadline = time.monotonic() + 120
        while max(losses(killed), default=0) < goal and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    run(killed, "train")
    assert losses(killed) == expected
    assert artifact_bytes(killed.root) == artifact_bytes(straight.root)
    repeated = [event.step for event in read(killed.events) if isinstance(event, Step)]
    assert len(repeated) > len(set(repeated)), "nothing was killed in the middle"


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_it(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, epochs=10_000, save_every_steps=10_000)
    run(job, "prepare")
    process = start(job, "train")
    deadline = time.monotonic() + 120
    while max(losses(job), default=0) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    events = list(read(job.events))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.state == "stopped"
    saved = next(event.step for event in reversed(events) if isinstance(event, Checkpoint))
    assert saved == max(losses(job))
    assert not (job.model / "trimtab.json").exists()


def test_a_time_limit_leaves_a_checkpoint_and_a_usable_artifact(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, epochs=10_000, max_minutes=0.1)
    run(job, "prepare")
    said = run(job, "train")
    assert "time limit" in said
    assert list(job.checkpoints.glob("step-*/manifest.json"))
    assert "time limit" in json.loads((job.model / "trimtab.json").read_text())["metrics"]["ended_by"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, max_steps=8, save_every_steps=3)
    run(job, "prepare")
    run(job, "train")
    complete = losses(job)
    tensors = job.checkpoints / "step-00000006" / "adapter.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    said = run(job, "train")
    assert "step-00000006 is passed over: step-00000006/adapter.safetensors does not match its digest" in said
    assert "going on after step 3" in said
    assert losses(job) == complete


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, max_steps=6, save_every_steps=3)
    run(job, "prepare")
    run(job, "train")
    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps({**pairs, "learning_rate": "0.5"}))
    assert "another job" in run(job, "train", expect=1)
    assert job.failure.read_text().startswith("step-")


def test_a_loss_that_is_no_number_stops_with_the_step_the_row_and_what_to_try(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = make_job(tmp_path / "job", broken)
    run(job, "prepare")
    run(job, "train", expect=1)
    reason = job.failure.read_text()
    assert reason.startswith("the loss is nan at step 1, row ")
    assert "smaller learning_rate" in reason.splitlines()[0]


def test_another_spec_version_ends_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps({**pairs, "spec_version": "99"}))
    run(job, "prepare", expect=1)
    assert job.failure.read_text().startswith("the job was written for spec_version 99")
    assert not job.channel("train").exists()


def test_rows_of_another_job_are_not_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    run(job, "prepare")
    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps({**pairs, "max_seq_len": "32"}))
    assert "belong to other data" in run(job, "train", expect=1)


def test_two_processes_in_one_folder_and_the_second_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, epochs=10_000)
    run(job, "prepare")
    first = start(job, "train")
    try:
        deadline = time.monotonic() + 120
        while not losses(job):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "another trimtab process works in" in run(job, "train", expect=1)
        assert not job.failure.exists()
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_preparing_needs_no_torch_and_loses_no_token(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n")
    documents = {**PAGES, "Long": " ".join(f"Sentence number {number} is here." for number in range(400))}
    job = make_job(tmp_path / "job", tiny_model, documents, max_seq_len=128, questions=2)
    said = run(job, "prepare", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    ledger = Ledger.model_validate_json((job.channel("train") / "ledger.json").read_text())
    rows = PackedRows(job.channel("train"))
    assert ledger.total.tokens == ledger.total.trained == sum(len(rows[index].tokens) for index in range(len(rows)))
    assert ledger.total.dropped == 0
    assert ledger.accounts["question"].samples > 0
    assert f"{ledger.total.tokens:,} tokens in" in said


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('{"title": "a", "text": "One two three four."}\n{"title": "b", "te', "line 2 is not JSON"),
        ('{"title": "a"}\n', "line 1 lacks the text field 'text'"),
        ("", "no token to train on"),
    ],
)
def test_bad_documents_are_named_by_line(tmp_path: Path, tiny_model: Path, lines: str, reason: str) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    (job.channel("documents") / "documents.jsonl").write_text(lines)
    run(job, "prepare", expect=1)
    assert reason in job.failure.read_text().splitlines()[0]


def test_the_base_models_own_words_are_rehearsed(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, replay=1.0, max_steps=3, max_seq_len=256)
    run(job, "generate")
    run(job, "prepare")
    rows = PackedRows(job.channel("train"))
    assert rows.ledger.accounts["replay"].trained > 0
    taught = [row for row in (rows[index] for index in range(len(rows))) if (row.teacher >= 0).any()]
    assert taught
    for row in taught:
        known = row.teacher[row.teacher >= 0]
        assert (row.teacher_chances[known].astype("f4").sum(1) <= 1.01).all()
        assert (row.teacher_chances[known].astype("f4").sum(1) > 0.1).all()
    run(job, "train")
    assert len(losses(job)) == 3


def test_training_needs_nothing_of_the_client(tmp_path: Path, tiny_model: Path) -> None:
    """A virtual environment that holds all that this one holds, but not what only the client needs."""
    import sysconfig

    absent = ("click", "rich", "requests", "boto3", "langchain", "trafilatura")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith((*absent, "__editable__", "_editable", "trimtab")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    import trimtab
    import trimtab_runtime

    for module in (trimtab, trimtab_runtime):
        folder = Path(module.__file__).parent
        (packages / folder.name).symlink_to(folder)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")
    python = environment / "bin" / "python"
    for name in ("click", "rich", "requests", "boto3"):
        assert subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False, env={"PATH": ""}).returncode == 1
    job = make_job(tmp_path / "job", tiny_model, method="qlora", max_steps=2)
    for verb in ("prepare", "train"):
        run(job, verb, python=python, PYTHONPATH="")
    assert (job.model / "trimtab.json").exists()


def test_an_unreadable_spec_says_which_file(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    job.hyperparameters.unlink()
    assert "TRIMTAB_ROOT" in run(job, "train", expect=1)
    assert issubclass(SpecError, ValueError)
