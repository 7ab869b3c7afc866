"""The base model from a hub, which is a real HTTP server on this machine; no internet is used."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from support.model_hub import ModelHub, Repository
from support.tiny_weights import USED, quietly, tiny_model_files
from trimtab import hub as trimtab_hub
from trimtab.catalog import catalog
from trimtab.errors import LicenceRequired, WeightsError
from trimtab.staging import lasting_name
from trimtab.weights import resolve

ALIAS = "smollm2-135m-instruct"
OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with the tiny model, and a user without token or cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    repository = Repository({"main": NEW, "v1": OLD}, {OLD: tiny_model_files(1), NEW: tiny_model_files(2)})
    with ModelHub({"tiny/llama": repository}, tokens={"hf_reader", "hf_other"}, readers={"hf_reader"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def gate(hub: ModelHub) -> None:
    hub.repositories["tiny/llama"].gated = True


def test_a_hub_id_means_the_commit_of_main_and_only_the_useful_files(hub: ModelHub, tmp_path: Path):
    base = quietly("tiny/llama", tmp_path)
    assert (base.hub_id, base.revision, base.files) == ("tiny/llama", NEW, USED)
    assert base.source == f"model hub, tiny/llama at {NEW}"
    assert all((base.folder / name).read_bytes() == tiny_model_files(2)[name] for name in USED)
    assert not any(path.is_symlink() for path in base.folder.iterdir())  # so that it can be mounted and uploaded
    assert not [path for _, path, _, _ in hub.requests if path.endswith((".bin", ".py", ".md"))]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_that_revision(hub: ModelHub, tmp_path: Path, revision: str):
    base = quietly(f"tiny/llama@{revision}", tmp_path)
    assert base.revision == OLD
    assert (base.folder / "config.json").read_bytes() == tiny_model_files(1)["config.json"]


def test_a_commit_in_the_cache_asks_nobody(hub: ModelHub, tmp_path: Path):
    base = quietly(f"tiny/llama@{OLD}", tmp_path)
    hub.requests.clear()
    assert quietly(f"tiny/llama@{OLD}", tmp_path) == base
    assert hub.requests == []


@pytest.mark.parametrize("given", ["tiny/llama", "tiny/llama@main"])
def test_the_name_that_a_job_keeps_means_the_same_files_after_main_moved(hub: ModelHub, tmp_path: Path, given: str):
    base = quietly(given, tmp_path)
    assert (kept := lasting_name(given, base)) == f"tiny/llama@{NEW}"
    hub.repositories["tiny/llama"].revisions["main"] = OLD
    hub.requests.clear()
    assert quietly(kept, tmp_path) == base
    assert hub.requests == []
    assert quietly(given, tmp_path).digest != base.digest


def test_an_alias_stays_an_alias(hub: ModelHub, tmp_path: Path):
    entry = catalog()[ALIAS]
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model_files(2), entry.revision: tiny_model_files(1)})
    assert lasting_name(ALIAS, quietly(ALIAS, tmp_path)) == ALIAS


def test_an_alias_of_a_branch_says_so_and_becomes_the_commit(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = replace(catalog()["glm4-9b-chat"], revision="main")
    monkeypatch.setitem(catalog(), entry.alias, entry)
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model_files(2)})
    said: list[str] = []
    base = resolve(entry.alias, cache=tmp_path, say=said.append)
    assert said[0] == f"{entry.alias} follows main of {entry.hub_id}, whatever that means today; the run names the commit"
    assert lasting_name(entry.alias, base) == f"{entry.hub_id}@{NEW}"


@pytest.mark.parametrize("revision", ["refs", "..", "../../precious"])
def test_a_revision_is_never_taken_for_a_folder(hub: ModelHub, tmp_path: Path, revision: str):
    quietly("tiny/llama", tmp_path)
    (tmp_path / "precious").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=r"has no revision|no model hub answered"):
        quietly(f"tiny/llama@{revision}", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_digest_follows_the_contents(hub: ModelHub, tmp_path: Path):
    digests = [quietly(f"tiny/llama@{revision}", tmp_path / where).digest for where, revision in (("a", OLD), ("b", OLD), ("a", NEW))]
    assert digests[0] == digests[1] != digests[2]


def test_main_without_a_hub_is_the_commit_of_last_time(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = quietly("tiny/llama", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert resolve("tiny/llama", cache=tmp_path, say=said.append) == base
    assert "main of tiny/llama is taken to mean what it meant the last time" in said[0]


def test_hugging_faces_own_cache_is_used_without_a_hub(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    huggingface_hub.snapshot_download("tiny/llama", endpoint=hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = quietly("tiny/llama", tmp_path / "ours")
    assert base.source == f"Hugging Face's cache, tiny/llama at {NEW}"
    assert (base.revision, base.files) == (NEW, USED)


def test_a_gated_model_in_hugging_faces_own_cache_needs_no_token(hub: ModelHub, tmp_path: Path):
    huggingface_hub.snapshot_download("tiny/llama", endpoint=hub.url)
    gate(hub)
    assert quietly("tiny/llama", tmp_path / "ours").source == f"Hugging Face's cache, tiny/llama at {NEW}"


def test_a_gated_alias_in_hugging_faces_own_cache_asks_nobody(hub: ModelHub, tmp_path: Path):
    entry = catalog()["llama2-7b"]
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model_files(2), entry.revision: tiny_model_files(1)})
    huggingface_hub.snapshot_download(entry.hub_id, revision=entry.revision, endpoint=hub.url)
    asked = len(hub.requests)
    assert quietly("llama2-7b", tmp_path / "ours").revision == entry.revision
    assert len(hub.requests) == asked


def test_a_gated_model_that_was_fetched_before_needs_no_token(hub: ModelHub, tmp_path: Path):
    gate(hub)
    base = quietly("tiny/llama", tmp_path / "ours", token="hf_reader")
    assert quietly("tiny/llama", tmp_path / "ours") == base


def test_a_part_of_a_gated_model_is_refused_for_its_licence(hub: ModelHub, tmp_path: Path):
    huggingface_hub.snapshot_download("tiny/llama", endpoint=hub.url, allow_patterns=["config.json", "model.safetensors"])
    gate(hub)
    with pytest.raises(LicenceRequired, match="hf auth login"):
        quietly("tiny/llama", tmp_path / "ours")


def test_a_part_of_a_model_in_hugging_faces_cache_is_not_used(hub: ModelHub, tmp_path: Path):
    huggingface_hub.snapshot_download("tiny/llama", endpoint=hub.url, allow_patterns=["config.json", "model.safetensors"])
    with pytest.raises(WeightsError, match="is not on this machine and no model hub answered"):
        quietly("tiny/llama", tmp_path / "ours", offline=True)


def test_the_catalogs_pin_is_what_is_asked_for(hub: ModelHub, tmp_path: Path):
    entry = catalog()[ALIAS]
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model_files(2), entry.revision: tiny_model_files(1)})
    base = quietly(ALIAS, tmp_path)
    assert (base.revision, base.entry) == (entry.revision, entry)
    assert (base.folder / "config.json").read_bytes() == tiny_model_files(1)["config.json"]


@pytest.mark.parametrize("alias", ["llama2-7b", "llama2-70b-chat"])
def test_a_gated_alias_without_a_token_fails_before_any_request(hub: ModelHub, tmp_path: Path, alias: str):
    with pytest.raises(LicenceRequired) as caught:
        quietly(alias, tmp_path)
    assert catalog()[alias].page in str(caught.value)
    assert "hf auth login" in str(caught.value)
    assert hub.requests == []


def test_a_gated_model_without_a_token_fails_before_any_file(hub: ModelHub, tmp_path: Path):
    gate(hub)
    with pytest.raises(LicenceRequired, match=r"Accept it at https://huggingface.co/tiny/llama and then type:  hf auth login"):
        quietly("tiny/llama", tmp_path)
    assert len(hub.requests) == 1


def test_a_token_without_access_is_told_where_to_ask(hub: ModelHub, tmp_path: Path):
    gate(hub)
    with pytest.raises(LicenceRequired, match=r"Ask for access at https://huggingface.co/tiny/llama"):
        quietly("tiny/llama", tmp_path, token="hf_other")


@pytest.mark.parametrize("how", ["argument", "environment", "login"])
def test_a_token_with_access_opens_a_gated_model(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    gate(hub)
    if how == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
    if how == "login":
        (tmp_path / "no-token").write_text("hf_reader")
    said: list[str] = []
    base = resolve("tiny/llama", cache=tmp_path / "ours", token="hf_reader" if how == "argument" else None, say=said.append)
    assert base.revision == NEW
    assert {token for _, _, _, token in hub.requests} == {"hf_reader"}
    written = [path.read_bytes() for place in ("ours", "hf") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert not any(b"hf_reader" in content for content in [*written, "\n".join(said).encode()])


def test_a_token_that_the_hub_does_not_know(hub: ModelHub, tmp_path: Path):
    with pytest.raises(WeightsError, match="The hub does not accept the token") as caught:
        quietly("tiny/llama", tmp_path, token="hf_stale")
    assert "hf_stale" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny/lama", "The hub shows no model tiny/lama. Check the spelling"),
        ("tiny/llama@v7", "tiny/llama has no revision v7. Give another"),
        ("tiny/llama/more", "'tiny/llama/more' cannot be the name of a model"),
        ("tiny/llama--", "'tiny/llama--' cannot be the name of a model"),
    ],
)
def test_what_the_hub_does_not_have(hub: ModelHub, tmp_path: Path, model: str, message: str):
    with pytest.raises(WeightsError) as caught:
        quietly(model, tmp_path)
    assert str(caught.value).startswith(message)


def test_pickles_are_refused_before_any_file(hub: ModelHub, tmp_path: Path):
    del hub.repositories["tiny/llama"].commits[NEW]["model.safetensors"]
    with pytest.raises(WeightsError, match=r"weights are pickles .* safetensors"):
        quietly("tiny/llama", tmp_path)
    assert len(hub.requests) == 1


def test_a_model_without_tokenizer_json_is_refused(hub: ModelHub, tmp_path: Path):
    del hub.repositories["tiny/llama"].commits[NEW]["tokenizer.json"]
    with pytest.raises(WeightsError, match=r"it has no tokenizer.json. Load the model and"):
        quietly("tiny/llama", tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_altered_bytes_are_refused_and_fetched_again(hub: ModelHub, tmp_path: Path, name: str):
    hub.altered = {name}
    with pytest.raises(WeightsError, match=f"{name} of tiny/llama arrived with other bytes"):
        quietly("tiny/llama", tmp_path)
    hub.altered = set()
    assert quietly("tiny/llama", tmp_path).revision == NEW


def test_a_transfer_that_breaks_goes_on_where_it_stopped(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # by default 10 MB, far more than the file has
    hub.cut, hub.cuts = 10_000, 1
    base = quietly("tiny/llama", tmp_path)
    assert (base.folder / "model.safetensors").read_bytes() == tiny_model_files(2)["model.safetensors"]
    assert [asked for method, path, asked, _ in hub.requests if path.endswith("model.safetensors") and asked] == ["bytes=10000-"]


def test_a_transfer_that_fails_says_what_to_do(hub: ModelHub, tmp_path: Path):
    hub.vanished = {"model.safetensors"}
    with pytest.raises(WeightsError, match=r"The download of tiny/llama broke off \(.*\). Run the same command again"):
        quietly("tiny/llama", tmp_path)
    assert not [path for path in (tmp_path / "models" / "tiny--llama").iterdir() if path.suffix != ".lock"]


def test_a_broken_copy_is_said_and_made_again(hub: ModelHub, tmp_path: Path):
    base = quietly(f"tiny/llama@{OLD}", tmp_path)
    (base.folder / "model.safetensors").unlink()
    said: list[str] = []
    assert resolve(f"tiny/llama@{OLD}", cache=tmp_path, say=said.append) == base
    assert said[0].startswith("the copy in the cache is broken and is made again: ")
    assert said[0].endswith("model.safetensors is missing or changed")


def test_a_changed_byte_is_found_when_asked_to_verify(hub: ModelHub, tmp_path: Path):
    base = quietly(f"tiny/llama@{OLD}", tmp_path)
    changed = base.folder / "tokenizer.json"
    content = changed.read_bytes()
    changed.unlink()  # it shares its bytes with Hugging Face's cache, which is to stay whole
    changed.write_bytes(content[:-1] + b" ")
    assert quietly(f"tiny/llama@{OLD}", tmp_path) == base  # names and sizes are the same: the quick check passes
    said: list[str] = []
    assert resolve(f"tiny/llama@{OLD}", cache=tmp_path, say=said.append, verify=True) == base
    assert said[0].endswith("tokenizer.json is missing or changed")
    assert changed.read_bytes() == content


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.perf_counter()
        with pytest.raises(trimtab_hub.NoHub, match=r"Timeout|no answer within"):
            trimtab_hub.ask("tiny/llama", "main", token=None, page="", patience=0.5)
        assert time.perf_counter() - started < 1.5


def test_an_answer_that_no_hub_gives_is_no_hub(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/tiny/llama/resolve/main/README.md?")  # such as the page of a login portal
    with pytest.raises(WeightsError, match="is not on this machine and no model hub answered"):
        quietly("tiny/llama", tmp_path)


def test_a_full_disk_is_said_before_the_download(hub: ModelHub, tmp_path: Path):
    listing = trimtab_hub.ask("tiny/llama", "main", token=None, page="", patience=5)
    huge = trimtab_hub.Listing("tiny/llama", NEW, {"model.safetensors": trimtab_hub.HubFile(1 << 60, None, None)})
    assert sum(file.size or 0 for file in listing.files.values()) < 1 << 20
    with pytest.raises(WeightsError, match=r"needs 1152921504\.6 GB and .* GB free"):
        trimtab_hub.download(huge, token=None, page="")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, hub: ModelHub):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WeightsError, match="set TRIMTAB_CACHE to another folder"):
        quietly("tiny/llama", tmp_path / "file")
