"""The runtime as a process on a small random model: it learns, ends, fails, stops and resumes as it says it does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

import trimtab
import trimtab_runtime
from support.job_tree import PAGES, losses, make_job, run, start, train_here
from support.transformers_trainer import trainer_losses
from trimtab.artifact import Artifact
from trimtab.errors import SpecError, StagingError
from trimtab.events import Checkpoint, Finished, Step, read
from trimtab.layout import JobDir
from trimtab.ledger import Ledger
from trimtab_runtime.recipe import Diverged
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


def test_a_run_that_was_asked_to_use_a_gpu_does_not_crawl_on_without_one(tmp_path: Path, tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which would be used")
    job = make_job(tmp_path / "job", tiny_model)
    run(job, "prepare")
    run(job, "train", expect=1, TRIMTAB_DEVICE="gpu")
    assert job.cause().startswith("this run was asked to compute on a GPU and torch sees none")
    assert "--device xeon" in job.cause()


def test_the_first_twenty_losses_are_those_of_transformers_trainer(tmp_path: Path, tiny_model: Path) -> None:
    """Same model, same unpacked samples, same order, fp32: our loop and the library's take the same steps."""
    from transformers import AutoModelForCausalLM

    from trimtab.spec import TrainSpec
    from trimtab_runtime.methods.lora import add_adapters

    text = {f"Page {number}": "".join(chr(97 + (number * 7 + place) % 26) for place in range(70)) + "." for number in range(30)}
    # rows so short that each document fills its own: nothing is packed
    options = {"views": ("document",), "max_seq_len": 90, "max_steps": 20}
    steady = {"lr_schedule": "constant", "warmup_ratio": 0, "learning_rate": 5e-4}
    job = make_job(tmp_path / "job", tiny_model, text, **options, **steady)
    run(job, "prepare")
    train_here(job)
    ours = list(losses(job).values())
    rows = PackedRows(job.channel("train"))

    spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    torch.manual_seed(spec.seed)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), spec)
    theirs = trainer_losses(model, rows, spec, tmp_path / "theirs")
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)


LONG = {"max_steps": 60, "epochs": 60, "save_every_steps": 3, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    """A job of `LONG` that ran straight to its end; copy it before you change it."""
    job = make_job(tmp_path_factory.mktemp("finished") / "job", tiny_model, **LONG)
    run(job, "prepare")
    run(job, "train")
    return job


def copy(job: JobDir, root: Path) -> JobDir:
    shutil.copytree(job.root, root, symlinks=True)
    return JobDir(root)


def wait_for_step(job: JobDir, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while max(losses(job), default=0) < step and process.poll() is None:
        assert time.monotonic() < deadline, "the run takes no steps"
        time.sleep(0.005)


def test_a_killed_run_resumes_with_the_very_same_losses(tmp_path: Path, tiny_model: Path, finished: JobDir) -> None:
    killed = make_job(tmp_path / "killed", tiny_model, **LONG)
    run(killed, "prepare")
    draw = random.Random(5)
    for _ in range(2):
        process = start(killed, "train")
        wait_for_step(killed, max(losses(killed), default=0) + draw.randint(2, 12), process)
        process.kill()
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    run(killed, "train")
    assert losses(killed) == losses(finished)
    assert artifact_bytes(killed.root) == artifact_bytes(finished.root)
    metrics, expected = (json.loads((job.model / "trimtab.json").read_text())["metrics"] for job in (killed, finished))
    assert {**metrics, "seconds": 0} == {**expected, "seconds": 0}


def test_sigterm_writes_a_checkpoint_and_one_process_alone_goes_on_from_it(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, epochs=10_000, save_every_steps=10_000)
    run(job, "prepare")
    process = start(job, "train")
    wait_for_step(job, 4, process)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    events = list(read(job.events))
    assert isinstance(events[-1], Finished)
    assert events[-1].state == "stopped"
    saved = next(event.step for event in reversed(events) if isinstance(event, Checkpoint))
    assert saved == max(losses(job))
    assert Artifact(job.model).manifest["metrics"]["ended_by"].startswith(f"asked to stop after step {saved} of ")

    process = start(job, "train")
    try:
        wait_for_step(job, saved + 1, process)
        assert "another trimtab process works in" in run(job, "train", expect=1)
        assert not job.failure.exists()
        assert process.poll() is None
    finally:
        process.kill()
        said, _ = process.communicate()
    assert f"going on after step {saved} from step-" in said
    steps = [event.step for event in read(job.events) if isinstance(event, Step)]
    assert steps == sorted(set(steps))


def test_a_time_limit_leaves_a_checkpoint_and_a_usable_artifact(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model, epochs=10_000, max_minutes=0.001)
    run(job, "prepare")
    said = train_here(job)
    assert "time limit" in said
    assert list(job.checkpoints.glob("step-*/manifest.json"))
    assert "time limit" in json.loads((job.model / "trimtab.json").read_text())["metrics"]["ended_by"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, finished: JobDir) -> None:
    job = copy(finished, tmp_path / "job")
    tensors = job.checkpoints / "step-00000057" / "parameters.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    said = run(job, "train")
    assert "step-00000057 is passed over: step-00000057/parameters.safetensors does not match its digest" in said
    assert "going on after step 54" in said
    assert losses(job) == losses(finished)
    assert artifact_bytes(job.root) == artifact_bytes(finished.root)


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path, finished: JobDir) -> None:
    job = copy(finished, tmp_path / "job")
    pairs = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps({**pairs, "learning_rate": "0.5"}))
    with pytest.raises(SpecError, match=r"step-00000057 was written by another job \(spec differs\): start a new run"):
        train_here(job)


