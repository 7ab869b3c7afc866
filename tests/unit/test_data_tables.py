"""Tables: rows of csv that are broken in the middle, and files that hold far more than their bytes."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from support.site_server import Reply, SiteServer
from trimtab.data import FetchLimits, load
from trimtab.data.arrow import rows
from trimtab.data.parts import LONGEST, Broken, Part, kind_of
from trimtab.data.records import read
from trimtab.errors import DataError


def found(tmp_path: Path, name: str, body: bytes) -> list[tuple[int, Any]]:
    (tmp_path / name).write_bytes(body)
    return list(read(Part(name, kind_of(name) or "", path=tmp_path / name)))


@pytest.mark.parametrize(("bad", "reason"), [(b"\xff", "it is not UTF-8"), (b"\0", "it holds NUL bytes")])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_no_part_of_a_quoted_field_becomes_a_row(tmp_path: Path, bad: bytes, reason: str, where: str):
    lines = {one: b"x" + (bad if one == where else b"") for one in ("first", "middle", "last")}
    field = b"%(first)b\nq,%(middle)b\nr,%(last)b" % {name.encode(): line for name, line in lines.items()}
    _, broken, (number, row) = found(tmp_path, "faq.csv", b'question,answer\nWho?,Ida.\nWhat?,"' + field + b'"\nWhere?,Here.\n')
    assert isinstance(broken[1], Broken)
    assert broken[0] == 3 + list(lines).index(where)
    assert broken[1].reason.startswith(reason)
    assert (number, row) == (6, {"question": "Where?", "answer": "Here."})


def test_a_line_of_names_that_cannot_be_read_ends_the_table(tmp_path: Path):
    ((number, broken),) = found(tmp_path, "faq.csv", b"question,answer\xff\nWho?,Ida.\nWhat?,A ferry.\n")
    assert (number, broken.last) == (1, True)


def test_a_table_of_an_old_mac_says_how_to_save_it(tmp_path: Path):
    ((_, broken),) = found(tmp_path, "faq.csv", b"question,answer\rWho?,Ida.\rWhat?,A ferry.\r")
    assert broken.reason == r"its lines end with \r alone, as old Macs wrote them; save it with line ends LF (\n)"
    rows = found(tmp_path, "fine.csv", b'question,answer\nWho?,"Ida.\rHolm."\n')
    assert rows == [(2, {"question": "Who?", "answer": "Ida.\rHolm."})]


def test_names_by_the_ten_thousand_take_no_time(tmp_path: Path):
    names = [f"k{number}" for number in range(40_000)]
    began = time.process_time()
    ((_, twice),) = found(tmp_path, "a.jsonl", ("{" + ",".join(f'"{name}":1' for name in [*names, "k39999"]) + "}").encode())
    ((_, row),) = found(tmp_path, "a.csv", (",".join(names) + "\n" + ",".join(names)).encode())
    ((_, again),) = found(tmp_path, "b.csv", (",".join([*names, "k39999"]) + "\n").encode())
    assert time.process_time() - began < 5  # by the square of their number: minutes
    assert twice.reason == "'k39999' is there twice in one object; keep one of them"
    assert len(row) == 40_000
    assert again.reason == "the column name 'k39999' is there twice; rename one"


def test_records_that_have_no_line_are_counted_as_records(tmp_path: Path):
    listed = {"data": [{"question": "a", "answer": "b"}, {"question": "c"}]}
    columns = {"question": ["a", "c"], "answer": ["b", " "]}
    for name, value in (("listed.json", listed), ("columns.json", columns)):
        (tmp_path / name).write_text(json.dumps(value))
        with pytest.raises(DataError, match=r"1 of 2 records cannot be read:\n  \w+\.json: record 2: "):
            load(tmp_path / name, cache=tmp_path / "cache", say=lambda line: None)


def repeated(text: str, count: int, **columns: Any) -> bytes:
    """A parquet file with one text in so many rows, held once."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))
    table = pyarrow.table({"text": texts, **columns})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    return file.getvalue()


