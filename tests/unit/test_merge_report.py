"""What is picked from the losses: the better weights where they are better by more than chance, else those that were trained on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trimtab.merge_report import by_document, choose, general_prose, report, sentences
from trimtab_runtime.rehearsal import prose


def told(original: list[float], dequantised: list[float] | None, documents: list[int] | None = None) -> dict[str, Any]:
    """losses.json with passages of 100 tokens, whose losses these are, summed."""

    def model(nats: list[float]) -> dict[str, Any]:
        return {"nats": nats, "agreement": 1.0, "divergence": 0.0, "trained": None}

    models = {"unmerged": model(dequantised or original), "original": model(original), "base": model(original)}
    models |= {"dequantised": model(dequantised)} if dequantised else {}
    passages = [{"document": one, "tokens": 100} for one in documents or range(len(original))]
    return {
        "computed": "in fp32",
        "left_out": 0,
        "passages": passages,
        "models": models | ({"dequantised": model(dequantised)} if dequantised else {}),
    }


def test_the_better_weights_are_picked_where_every_document_says_so() -> None:
    level = [300.0 + 10 * number for number in range(12)]
    worse = [nats + 2 + number % 3 for number, nats in enumerate(level)]
    found = report(told(original=level, dequantised=worse), "pages")
    assert found.pick == "original"
    assert "better by 0.0300 nats a token" in found.reason
    assert found.difference is not None
    assert abs(found.difference + 0.03) < 1e-9
    assert found.interval is not None
    assert found.interval[0] < -0.03 < found.interval[1] < 0
    assert report(told(original=worse, dequantised=level), "pages").pick == "dequantised"


def test_a_difference_that_may_be_chance_picks_what_was_trained() -> None:
    level = [300.0] * 12
    mixed = [nats + (5 if number % 2 else -5.5) for number, nats in enumerate(level)]
    found = report(told(original=mixed, dequantised=level), "pages")
    assert found.difference is not None
    assert found.difference < 0, "the original ones are a little better"
    assert found.pick == "dequantised"
    assert "by chance" in found.reason


def test_too_little_text_picks_what_was_trained_and_says_so() -> None:
    found = report(told(original=[100.0] * 4, dequantised=[200.0] * 4), "pages")
    assert (found.pick, found.interval) == ("dequantised", None)
    assert "4 documents are too few" in found.reason
    # however long it is: its passages depend on each other
    found = report(told(original=[100.0] * 9, dequantised=[200.0] * 9, documents=[0] * 9), "pages")
    assert (found.pick, found.interval) == ("dequantised", None)
    assert "1 document is too few" in found.reason


def test_a_lora_adapter_has_one_way_to_be_merged() -> None:
    found = report(told(original=[100.0] * 9, dequantised=None), "pages")
    assert (found.pick, found.difference, found.reason) == ("original", None, "the adapter was trained on them")


def test_documents_are_what_counts_whatever_their_length() -> None:
    pairs = [(document, 1.0, 10) for document in range(4)] + [(0, 3.0, 30)]
    assert by_document(pairs) == [(4.0, 40), *[(1.0, 10)] * 3]
    once = told(original=[100.0, 101.0, 103.0, 106.0, 102.0, 109.0], dequantised=[101.0] * 6)
    found = report(once, "pages")
    often = report(
        told(
            **{name: [nats for nats in once["models"][name]["nats"] for _ in range(9)] for name in ("original", "dequantised")},
            documents=[document for document in range(6) for _ in range(9)],
        ),
        "pages",
    )
    assert found.interval is not None
    assert often.interval == pytest.approx(found.interval), "nine passages that say the same are no nine documents"


def test_no_choice_hides_its_numbers() -> None:
    pick, why = choose(-0.01, (-0.02, -0.005), 24)
    assert pick == "original"
    assert all(part in why for part in ("0.0100", "-0.0200", "-0.0050", "24 documents"))


def test_the_table_shows_every_model_and_the_reason() -> None:
    lines = report(told(original=[100.0] * 9, dequantised=[110.0] * 9), "the pages given").lines()
    assert [line.split()[0] for line in lines[2:-1]] == ["unmerged", "original", "base", "dequantised"]
    assert lines[-1].startswith("merge onto the original weights: ")


def test_the_general_prose_is_no_text_that_runs_rehearse() -> None:
    texts = general_prose()
    assert len(texts) >= 20

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[place : place + 6]) for place in range(len(words) - 5)}

    rehearsed = set().union(*map(runs, prose()))
    assert not rehearsed & set().union(*map(runs, texts))


def test_sentences_are_compared_by_their_words() -> None:
    assert sentences("The mill has 1,200 sails.\nThe  MILL has 1200 sails! Short one.") == {"the mill has 1200 sails"}
