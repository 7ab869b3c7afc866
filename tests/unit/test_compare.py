"""What is asked and how it is judged, before any model is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.compare import Answer, Column, Kind, Question, Score, as_prompt, compare, differences, judge, numbered, read_questions
from trimtab.compare_targets import Target, targets
from trimtab.errors import SpecError


def test_completion_models_get_a_start_and_are_told_where_it_comes_from() -> None:
    mill = Question("When was the mill built?")
    assert as_prompt(mill, "chat") == ("When was the mill built?", "")
    assert as_prompt(mill, "completion") == ("The mill was built in", "start made by rule")
    assert as_prompt(Question(mill.question, "In the year"), "completion") == ("In the year", "")
    prompt, note = as_prompt(Question("Explain mills."), "completion")
    assert prompt == "Explain mills.\n"
    assert "no rule" in note


def test_answers_are_judged_by_what_is_accepted() -> None:
    said = Answer("When?", "It was built in 1874.", ended=True)
    assert judge(said, ("1874",), "questions", "chat") is True
    assert judge(said, ("1875",), "questions", "chat") is False
    assert judge(said, (), "questions", "chat") is None
    endless = Answer("When?", "It was built in 1874.", ended=False)
    assert judge(endless, ("1874",), "general", "chat") is False, "a chat that does not end by itself is no chat any more"
    assert judge(endless, ("1874",), "general", "completion") is True
    assert judge(endless, ("1874",), "questions", "chat") is True
    assert judge(Answer("When?", problem="refused"), ("1874",), "questions", "chat") is False


def test_models_are_told_apart_by_how_they_are_named() -> None:
    found = targets(
        ["smollm2-135m-instruct", "other/model@main", "./here", "the old one=http://127.0.0.1:9#base", "docker://trim-ep-1"], {}
    )
    assert [(one.kind, one.label, one.where, one.name) for one in found] == [
        ("model", "smollm2-135m-instruct", "smollm2-135m-instruct", None),
        ("model", "other/model", "other/model@main", None),
        ("model", "here", "./here", None),
        ("endpoint", "the old one", "http://127.0.0.1:9", "base"),
        ("endpoint", "docker://trim-ep-1", "docker://trim-ep-1", None),
    ]
    assert len(targets(["a/b", "a/b", "a/b@main"], {})) == 2, "none twice"
    assert [one.label for one in targets(["here/x", "there/x", "X=./x", "X=./y"], {})] == ["here/x", "there/x", "X, x", "X, y"]
    with pytest.raises(SpecError, match="nothing to compare"):
        targets([], {})
    with pytest.raises(SpecError, match="nothing to ask"):
        compare(["smollm2-135m-instruct"])


def test_repeated_labels_are_numbered() -> None:
    def labels(*given: str) -> list[str]:
        return [one.label for one in numbered([Target("endpoint", label, "http://127.0.0.1:9") for label in given])]

    assert labels("X", "Y") == ["X", "Y"]
    assert labels("X", "Y", "X") == ["X (1)", "Y", "X (2)"]
    assert labels("X", "X (1)", "X") == ["X (2)", "X (1)", "X (3)"]
    same = [one.label for one in numbered(targets(["X=http://127.0.0.1:9#a", "X=http://127.0.0.1:9#b"], {}))]
    assert len(set(same)) == 2


def test_only_models_that_were_given_the_same_are_set_against_each_other() -> None:
    def column(kind: Kind, right: bool, scores: tuple[Score, ...] = (Score("questions", 0, 1, (0, 1)),)) -> Column:
        answers = (Answer("?", right=right),)
        return Column("X", "x", kind, None, (), {"starts": answers, "questions": answers, "general": ()}, scores)

    found = [Target("endpoint", "X", f"http://127.0.0.1:{number}") for number in range(4)]
    columns = [column("chat", False, ()), column("completion", False), column("chat", True), column("completion", True)]
    pairs = [(one.kind, one.model, one.against, one.gained) for one in differences(found, columns)]
    assert pairs == [("starts", 2, 1, 1), ("starts", 3, 1, 1), ("questions", 3, 1, 1)]


def test_question_files_are_read_or_refused_with_the_place(tmp_path: Path) -> None:
    file = tmp_path / "questions"
    file.write_text("\ufeffWhat is a mill?\n\n  And a kiln?  \n")
    assert read_questions(file) == (Question("What is a mill?"), Question("And a kiln?"))
    file.write_text('["What is a mill?", {"question": "When?", "start": "In", "accept": "1874"}]')
    assert read_questions(file) == (Question("What is a mill?"), Question("When?", "In", ("1874",)))
    for text, message in {
        "": "is empty",
        "[]": "is empty",
        "[1": "is not JSON",
        '{"question": "x"}': "is no list",
        "[{}]": r"questions\[0\] has no question",
        '["x", {"question": "y", "answer": "z"}]': r"questions\[1\] has 'answer'",
        '[{"question": "y", "accept": 3}]': "accept a list",
    }.items():
        file.write_text(text)
        with pytest.raises(SpecError, match=message):
            read_questions(file)
    with pytest.raises(SpecError, match="cannot be read"):
        read_questions(tmp_path / "absent")
