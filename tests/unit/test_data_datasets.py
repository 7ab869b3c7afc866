"""Datasets from a hub, which is a real HTTP server on this machine, and from folders that `datasets.save_to_disk` wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from support.model_hub import ModelHub, Repository
from trimtab.data import load
from trimtab.data.datasets import Wanted, by_card, by_name, choose
from trimtab.errors import DataError

OLD, NEW, MADE = "1" * 40, "2" * 40, "3" * 40
NAME = "hf://datasets/tiny/faq"
README = b"# A dataset\n"


def rows(word: str, count: int = 60) -> list[dict[str, str]]:
    return [{"question": f"{word} {number}?", "answer": f"Answer {number}."} for number in range(count)]


def table(word: str, count: int = 60) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(word, count)), file)
    return file.getvalue()


def lines(word: str, count: int = 60) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(word, count)).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with one dataset of parquet files, and a user without token or cache."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    new = {
        "README.md": README,
        "data/train-00000-of-00002.parquet": table("First"),
        "data/train-00001-of-00002.parquet": table("Second"),
        "data/test-00000-of-00001.parquet": table("Test"),
        "notes/train.jsonl": lines("Note"),
    }
    repository = Repository({"main": NEW, "v1": OLD}, {OLD: {"train.parquet": table("Old")}, NEW: new})
    with ModelHub(datasets={"tiny/faq": repository}, tokens={"hf_reader", "hf_other"}, readers={"hf_reader"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def first_words(name: str, said: list[str] | None = None, **options: Any) -> set[str]:
    """What the questions of the dataset begin with."""
    loaded = load(name, say=said.append if said is not None else lambda line: None, **options)
    assert loaded.examples is not None
    return {json.loads(line)["instruction"].split()[0] for line in loaded.examples.path.read_text().splitlines()}


def refused(name: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        first_words(name, **options)
    return str(caught.value).split("\n")[1].strip()


def fetched(hub: ModelHub) -> set[str]:
    return {path.split("/resolve/")[1].split("/", 1)[1] for method, path, _, _ in hub.requests if method == "GET" and "/resolve/" in path}


def test_a_dataset_is_the_parquet_files_of_its_training_split(hub: ModelHub):
    said: list[str] = []
    assert first_words(NAME, said) == {"First", "Second"}
    assert fetched(hub) == {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"}
    assert said == [
        "data: tiny/faq: default, split train; not read: test",
        f"data: fetching 2 files of tiny/faq at {NEW}",
        f"data: {NAME}: 120 records with question, answer: question and answer; loss on the answer",
        "data: 120 examples (120 completion)",
    ]


def test_a_split_a_revision_and_a_file_by_name(hub: ModelHub):
    assert first_words(f"{NAME}/test") == {"Test"}
    assert first_words(f"{NAME}/default/test") == {"Test"}
    assert first_words(f"{NAME}@v1") == {"Old"}
    assert first_words(f"{NAME}@{OLD}/train") == {"Old"}
    assert first_words(f"{NAME}/notes/train.jsonl") == {"Note"}
    assert refused(f"{NAME}/dev") == f"{NAME}/dev: tiny/faq has no dev in default; its splits are: test, train"
    assert "has no revision v2" in refused(f"{NAME}@v2")
    assert "The hub shows no dataset tiny/none" in refused("hf://datasets/tiny/none")
    assert "only datasets are read from a hub, by  hf://datasets/OWNER/NAME" in refused("hf://tiny/faq")


def test_without_parquet_the_hubs_own_conversion_and_then_other_files(hub: ModelHub):
    files = {"README.md": README, "en/train.jsonl": lines("English"), "sv/train.jsonl": lines("Swedish")}
    hub.datasets["tiny/text"] = Repository({"main": NEW}, {NEW: files})
    name = "hf://datasets/tiny/text"
    assert refused(name) == f"{name}: tiny/text has several configurations: en, sv; pass one:  {name}/en"
    assert first_words(f"{name}/sv") == {"Swedish"}
    made = {"en/partial-train/0000.parquet": table("Made"), "sv/train/0000.parquet": table("Gjord"), "sv/test/0000.parquet": table("Prov")}
    hub.datasets["tiny/text"] = Repository({"main": NEW, "refs/convert/parquet": MADE}, {NEW: files, MADE: made})
    assert first_words(f"{name}/sv") == {"Gjord"}
    assert first_words(f"{name}/sv/test") == {"Prov"}
    said: list[str] = []
    assert first_words(f"{name}/en", said) == {"Made"}
    assert "data: tiny/text: the hub converted only a part of this split" in said
    assert first_words(f"{name}@{NEW}/sv") == {"Swedish"}  # the conversion is of another commit
    assert first_words(f"{name}@refs/convert/parquet/sv/train") == {"Gjord"}
    hub.datasets["tiny/text"] = Repository({"main": OLD}, {OLD: {"README.md": README, "a.bin": b"x"}})
    assert "tiny/text has no file of records (parquet, .jsonl, .json, .csv, .tsv)" in refused(name)


def test_a_card_says_which_files_are_which(hub: ModelHub):
    card: dict[str, object] = {
        "configs": [
            {"config_name": "faq", "data_files": [{"split": "train", "path": "a/*.jsonl"}, {"split": "test", "path": ["b/1.jsonl"]}]},
            {"config_name": "notes", "data_files": "**/n-*.jsonl"},
        ]
    }
    files = {"a/x.jsonl": lines("A"), "b/1.jsonl": lines("B"), "b/c/n-1.jsonl": lines("N"), "z.parquet": table("Z")}
    hub.datasets["tiny/card"] = Repository({"main": NEW}, {NEW: files}, card=card)
    assert first_words("hf://datasets/tiny/card/faq") == {"A"}
    assert first_words("hf://datasets/tiny/card/faq/test") == {"B"}
    assert first_words("hf://datasets/tiny/card/notes") == {"N"}
    assert "several configurations: faq, notes" in refused("hf://datasets/tiny/card")


def test_a_commit_asks_once_and_a_branch_without_a_hub_means_what_it_meant(hub: ModelHub, monkeypatch: pytest.MonkeyPatch):
    assert first_words(f"{NAME}@{NEW}") == {"First", "Second"}
    assert first_words(NAME) == {"First", "Second"}
    hub.requests.clear()
    assert first_words(f"{NAME}@{NEW}") == {"First", "Second"}
    assert hub.requests == []
    hub.datasets["tiny/faq"].revisions["main"] = OLD
    assert first_words(NAME) == {"Old"}
    said: list[str] = []
    assert first_words(NAME, said, offline=True) == {"Old"}
    assert said[0] == f"data: no hub answered (offline was asked for): {NAME} is taken to mean what it meant the last time"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert first_words(NAME) == {"Old"}
    reason = refused(f"{NAME}/test")
    assert "it is not on this machine and no hub answered (" in reason
    assert reason.endswith("(or a mirror: HF_ENDPOINT), or pass the dataset's files")


def test_tokens_are_as_for_models(hub: ModelHub, monkeypatch: pytest.MonkeyPatch):
    hub.datasets["tiny/faq"].gated = True
    assert "given only to people who accepted its licence, and no token was found" in refused(NAME)
    assert "The token has no access to tiny/faq" in refused(NAME, token="hf_other")
    assert "The hub does not accept the token (401)" in refused(NAME, token="hf_unknown")
    assert first_words(NAME, token="hf_reader") == {"First", "Second"}
    hub.datasets["tiny/faq"].private = True
    assert "if it is private, log in first" in refused(f"{NAME}/test")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert first_words(f"{NAME}/test") == {"Test"}


def test_a_file_that_is_not_what_the_hub_says_is_refused(hub: ModelHub):
    hub.altered.add("data/train-00000-of-00002.parquet")
    assert "arrived with other bytes than the hub says it has; it was removed" in refused(NAME)
    hub.altered.clear()
    assert first_words(NAME) == {"First", "Second"}


def test_names_and_tables():
    assert Wanted.of("hf://datasets/a/b@refs%2Fpr%2F1/c/d") == Wanted("a/b", "refs/pr/1", ("c", "d"))
    assert Wanted.of("hf://datasets/a/b@refs/pr/1") == Wanted("a/b", "refs/pr/1", ())
    assert by_name(["x/train_sft-00000-of-00001-ab.parquet", "x/dev.csv", "x/all.json", "test/0.jsonl"]) == {
        ("default", "test"): ("test/0.jsonl",),
        ("x", "train"): ("x/all.json",),
        ("x", "dev"): ("x/dev.csv",),
        ("x", "train_sft"): ("x/train_sft-00000-of-00001-ab.parquet",),
    }
    assert by_card(["a.csv", "d/train.csv"], [{"config_name": "c", "data_dir": "d"}]) == {("c", "train"): ("d/train.csv",)}
    assert by_card(["a.csv"], [{"data_files": {"train": "b.csv"}}, 3]) == {}
    wanted = Wanted("a/b", None, ())
    with pytest.raises(DataError, match="it has several splits: x, y; pass one:  hf://datasets/a/b/default/x"):
        choose({("default", "x"): ("1",), ("default", "y"): ("2",)}, wanted, print)
    with pytest.raises(DataError, match="has no configuration d; it has: c, e"):
        choose({("c", "x"): ("1",), ("e", "y"): ("2",)}, Wanted("a/b", None, ("d",)), print)


def save(folder: Path, found: list[dict[str, Any]], **state: Any) -> None:
    """As `datasets.save_to_disk` does: arrow streams, and what they are."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, half in zip(names, (found[:2], found[2:]), strict=True):
        whole = pyarrow.Table.from_pylist(half)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, whole.schema) as stream:
            stream.write_table(whole)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": None}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None, **state}))


