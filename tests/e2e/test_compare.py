"""Real servers are asked the same, a tuned chat model and one that only completes text; table, JSON and page say what they said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tiny_adapter import make_adapter, make_lively_model
from trimtab import weights
from trimtab.compare_cli import compare
from trimtab.compare_targets import targets
from trimtab.endpoint import Endpoint, deploy
from trimtab.errors import EndpointError, StagingError

# PEFT 0.21 asks transformers 5.23 for a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUESTIONS = [{"question": "When was the mill built?", "accept": ["1874"]}, "Explain <b>mills</b>."]
PROBES = {"starts": [{"prompt": "The keeper", "accept": ["of"]}], "general": [{"prompt": "What is two and two?", "accept": ["four"]}] * 9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("chat") / "lighthouse")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("artifact") / "tuned", model)
    digest = weights.resolve(str(model), say=lambda line: None).digest
    spec = {"model": str(model), "model_digest": digest, "method": "lora", "dtype": "float32"}
    (folder / "trimtab.json").write_text(json.dumps({"spec": spec}))
    return folder


@pytest.fixture(scope="module")
def completing(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Endpoint]:
    """A model without a chat template, served already."""
    folder = tmp_path_factory.mktemp("completing") / "plain"
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    with deploy(base_model=folder, engine="transformers") as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_API_KEY", endpoint.api_key or "x")
        yield endpoint


def test_a_run_means_its_base_and_its_tuned_model(artifact: Path, model: Path) -> None:
    base, tuned = targets([str(artifact)], {})
    assert (base.kind, base.label, base.where) == ("model", "lighthouse", str(model))
    assert (tuned.kind, tuned.label, tuned.where) == ("tuned", "lighthouse, tuned", str(artifact))
    assert base.is_base_of(tuned)
    assert not tuned.is_base_of(base)
    assert targets([f"{artifact}#tuned"], {}) == [tuned]
    assert targets([f"{artifact}#base", str(artifact)], {}) == [base, tuned], "none twice"
    assert [one.label for one in targets([f"mine={artifact}"], {})] == ["mine (model)", "mine (tuned)"]


def test_a_tuned_chat_model_and_a_plain_one_answer_side_by_side(
    artifact: Path, completing: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "probes.json").write_text(json.dumps(PROBES))
    words = [f"plain={completing.url}", f"{artifact}#tuned", "--questions", str(tmp_path / "questions.json"), "--max-tokens", "12"]
    words += [
        "--probes",
        str(tmp_path / "probes.json"),
        "--html",
        str(tmp_path / "page.html"),
        "--json",
    ]
    assert compare.main(words, standalone_mode=False) == 0
    told = json.loads(capsys.readouterr().out)
    plain, tuned = told["columns"]
    assert (plain["label"], plain["kind"], plain["ready_after"]) == ("plain", "completion", None)
    assert (tuned["label"], tuned["kind"]) == ("lighthouse, tuned", "chat")
    assert tuned["ready_after"] > 0
    assert [one["prompt"] for one in plain["answers"]] == ["The mill was built in", "Explain <b>mills</b>.\n"]
    assert [one["prompt"] for one in tuned["answers"]] == ["When was the mill built?", "Explain <b>mills</b>."]
    assert plain["answers"][0]["note"] == "start made by rule"
    for column in (plain, tuned):
        assert [one["right"] for one in column["answers"]] == [False, None]
        for answer in column["answers"]:
            assert answer["problem"] == ""
            assert answer["text"]
            assert 0 < answer["tokens"] <= 12
            assert 0 < answer["first"] <= answer["seconds"]
        assert column["probes"]["starts"][0]["prompt"] == "The keeper"
        assert [(one["kind"], one["of"]) for one in column["scores"]] == [("starts", 1), ("general", 9)]
    assert [(one["kind"], one["model"], one["against"]) for one in told["differences"]] == [("starts", 1, 0)], "the others differ by prompt"
    assert plain["answers"][0]["text"] != tuned["answers"][0]["text"]
    page = (tmp_path / "page.html").read_text()
    assert "Explain &lt;b&gt;mills&lt;/b&gt;." in page
    assert "<b>mills" not in page


def test_a_question_that_a_model_refuses_stands_as_a_problem(completing: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    words = [completing.url, "-q", "word " * 5000, "-q", "Who keeps the key?", "--max-tokens", "4"]
    assert compare.main(words, standalone_mode=False) == 1
    printed = capsys.readouterr().out
    assert "no answer" in printed
    assert "context" in printed
    assert "Who keeps the key?" in printed


def test_a_model_that_does_not_come_up_costs_no_other_models_answers(
    completing: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, broken = "http://127.0.0.1:9", tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (tmp_path / "probes.json").write_text(json.dumps(PROBES))
    words = ["-q", "Who keeps the key?", "--max-tokens", "4", "--probes", str(tmp_path / "probes.json"), "--json"]
    assert compare.main([completing.url, gone, str(broken), completing.url + "#base", *words], standalone_mode=False) == 1
    plain, *failed, again = json.loads(capsys.readouterr().out)["columns"]
    for column in (plain, again):
        assert column["answers"][0]["text"]
        assert (column["problem"], column["answers"][0]["problem"]) == ("", "")
        assert column["scores"]
    for column in failed:
        assert column["problem"]
        assert {one["problem"] for one in (*column["answers"], *column["probes"]["general"])} == {column["problem"]}
        assert column["scores"] == []
    with pytest.raises(EndpointError):  # nobody answers
        compare.main([gone, str(broken), *words], standalone_mode=False)


def test_answers_are_printed_also_where_the_page_cannot_be_written(
    completing: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StagingError, match="cannot be written"):  # a folder stands there
        compare.main([completing.url, "-q", "Who?", "--max-tokens", "4", "--json", "--html", str(tmp_path)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["columns"][0]["answers"][0]["text"]
