"""What words name, and to whom a setting goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import SpecError
from trimtab.named import Named, deploy_arguments, named, opened, own, refuse_foreign


@pytest.mark.parametrize(
    ("words", "kind", "backend"),
    [
        ("process://trim-7f3a9c21", "run", "process"),
        ("docker://trim-ep-7f3a9c21", "endpoint", "docker"),
        ("sagemaker://my-endpoint", "run", "sagemaker"),
        ("http://127.0.0.1:8080", "address", ""),
        ("https://example.com/x", "address", ""),
        ("s3://bucket/model/", "model", ""),
        ("smollm2-135m-instruct", "model", ""),
        ("owner/name@main", "model", ""),
        ("/no/such/folder", "model", ""),
    ],
)
def test_words_are_told_apart(words: str, kind: str, backend: str) -> None:
    assert named(words) == Named(kind, words, backend)  # type: ignore[arg-type]


def test_a_folder_with_an_adapter_is_an_artifact(tmp_path: Path) -> None:
    assert named(str(tmp_path)).kind == "model"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert named(str(tmp_path)).kind == "artifact"


def test_a_setting_goes_to_who_knows_it(tmp_path: Path) -> None:
    found = deploy_arguments("a/model", None, {"home": str(tmp_path), "max_running": "4"})
    assert found == {"base_model": "a/model", "backend": "process", "home": str(tmp_path), "max_running": "4"}
    assert deploy_arguments(None, "sagemaker", {"jumpstart": "some-id"}) == {"backend": "sagemaker", "jumpstart": "some-id"}
    assert own({"a": 1, "b": 2}, ["b"]) == {"b": 2}


def test_a_setting_that_nobody_knows_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean max_running"):
        deploy_arguments("a/model", None, {"max_runing": "4"})
    with pytest.raises(SpecError, match="no option 'memory'"):
        opened("process://trim-ep-7f3a9c21", {"memory": "8g"})
    with pytest.raises(SpecError, match="did you mean region"):
        refuse_foreign({"regin": "x"}, named("sagemaker://trim-7f3a9c21").settings)
