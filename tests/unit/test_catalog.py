from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.catalog import CatalogEntry, catalog, is_path, lookup, markdown, refuse_too_long, rows
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts
from trimtab.families import FAMILIES

# layers, hidden, intermediate, heads, heads of keys, vocabulary, tied: as the models' config.json publish them
SHAPES = {
    "smollm2-135m-instruct": (30, 576, 1536, 9, 3, 49152, True),
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000, False),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000, False),
    "llama2-70b": (80, 8192, 28672, 64, 8, 32000, False),
    "smollm2-360m-instruct": (32, 960, 2560, 15, 5, 49152, True),
    "smollm2-1.7b-instruct": (24, 2048, 8192, 32, 32, 49152, True),
    "llama3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "llama3.1-70b": (80, 8192, 28672, 64, 8, 128256, False),
    "llama3.2-1b": (16, 2048, 8192, 32, 8, 128256, True),
    "llama3.2-3b": (28, 3072, 8192, 24, 8, 128256, True),
    "llama3.3-70b-instruct": (80, 8192, 28672, 64, 8, 128256, False),
    "mistral-7b": (32, 4096, 14336, 32, 8, 32768, False),
    "mixtral-8x7b": (32, 4096, 14336, 32, 8, 32000, False),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-0.5b-instruct": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b-instruct": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b-instruct": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-14b-instruct": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b-instruct": (64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-72b-instruct": (80, 8192, 29568, 64, 8, 152064, False),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 151936, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 151936, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 151936, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, False),
    "qwen3-14b": (40, 5120, 17408, 40, 8, 151936, False),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 151936, False),
}
FALCON_7B = {"num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024}
GLM4_9B = (40, 4096, 13696, 32, 2, 151552, False)


def shape(alias: str) -> dict[str, Any]:
    """The sizes of a model of the catalog by their names in config.json; a chat model has its base's."""
    base = alias.removesuffix("-chat").removesuffix("-instruct")
    if base == "falcon-7b":
        return FALCON_7B
    sizes = GLM4_9B if alias.startswith("glm4-9b") else SHAPES.get(alias) or SHAPES.get(base) or SHAPES["llama3.1-70b"]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    found: dict[str, Any] = dict(zip((*names, "tie_word_embeddings"), sizes, strict=True))
    return found | ({"head_dim": 128} if alias.startswith(("qwen3-", "glm4")) else {})


def usable() -> list[CatalogEntry]:
    return [entry for entry in catalog().values() if not entry.coming]


def test_every_promised_family_is_there():
    there = {entry.architecture for entry in usable()}
    assert there == set(FAMILIES) == {"llama", "falcon", "mistral", "qwen2", "qwen3", "mixtral", "glm", "glm4"}
    sizes = ("7b", "13b", "70b")
    assert {"smollm2-135m-instruct", *(f"llama2-{s}" for s in sizes), *(f"llama2-{s}-chat" for s in sizes)} < set(catalog())
    assert {"llama3.1-8b-instruct", "llama3.2-1b", "llama3.3-70b-instruct", "mixtral-8x7b", "qwen2.5-72b-instruct"} < set(catalog())


@pytest.mark.parametrize("entry", catalog().values(), ids=lambda entry: entry.alias)
def test_every_entry_is_whole(entry: CatalogEntry):
    assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.hub_id)
    assert entry.pinned == bool(re.fullmatch(r"[0-9a-f]{40}", entry.revision))
    assert entry.pinned or entry.revision == "main"
    assert entry.licence.url.startswith("https://")
    assert entry.page == f"https://huggingface.co/{entry.hub_id}"
    assert (entry.kind == "chat") == bool(entry.template)
    if entry.alias.endswith(("chat", "instruct")):
        assert entry.kind == "chat"
    assert entry.gated == entry.hub_id.startswith(("meta-llama/", "mistralai/"))
    assert bool(entry.coming) != bool(entry.family)


