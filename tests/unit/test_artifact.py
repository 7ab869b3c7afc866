"""An artifact is its adapter's tensors; files that are not whole are refused."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from trimtab import Artifact, SpecError, StagingError, TrainSpec, WeightsError, weights

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, dtype=np.float16)}


def make(folder, tensors=None, *, metadata=None, **manifest):
    folder.mkdir()
    save_file(tensors or TENSORS, folder / "adapter_model.safetensors", metadata=metadata)
    sha256 = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    values = {"spec": TrainSpec(model="m", model_digest="d").model_dump(mode="json"), "files": {"adapter_model.safetensors": sha256}}
    (folder / "trimtab.json").write_text(json.dumps({**values, **manifest}))
    return Artifact(folder)


def test_two_artifacts_are_equal_when_their_tensors_are(tmp_path):
    first = make(tmp_path / "1")
    second = make(tmp_path / "2", dict(reversed(TENSORS.items())), metadata={"made": "today"}, metrics={"seconds": 3})
    assert first == second
    assert hash(first) == hash(second)
    assert first.base_digest == "d"
    assert first.spec.model == "m"


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "a": np.array([1, 1, 1, 1.5], dtype=np.float16)},
        {**TENSORS, "b": TENSORS["b"].reshape(3, 2)},
        {**TENSORS, "b": TENSORS["b"].view(np.int32)},
        {"b": TENSORS["b"], "c": TENSORS["a"]},
    ],
    ids=["value", "shape", "type", "name"],
)
def test_any_other_tensor_makes_another_artifact(tmp_path, tensors):
    assert make(tmp_path / "1") != make(tmp_path / "2", tensors)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    artifact = make(tmp_path / "1")
    file = tmp_path / "1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StagingError, match="not a whole safetensors file"):
        artifact.digest  # noqa: B018
    with pytest.raises(StagingError, match="not the file that the run wrote"):
        artifact.verify()


def test_a_whole_artifact_verifies_and_a_missing_file_is_named(tmp_path):
    artifact = make(tmp_path / "1")
    artifact.verify()
    (tmp_path / "1" / "adapter_model.safetensors").unlink()
    with pytest.raises(StagingError, match=r"adapter_model\.safetensors cannot be read"):
        artifact.verify()


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path):
    with pytest.raises(StagingError, match="holds no artifact"):
        Artifact(tmp_path)


def test_a_manifest_of_another_version_is_refused_by_name(tmp_path):
    artifact = make(tmp_path / "1", spec={**TrainSpec(model="m").model_dump(mode="json"), "spec_version": 99})
    with pytest.raises(SpecError, match="spec_version 99"):
        artifact.spec  # noqa: B018


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"spec": 3}'])
def test_a_manifest_that_says_nothing_is_refused(tmp_path, text):
    (tmp_path / "trimtab.json").write_text(text)
    with pytest.raises(StagingError, match=r"trimtab\.json"):
        Artifact(tmp_path).spec  # noqa: B018


def test_a_base_model_that_changed_since_is_refused(tmp_path, tiny_model):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    digest = weights.resolve(str(base), say=lambda line: None).digest
    artifact = make(tmp_path / "1", spec=TrainSpec(model=str(base), model_digest=digest).model_dump(mode="json"))
    assert weights.resolve_trained(artifact).folder == base
    (base / "generation_config.json").write_text('{"temperature": 2}')
    with pytest.raises(WeightsError, match="put the old files back"):
        weights.resolve_trained(artifact)
