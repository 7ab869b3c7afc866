"""The base model from a folder, a folder made once, and where all of it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_weights import USED, ignore, quietly, tiny_model_files
from trimtab.cache import cache_dir
from trimtab.errors import SpecError, WeightsError
from trimtab.model_folder import MANIFEST, Manifest, fact_of, make_once

SDK = Path(__file__).parents[2] / "sdk"


# Local folders --------------------------------------------------------------------------------------------------------------------


def local_model(folder: Path) -> Path:
    folder.mkdir()
    for name, content in tiny_model_files().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return folder


def test_a_local_folder_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = local_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    base = quietly("./model", tmp_path / "cache")
    assert (base.folder, base.hub_id, base.revision, base.entry) == (folder, None, None, None)
    assert base.files == USED
    assert base == quietly("model", tmp_path / "cache") == quietly(str(folder), tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {name for name in tiny_model_files() if "/" not in name}  # nothing is written there


def test_a_changed_local_folder_has_another_digest(tmp_path: Path):
    folder = local_model(tmp_path / "model")
    before = quietly(str(folder), tmp_path / "cache").digest
    (folder / "config.json").write_bytes(b"{}")
    after = quietly(str(folder), tmp_path / "cache").digest
    assert before != after
    (folder / "README.md").write_bytes(b"changed")
    assert quietly(str(folder), tmp_path / "cache", verify=True).digest == after


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["config.json", "tokenizer.json"], "it has no config.json and no tokenizer.json. Load the model and"),
        (["model.safetensors"], "its weights are pickles"),
        (["model.safetensors", "pytorch_model.bin"], "it has no model.safetensors. Load the model and"),
    ],
)
def test_an_incomplete_local_folder_says_what_is_missing(tmp_path: Path, gone: list[str], message: str):
    folder = local_model(tmp_path / "model")
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(WeightsError) as caught:
        quietly(str(folder), tmp_path / "cache")
    assert message in str(caught.value)


def test_a_local_folder_with_a_lost_shard_is_refused(tmp_path: Path):
    folder = local_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00002.safetensors, which its index names"):
        quietly(str(folder), tmp_path / "cache")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all"])
def test_a_path_to_nothing_is_refused(tmp_path: Path, path: str):
    with pytest.raises(WeightsError, match="There is no folder"):
        quietly(path, tmp_path)


def test_an_unknown_alias_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="Did you mean smollm2-135m-instruct"):
        quietly("smollm2", tmp_path)


# Making a folder once, and where ----------------------------------------------------------------------------------------------------


def fill(folder: Path) -> Manifest:
    (folder / "config.json").write_bytes(b"{}")
    return Manifest("a test", None, None, {"config.json": fact_of(folder / "config.json")})


def test_an_interrupt_leaves_nothing_and_the_next_call_works(tmp_path: Path):
    def interrupted(folder: Path) -> Manifest:
        fill(folder)
        raise KeyboardInterrupt

    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        make_once(target, interrupted, ignore)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]
    assert make_once(target, fill, ignore).source == "a test"
    assert make_once(target, interrupted, ignore).source == "a test"


def test_a_folder_without_a_manifest_is_not_whole(tmp_path: Path):
    target = tmp_path / "model"
    make_once(target, fill, ignore)
    (target / MANIFEST).write_text('{"source":')
    said: list[str] = []
    make_once(target, fill, said.append)
    assert "has no readable trimtab-weights.json" in said[0]


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/own", "/xdg", "/own"), ("", "/xdg", "/xdg/trimtab"), ("", "relative", "/home/me/.cache/trimtab"), ("~/t", "", "/home/me/t")],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, xdg: str, expected: str):
    for name, value in (("HOME", "/home/me"), ("TRIMTAB_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_importing_the_sdk_side_loads_nothing_heavy():
    code = "import sys, trimtab.weights; print([m for m in ('numpy', 'huggingface_hub', 'gguf', 'tokenizers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SDK)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_missing_extra_is_named(tmp_path: Path):
    """In a Python that sees trimtab and the standard library only."""
    code = "from trimtab.weights import resolve; resolve('llama2-7b')"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(SDK)}, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("huggingface_hub is needed to fetch a model:  pip install 'trimtab[weights]'")
