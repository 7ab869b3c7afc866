"""What training will take in memory, by a formula, beside what runs were measured to take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from support.job_tree import make_job, run, train_here
from support.kernel_paths import NAMES
from support.tiny_model import make_tiny_model
from trimtab.catalog import catalog
from trimtab.estimate import (
    BF16_FLAGS,
    ModelFacts,
    Rates,
    RowFacts,
    RowShape,
    attention_scratch,
    dtype_of,
    peak_memory,
    step_seconds,
)
from trimtab.events import Choice, read
from trimtab.ledger import Account, Ledger
from trimtab.plan import plan
from trimtab.spec import TrainSpec
from trimtab_runtime.choices import cpu_flags, pick_dtype
from trimtab_runtime.rows import shape_of_row
from trimtab_runtime.xeon import kernels
from trimtab_runtime.xeon.loss import linear_cross_entropy

SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "dtype": "bfloat16", "model_type": "llama",
}  # fmt: skip
LLAMA2_7B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
    "dtype": "bfloat16", "model_type": "llama",
}  # fmt: skip
LLAMA2_13B = {
    "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000,
    "dtype": "bfloat16", "model_type": "llama",
}  # fmt: skip

WIDE = {
    "num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 32000, "dtype": "bfloat16", "model_type": "llama",
}  # fmt: skip

# rows that runs saw: tokens, learned, groups, padded, pairs of places in short samples and in long ones
ONE = (2048, 2047, 1, 2048, 0, 2048**2)
SHORT = (512, 511, 1, 512, 512**2, 0)
MIXED = (2048, 2044, 4, 2048, 353_636, 1_267_876)

# the peaks, in MB, of runs of two or three steps in bf16: two threads, rank 32; and how many layers did their forward pass again
MEASURED = [
    (WIDE, SHORT, "lora", 0, 1296),
    (WIDE, ONE, "lora", 0, 1785),
    (WIDE, ONE, "lora", 4, 1459),
    (WIDE, MIXED, "qlora", 0, 1538),
]


def facts(config: dict[str, Any]) -> ModelFacts:
    found = ModelFacts.from_config(config)
    assert found is not None
    return found


@pytest.mark.parametrize(("config", "shape", "method", "again", "measured"), MEASURED)
def test_a_run_takes_what_is_estimated_of_its_rows(config, shape, method, again, measured):
    row = RowShape(**dict(zip(("tokens", "learned", "groups", "padded", "explicit", "flash"), shape, strict=True)))
    spec = TrainSpec(model="m", method=method, max_seq_len=shape[0])
    known = peak_memory(spec, facts(config), "bfloat16", RowFacts(mean=row, most=row, distinct=1500), again=again)
    assert 0.87 < measured / known.total < 1.13
    assert known.total <= peak_memory(spec, facts(config), "bfloat16", again=again).total  # where no rows are known


def test_a_gpu_holds_4_bit_weights_but_first_the_whole_model():
    found = peak_memory(TrainSpec(model="m", max_seq_len=512), facts(LLAMA2_13B), "bfloat16", long_samples(512), "gpu")
    assert 6 < found.base / 1024 < 8  # 13 billion weights in about 7 GB (arXiv:2305.14314)
    assert found.total / 1024 == pytest.approx(2 * facts(LLAMA2_13B).parameters / 2**30, rel=0.01)
    longer = peak_memory(TrainSpec(model="m", max_seq_len=2048), facts(LLAMA2_13B), "bfloat16", long_samples(2048), "gpu")
    assert longer.loading == 0
    assert longer.total > found.total


def long_samples(tokens: int) -> RowFacts:
    row = RowShape(tokens=tokens, learned=tokens, groups=1, padded=tokens, explicit=0, flash=tokens**2)
    return RowFacts(mean=row, most=row, distinct=32_000)


ROW_LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=12)


@given(rows=st.lists(ROW_LENGTHS, min_size=1, max_size=4))
def test_facts_of_rows_survive_json_and_bound_each_row(rows):
    shapes = [shape_of_row(lengths, [True] * sum(lengths)) for lengths in rows]
    found = RowFacts.of(shapes, 7)
    assert RowFacts.from_manifest({"shape": json.loads(found.model_dump_json())}) == found
    for lengths, shape in zip(rows, shapes, strict=True):
        assert shape.tokens == sum(lengths)
        assert shape.learned == sum(lengths) - len(lengths)
        assert shape.padded >= shape.tokens
        assert shape.explicit + shape.flash >= sum(length**2 for length in lengths)
        assert all(getattr(shape, name) <= getattr(found.most, name) for name in RowShape.model_fields)
    assert found.mean.tokens == pytest.approx(sum(map(sum, rows)) / len(rows), abs=1e-3)


@pytest.mark.parametrize("manifest", [{}, {"shape": None}, {"shape": {"mean": 1}}])
def test_a_manifest_that_tells_nothing_of_its_rows_gives_none(manifest):
    assert RowFacts.from_manifest(manifest) is None


def test_what_prepare_writes_is_read_without_its_arrays(staged):
    manifest = json.loads((staged.channels["train"] / "manifest.json").read_text())
    found = RowFacts.from_manifest(manifest)
    assert found.most.tokens <= staged.train.max_seq_len
    assert found.mean.tokens * staged.ledger.rows == pytest.approx(staged.ledger.total.trained, abs=0.1)


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize(("dtype", "by_kernels"), [("bfloat16", 1 / 3), ("float32", 1)])
@pytest.mark.parametrize("tokens", [200, 1100])
def test_logits_take_what_the_loss_allocates(path: str, dtype: str, by_kernels: float, tokens: int) -> None:
    """Of the estimate, which takes the kernels for absent, they take as much as they should where they are there."""
    if path != "off" and dtype != "float32" and dtype_of("auto", cpu_flags()) != dtype:
        pytest.skip("this processor does not multiply bf16: torch does by copies in fp32")
    model = facts({**SMOLLM2, "vocab_size": 20_000})
    row = RowShape(tokens=tokens, learned=tokens, groups=1, padded=tokens, explicit=0, flash=tokens**2)
    spec = TrainSpec(model="m", method="lora", max_seq_len=2048)
    expected = peak_memory(spec, model, dtype, RowFacts(mean=row, most=row, distinct=9)).logits * (1 if path == "off" else by_kernels)
    hidden = torch.randn(tokens, 8, dtype=getattr(torch, dtype), requires_grad=True)
    head, targets = torch.randn(20_000, 8, dtype=hidden.dtype), torch.arange(tokens)
    with kernels.forced(path), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        linear_cross_entropy(hidden, head, targets, scale=1.0)
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(accumulate(changes)) / 2**20 == pytest.approx(expected, rel=0.03, abs=1)


def test_attentions_memory_beside_its_tensors_is_counted():
    """MB of 4,096 tokens in bf16: each thread has 3 for keys and values, 0.5 for a block; sums are 4 for each part of a key head."""
    grouped = facts({**LLAMA2_7B, "num_key_value_heads": 8})
    for model, threads, laid_out, sums in ((facts(LLAMA2_7B), 56, 56, 2 * 32), (grouped, 56, 56, 7 * 8), (grouped, 2, 2, 2)):
        assert attention_scratch(model, 2, 4096, 4096, threads) / 2**20 == 3.5 * laid_out + 4 * sums
    assert attention_scratch(grouped, 2, 4096, 0, 56) == 0
    spec = TrainSpec(model="m", method="lora", max_seq_len=4096)
    scratch, query, keys = attention_scratch(grouped, 2, 4096, 4096, 64), 4096, 1024
    assert scratch > 4096 * (8 * keys + 16 * 8 * 512)  # what plain torch's takes, which a row of this length is counted with otherwise
    numbers = 2 * 4096 + 2 * query + 2 * keys + 2 * 11008 + 7 * spec.lora_rank  # that are kept of a token
    kept = grouped.layers * 4096 * (2 * numbers + 4 * 32 + 8)
    found = peak_memory(spec, grouped, "bfloat16").activations
    assert found == pytest.approx((kept + 4096 * 2 * (5 * query + 4 * keys) + scratch) / 2**20, abs=1)


SCRATCH = """
import torch
from pathlib import Path
from trimtab_runtime.xeon.attention import attend, attend_backward, plan_groups

