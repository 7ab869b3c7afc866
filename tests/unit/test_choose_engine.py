from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.served import tree_of
from support.tiny_adapter import make_adapter
from support.tiny_model import make_tiny_model
from trimtab.errors import EndpointError, WeightsError
from trimtab.layout import JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.choices import Choice
from trimtab_runtime.engines.adapters import read_adapter
from trimtab_runtime.engines.adapters import refusal as adapter_refusal
from trimtab_runtime.engines.choose import installed, load, pick_engine, refusals
from trimtab_runtime.engines.machine import cache_bytes, free_memory, processors
from trimtab_runtime.engines.scratch import scratch
from trimtab_runtime.engines.tree import Tree, read_tree
from trimtab_runtime.engines.vllm import engine_arguments, environment, fresh, gpus_used, token_bytes

# PEFT 0.21 asks transformers 5.23 for a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALL = {"openvino", "vllm", "transformers"}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact"), base)


def test_the_fastest_that_is_here_and_takes_the_model() -> None:
    assert pick_engine("auto", ALL, {}, "xeon").value == "openvino"
    assert pick_engine("auto", ALL, {}, "gpu") == Choice("vllm", "the one that computes on GPUs")
    fallback = pick_engine("auto", {"openvino", "transformers"}, {"openvino": "it is Mamba"}, "xeon")
    assert fallback.value == "transformers"
    assert fallback.reason == "openvino does not take this model (it is Mamba); vllm is not installed"
    assert pick_engine("transformers", ALL, {}, "xeon").reason == "asked for"


@pytest.mark.parametrize(
    ("asked", "present", "refused", "message"),
    [
        ("vllm", {"openvino"}, {}, "vllm is not installed here:  pip install vllm"),
        ("openvino", ALL, {"openvino": "it is Mamba"}, "openvino does not take this model: it is Mamba"),
        ("auto", {"openvino"}, {"openvino": "it is Mamba"}, "no engine can answer: openvino does not take"),
        ("auto", set(), {}, "openvino is not installed; vllm is not installed; transformers is not installed"),
    ],
)
def test_refusals_name_the_remedy(asked: str, present: set[str], refused: dict[str, str], message: str) -> None:
    with pytest.raises(EndpointError, match=message) as caught:
        pick_engine(asked, present, refused, "xeon")
    assert "pip install" in str(caught.value) or "--engine auto" in str(caught.value)


def test_on_a_gpu_nothing_answers_that_computes_on_processors() -> None:
    with pytest.raises(EndpointError, match=r"no engine can answer: vllm is not installed\. Install one:  pip install vllm.*--device xeon"):
        pick_engine("auto", {"openvino", "transformers"}, {}, "gpu")
    with pytest.raises(
        EndpointError, match=r"vllm does not take this model \(of 4 bits: merge it\)\. Serve another model; or choose --device xeon"
    ):
        pick_engine("auto", ALL, {"vllm": "of 4 bits: merge it"}, "gpu")
    for engine in ("openvino", "transformers"):
        with pytest.raises(EndpointError, match=f"{engine} computes on processors, not on a GPU: choose --engine auto, or --device xeon"):
            pick_engine(engine, ALL, {}, "gpu")


@pytest.mark.parametrize("engine", ["auto", "openvino", "transformers"])
def test_an_adapter_of_a_4_bit_base_is_to_be_merged_where_nothing_quantises(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """As in the serve images, which hold no bitsandbytes."""
    adapter = make_adapter(tmp_path / "four", base, method="qlora")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EndpointError, match=r"four was trained on a 4-bit base, .* not installed here: merge it \(leave out --no-merge\)"):
        load(tree_of(tmp_path, base, {"four": adapter}), ServeSpec(engine=engine))


