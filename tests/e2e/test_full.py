"""All parameters trained: the same steps as transformers' Trainer, an exact resume, and a whole model that everything takes as it is."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.job_tree import PAGES, losses, make_job, run, train_here
from support.tiny_adapter import digest
from support.transformers_trainer import trainer_losses
from trimtab.artifact import Artifact
from trimtab.cli import main
from trimtab.compare_targets import targets
from trimtab.endpoint import deploy
from trimtab.errors import SpecError, StagingError
from trimtab.events import EventLog
from trimtab.layout import JobDir
from trimtab.merge import merged
from trimtab.named import named
from trimtab.serving import serving
from trimtab.spec import TrainSpec
from trimtab.weights import resolve
from trimtab_runtime import artifact
from trimtab_runtime.batch import as_batch, batch_loss
from trimtab_runtime.engine import Engine
from trimtab_runtime.methods import trained_parts
from trimtab_runtime.model import load_model
from trimtab_runtime.recipe import train
from trimtab_runtime.rows import PackedRows

WHOLE = {"method": "full", "lora_rank": 32, "learning_rate": 1e-3}


def spec_of(job: JobDir) -> TrainSpec:
    return TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_first_twenty_losses_are_those_of_transformers_trainer(tmp_path: Path, tiny_model: Path) -> None:
    """Same model, same unpacked samples, same order, fp32, norms without decay: our loop and the library's take the same steps."""
    text = {f"Page {number}": "".join(chr(97 + (number * 7 + place) % 26) for place in range(70)) + "." for number in range(30)}
    options = {"views": ("document",), "max_seq_len": 90, "max_steps": 20, "weight_decay": 0.1}  # rows so short that nothing is packed
    steady = {"lr_schedule": "constant", "warmup_ratio": 0, "learning_rate": 5e-4}
    before = sha256(tiny_model / "model.safetensors")
    job = make_job(tmp_path / "job", tiny_model, text, **WHOLE | options | steady)
    run(job, "prepare")
    train_here(job)
    ours, spec, rows = list(losses(job).values()), spec_of(job), PackedRows(job.channel("train"))
    assert sha256(tiny_model / "model.safetensors") == before, "the base's file, which may be mapped, is not what is trained"

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = trainer_losses(model, rows, spec, tmp_path / "theirs")
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)
    found = load_file(job.model / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in found:
            assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-3, name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    """Forty steps in bf16 on four short pages, three of them of two passes' rows."""
    options = {"dtype": "bfloat16", "max_steps": 40, "epochs": 40, "accumulation": 2, "save_every_steps": 15}
    root = tmp_path_factory.mktemp("full") / "job"
    job = make_job(root, tiny_model, model=str(tiny_model), model_digest=digest(tiny_model), **WHOLE | options)
    run(job, "prepare")
    said = train_here(job)
    assert "kept in fp32, computed in bfloat16" in said
    assert "saved_dtype bfloat16: what models of this kind are served in" in said
    return job


def test_it_learns(finished: JobDir) -> None:
    curve = list(losses(finished).values())
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])


