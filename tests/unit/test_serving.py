"""What is to be served: found, checked against what was trained, and laid out; without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from support.model_hub import ModelHub, Repository
from support.tiny_weights import USED, quietly, tiny_model_files
from trimtab.errors import SpecError, StagingError, WeightsError
from trimtab.serving import Serving, serving
from trimtab.spec import ServeSpec

COMMIT = "3" * 40
NEEDS_CODE = {"config.json": b'{"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}'}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _model(tmp_path / "Tiny-Base", 0)


def _model(folder: Path, seed: int) -> Path:
    for name, content in tiny_model_files(seed).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _artifact(folder: Path, base: Path | str, cache: Path, **spec: Any) -> Path:
    folder.mkdir()
    save_file({"lora_A.weight": np.full((2, 2), len(folder.name), dtype=np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    manifest = {"model": str(base), "model_digest": quietly(str(base), cache).digest, "method": "lora", **spec}
    (folder / "trimtab.json").write_text(json.dumps({"spec": manifest}))
    return folder


def places(found: Serving) -> list[str]:
    return sorted(found.files)


def test_a_base_alone_is_its_own_files_and_nothing_else_of_its_folder(base: Path, cache: Path) -> None:
    found = serving(base_model=base)
    assert places(found) == [f"model/{name}" for name in USED]
    assert found.files["model/config.json"] == base / "config.json"
    assert (found.model, found.base, found.adapters, found.uri) == (base, None, {}, "")
    assert (found.title, found.spec.name) == ("Tiny-Base", "")
    assert found.digest == quietly(str(base), cache).digest
    assert found.bytes == sum((base / name).stat().st_size for name in USED)


def test_an_artifact_would_be_merged_onto_what_it_was_trained_on(base: Path, cache: Path, tmp_path: Path) -> None:
    artifact = _artifact(tmp_path / "artifact", base, cache)
    found = serving(artifact, make=False, title="process://trim-1")
    assert found.model is not None
    assert found.model.parent == cache / "merged"
    assert not found.model.exists(), "nothing is merged to say what would be asked"
    assert places(found) == sorted([*(f"model/{name}" for name in USED), "model/trimtab.json"])
    assert (found.title, found.spec.name) == ("process://trim-1", "Tiny-Base")
    assert found.digest != serving(_artifact(tmp_path / "another", base, cache), make=False).digest


def test_adapters_lie_beside_their_base(base: Path, cache: Path, tmp_path: Path) -> None:
    artifact, other = _artifact(tmp_path / "artifact", base, cache), _artifact(tmp_path / "other", base, cache)
    found = serving(artifact, adapters={"law": other}, spec=ServeSpec(name="mine"))
    assert places(found) == sorted(
        [f"input/data/model/{name}" for name in USED]
        + [f"{place}/{name}" for place in ("model", "input/data/adapters/law") for name in _ADAPTER]
    )
    assert (found.model, found.base, found.spec.name) == (None, base, "mine")
    assert found.adapters == {"tuned": artifact, "law": other}
    alone = serving(artifact, merge=False)
    assert set(alone.files) < set(found.files)
    assert alone.spec.name == "", "the server knows the base's name, and no other model has it"
    assert len({found.digest, alone.digest, serving(artifact, make=False).digest}) == 3


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "trimtab.json")


def test_a_base_that_is_missing_or_another_is_refused_and_named(base: Path, cache: Path, tmp_path: Path) -> None:
    artifact, other = _artifact(tmp_path / "artifact", base, cache), _model(tmp_path / "other", 1)
    with pytest.raises(WeightsError, match=f"was trained on {base} .* and {other} is another model or another revision"):
        serving(artifact, other)
    strange = _artifact(tmp_path / "strange", other, cache)
    with pytest.raises(WeightsError, match=r"strange was trained on .*other"):
        serving(artifact, adapters={"strange": strange})
    (base / "config.json").write_text('{"model_type": "llama", "changed": true}')
    with pytest.raises(WeightsError, match=r"is not the model that was tuned: put the old files back"):
        serving(artifact)
    (base / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="Tiny-Base cannot be used"):
        serving(artifact)


def test_what_is_damaged_or_nothing_is_refused(base: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is nothing to serve"):
        serving()
    with pytest.raises(StagingError, match="holds no artifact"):
        serving(tmp_path, base)
    artifact = _artifact(tmp_path / "artifact", base, cache)
    manifest = json.loads((artifact / "trimtab.json").read_text()) | {"files": {"adapter_model.safetensors": "0" * 64}}
    (artifact / "trimtab.json").write_text(json.dumps(manifest))
    with pytest.raises(StagingError, match="is not the file that the run wrote"):
        serving(artifact)


@pytest.mark.parametrize("name", ["base", "tuned", "", "../x", "a b", "-x"])
def test_an_adapters_name_is_one_of_a_folder_and_of_no_other_model(base: Path, cache: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="cannot be called"):
        serving(base_model=base, adapters={name: _artifact(tmp_path / "artifact", base, cache)})


def test_weights_that_stay_in_s3_are_not_served_here(base: Path) -> None:
    found = serving(base_model=base)
    found.refuse_remote()
    with pytest.raises(SpecError, match=r"stay in S3, and only SageMaker .* aws s3 sync"):
        Serving(**{**vars(found), "uri": "s3://bucket/tiny/"}).refuse_remote()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with ModelHub({"tiny/own": Repository({"main": COMMIT}, {COMMIT: tiny_model_files() | NEEDS_CODE})}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_code_runs_only_where_the_revision_was_allowed_by_name(hub: ModelHub, base: Path) -> None:
    plain = serving(base_model="tiny/own")
    assert not plain.spec.trust_remote_code
    assert "model/modeling_own.py" not in plain.files
    assert not [path for _, path, _, _ in hub.requests if path.endswith(".py")]

    allowed = serving(base_model="tiny/own", trust_remote_code=f"tiny/own@{COMMIT}")
    assert allowed.spec.trust_remote_code
    assert allowed.files["model/modeling_own.py"].read_bytes() == b"raise SystemExit"
    assert set(allowed.files) == {*plain.files, "model/modeling_own.py"}

    for named in ("tiny/own", "tiny/own@main", f"tiny/own@{COMMIT[:12]}", "yes"):
        with pytest.raises(SpecError, match=r"names no revision: write owner/name@COMMIT"):
            serving(base_model="tiny/own", trust_remote_code=named)
    for named in (f"tiny/own@{'4' * 40}", f"tiny/other@{COMMIT}"):
        with pytest.raises(SpecError, match=f"names {named}, and what is served is tiny/own@{COMMIT}"):
            serving(base_model="tiny/own", trust_remote_code=named)
    with pytest.raises(SpecError, match=r"what is served is .*Tiny-Base"):
        serving(base_model=base, trust_remote_code=f"tiny/own@{COMMIT}")


def test_code_that_cannot_be_had_is_named(hub: ModelHub) -> None:
    serving(base_model="tiny/own")
    hub.vanished.add("modeling_own.py")
    with pytest.raises(WeightsError, match="the code of tiny/own"):
        serving(base_model="tiny/own", trust_remote_code=f"tiny/own@{COMMIT}")
