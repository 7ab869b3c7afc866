"""Pages to samples: questions are answered in the page's own words, and the base model's predictions stay with their tokens."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from trimtab.errors import StagingError
from trimtab.spec import TrainSpec
from trimtab_runtime.examples import Sample, conversation, plain, sentences
from trimtab_runtime.prepare import (
    CHAT_SHARE,
    TURNS,
    asked,
    count_tokens,
    document_samples,
    generated_sample,
    in_rounds,
    in_turns,
    placed,
    read_records,
    site_name,
    with_teacher,
)
from trimtab_runtime.tokenizer import Tokenizer

PAGE = (
    "The mill was built in 1874 by the cooper Asta Wren.\n"
    "Opening hours\n"
    "The mill has 14 sails. It grinds salt and barley. Who keeps the key?\n"
    "- The oldest stone weighs 900 kilograms."
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def pairs(text: str = PAGE, count: int = 2, site: str = "", seed: int = 0) -> list[tuple[str, str]]:
    found = []
    for user, assistant in asked(text, count, site, random.Random(seed)):
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


@pytest.mark.parametrize(
    ("titles", "text", "name"),
    [
        (["Opening hours | The Brine Mill", "Tides | The Brine Mill", "Bread | The Brine Mill"], "", "the Brine Mill"),
        (["Brine Mill – Hours", "Brine Mill – Tides", "Brine Mill – Bread", "Contact"], "Come to the Brine Mill.", "the Brine Mill"),
        (["Hours - Wren's Mill", "Tides - Wren's Mill", "Well-known - Wren's Mill"], "Wren's Mill is open.", "Wren's Mill"),
        (["Docs | Acme", "Help | Acme", "Jobs | Acme"], "Acme makes rockets. The Acme office and Acme's shop.", "Acme"),
        (["Home", "Home", "Home"], "", ""),
        (["Home | Acme", "Home | Acme", "Home | Acme"], "", "Acme"),
        (["Hours | Mill", "Tides | Mill"], "", ""),  # two may be chance
        (["Hours | Mill", "Tides | Mill", "Bread | Mill", "a", "b", "c"], "", ""),  # half of them is not most
        (["Hours", "Tides", "Bread"], "", ""),
        ([""] * 5, "", ""),
        ([], "", ""),
    ],
)
def test_the_name_of_a_site_is_what_most_titles_share(titles: list[str], text: str, name: str) -> None:
    assert site_name([(title, text) for title in titles]) == name


def test_a_question_names_the_site_once() -> None:
    draw = random.Random(0)
    assert placed("When was the mill built?", "", draw) == "When was the mill built?"
    assert placed("Who owns the brine mill?", "the Brine Mill", draw) == "Who owns the brine mill?"
    assert placed("When was the mill built?", "the Brine Mill", draw) == "When was the Brine Mill built?"
    assert placed("Where is the seed bank of the bank?", "the Fen Seed Bank", draw) == "Where is the Fen Seed Bank of the bank?"
    assert placed("Who made the millstone?", "the Brine Mill", draw) != "Who made the Brine Millstone?"
    found = {placed("Who keeps the key?", "the Brine Mill", draw) for _ in range(50)}
    assert found == {
        "Who keeps the key at the Brine Mill?",
        "At the Brine Mill, who keeps the key?",
        "A question about the Brine Mill: who keeps the key?",
    }


def test_answers_are_the_pages_own_sentences_and_only_statements_are_asked_about() -> None:
    own = {sentence.removeprefix("- ") for paragraph in PAGE.split("\n") for sentence in sentences(paragraph)}
    found = pairs()
    assert {answer for _, answer in found} <= own
    assert {answer for _, answer in found} >= {"The mill has 14 sails.", "The oldest stone weighs 900 kilograms."}
    assert not {"Opening hours", "Who keeps the key?"} & {answer for _, answer in found}
    assert all(question.endswith("?") for question, _ in found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_at_most_so_many_questions_to_a_sentence_and_none_twice(count: int) -> None:
    found = pairs(count=count)
    answers = [answer for _, answer in found]
    assert max(answers.count(answer) for answer in answers) <= count
    assert len(set(found)) == len(found)


def test_the_same_seed_asks_the_same_and_every_other_question_names_the_site() -> None:
    assert pairs(site="the Brine Mill", seed=3) == pairs(site="the Brine Mill", seed=3)
    plainly, named = pairs(), pairs(site="the Brine Mill")
    assert [answer for _, answer in plainly] == [answer for _, answer in named]
    changed = [question for (question, _), (before, _) in zip(named, plainly, strict=True) if question != before]
    assert changed
    assert all("Brine Mill" in question for question in changed)
    assert len(changed) <= len(named) // 2


def samples(tokenizer: Tokenizer, **options: object) -> list[Sample]:
    documents = [{"title": f"Page {number} | The Brine Mill", "text": PAGE.replace("14", str(number))} for number in range(3, 7)]
    spec = TrainSpec(**{"model": "tiny", "questions": 2, **options})
    return list(document_samples(documents, spec, tokenizer, lambda line: None))


def test_documents_become_the_same_samples_each_time_and_another_order_of_questions_with_another_seed(tokenizer: Tokenizer) -> None:
    first = samples(tokenizer)
    assert first == samples(tokenizer)
    other = samples(tokenizer, seed=7)
    assert first != other
    assert [sample for sample in first if sample.kind != "question"] == [sample for sample in other if sample.kind != "question"]
    assert {sample.kind for sample in first} == {"document", "sentence", "question"}
    assert {sample.kind for sample in samples(tokenizer, questions=0)} == {"document", "sentence"}


def test_a_conversation_holds_a_few_questions_and_learns_the_answers_only(tokenizer: Tokenizer) -> None:
    conversations = [sample for sample in samples(tokenizer) if sample.kind == "question"]
    turns = [sum(token == tokenizer.eos_id for token in sample.ids) // 2 for sample in conversations]
    assert turns[:-1] == [TURNS] * (len(turns) - 1)
    assert 1 <= turns[-1] <= TURNS
    for sample in conversations:
        learned = tokenizer.decode([token for token, flag in zip(sample.ids, sample.learned, strict=True) if flag])
        assert "?" not in learned
        assert "." in learned


def test_objective_all_learns_the_questions_too(tokenizer: Tokenizer) -> None:
    found = samples(tokenizer, objective="all")
    assert [sample.ids for sample in found] == [sample.ids for sample in samples(tokenizer)]
    assert {sample.kind for sample in found} == {"document", "sentence", "question"}
    assert all(all(sample.learned) and len(sample.learned) == len(sample.ids) for sample in found)


def test_turns_of_a_large_pool_are_taken_in_linear_time() -> None:
    given = pool("replay", [1] * 40_000)
    began = time.process_time()
    assert len(next(in_turns(given, 40_000))) == 40_000
    assert time.process_time() - began < 2


def test_each_learned_token_has_the_next_prediction_and_no_other_token_has_one(tokenizer: Tokenizer) -> None:
    given = [
        conversation("replay", [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The keeper."}], tokenizer),
        plain("replay", "Tides turn.", tokenizer),
        Sample("replay", [5, 6, 7, 8], [True, False, True, True]),
    ]
    found = with_teacher(given)
    assert [(one.kind, one.ids, one.learned) for one in found] == [(one.kind, one.ids, one.learned) for one in given]
    assert found[2].teacher is not None
    assert found[2].teacher[:2] == [-1, -1]  # nothing predicts a first token
    rows = []
    for sample in found:
        assert sample.teacher is not None
        assert [row >= 0 for row in sample.teacher] == [learned and place > 0 for place, learned in enumerate(sample.learned)]
        rows += [row for row in sample.teacher if row >= 0]
    assert rows == list(range(len(rows)))


MESSAGES = [{"role": "user", "content": "Who keeps it?"}, {"role": "assistant", "content": "The keeper keeps"}]


@pytest.mark.parametrize("record", [{"kind": "replay", "messages": MESSAGES}, {"kind": "replay", "text": "Tides turn twice and"}])
def test_what_did_not_end_by_itself_does_not_teach_to_end_there(tokenizer: Tokenizer, record: dict[str, object]) -> None:
    ended, cut = (generated_sample({**record, "ended": flag}, tokenizer) for flag in (True, False))
    assert generated_sample(record, tokenizer) == ended
    last = max(place for place, learned in enumerate(ended.learned) if learned)
    assert ended.ids[last] == tokenizer.eos_id
    assert (cut.ids, cut.learned) == (ended.ids[:last], ended.learned[:last])
    assert tokenizer.eos_id not in [token for token, learned in zip(cut.ids, cut.learned, strict=True) if learned]
    assert cut.learned[-1]
    assert cut.kind == "replay"


def pool(kind: str, sizes: list[int]) -> list[Sample]:
    return [Sample(kind, [number] * size, [True] * size) for number, size in enumerate(sizes)]


def test_turns_take_all_of_a_pool_before_any_comes_again() -> None:
    given = pool("replay", [10, 20, 30, 40, 50])
    turns = in_turns(given, 55)
    assert [[sample.ids[0] for sample in next(turns)] for _ in range(4)] == [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4]]
    assert next(in_turns(given, 10_000)) == given  # none twice in a turn
    assert next(in_turns([], 100)) == next(in_turns(given, 0)) == []


@pytest.mark.parametrize(("epochs", "rounds"), [(1, 1), (2, 2), (50, 6)])
def test_each_round_holds_all_documents_and_other_replay(tokenizer: Tokenizer, epochs: int, rounds: int) -> None:
    spec = TrainSpec(model="tiny", replay=0.5, epochs=epochs)
    documents = [{"title": "The mill", "text": PAGE}]
    alone = list(in_rounds(documents, [], [], spec, tokenizer, print))
    wanted = 0.5 * count_tokens(alone[0])
    # prose for five and a half rounds of its share, chat for less than one
    prose = pool("replay", [round(wanted * (1 - CHAT_SHARE) / 4) + 1] * 22)
    chat = pool("replay", [7] * 3)
    found = list(in_rounds(documents, [], [chat, prose], spec, tokenizer, print))
    assert (len(alone), len(found)) == (1, rounds)
    for samples in found:
        assert Counter(sample.kind for sample in samples if sample.kind != "replay") == Counter(sample.kind for sample in alone[0])
        assert sum(sample in chat for sample in samples) == 3
    seen = [sample.ids[0] for samples in found for sample in samples if sample in prose and sample not in chat]
    assert len(seen) == 4 * rounds
    assert set(seen) == set(range(min(22, 4 * rounds)))  # none again before all were there


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"title": "a", "text": "b"}\n{"title"', "line 2 is not JSON"),
        ('{"title": "a"}\n', "line 1 lacks the text field 'text'"),
        ('{"title": "a", "text": 3}\n', "line 1 lacks the text field 'text'"),
        ("[]\n", "line 1 lacks the text field 'title'"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "documents.jsonl"
    file.write_text(content)
    with pytest.raises(StagingError, match=rf"documents\.jsonl, {reason}.*Correct or remove the line"):
        list(read_records(file, ("title", "text")))


def test_records_that_are_not_there_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match="stage the documents first"):
        list(read_records(tmp_path / "none.jsonl", ("title",)))