def test_a_loss_that_is_no_number_stops_with_the_step_the_row_and_what_to_try(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = make_job(tmp_path / "job", broken)
    run(job, "prepare")
    with pytest.raises(Diverged, match=r"^the loss is nan at step 1, row \d+: try a smaller learning_rate \(it is 0\.002\)"):
        train_here(job)
    assert not list(job.checkpoints.iterdir())


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
    with pytest.raises(StagingError, match=r"belong to other data.*prepare them again"):
        train_here(job)


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


@pytest.fixture(scope="module")
def without_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment that holds all that this one holds, but not what only the client needs."""
    root = tmp_path_factory.mktemp("without-client")
    absent = ("click", "rich", "requests", "boto3", "langchain", "trafilatura")
    environment, packages = root / "venv", root / "packages"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith((*absent, "__editable__", "_editable", "trimtab")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    for module in (trimtab, trimtab_runtime):
        assert module.__file__
        folder = Path(module.__file__).parent
        (packages / folder.name).symlink_to(folder)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")
    python = environment / "bin" / "python"
    for name in ("click", "rich", "requests", "boto3"):
        assert subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False, env={"PATH": ""}).returncode == 1
    return python


def test_without_the_clients_packages_the_base_models_own_words_are_rehearsed(
    tmp_path: Path, tiny_model: Path, without_client: Path
) -> None:
    job = make_job(tmp_path / "job", tiny_model, method="qlora", replay=1.0, max_steps=3, max_seq_len=256)
    for verb in ("generate", "prepare", "train"):
        run(job, verb, python=without_client, PYTHONPATH="")
    rows = PackedRows(job.channel("train"))
    assert rows.ledger.accounts["replay"].trained > 0
    taught = [row for row in (rows[index] for index in range(len(rows))) if (row.teacher >= 0).any()]
    assert taught
    for row in taught:
        sums = row.teacher_chances[row.teacher[row.teacher >= 0]].astype("f4").sum(1)
        assert (sums > 0.1).all()
        assert (sums <= 1.01).all()
    assert len(losses(job)) == 3
    assert (job.model / "trimtab.json").exists()


def test_an_unreadable_spec_says_which_file(tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    job.hyperparameters.unlink()
    assert "TRIMTAB_ROOT" in run(job, "train", expect=1)
    assert issubclass(SpecError, ValueError)