@pytest.mark.parametrize("entry", usable(), ids=lambda entry: entry.alias)
def test_parameters_are_those_of_the_published_shape(entry: CatalogEntry):
    """Counted by building the model without memory: with one layer and with two, which says what each further one has."""
    sizes = shape(entry.alias)
    one, two = (parameters(entry.architecture, {**sizes, "num_hidden_layers": layers}) for layers in (1, 2))
    assert entry.parameters == one + (sizes["num_hidden_layers"] - 1) * (two - one)


def parameters(architecture: str, sizes: dict[str, Any]) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        found: int = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).num_parameters()
    return found


def test_no_two_aliases_stand_for_one_model():
    entries = list(catalog().values())
    assert len({entry.hub_id for entry in entries}) == len({entry.revision for entry in entries}) == len(entries)


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
    ("typed", "meant"),
    [
        ("smollm2", "smollm2-135m-instruct or smollm2-360m-instruct or smollm2-1.7b-instruct"),
        ("smolm2-135m", "smollm2-135m-instruct"),
        ("llama2-7b-caht", "llama2-7b-chat"),
        ("LLAMA2-13B", "llama2-13b or llama2-13b-chat"),
        ("falcon", "falcon-7b or falcon-7b-instruct"),
    ],
)
def test_an_unknown_name_gets_the_nearest_aliases_and_where_all_are_listed(typed: str, meant: str):
    with pytest.raises(SpecError) as caught:
        lookup(typed)
    assert f"Did you mean {meant}?" in str(caught.value)
    assert "trimtab models" in str(caught.value)


def test_a_name_like_no_other_gets_the_list_only():
    with pytest.raises(SpecError, match=r"There is no model 'zzz'. Give an alias"):
        lookup("zzz")


@pytest.mark.parametrize("name", ["flan-t5-xl", "google/flan-t5-xl", "google/flan-t5-xl@main"])
def test_what_is_coming_is_listed_and_refused_with_what_to_take_instead(name: str):
    with pytest.raises(SpecError, match=r"not there yet: take ([\w.-]+) or ([\w.-]+)$") as caught:
        lookup(name)
    instead = re.findall(r"[\w.-]+", str(caught.value).rpartition(": take ")[2])
    assert {instead[0], instead[2]} <= {entry.alias for entry in usable()}
    assert next(row for row in rows() if row["alias"] == "flan-t5-xl")["coming"]


def test_rows_hold_what_a_list_of_models_shows():
    listed = {row["alias"]: row for row in rows()}
    assert list(listed) == list(catalog())
    assert json.loads(json.dumps(rows())) == rows()
    mixtral = listed["mixtral-8x7b-instruct"]
    assert mixtral["engines"] == ["vllm", "transformers"]
    assert mixtral["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "experts stay as they are" in mixtral["note"]
    assert listed["qwen3-8b"]["engines"][0] == "openvino"
    assert listed["qwen2.5-3b-instruct"]["licence"] == "Qwen Research License"


def test_the_table_names_every_alias_once():
    table = markdown()
    assert all(table.count(f"`{alias}`") == 1 for alias in catalog())
    assert table.count("\n") == 2 + len(FAMILIES) + 1


def test_a_row_longer_than_the_model_is_refused_before_anything_is_fetched():
    with pytest.raises(SpecError, match=r"max_seq_len 4,096 is beyond the 2,048 positions of falcon-7b: choose 2048 or less"):
        refuse_too_long("tiiuae/falcon-7b", 4096)
    refuse_too_long("falcon-7b", 2048)
    refuse_too_long("tiiuae/falcon-7b@main", 4096)  # another revision may say otherwise
    refuse_too_long("someone/something", 1_000_000)


@pytest.mark.parametrize("entry", usable(), ids=lambda entry: entry.alias)
def test_the_estimate_knows_a_models_size_or_says_nothing(entry: CatalogEntry):
    """Biases and further norms, which it leaves out, are less than a thousandth; experts and Falcon's fused layers would be more."""
    facts = ModelFacts.from_config(
        {"model_type": entry.architecture, "num_local_experts": 8 * (entry.architecture == "mixtral"), **shape(entry.alias)}
    )
    assert (facts is None) == (entry.architecture in ("mixtral", "falcon"))
    assert facts is None or abs(facts.parameters / entry.parameters - 1) < 1e-3
