"""Records from what the user passes to packed rows: named by content, whatever file they came in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trimtab import data
from trimtab.spec import JobSpec
from trimtab.staging import data_digest, documents_digest, stage
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.tokenizer import Tokenizer

ROWS = [{"question": f"Which berth has ship {number}?", "answer": f"Berth {number}."} for number in range(12)]


def quiet(line: str) -> None:
    pass


def test_records_alone_are_staged_and_found_again_from_another_file(small_job: JobSpec, tmp_path: Path):
    lines, table = tmp_path / "faq.jsonl", tmp_path / "elsewhere.csv"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    said: list[str] = []
    first = stage(small_job.model_copy(update={"data": (str(lines),)}), cache=tmp_path, say=said.append)
    assert first.ledger.accounts["completion"].samples == 12
    assert first.loaded.examples is not None
    assert first.loaded.documents == ()
    folder = first.channels["train"].parent / "documents"
    assert (folder / "documents.jsonl").read_bytes() == b""
    assert (folder / "examples.jsonl").read_bytes() == first.loaded.examples.path.read_bytes()
    again = stage(small_job.model_copy(update={"data": (str(table),)}), cache=tmp_path, say=quiet)
    assert again.reused
    assert again.train == first.train


def test_records_and_pages_are_staged_together(small_job: JobSpec, tmp_path: Path):
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"text": "The quay is long."}\n')
    sources = (str(tmp_path / "faq.jsonl"), *small_job.data)
    staged = stage(small_job.model_copy(update={"data": sources}), cache=tmp_path, say=quiet)
    assert {"completion", "document"} <= set(staged.ledger.accounts)
    pages = data.load(small_job.data, say=quiet)
    assert [document.text for document in staged.loaded.documents] == ["The quay is long.", *(page.text for page in pages.documents)]


def test_the_digest_is_of_documents_and_examples_in_their_order(small_job: JobSpec, tmp_path: Path):
    for name, rows in (("a", ROWS), ("b", ROWS[::-1]), ("c", [*ROWS, ROWS[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = {name: data.load(tmp_path / f"{name}.jsonl", cache=tmp_path, say=quiet) for name in "abc"}
    digests = {name: data_digest(one) for name, one in loaded.items()}
    assert digests["a"] == digests["c"] != digests["b"]
    pages = data.load(small_job.data, say=quiet)
    assert data_digest(pages) == documents_digest(pages.documents)  # as before there were records
    listed = json.dumps([[document.title, document.text] for document in pages.documents])
    assert documents_digest(pages.documents) == hashlib.sha256(listed.encode()).hexdigest()
    assert documents_digest([]) == hashlib.sha256(b"[]").hexdigest()
    both = pages.model_copy(update={"examples": loaded["a"].examples})
    assert len({data_digest(both), data_digest(pages), digests["a"]}) == 3


def test_what_was_skipped_stays_in_the_ledger_and_only_where_it_was(small_job: JobSpec, tmp_path: Path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name, text in (("whole", lines), ("broken", lines + "{}\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    job = small_job.model_copy(update={"on_error": "skip"})
    staged = {
        name: stage(job.model_copy(update={"data": (str(tmp_path / f"{name}.jsonl"),)}), cache=tmp_path, say=quiet)
        for name in ("broken", "whole")
    }
    note = "skipped, because they cannot be read: 1 of 13 records of broken.jsonl"
    assert note in staged["broken"].ledger.notes
    assert note in (staged["broken"].channels["train"] / "ledger.json").read_text()
    assert note not in staged["whole"].ledger.notes
    assert staged["broken"].train == staged["whole"].train
    assert not staged["whole"].reused


def test_of_a_prompt_that_ends_with_a_tool_only_the_completion_is_learned(small_job: JobSpec, tiny_model: Path, tmp_path: Path):
    earlier = {"role": "assistant", "content": "Let me look."}
    prompt = [{"role": "user", "content": "Where?"}, earlier, {"role": "tool", "content": "north"}]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "At the quay."}]}
    (tmp_path / "agent.jsonl").write_text(json.dumps(record) + "\n")
    staged = stage(small_job.model_copy(update={"data": (str(tmp_path / "agent.jsonl"),)}), cache=tmp_path, say=quiet)
    rows = PackedRows(staged.channels["train"])
    learned = [int(token) for token, wanted in zip(rows[0].tokens, rows[0].learned, strict=True) if wanted]
    text = Tokenizer(tiny_model).decode(learned)
    assert "At the quay." in text
    assert "Let me look." not in text
