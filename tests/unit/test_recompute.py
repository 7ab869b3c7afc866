"""Which layers do their forward pass again, by the memory that is there: as few as fit, the reason, and the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.job_tree import make_job, run, train_here
from trimtab.estimate import ModelFacts, Rates, peak_memory, recompute_layers, step_seconds
from trimtab.events import Choice, read
from trimtab.spec import TrainSpec
from trimtab_runtime import memory
from trimtab_runtime.choices import recomputed

LLAMA2_13B = {
    "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000,
    "dtype": "bfloat16", "model_type": "llama",
}  # fmt: skip
FACTS = ModelFacts.from_config(LLAMA2_13B)
assert FACTS is not None
SPEC = TrainSpec(model="m", method="qlora", lora_rank=16, max_seq_len=2048)


def total(again: int, spec: TrainSpec = SPEC) -> int:
    assert FACTS is not None
    return peak_memory(spec, FACTS, "bfloat16", again=again).total


@given(there=st.integers(4_000, 60_000), method=st.sampled_from(["lora", "qlora", "full"]), dropout=st.sampled_from([0.0, 0.1]))
def test_as_few_as_fit(there: int, method: Any, dropout: float) -> None:
    assert FACTS is not None
    adapters = {} if method == "full" else {"lora_rank": 16, "lora_dropout": dropout}
    spec = TrainSpec(model="m", method=method, max_seq_len=2048, **adapters)
    found = recompute_layers(spec, FACTS, "bfloat16", None, there)
    room = int(0.92 * there)
    assert found.layers == 0 or total(found.layers - 1, spec) > room
    if found.layers < 40:
        assert total(found.layers, spec) <= room
        assert f"{total(found.layers, spec):,} MB" in found.reason
    else:
        assert total(0, spec) > room
    assert f"{there:,}" in found.reason


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_each_layer_more_takes_less_memory_and_more_time(method: Any) -> None:
    assert FACTS is not None
    spec = TrainSpec(model="m", method=method, max_seq_len=2048)
    totals = [total(again, spec) for again in (0, 10, 20, 30, 40)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] - totals[1] == pytest.approx(totals[2] - totals[3], abs=2)
    rates = Rates.stated("bfloat16", 1e12, 1e11)
    seconds = [step_seconds(spec, FACTS, rates, again=again) for again in (0, 20, 40)]
    assert 0 < seconds[1] - seconds[0] == pytest.approx(seconds[2] - seconds[1])
    assert 1.25 < seconds[2] / seconds[0] < 1.55  # a forward pass more, of three passes' time, or of two with frozen weights


def test_13_billion_in_16_gb() -> None:
    assert FACTS is not None
    found = recompute_layers(SPEC, FACTS, "bfloat16", None, int(16e9) >> 20)
    assert 0 < found.layers < 40
    assert found.reason.startswith("of 40: about ")
    assert recompute_layers(SPEC, FACTS, "bfloat16", None, 40_000).layers == 0
    assert recompute_layers(SPEC, FACTS, "bfloat16", None, None).layers == 0


def test_what_does_not_name_its_sizes_keeps_all() -> None:
    assert recomputed(SPEC, {"model_type": "falcon"}, "bfloat16", {}, 100) == (0, None)


def machine(root: Path, *, available: int = 8 << 20, limit: str = "max") -> Path:
    """Files of a machine with so many kB available, and a control group's limit in bytes."""
    for name, text in (
        ("proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {available} kB\n"),
        ("proc/self/status", "Name: x\nVmSize: 3145728 kB\nVmRSS: 1048576 kB\n"),
        ("proc/self/cgroup", "0::/\n"),
        ("sys/fs/cgroup/memory.max", f"{limit}\n"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_memory_that_is_there(tmp_path: Path) -> None:
    """What is available and what this process holds already, or less where a control group says so; several ranks share both."""
    assert memory.memory_there(root=machine(tmp_path)) == 9 * 1024
    assert memory.memory_there(ranks=2, root=machine(tmp_path)) == 5 * 1024
    assert memory.memory_there(root=machine(tmp_path, limit=str(6 << 30))) == 6 * 1024
    assert memory.memory_there(ranks=3, root=machine(tmp_path, limit=str(6 << 30))) == 2 * 1024
    assert memory.memory_there(root=tmp_path / "nothing") is None
    assert (memory.memory_there() or 0) > 100


def test_a_limit_of_the_address_space_counts(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    own = memory._kilobytes(Path("/proc/self/status"), "VmSize:") or 0
    resource.setrlimit(resource.RLIMIT_AS, ((own + (4 << 20)) << 10, before[1]))
    try:
        found = memory.memory_there(root=machine(tmp_path, available=900 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert found == (((own + (4 << 20)) - (3 << 20) + (1 << 20)) >> 10)  # the limit, less what the file says is mapped, and what is held


def test_a_run_says_it_and_learns_the_same(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run with the memory of this machine, one that is told that there is hardly any: the same losses to the last digit."""
    losses = []
    for there in (None, 100):
        job = make_job(tmp_path / str(there), tiny_model, max_steps=3)
        run(job, "prepare")
        if there:
            monkeypatch.setattr("trimtab_runtime.recipe.memory_there", lambda ranks: 100)
        train_here(job)
        said = {event.name: event for event in read(job.events) if isinstance(event, Choice)}
        assert said["recompute"].value == ("4 layers" if there else "none")
        assert ("even so about" if there else "all that layers keep fits") in said["recompute"].reason
        losses.append([event.loss for event in read(job.events) if event.__class__.__name__ == "Step"])
        expected = int(said["peak_memory"].value.split()[1].replace(",", ""))
        spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
        assert spec.max_steps == 3
        assert expected > 0
    assert losses[0] == losses[1]
