from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.catalog import CatalogEntry, catalog, is_path, lookup
from trimtab.errors import SpecError


def test_the_promised_aliases_are_there():
    sizes = ("7b", "13b", "70b")
    assert set(catalog()) == {"smollm2-135m-instruct", *(f"llama2-{s}" for s in sizes), *(f"llama2-{s}-chat" for s in sizes)}


@pytest.mark.parametrize("entry", catalog().values(), ids=lambda entry: entry.alias)
def test_every_entry_is_whole(entry: CatalogEntry):
    assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.hub_id)
    assert re.fullmatch(r"[0-9a-f]{40}", entry.revision)
    assert entry.licence.url.startswith("https://")
    assert entry.page == f"https://huggingface.co/{entry.hub_id}"
    assert entry.kind == ("chat" if entry.alias.endswith(("chat", "instruct")) else "completion")
    assert entry.gated == entry.hub_id.startswith("meta-llama/")


def test_no_two_aliases_stand_for_one_model():
    entries = list(catalog().values())
    assert len({entry.hub_id for entry in entries}) == len({entry.revision for entry in entries}) == len(entries)


@pytest.mark.parametrize(
    ("alias", "layers", "hidden", "heads", "kv_heads", "feed_forward", "vocabulary", "tied"),
    [
        ("smollm2-135m-instruct", 30, 576, 9, 3, 1536, 49152, True),
        ("llama2-7b", 32, 4096, 32, 32, 11008, 32000, False),
        ("llama2-13b-chat", 40, 5120, 40, 40, 13824, 32000, False),
        ("llama2-70b", 80, 8192, 64, 8, 28672, 32000, False),
    ],
)
def test_parameters_follow_from_the_published_shapes(
    alias: str, layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: int, vocabulary: int, tied: bool
):
    attention = 2 * hidden * hidden + 2 * hidden * hidden * kv_heads // heads
    layer = attention + 3 * hidden * feed_forward + 2 * hidden
    assert catalog()[alias].parameters == layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)


def test_a_hub_id_of_the_catalog_is_recognised():
    entry = catalog()["llama2-7b-chat"]
    assert lookup("meta-llama/Llama-2-7b-chat-hf") == lookup("llama2-7b-chat") == entry
    assert lookup(f"meta-llama/llama-2-7b-chat-hf@{entry.revision}") == entry


def test_a_revision_of_ones_own_has_no_fallback():
    entry = lookup("HuggingFaceTB/SmolLM2-135M-Instruct@main")
    assert entry is not None
    assert (entry.revision, entry.fallback, entry.alias) == ("main", None, "smollm2-135m-instruct")


def test_other_hub_ids_and_folders_are_not_in_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    assert lookup("someone/something") is None
    assert lookup("my-model") is None
    assert lookup("./not-there-yet") is None
    assert is_path("my-model")
    assert not is_path("someone/something")


def test_an_alias_wins_over_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama2-7b").mkdir()
    assert lookup("llama2-7b") == catalog()["llama2-7b"]
    assert is_path("./llama2-7b")


@pytest.mark.parametrize(
    ("typed", "meant"), [("smollm2", "smollm2-135m-instruct"), ("llama2-7b-caht", "llama2-7b-chat"), ("LLAMA2-13B", "llama2-13b")]
)
def test_an_unknown_name_gets_the_nearest_alias_and_the_list(typed: str, meant: str):
    with pytest.raises(SpecError) as caught:
        lookup(typed)
    assert f"Did you mean {meant}?" in str(caught.value)
    assert all(alias in str(caught.value) for alias in catalog())


def test_a_name_like_no_other_gets_the_list_only():
    with pytest.raises(SpecError, match=r"There is no model 'zzz'. Give one of"):
        lookup("zzz")
