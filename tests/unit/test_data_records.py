"""Records from files and addresses: what is read, what is said, and each way in which a file can be broken."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from support.site_server import Reply, SiteServer
from trimtab.data import FetchLimits, Loaded, load
from trimtab.errors import DataError

RECORDS = Path(__file__).parents[1] / "support/records"
ROW = {"question": "Where is she?", "answer": "At the north quay."}
LINE = json.dumps(ROW).encode() + b"\n"
CANONICAL = {"form": "completion", "instruction": "Where is she?", "input": "", "completion": "At the north quay."}


class Said(list[str]):
    """What `load` said, line by line."""

    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(*sources: str | Path, said: Said | None = None, **options: Any) -> Loaded:
    return load(sources, allow_private_hosts=True, say=said if said is not None else Said(), **options)


def examples(loaded: Loaded) -> list[dict[str, Any]]:
    if loaded.examples is None:
        return []
    found = [json.loads(line) for line in loaded.examples.path.read_text().split("\n")[:-1]]
    assert len(found) == loaded.examples.count
    return found


def written(tmp_path: Path, name: str, body: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(body)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    head, reason, advice = str(caught.value).split("\n  ", 1)[0], *str(caught.value).split("\n  ", 1)[1].rsplit("\n", 1)
    if head == "the source could not be read:":
        assert advice == "Correct what was passed and try again."
    else:
        assert re.fullmatch(r"[\d,]+ of (the first )?[\d,]+ records cannot be read:", head)
        assert advice == 'Correct what is broken, or go on without it: --on-error skip (on_error="skip").'
    return reason.removeprefix(f"{path.name}: ")


def test_a_folder_with_every_form(cache: Path):
    said = Said()
    loaded = read(RECORDS, said=said)
    assert [document.title for document in loaded.documents] == ["The Vane", "The Orla"]
    assert loaded.documents[0].text == "The ferry Astrid Vane was built in 1974.\nShe has 240 seats."
    assert loaded.documents[1].source == "records/corpus.jsonl:2"
    found = examples(loaded)
    assert [one["source"].removeprefix("records/") for one in found] == [
        *("alpaca.jsonl:1", "alpaca.jsonl:2", "alpaca.jsonl:3", "guanaco.jsonl:1", "messages.jsonl:1", "messages.jsonl:2"),
        *("questions.csv:2", "questions.csv:4", "sharegpt.json:2"),
    ]
    assert found[6]["instruction"] == 'How long is the "Vane"?'
    assert found[6]["completion"] == "She is long:\n92 metres."
    assert said == [
        "data: records/alpaca.jsonl: 3 records with instruction, input, output: Alpaca; loss on the answer",
        "data: records/alpaca.jsonl: left out, because no form reads them there: id",
        "data: records/corpus.jsonl: 2 records with title, text: running text; loss on every token",
        "data: records/guanaco.jsonl: 1 record with text: Guanaco; loss on every token",
        "data: records/messages.jsonl: 2 records with messages: conversations; loss on every assistant turn",
        "data: records/questions.csv: 2 records with question, answer: question and answer; loss on the answer",
        "data: records/sharegpt.json: 1 record with conversations: ShareGPT; loss on every assistant turn",
        "data: records/sharegpt.json: left out, because no form reads them there: id",
        "data: 9 examples (3 chat, 5 completion, 1 guanaco)",
    ]
    assert loaded.examples is not None
    assert loaded.examples.path == cache / "examples" / f"{loaded.examples.digest}.jsonl"
    assert [path.name for path in (cache / "examples").iterdir()] == [loaded.examples.path.name]


def test_pages_and_records_keep_the_order_of_the_sources(tmp_path: Path):
    page = written(tmp_path, "ida.txt", b"Ida Holm steers the Vane.")
    said = Said()
    loaded = read(RECORDS / "corpus.jsonl", page, RECORDS / "alpaca.jsonl", said=said)
    assert [document.source for document in loaded.documents] == ["corpus.jsonl:1", "corpus.jsonl:2", "ida.txt"]
    assert said[-2:] == [
        "data: 1 document with 5 words of main text; the pages show 5 words",
        "data: 3 examples (3 completion)",
    ]


ROWS = [{"question": f"Question {number}?", "answer": f"Answer\n{number}"} for number in range(3)]
AS_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
AS_CSV = "question,answer\n" + "".join(f'{row["question"]},"{row["answer"]}"\n' for row in ROWS)
COLUMNS = {name: [row[name] for row in ROWS] for name in ("question", "answer")}


def parquet(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.parquet", group: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name, row_group_size=group, compression="none")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("rows.jsonl", AS_LINES.encode()),
        ("rows.ndjson", b"\xef\xbb\xbf" + AS_LINES.replace("\n", "\r\n\r\n").encode().rstrip()),
        ("rows.jsonl.gz", gzip.compress(AS_LINES[:40].encode()) + gzip.compress(AS_LINES[40:].encode())),
        ("rows.ndjson.gz", gzip.compress(AS_LINES.encode())),
        ("rows.jsonl", gzip.compress(AS_LINES.encode())),  # its first bytes say more than its name
        ("rows.json", json.dumps(ROWS, indent=1).encode()),
        ("rows.json", json.dumps({"version": 2, "data": ROWS}).encode()),
        ("rows.json", json.dumps({"questions": ROWS}).encode()),
        ("rows.json", json.dumps(COLUMNS).encode()),
        ("rows.json", json.dumps({name: dict(enumerate(column)) for name, column in COLUMNS.items()}).encode()),  # as pandas writes it
        ("rows.json", AS_LINES.encode()),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("rows.csv", b"\xef\xbb\xbf" + AS_CSV.replace("\n", "\r\n").replace("\r\n0", "\n0").encode()),
        ("rows.csv", AS_CSV.replace(",", ";").encode()),
        ("rows.csv.gz", gzip.compress(AS_CSV.encode())),
        ("rows.tsv", AS_CSV.replace(",", "\t").encode()),
    ],
)
def test_the_same_rows_in_every_kind_of_file(tmp_path: Path, name: str, body: bytes):
    loaded = read(written(tmp_path, name, body))
    found = examples(loaded)
    assert [(one["instruction"], one["completion"].replace("\r\n", "\n")) for one in found] == [
        (row["question"], row["answer"]) for row in ROWS
    ]


def test_the_digest_is_of_the_contents_and_not_of_their_place(tmp_path: Path):
    files = [written(tmp_path, "a.jsonl", AS_LINES.encode()), written(tmp_path, "b.csv", AS_CSV.encode())]
    digests = {read(path).examples.digest for path in files}  # type: ignore[union-attr]
    digests.add(read(parquet(tmp_path, ROWS)).examples.digest)  # type: ignore[union-attr]
    assert len(digests) == 1
    other = read(written(tmp_path, "c.jsonl", AS_LINES.replace("Question 1", "Question 9").encode()))
    assert other.examples.digest not in digests  # type: ignore[union-attr]


def test_parquet_reads_the_columns_of_its_form_alone(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi", "tool_calls": None}, {"role": "assistant", "content": "Hello", "tool_calls": None}]
    tool = {"name": "berth", "parameters": {"ship": {"type": "string"}, "at": None}}
    other = {"name": "tide", "parameters": {"ship": None, "at": {"type": "string"}}}
    rows = [{"messages": turns, "tools": [tool], "image": b"\x00" * 9}, {"messages": turns, "tools": [other], "image": b""}]
    said = Said()
    found = examples(read(parquet(tmp_path, rows), said=said))
    assert found[0] == {
        "form": "chat",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "tools": [{"type": "function", "function": {"name": "berth", "parameters": {"ship": {"type": "string"}}}}],
        "source": "rows.parquet:1",
    }
    assert found[1]["tools"][0]["function"]["parameters"] == {"at": {"type": "string"}}
    assert said[1] == "data: rows.parquet: left out, because no form reads them there: image"
    bad = parquet(tmp_path, [ROW, ROW | {"answer": None}, {"question": "x", "answer": " "}], "bad.parquet")
    assert refused(bad) == (
        "\n    row 2: answer is null; give it a text, or remove the record"
        "\n    row 3: answer is empty; write its text, or remove the record"
    )
    assert "no form of record" in refused(parquet(tmp_path, [{"img": 1}, {"img": 2}], "images.parquet"))


def test_a_row_may_be_of_another_form_than_the_one_before(tmp_path: Path):
    mixed = [
        ROW,
        {"text": "She is blue."},
        {"messages": None, **ROW, "answer": "Gone."},
        {"prompt": "a", "completion": "b", "answer": None},
    ]
    said = Said()
    loaded = read(written(tmp_path, "mixed.jsonl", "\n".join(map(json.dumps, mixed)).encode()), said=said)
    assert [document.text for document in loaded.documents] == ["She is blue."]
    assert [one["form"] for one in examples(loaded)] == ["completion"] * 3
    assert said[:3] == [
        "data: mixed.jsonl: 2 records with question, answer: question and answer; loss on the answer",
        "data: mixed.jsonl: 1 record with text: running text; loss on every token",
        "data: mixed.jsonl: 1 record with prompt, completion: prompt and completion; loss on the completion",
    ]


def test_equal_records_are_kept_once_and_counted(tmp_path: Path):
    said = Said()
    body = LINE + b'{"text": "She is blue."}\n' + LINE + b'{"text": "She is blue.", "id": 2}\n' + LINE
    loaded = read(
        written(tmp_path, "twice.jsonl", body),
        written(tmp_path, "again.csv", b"answer,question\nAt the north quay.,Where is she?\n"),
        said=said,
    )
    assert [len(examples(loaded)), len(loaded.documents)] == [1, 1]
    assert "data: twice.jsonl: 3 records are the same as one before (the first: line 3); each is kept once" in said
    assert "data: again.csv: 1 record is the same as one before (the first: line 2); each is kept once" in said


BROKEN = {
    b'{"question": "a", answer: "b"}':
    "it is not JSON (expecting property name enclosed in double quotes at column 19); correct it, or remove the record",
    b'{"question": "a", "answer": "b"': "it is not JSON (expecting ',' delimiter at column 32); correct it, or remove the record",
    b'{"question": "a", "answer": NaN}': "NaN is no JSON; write null, or a text",
    b'{"question": "a", "answer": "b", "x": -Infinity}': "-Infinity is no JSON; write null, or a text",
    b'{"question": "a", "answer": "b", "question": "c"}': "'question' is there twice in one object; keep one of them",
    b'{"question": "a", "answer": "\xe9"}': "it is not UTF-8 (byte 0xe9 at position 30); write the file again as UTF-8",
    b'{"question": "a", "answer": "\\ud83d"}': "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; correct it",
    b"\0" * 40: "it holds NUL bytes, as a file has that was not written to its end; remove the line or write the file again",
    b'{"question": "a", "answer": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}":
    "it is nested too deeply to be read; flatten it, or remove the record",
    b'["a", "b"]': "it is no object; write each record as an object, {...}",
    b'{"question": "a"}':
    "its columns are question, which make no form of record; the answer is missing: completion, output, response or answer. "
    "Rename them to one of: text; prompt and completion; instruction and output; messages; conversations",
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_line_is_named_and_may_be_skipped(tmp_path: Path, line: bytes, reason: str):
    path = written(tmp_path, "faq.jsonl", LINE + line + b"\r\n" + LINE.replace(b"north", b"south"))
    assert refused(path) == f"line 2: {reason}"
    said = Said()
    loaded = read(path, on_error="skip", said=said)
    assert [one["source"] for one in examples(loaded)] == ["faq.jsonl:1", "faq.jsonl:3"]
    assert [(item.source, item.reason) for item in loaded.skipped] == [("faq.jsonl", f"line 2: {reason}")]
    assert f"data: faq.jsonl: 1 of 3 records skipped: line 2: {reason}" in said
    assert loaded.losses == ("skipped, because they cannot be read: 1 of 3 records of faq.jsonl",)


def test_many_broken_lines_are_counted_and_the_first_named(tmp_path: Path):
    path = written(tmp_path, "faq.jsonl", (LINE + b"{}\n[]\n") * 5)
    nothing, no_object = "it has no columns with a value; remove it", "it is no object; write each record as an object, {...}"
    assert refused(path) == (f"\n    lines 2, 5, 8: {nothing}\n    lines 3, 6: {no_object}\n    what comes after these was not looked at")
    (skipped,) = read(path, on_error="skip").skipped
    assert skipped.reason.endswith("\n    and 5 more of 15 records")
    only = written(tmp_path, "only.jsonl", b"{}\n{}\n")
    with pytest.raises(DataError, match="lines 1, 2: it has no columns"):
        read(only, on_error="skip")
    assert len(read(only, path, on_error="skip").skipped) == 2


def test_numbers_that_json_or_python_cannot_hold_are_never_changed(tmp_path: Path):
    long = written(tmp_path, "long.jsonl", LINE[:-2] + b', "id": ' + b"9" * 10_000 + b"}\n")
    assert refused(long) == "line 1: it holds a number of 10,000 digits; write it as a text"
    call = {"function": {"name": "berth", "arguments": {"at": 1}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    body = json.dumps({"messages": turns}).replace("1}", "1e999}").encode()
    assert "it holds what JSON cannot, such as an infinite number" in refused(written(tmp_path, "infinite.jsonl", body))


def test_a_line_of_ten_megabytes(tmp_path: Path):
    path = written(tmp_path, "faq.jsonl", json.dumps({**ROW, "answer": "quay " * 2_000_000}).encode())
    assert len(examples(read(path))[0]["completion"]) == 10_000_000  # a page would be refused: FetchLimits().max_bytes


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("faq.jsonl", b"", "it holds no records"),
        ("faq.jsonl", b"\n \r\n", "it holds no records"),
        ("faq.json", b"[]", "it holds no records"),
        ("faq.csv", b"question,answer\n", "it holds no records"),
        ("faq.jsonl", LINE.decode().encode("utf-16"), "line 1: it is UTF-16 or UTF-32, not UTF-8; write it again as UTF-8"),
        ("faq.csv", "question,answer\na,b\n".encode("utf-16-le"), "line 1: it is UTF-16 or UTF-32, not UTF-8"),
        ("faq.json", b"\xff\xfe[\0]\0", "line 1: it is UTF-16 or UTF-32, not UTF-8"),
        ("faq.jsonl.gz", gzip.compress(LINE)[:6], "line 1: the gzip file is cut short"),
        ("faq.jsonl", json.dumps([ROW]).encode(), "line 1: it is a JSON list; name the file .json"),
        ("faq.jsonl", json.dumps(ROW, indent=1).encode(), "line 1: the file is one JSON value over many lines; name it .json"),
        ("faq.json", json.dumps([ROW, ROW | {"answer": "b"}], indent=1).encode()[:-6], "line 8: it is not JSON (unterminated string"),
        ("faq.json", b'[\n{"question": "a", "answer": "b"}\n{}]', "line 3: after this record there is neither a comma nor the list's end"),
        ("faq.json", b'[{"question": "a", "answer": "b"}]\nx', "line 1: the list ends here and more follows"),
        ("faq.json", b"[" * 100_000, "line 1: it is nested too deeply"),
        ("faq.json", b'{"x":' * 100_000, "line 1: it is nested too deeply"),
        ("faq.json", json.dumps({"train": [ROW], "test": [ROW]}).encode(), "line 1: it has several lists of records (train, test)"),
        ("faq.json", json.dumps({"question": ["a"], "answer": ["b", "c"]}).encode(), "line 1: its columns are of different lengths (1, 2)"),
        ("faq.csv", b'question,answer\na,"b\nc"\nd,e,f\ng,h\n', "line 4: the row has 3 fields and the first line names 2"),
        ("faq.csv", b'question,answer\na,b\nc,"d\ne,f\n', "line 3: the row that begins here cannot be read (unexpected end of data)"),
        ("faq.csv", b"question,answer,question\na,b,c\n", "line 1: the column name 'question' is there twice"),
        ("faq.csv", b"question,answer\na,b\nc,\xe9\nd,e\n", "line 3: it is not UTF-8 (byte 0xe9 at position 3)"),
        ("faq.csv", b"question,answer\na,b\nc,\0\0\n", "line 3: it holds NUL bytes"),
        ("faq.csv", b"question,answer\na,\n", "line 2: answer is empty"),
        ("faq.parquet", b"PAR1 and no more", "row 1: the file cannot be read at all (Parquet magic bytes not found"),
        ("faq.parquet", b"", "row 1: the file cannot be read at all"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, name: str, body: bytes, reason: str):
    found = refused(written(tmp_path, name, body))
    assert found.lstrip().startswith(reason)


def test_what_stands_before_a_break_is_kept_when_the_rest_is_skipped(tmp_path: Path):
    rows = [{"question": f"Question {number}?", "answer": f"{number} " * 20} for number in range(2000)]
    whole = parquet(tmp_path, rows, "whole.parquet", group=512).read_bytes()
    cut = written(tmp_path, "cut.parquet", whole[:-30])
    damaged = written(tmp_path, "damaged.parquet", whole[: len(whole) // 2] + b"\xff" * 20_000 + whole[len(whole) // 2 + 20_000 :])
    packed = written(tmp_path, "cut.jsonl.gz", gzip.compress(AS_LINES.encode() * 2000)[:-20])
    assert re.match(r"line \d+: the gzip file is cut short or damaged from here on", refused(packed))
    assert "cannot be read at all" in refused(cut)
    assert "the file cannot be read from here on" in refused(damaged)
    loaded = read(cut, damaged, packed, on_error="skip")
    kept = [one["source"].split(":")[0] for one in examples(loaded)]
    assert 0 < kept.count("damaged.parquet") < 2000
    assert kept.count("cut.jsonl.gz") == len(ROWS)  # equal ones are kept once
    assert [item.source for item in loaded.skipped] == ["cut.parquet", "damaged.parquet", "cut.jsonl.gz"]


def test_one_broken_line_in_a_million(tmp_path: Path):
    """200,000 lines, and the memory that a million would take: only a digest of each example is held."""
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(200_000):
            file.write(f'{{"prompt":"What is {number}?","completion":"A number."}}\n')
            if number == 180_000:
                file.write('{"prompt":"What is this?","completion":}\n')
    size = (tmp_path / "many.jsonl").stat().st_size
    assert refused(tmp_path / "many.jsonl").startswith("line 180002: it is not JSON (expecting value at column 40)")
    with (tmp_path / "wide.jsonl").open("w") as file:
        for number in range(20):
            file.write(json.dumps({"text": "", "prompt": str(number), "completion": "x" * (size // 20)}) + "\n")
    tracemalloc.start()
    try:
        assert read(tmp_path / "wide.jsonl").examples.count == 20  # type: ignore[union-attr]
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def test_records_from_addresses(tmp_path: Path):
    rows = parquet(tmp_path, ROWS).read_bytes()
    pages = {
        "/faq.jsonl": Reply(AS_LINES, content_type="text/plain"),
        "/api": Reply(json.dumps({"rows": ROWS}), content_type="application/json; charset=utf-8"),
        "/faq.csv.gz": Reply(gzip.compress(AS_CSV.encode()), content_type="application/gzip"),
        "/faq.parquet?token=secret123": Reply(rows, content_type="application/octet-stream"),
        "/gone.jsonl": Reply("<h1>Log in</h1>"),
        "/bomb.jsonl.gz": Reply(gzip.compress(b" " * 3_000_000), content_type=None),
        "/long.jsonl": Reply(AS_LINES * 1000, content_type=None),
        "/pdf": Reply(b"%PDF-", content_type="application/pdf"),
    }
    with SiteServer(pages) as site:
        said = Said()
        good = [site.url(path) for path in list(pages)[:4]]
        loaded = read(*good, limits=FetchLimits(max_bytes=50_000), said=said)
        assert [one["source"] for one in examples(loaded)] == [f"{good[0]}:{line}" for line in (1, 2, 3)]
        assert sum("3 records are the same as one before" in line for line in said) == 3
        assert any(line.startswith(f"data: {site.url('/faq.parquet?token=***')}: 3 records") for line in said)
        with pytest.raises(DataError) as caught:
            read(*(site.url(path) for path in list(pages)[4:]), limits=FetchLimits(max_bytes=50_000, retries=0))
    reasons = str(caught.value).split("\n")
    assert "it is a web page and not the file that its address names" in reasons[1]
    assert "it is application/pdf, which is not read" in "".join(reasons)
    assert "larger than 50,000 bytes; raise max_page_mb (--max-page-mb)" in "".join(reasons)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, cache: Path):
    cache.write_text("no folder")
    with pytest.raises(DataError, match=r"the examples cannot be kept in .*; make room there, or set TRIMTAB_CACHE to another folder"):
        read(RECORDS / "alpaca.jsonl")


def test_nothing_stays_of_a_load_that_failed(tmp_path: Path, cache: Path):
    with pytest.raises(DataError):
        read(written(tmp_path, "faq.jsonl", LINE + b"{\n"))
    assert list((cache / "examples").iterdir()) == []


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path):
    parquet(tmp_path, ROWS)
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from trimtab.data import load\nfrom trimtab.errors import DataError\n"
        f"try: load([{str(tmp_path / 'rows.parquet')!r}], on_error='skip')\nexcept DataError as exc: print(exc)\n"
        f"load([{str(RECORDS / 'alpaca.jsonl')!r}], say=str)\nassert 'requests' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("reading rows.parquet needs pyarrow (")
    assert done.stdout.rstrip().endswith(":  pip install 'trimtab[parquet]'")
