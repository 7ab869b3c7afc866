"""Data in memory as sources."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest

from trimtab.data import as_sources, load
from trimtab.data.examples import Writer
from trimtab.errors import DataError

ROWS = [{"question": f"Question {number}?", "answer": "Yes.", "score": None} for number in range(1500)]


def test_paths_and_addresses_stay_as_they_are(tmp_path: Path):
    assert as_sources("https://a.test", tmp_path) == ["https://a.test"]
    assert as_sources([tmp_path / "a.jsonl", "b.csv"], tmp_path) == [str(tmp_path / "a.jsonl"), "b.csv"]
    assert as_sources([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_rows_in_memory_become_one_file_named_by_its_content(tmp_path: Path):
    table = pyarrow.Table.from_pylist(ROWS)
    (path,) = as_sources(ROWS, tmp_path)
    assert as_sources(table, tmp_path) == as_sources(tuple(ROWS), tmp_path) == [path]
    assert as_sources(["pages/", ROWS], tmp_path) == ["pages/", path]
    assert [entry.name for entry in (tmp_path / "given").iterdir()] == [Path(path).name]
    loaded = load(path, cache=tmp_path, say=lambda line: None)
    assert loaded.examples is not None
    assert loaded.examples.count == 1500


def test_the_oldest_records_go_when_all_take_too_much_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In both folders; what is of the last day stays, for a job may be about to read it."""

    def write(text: str) -> tuple[Path, Path]:
        with Writer(tmp_path) as writer:
            writer.add({"form": "guanaco", "text": text}, "a")
            examples = writer.finish()
        assert examples is not None
        return Path(as_sources([{"text": text}], tmp_path)[0]), examples.path

    a, b, c = (write(text * 3000) for text in "abc")
    for days, files in ((2, c), (3, b), (4, a)):
        for path in files:
            os.utime(path, (time.time() - days * 86_400,) * 2)
    d = write("d")
    assert all(path.exists() for path in (*a, *b, *c, *d))  # the disk has room for all
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10 * 7500))
    assert write("a" * 3000) == a  # the same, and the newest now
    assert {*tmp_path.glob("*/*.jsonl")} == {*a, *c, *d}
    e = write("e" * 9000)  # alone more than may be
    assert {*tmp_path.glob("*/*.jsonl")} == {*a, *d, *e}


def test_what_a_killed_client_left_goes_whatever_the_clock_says(tmp_path: Path):
    """Both folders of records that are made: one of data in memory, one of examples. What is being made stays, however old it seems."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom trimtab.data.given import as_sources\n"
        "from trimtab.data.examples import Writer\n"
        "def rows():\n    yield {'text': 'x'}\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "class Rows:\n    column_names = ['text']\n    def __iter__(self): return rows()\n"
        "with Writer(Path(sys.argv[1])) as writer:\n"
        "    writer.add({'form': 'guanaco', 'text': 'x'}, 'a')\n    as_sources(Rows(), Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert len([*tmp_path.glob("*/.*")]) == 2
    with Writer(tmp_path) as slow:
        slow.add({"form": "guanaco", "text": "y"}, "a")
        (making,) = (tmp_path / "examples").iterdir()
        os.utime(making, (0, 0))
        with Writer(tmp_path) as writer:
            writer.add({"form": "guanaco", "text": "z"}, "a")
            assert writer.finish() is not None
        assert slow.finish() is not None
    as_sources(ROWS, tmp_path)
    assert not [*tmp_path.glob("*/.*")]
    assert len([*tmp_path.glob("examples/*.jsonl")]) == 2


class Number:
    """What numpy's numbers and arrays have."""

    def tolist(self) -> list[int]:
        return [1, 2]


def test_what_json_lacks_becomes_what_it_has(tmp_path: Path):
    (path,) = as_sources([{"text": "x", "vector": Number(), "nothing": float("nan"), 3: "three"}], tmp_path)
    assert Path(path).read_text() == '{"text": "x", "vector": [1, 2], "nothing": null, "3": "three"}\n'


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": ROWS, "test": ROWS}, "the data is a dictionary of train, test; pass one split of it"),
        (3, "data of type int is not read; pass paths, addresses, or a list with a dictionary for each record"),
        ([{"text": "x"}, "a.jsonl"], "the data is a list of dictionaries and of other things"),
        (
            [{"text": "x"}, {"text": "x", "image": b"x"}],
            "record 2 cannot be written as JSON (a value is of type bytes); leave that column out",
        ),
        ([{"text": {"deep": float("inf")}}], "record 1 cannot be written as JSON"),
        (pyarrow.Table.from_pylist([{"text": "x"}]).slice(0, 0), "the data holds no records; pass at least one"),
    ],
    ids=range(6),
)
def test_what_is_no_data_is_refused(tmp_path: Path, given: Any, said: str):
    with pytest.raises(DataError) as caught:
        as_sources(given, tmp_path)
    assert said in str(caught.value)
    assert not [entry for entry in tmp_path.rglob("*") if entry.is_file()]
