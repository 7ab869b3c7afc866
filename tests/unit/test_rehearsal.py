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


def test_every_wording_comes_before_any_comes_again() -> None:
    wordings = rehearsal.wordings()
    first = rehearsal.prompts(len(wordings), 5)
    used = Counter(wording for prompt in first for wording, words in wordings.items() if prompt in map(wording.format, words))
    assert used == Counter(dict.fromkeys(wordings, 1))


@pytest.mark.parametrize("name", ["demo", "heldout"])
def test_none_is_a_question_of_our_probes(name: str) -> None:
    known = probes.load(BENCHMARKS / name / "probes.json")
    asked = {" ".join(plain_words(probe.prompt)) for kind in KINDS for probe in known[kind]}
    rehearsed = {" ".join(plain_words(prompt)) for prompt in ALL}
    assert rehearsed & asked == set()
    answers = {" ".join(plain_words(answer)) for kind in ("starts", "questions") for probe in known[kind] for answer in probe.accept}
    names = {answer for answer in answers if not answer[0].isdigit() and len(answer) > 5}
    assert [prompt for prompt in rehearsed for name in names if f" {name} " in f" {prompt} "] == []


def test_prose_is_many_texts_of_running_words() -> None:
    texts = rehearsal.prose()
    assert len(set(texts)) == len(texts) > 100
    assert all(100 < len(text.split()) < 500 for text in texts)
    assert len({text.split("\n")[0][:20] for text in texts}) > 0.95 * len(texts)


@pytest.mark.parametrize("name", ["demo", "heldout"])
def test_prose_holds_no_answer_of_our_probes_and_nothing_of_the_text_that_perplexity_is_taken_on(name: str) -> None:
    """Eight words in a row that both have would be a copy; the invented names of the sites occur nowhere."""
    words = " ".join(f" {' '.join(plain_words(text))} " for text in rehearsal.prose())
    known = probes.load(BENCHMARKS / name / "probes.json")
    starts = {" ".join(plain_words(probe.prompt)) for probe in known["starts"]}
    pages = " ".join(" ".join(plain_words(file.read_text(encoding="utf-8"))) for file in (BENCHMARKS / name / "pages").glob("*.html"))
    unrelated = " ".join(plain_words((BENCHMARKS / "demo" / "unrelated.txt").read_text(encoding="utf-8")))
    assert [start for start in starts if f" {start} " in words] == []
    for text in (pages, unrelated):
        kept = text.split()
        assert [run for begin in range(len(kept) - 7) if f" {(run := ' '.join(kept[begin : begin + 8]))} " in words] == []
    answers = [answer for kind in ("starts", "questions") for probe in known[kind] for answer in probe.accept]
    unknown = {" ".join(plain_words(answer)) for answer in answers if answer.istitle() and len(answer.split()) > 1}
    assert unknown
    assert [answer for answer in unknown if f" {answer} " in words] == []
