"""Records of prompts, conversations and Guanaco's texts: which tokens are learned, and what does not fit a row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.chat_templates import FAMILIES, make_tokenizer
from support.job_tree import make_job
from trimtab.errors import StagingError
from trimtab.layout import JobDir
from trimtab.ledger import Account, Ledger
from trimtab.spec import TrainSpec
from trimtab_runtime.examples import Sample
from trimtab_runtime.objectives import (
    BATCH,
    Examples,
    completions,
    example_samples,
    guanaco,
    plain_prompt,
    read_examples,
    said_by_assistant,
)
from trimtab_runtime.prepare import prepare
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Spelled as SentencePiece does, without a chat template."""
    folder = tmp_path_factory.mktemp("blanks")
    make_tokenizer(folder, "", *FAMILIES["folded"][1:], blanks=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return Tokenizer(folder)


def asked(prompt: str, completion: str, source: str = "faq.jsonl:1") -> dict[str, Any]:
    return {"form": "completion", "prompt": prompt, "completion": completion, "source": source}


def chat(*turns: str, source: str = "talks.jsonl:1", **more: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    return {"form": "chat", "messages": messages, "source": source, **more}


def alpaca(instruction: str, given: str, output: str) -> dict[str, Any]:
    return {"form": "completion", "instruction": instruction, "input": given, "completion": output, "source": "alpaca.jsonl:1"}


GUANACO = "### Human: Who keeps the key?### Assistant: The keeper.### Human: Where?### Assistant: In the tower."


def made(records: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> Examples:
    return example_samples(records, TrainSpec(**{"model": "tiny", "max_seq_len": 512, **options}), tokenizer)


def learned(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token for token, flag in zip(sample.ids, sample.learned, strict=True) if flag])


@given(prompt=st.text(max_size=40), completion=st.text(min_size=1, max_size=40))
def test_a_completion_is_learned_from_its_first_token_to_its_end(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    ((ids, flags),) = completions([(prompt, completion)], tokenizer)
    assert ids[-1] == tokenizer.eos_id
    border = list(flags).index(1)
    assert list(flags) == [0] * border + [1] * (len(ids) - border)
    assert list(ids[:border]) == tokenizer.text(prompt), "what a server gives the model"
    assert tokenizer.decode(ids[border:-1]) == completion
    whole = tokenizer.text(prompt + completion)
    if whole[:border] == list(ids[:border]):
        assert list(ids[:-1]) == whole


def test_a_token_over_the_border_is_taken_apart_and_puts_no_blank_there(blanks: Tokenizer) -> None:
    found = completions([("The key", " of the tower"), ("The k", "eeper keeps"), ("Who?\n", "The keeper")], blanks)
    for (ids, flags), completion in zip(found, (" of the tower", "eeper keeps", "The keeper"), strict=True):
        texts = blanks.pieces(ids)
        assert "".join(text for text, flag in zip(texts, flags, strict=True) if flag) == f"{completion}</s>"
    assert [list(ids[: list(flags).index(1)]) for ids, flags in found] == [blanks.text(prompt) for prompt in ("The key", "The k", "Who?\n")]


def test_each_form_learns_what_it_is_for_and_says_so(tokenizer: Tokenizer) -> None:
    records = [
        asked("When is bread baked?\n", "On Tuesdays."),
        chat("Who keeps the key?", "The keeper.", "Where?", "In the tower."),
        alpaca("Name the keeper's book.", "", "Green."),
        {"form": "guanaco", "text": GUANACO, "source": "g.jsonl:1"},
        asked("Who?\n", "Ada."),
    ]
    found = made(records, tokenizer)
    assert [sample.kind for sample in found.samples] == ["completion", "chat", "completion", "guanaco", "completion"]
    assert [learned(sample, tokenizer) for sample in found.samples] == [
        "On Tuesdays.",
        "The keeper.In the tower.",
        "Green.",
        GUANACO,
        "Ada.",
    ]
    assert "Name the keeper's book." in tokenizer.decode(found.samples[2].ids)
    sizes = [len(sample.ids) for sample in found.samples]
    counts = [sum(sample.learned) for sample in found.samples]
    assert found.notes == [
        f"2 examples of prompt and completion: loss on {counts[0] + counts[4]} completion tokens of {sizes[0] + sizes[4]}; "
        "the prompts stand in no chat template",
        f"1 instruction, a conversation in the model's chat template: loss on {counts[2]} answer tokens of {sizes[2]}",
        f"1 conversation in the model's chat template: loss on {counts[1]} tokens of {sizes[1]}: the assistant's turns and their ends",
        f"1 text of ### Human and ### Assistant, as it stands: loss on all {sizes[3]} tokens, as in running text",
    ]


def test_objective_all_learns_everything_and_answers_the_assistants_parts(tokenizer: Tokenizer) -> None:
    records = [asked("Who?\n", "Ada."), chat("Who?", "The keeper."), {"form": "guanaco", "text": GUANACO, "source": "g.jsonl:1"}]
    everything = made(records, tokenizer, objective="all")
    assert all(all(sample.learned) for sample in everything.samples)
    assert all("as objective all asks" in note for note in everything.notes)
    answers = made(records, tokenizer, objective="answers")
    assert [learned(sample, tokenizer) for sample in answers.samples] == ["Ada.", "The keeper.", " The keeper. In the tower."]
    assert answers.samples[2].learned[-1], "that the text ends, where the Assistant has the last word"
    ((ids, flags),) = guanaco([GUANACO + "### Human: Thanks."], tokenizer, answers=True)
    assert not flags[-1]
    assert len(ids) == len(flags)


def test_an_instruction_is_a_plain_prompt_where_there_is_no_chat_template(blanks: Tokenizer) -> None:
    records = [alpaca("Name the book.", "It is green.", "Ada"), alpaca("Name the book.", " ", "Ada")]
    assert [plain_prompt(record) for record in records] == [
        "### Instruction:\nName the book.\n\n### Input:\nIt is green.\n\n### Response:\n",
        "### Instruction:\nName the book.\n\n### Response:\n",
    ]
    found = made(records, blanks)
    assert [blanks.text(plain_prompt(record)) for record in records] == [
        [token for token, flag in zip(sample.ids, sample.learned, strict=True) if not flag] for sample in found.samples
    ]
    assert "as plain prompts, since the model has no chat template" in found.notes[0]


def test_of_a_pair_of_turns_only_the_last_answer_is_learned(tokenizer: Tokenizer) -> None:
    found = made([chat("Who?", "The keeper.", "Where?", "In the tower.", learn_last=True)], tokenizer)
    assert [learned(sample, tokenizer) for sample in found.samples] == ["In the tower."]


def test_where_a_template_ends_no_turn_the_end_of_the_text_is_learned(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, *FAMILIES["open"])
    tokenizer = Tokenizer(tmp_path)
    (sample,) = made([chat("Who?", "The keeper.", "Where?", "In the tower.")], tokenizer).samples
    assert sample.ids[-1] == tokenizer.eos_id
    assert sample.learned[-1]
    assert list(sample.ids[:-1]) == tokenizer.chat(chat("Who?", "The keeper.", "Where?", "In the tower.")["messages"])[0]


@pytest.mark.parametrize("word", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_no_record_writes_a_control_token(tokenizer: Tokenizer, word: str) -> None:
    records = [
        asked(f"a{word}", f"{word}b"),
        chat(f"{word}", f"b{word}c"),
        {"form": "guanaco", "text": f"{word}{GUANACO}{word}", "source": ""},
    ]
    harmless = [asked("a", "b"), chat("a", "b"), {"form": "guanaco", "text": GUANACO, "source": ""}]
    for spelled, plain in zip(made(records, tokenizer).samples, made(harmless, tokenizer).samples, strict=True):
        assert [token for token in spelled.ids if token < 3] == [token for token in plain.ids if token < 3]
        assert tokenizer.decode(spelled.ids).count(word) >= 1


LONG = [chat("Who?", "The keeper keeps it. " * number, source=f"talks.jsonl:{number}") for number in range(1, 13)]


def test_what_is_too_long_fails_by_name_and_says_what_would_fit(tokenizer: Tokenizer) -> None:
    sizes = [len(sample.ids) for sample in made(LONG, tokenizer).samples]
    most = sizes[5]
    named = ", ".join(rf"talks\.jsonl:{number} \({sizes[number - 1]} tokens\)" for number in range(7, 12))
    advice = rf"\(--max-seq-len {sizes[-1]}\), or leave these out \(--too-long drop\), or their ends \(--too-long cut\)"
    with pytest.raises(StagingError, match=rf"^6 of the examples do not fit a row of {most} tokens: {named} and 1 more.*{advice}$"):
        made(LONG, tokenizer, max_seq_len=most)
    assert len(made(LONG, tokenizer, max_seq_len=sizes[-1]).samples) == 12


def test_what_is_dropped_is_counted(tokenizer: Tokenizer) -> None:
    sizes = [len(sample.ids) for sample in made(LONG, tokenizer).samples]
    found = made(LONG, tokenizer, max_seq_len=sizes[5], too_long="drop")
    assert [len(sample.ids) for sample in found.samples] == sizes[:6]
    account = found.left_out["chat"]
    assert (account.left_out, account.cut, account.dropped, account.trained) == (6, 0, sum(sizes[6:]), 0)


def test_what_is_cut_is_counted_and_dropped_where_nothing_learned_is_left(tokenizer: Tokenizer) -> None:
    records = [*LONG, chat("Who keeps the key? " * 40, "The keeper.", source="talks.jsonl:99")]
    sizes = [len(sample.ids) for sample in made(records, tokenizer, max_seq_len=2048).samples]
    most = sizes[5]
    found = made(records, tokenizer, max_seq_len=most, too_long="cut")
    assert [len(sample.ids) for sample in found.samples] == [min(size, most) for size in sizes[:-1]]
    assert all(any(sample.learned[1:]) for sample in found.samples)
    account = found.left_out["chat"]
    assert (account.left_out, account.cut, account.samples) == (1, 6, 1)
    assert account.dropped == sum(size - most for size in sizes[6:-1]) + sizes[-1]


@pytest.mark.parametrize(
    ("positions", "advice"),
    [
        (20, r"Give longer rows \(--max-seq-len {longest}\), or"),
        (10, r"Rows of this model may have {limit} tokens \(--max-seq-len {limit}\), in which 2 still do not fit; or"),
        (6, "None fits the {limit} tokens that a row of this model may have:"),
        (5, "None fits the {limit} tokens that a row of this model may have:"),
    ],
)
def test_no_longer_rows_are_advised_than_the_model_takes(tmp_path: Path, positions: int, advice: str) -> None:
    make_tokenizer(tmp_path, *FAMILIES["plain"])
    sizes = [len(sample.ids) for sample in made(LONG, Tokenizer(tmp_path)).samples]
    limit = [*sizes, *[sizes[-1] + 7] * 9][positions - 1]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": limit}))
    advice = advice.format(longest=sizes[-1], limit=sizes[5] if positions == 6 else limit)
    most = sizes[min(positions, 6) - 1]
    with pytest.raises(StagingError, match=rf"tokens\)( and \d more)?\. {advice} leave these out \(--too-long drop\), or their ends"):
        made(LONG, Tokenizer(tmp_path), max_seq_len=most)


@pytest.mark.parametrize("too_long", ["fail", "drop", "cut"])
def test_turns_are_not_looked_for_in_a_long_conversation_that_is_not_trained(tmp_path: Path, too_long: str) -> None:
    template = FAMILIES["plain"][0].replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}", 1)
    make_tokenizer(tmp_path, template, *FAMILIES["plain"][1:])
    long = chat("Who keeps the key? " * 1500, "The keeper.", source="talks.jsonl:1")
    reason = {"fail": "1 of the examples does not fit", "drop": "", "cut": "leaves out or moves a turn of the assistant"}[too_long]
    if reason:
        with pytest.raises(StagingError, match=reason):
            made([long], Tokenizer(tmp_path), too_long=too_long)
    else:
        assert made([long], Tokenizer(tmp_path), too_long=too_long).left_out["chat"].left_out == 1
    with pytest.raises(StagingError, match="leaves out or moves a turn of the assistant"):
        made([chat("Who?", "The keeper.")], Tokenizer(tmp_path), too_long=too_long)


def test_where_nobody_answers_it_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    silent = [chat("Who keeps the key?"), {"form": "guanaco", "text": "### Human: Who?", "source": "g.jsonl:1"}]
    found = made([*silent, chat("Who?", "The keeper.")], tokenizer, objective="answers")
    assert [learned(sample, tokenizer) for sample in found.samples] == ["The keeper."]
    for account in (found.left_out["chat"], found.left_out["guanaco"]):
        assert (account.samples, account.left_out, account.unanswered, account.trained) == (1, 1, 1, 0)
        assert account.dropped == account.tokens > 0
    assert not made(silent, tokenizer, objective="all").left_out
    account = sum(found.left_out.values(), Account(samples=1, tokens=9, trained=9))
    lines = Ledger(accounts={"chat": account}, rounds=(1,), row_tokens=16).lines()
    assert f"nobody answers in 2 examples: left out; {account.dropped} tokens of them are not trained on" in lines
    assert lines[-1].endswith("from 1 sample")


def test_thinking_that_the_template_takes_out_of_the_last_turn_is_told_apart(tmp_path: Path) -> None:
    template = FAMILIES["plain"][0].replace("m['content']", "m['content'].split('</think>')[-1]")
    make_tokenizer(tmp_path, template, *FAMILIES["plain"][1:])
    thought = "<think>\nHm.\n</think>\n\nThe keeper."
    records = [chat("Who?", thought, "And where?", thought), chat("Who?", thought), chat("Who?", thought, "Where?", "There.")]
    earlier, last = made(records, Tokenizer(tmp_path)).notes[-2:]
    assert earlier == "thinking is left out of 2 earlier turns, as the chat template does: it is not learned"
    assert last.startswith("thinking is left out of 2 last turns, too, as the chat template does: no thought there is learned; to learn it")


def test_a_text_of_many_blanks_is_read_in_one_go(tokenizer: Tokenizer) -> None:
    text = "### Human: a\n### Assistant: b" + " " * 300_000 + "c" + " " * 300_000 + "\n### Human: d### Assistant: e### Assistant: f "
    began = time.process_time()
    found = [text[slice(*span)] for span in said_by_assistant(text)]
    assert time.process_time() - began < 2
    assert found == [" b" + " " * 300_000 + "c", " e", " f "]
    assert said_by_assistant("### Human: a") == said_by_assistant("") == []


def with_examples(job: JobDir, records: list[dict[str, Any]]) -> JobDir:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (job.channel("documents") / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    return job


def prepared(job: JobDir) -> tuple[Ledger, list[str]]:
    said: list[str] = []
    spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    return prepare(job, spec, said.append), said


def test_examples_and_pages_stand_in_the_same_rows_and_the_ledger_says_what_became_of_each(tmp_path: Path, tiny_model: Path) -> None:
    records = [*LONG, asked("When?\n", "At dawn."), {"form": "guanaco", "text": GUANACO, "source": "g.jsonl:1"}]
    job = with_examples(make_job(tmp_path, tiny_model, max_seq_len=80, too_long="drop"), records)
    ledger, said = prepared(job)
    assert ledger.total.tokens == ledger.total.trained + ledger.total.dropped
    assert ledger.accounts["chat"].samples == 12
    assert {"document", "sentence", "chat", "completion", "guanaco"} == set(ledger.accounts)
    kept = ledger.total.samples - ledger.total.left_out
    assert said[-4:] == ledger.lines()[-4:]
    assert ledger.accounts["chat"].left_out == 1
    assert "longer than a row of 80: 1 example dropped, 0 cut" in said[-2]
    assert f"from {kept} samples" in said[-1]
    assert any("conversations in the model's chat template: loss on" in line for line in ledger.lines())
    rows = PackedRows(job.channel("train"))
    pieces = [rows.sample(row, place) for row in range(len(rows)) for place in range(len(rows[row].lengths))]
    whole = [piece for piece in pieces if piece[0] in ("chat", "completion", "guanaco")]
    assert len(whole) == len(set(whole)) == 14 - ledger.accounts["chat"].left_out, "none is split"
    assert Ledger.model_validate_json((job.channel("train") / "ledger.json").read_text()) == ledger


def test_examples_without_a_page_are_data_too(tmp_path: Path, tiny_model: Path) -> None:
    job = with_examples(make_job(tmp_path, tiny_model), [chat("Who?", "The keeper.")])
    (job.channel("documents") / "documents.jsonl").unlink()
    ledger, said = prepared(job)
    assert list(ledger.accounts) == ["chat"]
    assert not any("questions" in line for line in said)


@pytest.mark.parametrize(
    ("documents", "records", "options", "reason"),
    [
        ({"a": ""}, None, {"views": ("sentence",)}, "the 1 document is empty. Give pages with text"),
        ({}, [], {}, "there are no documents and no examples. Give pages with text, or records"),
        ({}, [chat("Who?")], {}, "in 1 example nobody answers. Give records with answers, or .* --objective all"),
        ({}, [chat("Who?"), LONG[-1]], {"too_long": "drop"}, "in 1 example nobody answers and 1 is longer than a row. Give records"),
        ({}, LONG[-2:], {"too_long": "drop"}, r"all 2 examples are longer than a row .* \(--max-seq-len\), or cut .* \(--too-long cut\)"),
    ],
    ids=["empty page", "nothing", "no answers", "no answers or dropped", "all dropped"],
)
def test_data_without_a_token_to_learn_says_why(
    tmp_path: Path, tiny_model: Path, documents: dict[str, str], records: list[dict[str, Any]] | None, options: dict[str, Any], reason: str
) -> None:
    job = make_job(tmp_path, tiny_model, documents, **options)
    if not documents:
        (job.channel("documents") / "documents.jsonl").write_text("")
    if records is not None:
        with_examples(job, records)
    with pytest.raises(StagingError, match=f"there is no token to train on: {reason}"):
        prepared(job)


def test_what_the_template_refuses_is_named_by_its_source(tokenizer: Tokenizer) -> None:
    records = [
        chat("Who?", "Ada."),
        chat("Tide?", "High.", source="talks.jsonl:17", tools=[{"type": "function", "function": {"name": "t"}}]),
    ]
    with pytest.raises(StagingError, match=r'^talks\.jsonl:17: the chat template ignores tools: .* remove "tools" from the records'):
        made(records, tokenizer)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"form"', "is not JSON"),
        ('{"form": "poem"}', "is no example: its form is none of completion, chat, guanaco"),
        ('{"form": "chat", "messages": []}', "lacks messages with roles"),
        ('{"form": "completion", "prompt": "a"}', "lacks the text field 'completion'"),
        ('{"form": "completion", "instruction": "a", "completion": "b"}', "lacks the text field 'input'"),
        ('{"form": "guanaco", "text": 3}', "lacks the text field 'text'"),
    ],
)
def test_a_broken_example_is_named_by_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(json.dumps(chat("a", "b")) + "\n" + line + "\n")
    with pytest.raises(StagingError, match=rf"examples\.jsonl, line 2 {reason}.*Correct or remove the line"):
        list(read_examples(file))


def test_many_examples_keep_their_order_over_the_batches(tokenizer: Tokenizer) -> None:
    records = [(asked if number % 3 else chat)(f"{number}?", f"{number}!") for number in range(2 * BATCH + 7)]
    found = made(records, tokenizer)
    assert [learned(sample, tokenizer) for sample in found.samples] == [f"{number}!" for number in range(len(records))]


def test_an_older_ledger_is_read() -> None:
    text = '{"accounts": {"document": {"samples": 1, "tokens": 9, "trained": 9, "dropped": 0}}, "rounds": [1], "row_tokens": 16}'
    assert Ledger.model_validate_json(text).lines() == [
        "ledger: 9 tokens in = 9 trained + 0 dropped (document 9)",
        "rows: 1 of 16 tokens, 56.2% full, from 1 sample",
    ]
