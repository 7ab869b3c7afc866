"""Everyday prompts: the same for the same seed, none twice, and none that somebody may ask as a test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from trimtab import probes
from trimtab.probes import KINDS, plain_words
from trimtab_runtime import rehearsal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALL = rehearsal.prompts(10_000, 0)


def test_prompts_are_distinct_and_as_many_as_asked_for() -> None:
    assert len({" ".join(plain_words(prompt)) for prompt in ALL}) == len(ALL) > 100
    assert rehearsal.prompts(0, 0) == []
    for count in (1, 30, 100):
        assert rehearsal.prompts(count, 0) == ALL[:count]


def test_the_seed_decides_the_order_and_nothing_else() -> None:
    assert rehearsal.prompts(10_000, 0) == ALL
    assert rehearsal.prompts(10_000, 1) != ALL
    assert sorted(rehearsal.prompts(10_000, 1)) == sorted(ALL)
    assert rehearsal.essays(50, 3) == rehearsal.essays(50, 3) != rehearsal.essays(50, 4)


def test_every_wording_comes_before_any_comes_again() -> None:
    wordings = rehearsal._ASKED
    first = rehearsal.prompts(len(wordings), 5)
    used = Counter(wording for prompt in first for wording, words in wordings.items() if prompt in map(wording.format, words.split("|")))
    assert used == Counter(dict.fromkeys(wordings, 1))


def test_every_subject_is_written_about_before_any_comes_again() -> None:
    subjects = rehearsal._SUBJECTS
    assert len(set(subjects)) == len(subjects)
    first = rehearsal.essays(len(subjects), 2)
    assert all(sum(f" {subject}" in essay for essay in first) for subject in subjects)
    every = rehearsal.essays(len(rehearsal._TEXTS) * len(subjects), 2)
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", ["demo", "heldout"])
def test_none_is_a_question_of_our_probes(name: str) -> None:
    known = probes.load(BENCHMARKS / name / "probes.json")
    asked = {" ".join(plain_words(probe.prompt)) for kind in KINDS for probe in known[kind]}
    essays = rehearsal.essays(len(rehearsal._TEXTS) * len(rehearsal._SUBJECTS), 0)
    rehearsed = {" ".join(plain_words(prompt)) for prompt in [*ALL, *essays]}
    assert rehearsed & asked == set()
    answers = {" ".join(plain_words(answer)) for kind in ("starts", "questions") for probe in known[kind] for answer in probe.accept}
    names = {answer for answer in answers if not answer[0].isdigit() and len(answer) > 5}
    assert [prompt for prompt in rehearsed for name in names if f" {name} " in f" {prompt} "] == []
