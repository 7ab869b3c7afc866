"""The demo's last line is what its answers say, and it counts neither what it taught nor a chat that does not end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.errors import SpecError
from trimtab.events import Phase, Step
from trimtab.probes import Probe

FILE = Path(__file__).parents[2] / "benchmarks" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(**answers: tuple[str, bool]) -> dict[str, Any]:
    found = {key.replace("_", "/"): {"text": text, "ended": ended} for key, (text, ended) in answers.items()}
    return {
        "base": {"answers": {key: {"text": "no idea", "ended": True} for key in found}, "perplexity": {"unrelated": 20.0}},
        "tuned": {"answers": found, "perplexity": {"unrelated": 24.04}},
    }


ASKED = {
    "starts": (Probe("The mill was built in", ("1874",)),),
    "questions": (Probe("Who built the mill?", ("Wren",)), Probe("When does it grind?", ("dawn",))),
    "general": (Probe("What is the capital of Japan?", ("Tokyo",)),),
}


def test_the_last_line_is_computed_from_the_answers(demo: ModuleType) -> None:
    answers = told(starts_0=("1874.", True), questions_0=("Asta Wren.", True), questions_1=("At noon.", True), general_0=("Tokyo.", True))
    result = demo.judged(ASKED, answers, " other words ") | {"seconds": 7}
    assert demo.last_line(result) == (
        "demo: base 0/1 starts 0/2 questions, tuned 1/1 starts 1/2 questions, general 0/1 -> 1/1, perplexity 20.0 -> 24.0, 7 s"
    )


def test_the_pace_is_that_of_the_last_process_and_of_all_steps(demo: ModuleType) -> None:
    def step(number: int, speed: float) -> Step:
        return Step(
            step=number, of=3, epoch=1, loss=1, lr=1, grad_norm=1, tokens_per_second=speed, seconds_left=0, memory_mb=1
        )  # fmt: skip

    first = [Phase(name="start", at=10.0), Phase(name="load", at=12.0), Phase(name="train", at=40.0), step(1, 300)]
    resumed = [Phase(name="start", at=100.0), Phase(name="train", at=115.5), step(2, 500), step(3, 400), Phase(name="save", at=130.0)]
    assert demo.pace([*first, *resumed]) == {"first_step_after": 15.5, "tokens_per_second": 400}


def test_a_question_that_was_taught_does_not_count_and_is_named(demo: ModuleType) -> None:
    answers = told(starts_0=("1874.", True), questions_0=("Wren.", True), questions_1=("At dawn.", True), general_0=("Tokyo.", True))
    result = demo.judged(ASKED, answers, " so who built the mill asta did ")
    assert [entry["prompt"] for entry in result["questions"]] == ["When does it grind?"]
    assert result["excluded"] == [{"kind": "questions", "prompt": "Who built the mill?"}]


def test_a_general_answer_that_never_ends_is_wrong(demo: ModuleType) -> None:
    answers = told(starts_0=("1874", False), questions_0=("Wren", False), questions_1=("", True), general_0=("Tokyo and", False))
    result = demo.judged(ASKED, answers, " ")
    assert [result[kind][0]["tuned_right"] for kind in ("starts", "questions", "general")] == [True, True, False]


def test_a_folder_without_pages_says_what_to_give(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="PAGES=folder"):
        demo.page_files(tmp_path)