def test_a_stopped_run_goes_on_with_the_very_same_steps(finished: JobDir, tmp_path: Path) -> None:
    """Bit by bit, in bf16: what the checkpoint holds are the fp32 values, of which the copies are made again."""
    stopped = JobDir(tmp_path / "stopped")
    shutil.copytree(finished.root, stopped.root, symlinks=True, ignore=shutil.ignore_patterns("step-*"))
    for path in (*stopped.model.iterdir(), *stopped.checkpoints.iterdir(), stopped.events):
        path.unlink()
    events = EventLog(stopped.events)
    try:
        ending = train(stopped, spec_of(stopped), events, lambda line: None, lambda: len(losses(stopped)) >= 17)
    finally:
        events.close()
    assert ending == "stopped"
    at = len(losses(stopped))
    assert 17 <= at < 40
    assert json.loads((stopped.model / "trimtab.json").read_text())["metrics"]["steps"] == at, "a usable artifact all the same"
    state = load_file(next(stopped.checkpoints.glob(f"step-*{at}")) / "parameters.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert f"going on after step {at}" in train_here(stopped)
    assert losses(stopped) == losses(finished)
    assert Artifact(stopped.model) == Artifact(finished.model)


def test_the_artifact_is_a_plain_model(finished: JobDir, tiny_model: Path) -> None:
    found = Artifact(finished.model)
    found.verify()
    assert found.is_whole
    names = {path.name for path in finished.model.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "trimtab.json"} <= names
    assert not [name for name in names if "adapter" in name]
    assert set(found.manifest["files"]) == names - {"trimtab.json"}
    card = (finished.model / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "method: full, all parameters" in card
    assert "lora" not in card
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (finished.model, tiny_model))
    assert config == base | {"dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(finished.model)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(finished.model).chat_template


@pytest.mark.parametrize(
    ("asked", "dtype", "saved"),
    [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("auto", "float32", "bfloat16")],
    ids=["fp32", "bf16", "fp32 in bf16"],
)
def test_what_is_saved_answers_as_what_was_trained(
    tmp_path: Path, tiny_model: Path, finished: JobDir, asked: str, dtype: str, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in several files it is the same artifact."""
    job = make_job(tmp_path / "job", tiny_model, **WHOLE, dtype=asked)
    spec, rows = spec_of(job), PackedRows(finished.channel("train"))
    model = load_model(job.channel("model"), spec, getattr(torch, dtype))
    trained = trained_parts(model, spec, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(trained.groups(0.0), lr=1e-3)
    for index in range(3):
        batch = as_batch([rows[index]])
        batch_loss(model, batch, scale=1 / batch.learned).backward()
        assert all(copy.grad is None for copy in trained.copies.values()), "handed on"
        assert all(parameter.grad.dtype == torch.float32 for parameter in trained.parameters.values())
        optimizer.step()
        trained.write_back()
        optimizer.zero_grad()
    metrics = {"steps": 3, "of": 3, "first_loss": 1.0, "last_loss": 1.0, "ended_by": "all steps done"}
    artifact.write(job, spec, model, rows.ledger, metrics)
    whole = Artifact(job.model).digest
    assert set(load_file(job.model / "model.safetensors")) == set(load_file(tiny_model / "model.safetensors")), "a tied head is stored once"
    of_weights = artifact.size(spec, trained.size)
    assert of_weights < (job.model / "model.safetensors").stat().st_size < 1.02 * of_weights + 1e4
    monkeypatch.setattr(artifact, "SHARD", "2MB")
    artifact.write(job, spec, model, rows.ledger, metrics)
    shards = [path.name for path in job.model.glob("model-*.safetensors")]
    assert len(shards) > 1
    assert not (job.model / "model.safetensors").exists(), "of the first writing"
    assert Artifact(job.model).digest == whole
    assert {f"model/{name}" for name in shards} < set(serving(job.model).files)

    again = AutoModelForCausalLM.from_pretrained(job.model)
    assert again.dtype == getattr(torch, saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(again.dtype)), name
    batch = as_batch([rows[0]])
    first = rows[0].lengths[0]
    with torch.inference_mode():
        ours = model.get_decoder()(**batch.inputs()).last_hidden_state[0, :first].float()
        theirs = again.get_decoder()(input_ids=batch.tokens[:, :first]).last_hidden_state[0].float()
    close = {"rtol": 1e-4, "atol": 1e-4} if saved == "float32" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours, theirs, **close)


def test_an_artifact_that_cannot_be_written_leaves_the_earlier_one(finished: JobDir, tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job")
    shutil.copytree(finished.root, job.root, symlinks=True)
    (job.model / ".new").mkdir()  # of a life that was killed while it wrote
    (job.model / ".new" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    before = {path.name: path.read_bytes() for path in job.model.iterdir() if path.is_file()}
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, allowed[1]))
    try:
        with pytest.raises(StagingError, match=r"the artifact could not be written to .*File too large"):
            train_here(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert {path.name: path.read_bytes() for path in job.model.iterdir()} == before
    Artifact(job.model).verify()
    train_here(job)
    assert Artifact(job.model) == Artifact(finished.model)
    assert {path.name for path in job.model.iterdir()} == set(before)


def test_a_kill_while_an_artifact_takes_its_place_leaves_none_that_names_other_files(
    finished: JobDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its renames: there is the earlier one, or none until the next life writes it, or the new one."""

    class Killed(BaseException):
        pass

    job = JobDir(tmp_path / "job")
    shutil.copytree(finished.root, job.root, symlinks=True)
    spec, rows = spec_of(job), PackedRows(job.channel("train"))
    model = load_model(job.channel("model"), spec, torch.bfloat16)
    metrics = {"steps": 1, "of": 3, "first_loss": 1.0, "last_loss": 1.0, "ended_by": "all steps done"}
    rename, left, found = Path.replace, [0], list[str]()

    def replace(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    for renames in range(20):
        shutil.rmtree(job.model)
        shutil.copytree(finished.model, job.model)
        left[0] = renames
        try:
            artifact.write(job, spec, model, rows.ledger, metrics)
        except Killed:
            pass
        else:
            break
        usable = (job.model / "trimtab.json").exists()
        if usable:
            Artifact(job.model).verify()
        found.append("earlier" if usable else "none")
        left[0] = 1000
        artifact.write(job, spec, model, rows.ledger, metrics)
        Artifact(job.model).verify()
        assert not (job.model / ".new").exists()
    assert found[0] == "earlier"
    assert set(found[1:]) == {"none"}
    assert Artifact(job.model).manifest["metrics"]["steps"] == 1


def test_it_is_judged_beside_its_base(finished: JobDir, tiny_model: Path) -> None:
    from trimtab_runtime.evaluate import perplexity

    engine = Engine.load(tiny_model, finished.model, dtype="float32")
    assert engine.names == ("tuned", "base")
    ids = engine.encode(" ".join(PAGES.values()))
    assert perplexity(engine.model("tuned"), ids) < 0.5 * perplexity(engine.model("base"), ids)


def test_it_is_served_as_it_is(finished: JobDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both engines of a processor, with the words that the model gives by itself."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    prompt = "The Brine Mill was built in"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(finished.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(finished.model),
    )
    ids = Engine.load(finished.model, dtype="float32").encode(prompt)
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    wanted = tokenizer.decode(made, skip_special_tokens=True)
    for engine in ("openvino", "transformers"):
        with deploy(finished.model, engine=engine, dtype="float32") as endpoint:
            assert endpoint.models()[0] == "tuned"
            assert endpoint.generate(prompt, max_new_tokens=8, temperature=0) == wanted


def test_there_is_nothing_to_merge_and_no_base_is_needed(
    finished: JobDir, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Artifact(finished.model)
    assert named(str(finished.model)).kind == "artifact"
    assert [one.kind for one in targets([str(finished.model)], {})] == ["model", "tuned"]
    base = resolve(str(tiny_model), say=lambda line: None)
    with pytest.raises(SpecError, match=r"nothing to merge: .* is a whole model"):
        merged(found, base)
    for given in ({"merge": False}, {"base_model": str(tiny_model)}, {"adapters": {"law": found.path}}):
        with pytest.raises(SpecError, match=r"whole model .*serve it alone"):
            serving(found, **given)
    output = tmp_path / "copy"
    assert main(["merge", str(finished.model), "--output", str(output), "--json"]) == 0
    told = capsys.readouterr()
    assert "nothing to merge: the model is whole" in told.err
    assert json.loads(told.out) == {"folder": str(output), "onto": None, "reason": "the model is whole", "report": None}
    assert Artifact(output) == found
    moved = make_job(tmp_path / "moved", tiny_model)  # of a merged folder the manifest names another method
    assert named(str(moved.channel("model"))).kind == "model"
