"""Records from what the user passes to packed rows: named by content, whatever file they came in."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab import data
from trimtab.spec import JobSpec
from trimtab.staging import data_digest, documents_digest, stage

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
    both = pages.model_copy(update={"examples": loaded["a"].examples})
    assert len({data_digest(both), data_digest(pages), digests["a"]}) == 3