def test_what_an_engine_does_not_take() -> None:
    spec = ServeSpec()
    assert refusals(Tree(Path("m"), ("base",), config=LLAMA), spec, ALL) == {}
    mamba = Tree(Path("m"), ("base",), config={"architectures": ["MambaForCausalLM"]})
    assert "MambaForCausalLM" in refusals(mamba, spec, ALL)["openvino"]
    own = Tree(Path("m"), ("base",), config=LLAMA | {"auto_map": {}})
    assert "code of its own" in refusals(own, ServeSpec(trust_remote_code=True), ALL)["openvino"]
    four = Tree(Path("m"), ("tuned", "base"), {"tuned": Path("a")}, LLAMA, {"tuned": "qlora"})
    assert set(refusals(four, spec, ALL)) == {"vllm"}


def test_dora_beside_its_base_is_for_transformers_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    tree = Tree(Path("m"), ("tuned", "base"), {"tuned": tmp_path}, LLAMA, {"tuned": "lora"})
    found = refusals(tree, ServeSpec(), ALL)
    assert set(found) == {"openvino", "vllm"}
    assert all("use_dora = True" in why and "merge it (leave out --no-merge)" in why for why in found.values())
    assert pick_engine("auto", ALL, found, "xeon").value == "transformers"


def test_here_are_two_of_them() -> None:
    assert {"openvino", "transformers"} <= installed()


def test_a_whole_model_is_tuned_where_it_was_merged(base: Path, tmp_path: Path) -> None:
    job = JobDir(tmp_path / "tree")
    job.root.mkdir()
    job.model.symlink_to(base)
    assert read_tree(job).names == ("base",)
    job.model.unlink()
    job.model.mkdir()
    for file in base.iterdir():
        (job.model / file.name).symlink_to(file)
    (job.model / "trimtab.json").write_text("{}")
    assert (read_tree(job).names, read_tree(job).adapters) == (("tuned",), {})


def test_a_base_alone_and_with_adapters(base: Path, artifact: Path, tmp_path: Path) -> None:
    assert read_tree(tree_of(tmp_path, base)).names == ("base",)
    both = read_tree(tree_of(tmp_path, base, {"other": artifact}, tuned=artifact))
    assert both.names == ("tuned", "other", "base")
    assert both.methods == {"tuned": "lora", "other": "lora"}
    assert both.dtype() == "float32"
    assert both.tokenizer == both.model  # the adapter brought none
    assert len(both.stop_ids()) == 1


def test_no_model_and_two_of_one_name(base: Path, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no model: put or link"):
        read_tree(JobDir(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="two models would be called 'base'"):
        read_tree(tree_of(tmp_path, base, {"base": artifact}))
    with pytest.raises(WeightsError, match="two models would be called 'tuned'"):
        read_tree(tree_of(tmp_path, base, {"tuned": artifact}, tuned=artifact))
    (tmp_path / "half").mkdir()
    with pytest.raises(WeightsError, match=r"holds no trimtab\.json"):
        read_tree(tree_of(tmp_path, base, {"half": tmp_path / "half"}))


def test_another_base_is_refused_by_name(base: Path, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    files = {"config.json": {"size": 1, "sha256": "ab" * 32}, "model.safetensors": {"size": 2, "sha256": "cd" * 32}}
    (folder / "trimtab-weights.json").write_text(json.dumps({"files": files}))
    own = hashlib.sha256(f"{'ab' * 32}  config.json\n{'cd' * 32}  model.safetensors\n".encode()).hexdigest()
    trained = tmp_path / "trained"
    trained.mkdir()
    for file in artifact.iterdir():
        (trained / file.name).symlink_to(file)
    for digest, fits in (own, True), ("", True), ("12" * 32, False):
        (trained / "trimtab.json").unlink()
        (trained / "trimtab.json").write_text(json.dumps({"spec": {"model": "owner/name", "model_digest": digest, "method": "lora"}}))
        job = tree_of(tmp_path, folder, tuned=trained)
        if fits:
            assert read_tree(job).names == ("tuned", "base")
            continue
        with pytest.raises(WeightsError, match=rf"trained on owner/name with the digest {digest[:16]}, .* holds {own[:16]}"):
            read_tree(job)


def test_pickles_and_code_are_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"only pytorch_model\.bin, a pickle"):
        read_tree(tree_of(tmp_path, folder))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoModel": "own.Own"}}))
    with pytest.raises(WeightsError, match="--trust-remote-code"):
        read_tree(tree_of(tmp_path, folder))
    assert read_tree(tree_of(tmp_path, folder), trust_remote_code=True).names == ("base",)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        read_tree(tree_of(tmp_path, folder))


def test_loading_says_what_was_chosen_and_falls_back(base: Path, tmp_path: Path) -> None:
    engine = load(tree_of(tmp_path, base), ServeSpec(cache_gb=0.05, max_context=100))
    assert engine.facts.engine.startswith("openvino-genai ")
    assert engine.facts.context == 100
    assert "engine openvino: the fastest measured with few clients, and the first to start (benchmarks/README.md)" in engine.facts.choices
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        if file.name != "config.json":
            (other / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}))
    fallen = load(tree_of(tmp_path, other), ServeSpec(cache_gb=0.05))
    assert fallen.facts.engine.startswith("transformers ")
    assert "openvino does not take this model (only a part of each head is rotated)" in fallen.facts.choices[0]
    with pytest.raises(EndpointError, match="a part of each head"):
        load(tree_of(tmp_path, other), ServeSpec(engine="openvino"))
    with pytest.raises(EndpointError, match="hold no prompt"):
        load(tree_of(tmp_path, base), ServeSpec(cache_gb=1e-5, engine="openvino"))