def test_a_small_file_from_an_address_that_unpacks_to_gigabytes_is_refused_before_it_does():
    bomb = repeated("x" * 5_000_000, 2_000)
    assert len(bomb) < 5_000
    with SiteServer({"/bomb.parquet": Reply(bomb, content_type=None)}) as site, pytest.raises(DataError) as caught:
        load(site.url("/bomb.parquet"), allow_private_hosts=True, limits=FetchLimits(), say=lambda line: None)
    assert "it is larger than 10,000,000 bytes; raise max_page_mb (--max-page-mb), or download it" in str(caught.value)


def test_a_packed_file_from_an_address_is_bounded_when_it_is_unpacked():
    with (
        SiteServer({"/bomb.jsonl.gz": Reply(gzip.compress(b" " * 3_000_000), content_type=None)}) as site,
        pytest.raises(DataError) as caught,
    ):
        load(site.url("/bomb.jsonl.gz"), allow_private_hosts=True, limits=FetchLimits(max_bytes=1_000_000), say=str)
    assert "it is larger than 1,000,000 bytes; raise max_page_mb (--max-page-mb), or download it and pass the file" in str(caught.value)


def test_turns_and_numbers_count_like_texts():
    text = "x" * 100_000
    turns = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]] * 50
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), table)
    numbers = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "history": [[7] * 1_000_000]}), numbers)
    for body, at_most in ((table, 1_000_000), (numbers, 900_000)):
        ((number, broken),) = rows(Part("a", "parquet", body=body.getvalue(), at_most=at_most))
        assert number == 1
        assert isinstance(broken, Broken)
        assert broken.reason.startswith(f"it is larger than {at_most:,} bytes")
        assert broken.last
    assert len(list(rows(Part("a", "parquet", body=table.getvalue(), at_most=6_000_000)))) == 50


def test_many_rows_of_one_long_text_in_a_file_of_this_machine_come_one_by_one(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(repeated("x" * 1_000_000, 400))
    found = [len(row["text"]) for _, row in rows(Part("a", "parquet", path=tmp_path / "a.parquet")) if not isinstance(row, Broken)]
    assert found == [1_000_000] * 400


def test_a_row_may_not_be_longer_than_a_line_may(tmp_path: Path):
    pieces = pyarrow.array([["x" * 1_000_000] * (LONGEST // 1_000_000 + 1), ["x"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "history": pieces}), tmp_path / "a.parquet")
    (_, long), (number, row) = rows(Part("a", "parquet", path=tmp_path / "a.parquet"))
    assert isinstance(long, Broken)
    assert f"and {LONGEST:,} are read of one; remove it" in long.reason
    assert not long.last
    assert (number, row) == (2, {"text": "b", "history": ["x"]})


def test_a_value_that_does_not_fit_into_memory_is_an_error_like_others(tmp_path: Path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x" * 90_000_000]}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport pyarrow.parquet\nfrom trimtab.data import load\n"
        "from trimtab.errors import DataError\n"
        "most = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + 120_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "try: load(sys.argv[1], cache=Path(sys.argv[2]), say=str)\nexcept DataError as exc: print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.parquet", tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert "a.parquet: row 1: there is not enough memory to read on; write it again in smaller row groups" in done.stdout


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, twice.schema) as stream:
        stream.write_table(twice)
    for kind in ("parquet", "arrow"):
        ((_, broken),) = rows(Part("a", kind, path=tmp_path / f"a.{kind}"))
        assert broken == Broken("the column name 'text' is there twice; rename one", last=True)
    images = pyarrow.Table.from_arrays([pyarrow.array(["a"])] + [pyarrow.array([1])] * 2, names=["text", "image", "image"])
    pyarrow.parquet.write_table(images, tmp_path / "b.parquet")
    ((_, row),) = rows(Part("b", "parquet", path=tmp_path / "b.parquet"))
    assert row == {"text": "a", "image": ...}