def test_folders_that_save_to_disk_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    found = [{"conversations": [*turns, {"from": "human", "value": str(number)}], "image": b"x"} for number in range(3)]
    save(tmp_path / "one", found)
    said: list[str] = []
    loaded = load(tmp_path / "one", say=said.append)
    assert loaded.examples is not None
    sources = [json.loads(line)["source"] for line in loaded.examples.path.read_text().splitlines()]
    assert sources == ["one/data-00000-of-00002.arrow:1", "one/data-00000-of-00002.arrow:2", "one/data-00001-of-00002.arrow:1"]
    assert "data: one: left out, because no form reads them there: image" in said
    for split in ("train", "test"):
        save(tmp_path / "two" / split, found)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert load(tmp_path / "two", say=said.append).examples == loaded.examples
    assert "data: two: split train; not read: test" in said


def test_a_saved_folder_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "picked", rows("x", 3), _indices_data_files=[{"filename": "indices.arrow"}])
    assert "call flatten_indices() before save_to_disk()" in refused(str(tmp_path / "picked"))
    save(tmp_path / "out", rows("x", 3), _data_files=[{"filename": "../picked/data-00000-of-00002.arrow"}])
    assert "its state.json or dataset_dict.json cannot be read" in refused(str(tmp_path / "out"))
    save(tmp_path / "cut", rows("x", 300))
    file = tmp_path / "cut" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-3000])
    (tmp_path / "cut" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError) as caught:
        load(tmp_path / "cut", say=lambda line: None)
    assert "cut/data-00000-of-00002.arrow, row 1: the file cannot be read at all" in str(caught.value)
    assert "cut/data-00001-of-00002.arrow, row 1: the file cannot be read at all" in str(caught.value)
