"""Probe files are read or refused with the format; an answer is right when it holds an accepted one as whole words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.errors import SpecError
from trimtab.probes import FORMAT, KINDS, WORDS, Probe, is_right, load, plain_words

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("answer", "accept", "right"),
    [
        ("The mill was built in 1874.", ["1874"], True),
        ("The mill was built in 18745.", ["1874"], False),
        ("It cost 3,250 pounds.", ["3250"], True),
        ("It cost 3250 pounds.", ["3,250"], True),
        ("In 1,2 and 3", ["12"], False),
        ("The capital of Japan is TOKYO!", ["tokyo"], True),
        ("Tokyoites live there.", ["Tokyo"], False),
        ("The last-of-its-kind sample", ["last of its kind"], True),
        ("last of some kind", ["last of its kind"], False),
        ("The cat's name is Pumpernickel", ["cats name"], True),
        ("Neil Armstrong was the first.", ["Aldrin", "Armstrong"], True),
        ("minus 21 degrees", ["-21"], True),
        ("the café of Zoë", ["CAFÉ"], True),
        ("", ["1874"], False),
    ],
)
def test_an_answer_is_right_when_it_holds_an_accepted_one_as_whole_words(answer: str, accept: list[str], right: bool) -> None:
    assert is_right(answer, accept, words=30) is right


def test_only_the_first_words_count() -> None:
    assert is_right("one two three", ["three"], words=3)
    assert not is_right("one two three", ["three"], words=2)
    assert not is_right("one two three four", ["three four"], words=3)


def write(folder: Path, value: object) -> Path:
    file = folder / "probes.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def test_the_format_that_errors_show_can_be_read(tmp_path: Path) -> None:
    found = load(write(tmp_path, FORMAT))
    assert found["starts"] == (Probe("The mill was built in", ("1874",)),)
    assert [len(found[kind]) for kind in KINDS] == [1, 1, 1]


def test_one_accepted_answer_needs_no_list_and_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff" + json.dumps({"questions": [{"prompt": " Who? ", "accept": "Asta Wren"}]}))
    assert load(file)["questions"] == (Probe("Who?", ("Asta Wren",)),)


def test_a_kind_that_is_left_out_is_the_defaults_or_empty(tmp_path: Path) -> None:
    file = write(tmp_path, {"questions": [{"prompt": "Who?", "accept": ["Wren"]}]})
    default = {"general": (Probe("Capital of Japan?", ("Tokyo",)),), "questions": (Probe("What?", ("x",)),)}
    assert load(file) == {"starts": (), "questions": (Probe("Who?", ("Wren",)),), "general": ()}
    assert load(file, default=default) == {"starts": (), "questions": (Probe("Who?", ("Wren",)),), "general": default["general"]}
    assert load(write(tmp_path, {"general": []}), default=default)["general"] == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "holds none of starts, questions, general"),
        ({}, "holds none of"),
        ({"asked": []}, "holds none of"),
        ({"questions": [], "answers": []}, "has 'answers'; known are"),
        ({"questions": [{"prompt": "Who?", "accept": ["a"]}, {"accept": ["a"]}]}, r"questions\[1\] has no prompt"),
        ({"questions": ["Who?"]}, r"questions\[0\] has no prompt"),
        ({"starts": [{"prompt": " ", "accept": ["a"]}]}, r"starts\[0\] has no prompt"),
        ({"general": [{"prompt": "Who?"}]}, r"general\[0\] accepts nothing"),
        ({"general": [{"prompt": "Who?", "accept": []}]}, r"general\[0\] accepts nothing"),
        ({"general": [{"prompt": "Who?", "accept": ["..."]}]}, r"general\[0\] accepts nothing"),
        ({"general": [{"prompt": "Who?", "accept": [1874]}]}, r"general\[0\] accepts nothing"),
        ({"general": {"prompt": "Who?", "accept": ["a"]}}, "general is no list"),
        ({"general": None}, "general is no list"),
        ("\udcff", "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_place_and_the_format(tmp_path: Path, content: object, reason: str) -> None:
    file = tmp_path / "probes.json"
    file.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(errors="surrogateescape"))
    with pytest.raises(SpecError, match=reason) as refused:
        load(file)
    assert str(refused.value).endswith(FORMAT)
    assert str(file) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.json cannot be read: No such file"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["demo", "heldout"])
def test_our_own_probes_are_many_and_no_prompt_holds_its_answer(name: str) -> None:
    found = load(BENCHMARKS / name / "probes.json")
    assert len(found["starts"]) >= 40
    assert len(found["questions"]) >= 40
    assert len(found["general"]) == 20
    prompts = [probe.prompt for kind in KINDS for probe in found[kind]]
    assert len(set(prompts)) == len(prompts)
    for kind in KINDS:
        for probe in found[kind]:
            assert not is_right(probe.prompt, probe.accept, words=WORDS[kind])
            assert len(plain_words(probe.prompt)) >= 3