def held(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) << 10

def peak(tokens, threads=16):
    torch.set_num_threads(threads)
    query, key, value, d_out = (torch.randn(tokens, heads, 64) for heads in (8, 1, 1, 8))
    groups, into = plan_groups([tokens]), torch.zeros(tokens, 10 * 64)
    out, lse = attend(query, key, value, groups, 0.1)
    before = held("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    attend_backward(d_out, query, key, value, out, lse, groups, 0.1, None, into)
    return held("VmHWM:") - before

peak(64)
print(peak(2048))
"""


def test_attentions_memory_is_what_the_kernel_takes():
    """Of one sample in 16 parts: the sums of all are there at once, what threads lay out where they compute at the same time."""
    environment = {**os.environ, "TRIMTAB_XEON": "avx512"}
    done = subprocess.run([sys.executable, "-c", SCRATCH], env=environment, capture_output=True, text=True, check=False)
    if "has no AVX-512" in done.stderr or "cannot be loaded" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    model = ModelFacts(layers=1, hidden=512, intermediate=64, heads=8, kv_heads=1, head_width=64, vocabulary=64, tied=True)
    sums = 8 * 2048 * 64 * 16
    assert 0.9 * sums < int(done.stdout) < attention_scratch(model, 4, 2048, 2048, 16)


SLOW = Rates.stated("bfloat16", 1e12, 5e10)


def seconds(rates: Rates = SLOW, nodes: int = 1, rows: RowFacts | None = None, **options: Any) -> float:
    return step_seconds(TrainSpec(model="m", **options), facts(SMOLLM2), rates, rows, nodes)


def test_a_step_takes_longer_with_more_to_do():
    assert seconds(accumulation=2) == pytest.approx(2 * seconds(), rel=0.02)  # but for the optimiser's part
    assert seconds(batch_rows=2) > 1.5 * seconds()
    assert seconds(max_seq_len=2048) > seconds(max_seq_len=1024)
    assert seconds(lora_rank=64) > seconds(lora_rank=8)
    assert seconds(method="qlora") > seconds(method="lora")
    assert seconds(rows=RowFacts.worst(TrainSpec(model="m", max_seq_len=512))) < seconds()


@pytest.mark.parametrize("name", ["linear", "adapters", "explicit", "logits", "dequantised", "bandwidth", "gathered"])
def test_each_rate_counts(name):
    row = RowShape(tokens=1024, learned=1000, groups=3, padded=1100, explicit=100_000, flash=360_000)
    mixed = RowFacts(mean=row, most=row, distinct=500)
    assert seconds(SLOW.model_copy(update={name: getattr(SLOW, name) / 2}), rows=mixed, method="qlora") > seconds(
        rows=mixed, method="qlora"
    )


def test_all_parameters_take_more_than_adapters_of_them():
    assert seconds(method="full") > seconds(method="lora")
    model = facts(SMOLLM2)
    whole = TrainSpec(model="m", method="full", max_seq_len=512)
    for dtype in ("bfloat16", "float32"):
        for device in ("cpu", "gpu"):
            few = peak_memory(whole.model_copy(update={"method": "lora"}), model, dtype, device=device)
            assert peak_memory(whole, model, dtype, device=device).total > few.total + 4 * model.parameters / 2**20


def test_fewer_targets_take_less_and_dora_takes_more():
    model = facts(SMOLLM2)
    every, some = TrainSpec(model="m", method="lora"), TrainSpec(model="m", method="lora", lora_targets=("q_proj", "layers.1.mlp.up_proj"))
    directed = TrainSpec(model="m", method="lora", use_dora=True)
    assert model.trained(every) == model.adapter(32)
    hidden, inner = model.hidden, model.intermediate
    assert model.trained(some) == 32 * (model.layers * 2 * hidden + hidden + inner)
    assert model.trained(TrainSpec(model="m", lora_targets=("query_key_value",))) == model.adapter(32), "a name of another family"
    assert 0 < model.trained(directed) - model.trained(every) < model.trained(every) / 20
    assert peak_memory(some, model, "bfloat16").total < peak_memory(every, model, "bfloat16").total
    assert peak_memory(directed, model, "bfloat16").total > peak_memory(every, model, "bfloat16").total
    assert step_seconds(some, model, SLOW) < step_seconds(every, model, SLOW) < step_seconds(directed, model, SLOW)


def test_machines_share_gradients_where_their_network_is_known():
    assert seconds(nodes=4) == seconds()
    known = SLOW.model_copy(update={"network": 1e9})
    assert seconds(known) == seconds()
    low_rank = facts(SMOLLM2).adapter(32)
    assert seconds(known, nodes=4) - seconds() == pytest.approx(8 * low_rank * 3 / 4 / 1e9)


def test_rates_are_json_both_ways():
    assert Rates.model_validate_json(SLOW.model_dump_json()) == SLOW
    with pytest.raises(ValueError):
        Rates.model_validate({**SLOW.model_dump(), "linear": 0})


def test_this_machine_is_measured_at_a_models_shapes(tmp_path, tiny_model):
    job = make_job(tmp_path, tiny_model)
    said = run(job, "measure", OMP_NUM_THREADS="1")
    assert "rates in float32" in said
    found = Rates.model_validate_json(job.rates.read_bytes())
    assert found.dtype == "float32"
    assert 1e8 < found.linear < 1e14


def test_a_run_says_what_memory_it_expects_by_the_same_estimate(tmp_path, tiny_model):
    job = make_job(tmp_path, tiny_model, max_steps=1)
    run(job, "prepare")
    train_here(job)
    (said,) = (event for event in read(job.events) if isinstance(event, Choice) and event.name == "peak_memory")
    spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    manifest = json.loads((job.channel("train") / "manifest.json").read_text())
    config = json.loads((tiny_model / "config.json").read_text())
    expected = peak_memory(spec, facts(config), "float32", RowFacts.from_manifest(manifest))
    assert said.value == f"about {expected.total:,} MB"
    assert said.reason == f"estimated: {expected}"


def test_weights_are_counted_as_the_models_have_them(tmp_path):
    assert facts(SMOLLM2).parameters == catalog()["smollm2-135m-instruct"].parameters
    assert facts(LLAMA2_7B).parameters == catalog()["llama2-7b"].parameters
    from transformers import AutoModelForCausalLM

    from trimtab_runtime.methods.lora import add_adapters

    folder = make_tiny_model(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = facts(json.loads((folder / "config.json").read_text()))
    assert found.parameters == model.num_parameters()
    adapted = add_adapters(model, TrainSpec(model="m", lora_rank=4))
    assert found.adapter(4) == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "config", [{}, {**SMOLLM2, "hidden_size": None}, {**SMOLLM2, "vocab_size": "many"}, {"n_layer": 12, "n_embd": 768}]
)
def test_a_model_that_does_not_name_its_sizes_is_not_estimated(config):
    assert ModelFacts.from_config(config) is None


@pytest.mark.parametrize("more", [{"max_seq_len": 2048}, {"batch_rows": 2}, {"lora_rank": 64}, {"max_seq_len": 1100}])
def test_more_of_anything_takes_more(more):
    plain = {"model": "m", "method": "lora", "max_seq_len": 1024, "lora_rank": 32}
    least = peak_memory(TrainSpec(**plain), facts(LLAMA2_7B), "bfloat16").total
    assert peak_memory(TrainSpec(**{**plain, **more}), facts(LLAMA2_7B), "bfloat16").total > least
    assert peak_memory(TrainSpec(**plain), facts(LLAMA2_7B), "float32").total > least


@given(asked=st.sampled_from(["auto", "bfloat16", "float32"]), flags=st.frozensets(st.sampled_from([*BF16_FLAGS, "avx2", "avx512f"])))
def test_the_dtype_is_the_one_that_the_run_will_choose(asked, flags):
    assert dtype_of(asked, flags) == pick_dtype(asked, flags).value


def test_a_plan_says_what_it_will_take_and_of_what():
    ledger = Ledger(accounts={"document": Account(samples=9, tokens=900, trained=900)}, rounds=(10,), row_tokens=100)
    spec = TrainSpec(model="m", batch_rows=2)
    memory = peak_memory(spec, facts(SMOLLM2), "bfloat16")
    found = plan(spec, ledger, memory=memory)
    assert found.memory_mb == memory.total
    assert f"memory about {memory.total:,} MB: model {memory.base:,}, " in found.reasons[-1]
    assert "2 x 1,024 tokens" in found.reasons[-1]
    assert plan(spec, ledger).memory_mb is None
