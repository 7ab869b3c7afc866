"""Automatic choices: what follows from which facts, and that the learning rate goes where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts, peak_memory
from trimtab.spec import TrainSpec
from trimtab_runtime.choices import cpu_flags, learning_rate, pick_device, pick_dtype, short_of_memory

SCHEDULES = ("cosine", "linear", "constant")


@pytest.mark.parametrize(
    ("asked", "flags", "value", "reason"),
    [
        ("auto", {"avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}, "bfloat16", "AMX"),
        ("auto", {"avx512f", "avx512_bf16"}, "bfloat16", "avx512_bf16"),
        ("auto", {"avx2", "avx512f"}, "float32", "no bf16 instructions"),
        ("auto", {"gpu_bf16"}, "bfloat16", "GPU"),
        ("auto", set(), "float32", "no bf16 instructions"),
        ("bfloat16", set(), "bfloat16", "asked for"),
        ("float32", {"amx_bf16"}, "float32", "asked for"),
    ],
)
def test_bf16_where_the_processor_multiplies_it_or_where_it_is_asked_for(asked: str, flags: set[str], value: str, reason: str) -> None:
    choice = pick_dtype(asked, frozenset(flags))
    assert choice.value == value
    assert reason in choice.reason


def test_a_gpu_is_used_where_it_was_asked_for_and_only_there() -> None:
    assert pick_device("xeon", 2).value == "cpu"
    assert pick_device("gpu", 1).value == "cuda"
    assert "the first is used" in pick_device("gpu", 2).reason
    with pytest.raises(SpecError, match=r"--device xeon"):
        pick_device("gpu", 0)
    with pytest.raises(SpecError, match=r"--nodes 1"):
        pick_device("gpu", 1, nodes=2)


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "amx_bf16"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_flags(cpuinfo) == {"fp", "asimd", "bf16"}
    cpuinfo.write_text("processor\t: 0\n")
    assert cpu_flags(cpuinfo) == frozenset()
    assert cpu_flags(tmp_path / "none") == frozenset()


def curve(steps: int, schedule: str, warmup_ratio: float = 0.0, peak: float = 1.0) -> list[float]:
    return [learning_rate(step, steps, peak=peak, warmup_ratio=warmup_ratio, schedule=schedule) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_warms_up_in_equal_parts_and_then_stands_at_the_peak(schedule: str) -> None:
    rates = curve(50, schedule, warmup_ratio=0.08, peak=0.5)
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == 0.5


def test_linear_goes_down_by_equal_parts() -> None:
    rates = curve(10, "linear")
    assert rates == pytest.approx([1 - step / 10 for step in range(10)])


def test_cosine_is_at_half_in_the_middle_and_near_nothing_at_the_end() -> None:
    rates = curve(100, "cosine")
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert rates[:50] == pytest.approx([1 - rate for rate in [*rates[50:], 0.0][:0:-1]])  # as much above the half as below it


def test_constant_stays() -> None:
    assert curve(10, "constant") == [1.0] * 10


@settings(deadline=None)  # a busy machine is no failure
@given(
    steps=st.integers(1, 200),
    schedule=st.sampled_from(SCHEDULES),
    warmup_ratio=st.floats(0, 1, exclude_max=True),
    peak=st.floats(1e-6, 1.0),
)
def test_it_is_positive_never_above_the_peak_and_never_rises_after_the_warm_up(
    steps: int, schedule: str, warmup_ratio: float, peak: float
) -> None:
    rates = curve(steps, schedule, warmup_ratio, peak)
    assert all(0 < rate <= peak for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip


def test_ranks_that_take_more_memory_than_there_is_are_warned_of() -> None:
    spec = TrainSpec(model="m", ranks="auto")
    model = ModelFacts.from_config(LLAMA)
    assert model is not None
    each = peak_memory(spec, model, "float32").total

    def short(memory_mb: int | None, ranks: int = 4) -> str:
        found = short_of_memory(spec, LLAMA, "float32", {}, memory_mb, ranks)
        return found.reason if found else ""

    assert short(each) == short(None) == short(each // 2, ranks=1) == ""
    half = short(each // 2 + 1)
    assert half.startswith(f"4 ranks of about {each:,} MB take {4 * each:,} MB, and there are {4 * (each // 2 + 1):,} MB")
    assert "--ranks 2," in half
    assert "--ranks 1," in short(each // 8)
    assert short_of_memory(spec, {"model_type": "unknown"}, "float32", {}, 1, 4) is None
