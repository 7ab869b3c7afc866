"""A run's adapter becomes a plain model folder, made once, whole or not at all; and what merging costs is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.job_tree import PAGES, make_job, run, train_here
from support.tiny_model import make_tiny_model
from trimtab import weights
from trimtab.artifact import Artifact
from trimtab.errors import DataError, SpecError, StagingError, WeightsError
from trimtab.merge import merge_digest, merged, pick_file, pick_of
from trimtab.merge_cli import merge as command
from trimtab.weights import BaseModel

MERGE = """
import resource, sys
from trimtab.artifact import Artifact
from trimtab.errors import TrimtabError
from trimtab.merge import merged
from trimtab.weights import resolve
if limit := int(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    base = resolve(sys.argv[2], say=lambda line: None)
    print(merged(Artifact(sys.argv[1]), base, onto="original", say=lambda line: print(line, file=sys.stderr)))
except TrimtabError as exc:
    sys.exit(f"{type(exc).__name__}: {exc}")
"""


def elsewhere(artifact: Artifact, base: BaseModel, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """Merging in another process, which may write files of at most `limit` bytes."""
    command = [sys.executable, "-c", MERGE, str(artifact.path), str(base.folder), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return weights.resolve(str(tiny_model), say=lambda line: None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, base: BaseModel) -> Artifact:
    """Thirty steps of qlora on four short pages."""
    options = {"model": str(base.folder), "model_digest": base.digest, "method": "qlora", "max_steps": 30, "epochs": 30}
    job = make_job(tmp_path_factory.mktemp("merge") / "job", base.folder, **options)
    run(job, "prepare")
    train_here(job)
    return Artifact(job.model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this file's models are merged; one test finds what another has made."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(folder))
        yield folder / "merged"


def test_two_processes_make_one_folder_which_loads_like_any_model(artifact: Artifact, base: BaseModel, cache: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: elsewhere(artifact, base), range(2)))
    assert [one.returncode for one in done] == [0, 0], done
    (folder,) = {Path(one.stdout.strip()) for one in done}
    assert sum("waiting" in one.stderr for one in done) == 1
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [folder.name]
    again = weights.resolve(str(folder), say=lambda line: None)  # a model like any other, also to be tuned again
    assert "model.safetensors" in again.files
    assert json.loads((folder / "trimtab.json").read_text())["merged"]["onto"] == "original"

    stamp = (folder / "model.safetensors").stat()
    assert merged(artifact, base, onto="original") == folder
    assert (folder / "model.safetensors").stat().st_ino == stamp.st_ino, "not made again"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    said: list[str] = []
    assert merged(artifact, base, onto="original", say=said.append) == folder
    assert any("made again" in line for line in said)
    assert (folder / "model.safetensors").read_bytes() != bytes(data)


def test_a_disk_that_is_full_leaves_nothing(artifact: Artifact, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    done = elsewhere(artifact, base, limit=1 << 20)
    assert done.returncode == 1
    assert "StagingError: the model could not be merged: the merged model cannot be written" in done.stderr
    assert "make room" in done.stderr
    assert [path for path in (tmp_path / "merged").iterdir() if path.is_dir()] == []


def test_other_bases_and_other_methods_are_refused(artifact: Artifact, base: BaseModel, tmp_path: Path) -> None:
    other = weights.resolve(str(make_tiny_model(tmp_path / "other", seed=1)), say=lambda line: None)
    with pytest.raises(WeightsError, match="is not the model that was tuned"):
        merged(artifact, other)
    lora = tmp_path / "lora"
    lora.mkdir()
    for file in artifact.path.iterdir():
        (lora / file.name).write_bytes(file.read_bytes().replace(b'"qlora"', b'"lora"'))
    with pytest.raises(SpecError, match="was trained on the original weights"):
        merged(Artifact(lora), base, onto="dequantised")
    assert pick_of(Artifact(lora), base)[0] == "original"
    assert pick_of(artifact, base)[0] == "dequantised"
    assert len({merge_digest(found, base, onto) for found in (artifact, Artifact(lora)) for onto in ("original", "dequantised")}) == 4


def test_the_command_measures_what_merging_costs_and_hands_the_model_over(
    artifact: Artifact, base: BaseModel, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models" / "mill"
    command.main([str(artifact.path), "--output", str(output)], standalone_mode=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(output)
    assert "general prose" in printed[0]
    report = json.loads(pick_file(artifact, base).read_text())
    assert printed[-2] == f"merge onto the {report['pick']} weights: {report['reason']}"
    assert pick_of(artifact, base) == (report["pick"], report["reason"])
    assert report["documents"] == 24
    assert list(report["models"]) == ["unmerged", "dequantised", "original", "base"]

    unmerged, dequantised, original, untuned = report["models"].values()
    assert abs(dequantised["loss"] - unmerged["loss"]) < 1e-4 < abs(original["loss"] - unmerged["loss"])
    assert (unmerged["agreement"], unmerged["divergence"]) == (1, 0)
    assert dequantised["divergence"] < 1e-6 < original["divergence"] < untuned["divergence"]
    assert dequantised["agreement"] > original["agreement"] > untuned["agreement"]
    assert unmerged["trained"] < untuned["trained"] - 0.1, "the run's own rows are here"

    made = merged(artifact, base)  # as deploying would: what was picked
    assert json.loads((made / "trimtab.json").read_text())["merged"]["onto"] == report["pick"]
    assert {path.name for path in made.iterdir()} - {path.name for path in output.iterdir()} == {"trimtab-weights.json"}
    assert (made / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    with pytest.raises(StagingError, match="is there already"):
        command.main([str(artifact.path), "--output", str(output)], standalone_mode=False)

    command.main([str(artifact.path), "--onto", "original", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["onto"], told["report"]) == ("original", None)
    assert told["folder"] == str(merged(artifact, base, onto="original"))


def test_pages_that_were_trained_on_are_not_held_out(artifact: Artifact, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("New here.\n" + "\n".join(PAGES.values()))
    with pytest.raises(DataError, match=r"own\.txt is among the pages that the run was trained on"):
        command.main([str(artifact.path), str(tmp_path / "own.txt")], standalone_mode=False)