def test_the_cache_limits_the_context(base: Path, tmp_path: Path) -> None:
    engine = load(tree_of(tmp_path, base), ServeSpec(cache_gb=0.004, dtype="float32", engine="openvino"))
    assert 100 < engine.facts.context < 640
    assert f"context {engine.facts.context}: what the cache holds" in engine.facts.choices


def test_a_disk_that_holds_no_copy_is_refused_before_any_is_written(base: Path, artifact: Path, tmp_path: Path) -> None:
    """The model has one more layer, larger than disk and memory, and none of it on the disk."""
    large = tmp_path / "large"
    shutil.copytree(base, large)
    raw = (base / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, content = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    rows = 2 * (shutil.disk_usage(tempfile.gettempdir()).free + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 4096
    header["model.layers.9.mlp.up_proj.weight"] = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [content, content + rows * 4096]}
    text = json.dumps(header).encode()
    (large / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    os.truncate(large / "model.safetensors", 8 + len(text) + content + rows * 4096)
    four = make_adapter(tmp_path / "four", base, method="qlora")
    needed = []
    for adapters in {"plain": artifact}, {"four": four}:
        with pytest.raises(EndpointError, match=r"loading needs ([\d.]+) GB in .* are free: make room there, or set TMPDIR") as refused:
            load(tree_of(tmp_path, large, adapters), ServeSpec(engine="openvino", cache_gb=0.05))
        needed.append(float(str(refused.value).split()[2]))
    assert needed == pytest.approx([rows * 4096 / 1e9, 2 * rows * 4096 / 1e9], rel=0.01), "twice where layers go through 4 bits"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_of_another_kind_are_named(change: dict[str, Any], named: str) -> None:
    assert adapter_refusal({"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None}) == ""
    assert named in adapter_refusal(change)


def test_an_adapters_scale_is_pefts(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").symlink_to(artifact / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"

    def scaled(**change: object) -> float:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        return float(abs(read_adapter(tmp_path, "a").factors[name][1]).sum())

    one = scaled(lora_alpha=4)  # rank 4
    assert scaled(lora_alpha=8) == pytest.approx(2 * one)
    assert scaled(lora_alpha=8, use_rslora=True) == pytest.approx(4 * one)
    assert scaled(lora_alpha=8, alpha_pattern={"up_proj": 16}) == pytest.approx(4 * one)
    assert scaled(lora_alpha=8, alpha_pattern={"q_proj": 16}) == pytest.approx(2 * one)


def test_processors_and_memory_are_those_of_the_group(tmp_path: Path) -> None:
    machine = processors(tmp_path)
    assert machine >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert processors(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors(tmp_path) == machine
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert free_memory(tmp_path, meminfo) == 1000 << 10
    (tmp_path / "memory.max").write_text("600000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert free_memory(tmp_path, meminfo) == 200_000
    (tmp_path / "memory.stat").write_text("anon 100000\nfile 250000\ninactive_file 150000\nactive_file 100000\n")
    assert free_memory(tmp_path, meminfo) == 350_000, "files that nobody looks at go when room is needed"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("300000")
    assert free_memory(tmp_path, meminfo) == 300_000
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("250000")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 40000\n")
    assert free_memory(tmp_path, meminfo) == 90_000
    assert cache_bytes(1.5, 10, 10)[0] == 1_500_000_000
    assert cache_bytes(None, 1000, 200) == (200, "what all running requests can fill")
    assert cache_bytes(None, 1000, 300) == (250, "a quarter of the free memory")


def test_what_vllm_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 24, "rank_pattern": {"q_proj": 40}}))
    plain = Tree(Path("m"), ("base",), config=LLAMA)
    split = engine_arguments(plain, ServeSpec(), "bfloat16", 700, 10**9, compiler=True, gpus=4)
    assert (split["tensor_parallel_size"], split["kv_cache_memory_bytes"]) == (4, 10**9 // 4)
    assert [gpus_used(LLAMA | {"intermediate_size": 96, "vocab_size": 9}, present) for present in (0, 1, 3, 4, 8)] == [1, 1, 2, 4, 4]
    assert [gpus_used({}, present) for present in (0, 1, 3)] == [1, 1, 3]
    told = engine_arguments(plain, ServeSpec(max_running=5), "bfloat16", 700, 10**9, compiler=True)
    assert (told["dtype"], told["max_model_len"], told["max_num_seqs"], told["kv_cache_memory_bytes"]) == ("bfloat16", 700, 5, 10**9)
    assert not told["enforce_eager"]
    assert not told["trust_remote_code"]
    assert "enable_lora" not in told
    assert engine_arguments(plain, ServeSpec(), "bfloat16", 700, None, compiler=False)["enforce_eager"]
    both = Tree(Path("m"), ("tuned", "base"), {"tuned": tmp_path}, LLAMA)
    told = engine_arguments(both, ServeSpec(), "bfloat16", 700, None, compiler=True)
    assert (told["enable_lora"], told["max_loras"], told["max_lora_rank"], told["enforce_eager"]) == (True, 1, 64, True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1000}))
    with pytest.raises(WeightsError, match="rank 512, one here has 1000"):
        engine_arguments(both, ServeSpec(), "bfloat16", 700, None, compiler=True)
    assert environment("xeon", 3)["OMP_NUM_THREADS"] == "3"
    assert environment("xeon", 3)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_NUM_THREADS" not in environment("gpu", 3)
    assert {environment(device, 1)["VLLM_NO_USAGE_STATS"] for device in ("xeon", "gpu")} == {"1"}
    assert token_bytes(LLAMA, "bfloat16") == 2 * 2 * 64 * 2
    assert token_bytes(LLAMA | {"num_key_value_heads": 2, "head_dim": 8}, "float32") == 2 * 2 * 16 * 4


def test_what_vllm_says() -> None:
    stop = frozenset({2})
    assert fresh([5, 2], None, stop) == ([5, 2], None)
    assert fresh([5, 2], "stop", stop) == ([5], "stop")
    assert fresh([], "stop", stop) == ([], "stop")
    assert fresh([5], "length", stop) == ([5], "length")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from trimtab_runtime.engines.scratch import scratch
with scratch(Path(sys.argv[1])):
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch(tmp_path) as mine, scratch(tmp_path) as other:
        (mine / "model.bin").write_bytes(b"x")
        assert set(tmp_path.iterdir()) == {mine, other}
    assert not list(tmp_path.iterdir())
