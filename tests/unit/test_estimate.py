"""What training will take in memory, by a formula, beside what runs were measured to take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.tiny_model import make_tiny_model
from trimtab.catalog import catalog
from trimtab.estimate import BF16_FLAGS, ModelFacts, dtype_of, peak_memory
from trimtab.ledger import Account, Ledger
from trimtab.plan import plan
from trimtab.spec import TrainSpec
from trimtab_runtime.choices import pick_dtype

SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA2_7B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip

# peaks of whole runs over benchmarks/demo/pages without replay, in MB; the short ones saw no row of long samples
MEASURED = [
    ({"method": "lora", "dtype": "float32", "max_seq_len": 128, "max_steps": 2}, 1391),
    ({"method": "lora", "dtype": "float32", "max_seq_len": 512, "max_steps": 10}, 2536),
    ({"method": "lora", "dtype": "float32", "max_seq_len": 1024, "max_steps": 2}, 4067),
    ({"method": "lora", "dtype": "bfloat16", "max_seq_len": 128, "max_steps": 2}, 1037),
    ({"method": "lora", "dtype": "bfloat16", "max_seq_len": 512, "max_steps": 2}, 1965),
    ({"method": "lora", "dtype": "bfloat16", "max_seq_len": 1024, "max_steps": 2}, 2176),
    ({"method": "lora", "dtype": "bfloat16", "max_seq_len": 1024, "max_steps": 12}, 3160),
    ({"method": "qlora", "dtype": "float32", "max_seq_len": 1024, "max_steps": 2}, 4031),
    ({"method": "qlora", "dtype": "bfloat16", "max_seq_len": 512, "max_steps": 2}, 2129),
    ({"method": "qlora", "dtype": "bfloat16", "max_seq_len": 1024, "max_steps": 12}, 3178),
    ({"method": "qlora", "dtype": "bfloat16", "max_seq_len": 2048, "max_steps": 3}, 4091),
    ({"method": "qlora", "dtype": "bfloat16", "max_seq_len": 1024, "batch_rows": 3, "max_steps": 3}, 5465),
]


def facts(config: dict[str, Any]) -> ModelFacts:
    found = ModelFacts.from_config(config)
    assert found is not None
    return found


@pytest.mark.parametrize(("options", "measured"), MEASURED)
def test_a_real_model_takes_about_what_is_estimated(options, measured):
    estimate = peak_memory(TrainSpec(model="m", **options), facts(SMOLLM2), options["dtype"]).total
    assert 0.65 < measured / estimate < 1.15
    if options["max_steps"] >= 10:  # costly rows among them
        assert 0.9 < measured / estimate < 1.1


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


@pytest.mark.parametrize("more", [{"max_seq_len": 2048}, {"batch_rows": 2}, {"lora_rank": 64}, {"method": "qlora", "max_seq_len": 2048}])
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
