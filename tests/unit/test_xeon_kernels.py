"""NF4 on every path of the kernels, to the bit as bitsandbytes makes and reads it; how a path is chosen; the shared scratch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")

import bitsandbytes as bnb  # noqa: E402
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute  # noqa: E402
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit  # noqa: E402

from trimtab.errors import SpecError  # noqa: E402
from trimtab_runtime.choices import Choice  # noqa: E402
from trimtab_runtime.xeon import kernels, weights  # noqa: E402
from trimtab_runtime.xeon.lora import fuse  # noqa: E402

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
# whole blocks, blocks across rows, a rest behind the last block, odd numbers of numbers, one number; one that two threads share
SHAPES = [(2, 64), (3, 32), (5, 100), (7, 33), (1, 1), (1, 63), (1, 2), (1, 65), (64, 1), (11, 127), (300, 130), (512, 768)]


@pytest.fixture(params=kernels.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its own reference for odd shapes with torch.compile, half a minute each; it computes the same without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def same(found: Tensor, expected: Tensor) -> bool:
    """To the bit, the sign of zero and all; any NaN is as good as another."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if found.is_floating_point() and bool(expected.isnan().any()):
        return torch.equal(found.isnan(), expected.isnan()) and same(found.nan_to_num(0.5), expected.nan_to_num(0.5))
    return torch.equal(found.reshape(-1).contiguous().view(torch.uint8), expected.reshape(-1).contiguous().view(torch.uint8))


def same_state(found: QuantState, expected: QuantState) -> bool:
    outer = all(same(getattr(found, name), getattr(expected, name)) for name in ("absmax", "code", "offset"))
    inner = all(same(getattr(found.state2, name), getattr(expected.state2, name)) for name in ("absmax", "code"))
    plain = all(getattr(found, name) == getattr(expected, name) for name in ("shape", "dtype", "blocksize", "quant_type", "nested"))
    return outer and inner and plain and found.state2.blocksize == expected.state2.blocksize and found.state2.dtype == expected.state2.dtype


def drawn(shape: tuple[int, int], kind: str) -> Tensor:
    """A weight in fp32. `ties` holds the codes themselves and the bounds between them, of which the lower code is to be taken."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=generator)
    flat = weight.view(-1)
    if kind == "zeros":  # whole blocks of them, some negative
        flat[: len(flat) // 2] = 0.0
        flat[1::3] = -0.0
    elif kind == "sizes":
        weight *= torch.exp(2 * torch.randn(shape, generator=generator))
    elif kind == "ties":
        code = bnb.functional.get_4bit_type("nf4", device="cpu")
        values = torch.cat([code, (code[1:] + code[:-1]) / 2])
        flat.copy_(values[torch.randint(len(values), (len(flat),), generator=generator)])
        flat[::64] = 1.0
    elif kind == "tiny":  # under the smallest divisor, 1e-38
        weight *= 1e-39
    return weight


def by_format(packed: Tensor, state: QuantState) -> Tensor:
    """What the storage format says, by bitsandbytes' own default implementation: its AVX-512 kernel is not always right (below)."""
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    found: Tensor = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)
    return found.view(state.shape)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP16])
@pytest.mark.parametrize("kind", ["normal", "zeros", "sizes", "ties", "tiny"])
def test_what_is_quantised_is_what_bitsandbytes_makes(path: str, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = drawn(shape, kind).to(dtype)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        ours, our_state = kernels.nf4_quantise(weight)
        assert same(ours, packed), shape
        assert same_state(our_state, state), shape


def test_a_weight_with_gaps_between_its_rows_is_quantised_as_without(path: str) -> None:
    wide = drawn((33, 200), "normal")
    assert same(kernels.nf4_quantise(wide[:, :100])[0], kernels.nf4_quantise(wide[:, :100].contiguous())[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 64 * 5 + 3, -1])
def test_a_weight_that_is_not_finite_is_refused(path: str, number: float, at: int) -> None:
    weight = drawn((5, 100), "normal")
    weight.view(-1)[at] = number
    with pytest.raises(ValueError, match=r"NaN or infinite.*method=lora"):
        kernels.nf4_quantise(weight)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", kernels.PATHS[:-1])
def test_the_operator_itself_puts_numbers_that_are_not_finite_where_bitsandbytes_does(path: str, number: float) -> None:
    weight = drawn((5, 100), "normal")
    weight.view(-1)[[7, 70, -1]] = number
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    ours, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    with kernels.forced(path):
        torch.ops.trimtab_xeon.nf4_quantise(weight, ours, absmax)
    assert same(ours, packed)
    assert same(absmax, state.absmax)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16])
def test_what_is_dequantised_is_what_bitsandbytes_reads(path: str, dtype: torch.dtype, nested: bool, monkeypatch: Any) -> None:
    for shape in SHAPES:
        for kind in ("normal", "zeros", "sizes"):
            weight = drawn(shape, kind).to(dtype)
            packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
            wanted = by_format(packed, state)
            if shape[1] % 64 == 0:
                assert same(dequantize_4bit(packed, state), wanted)
            for into in (BF16, FP32):
                for stream_from in (0, 1 << 40):  # past the caches, or not
                    monkeypatch.setattr(kernels, "STREAM_FROM", stream_from)
                    out = torch.full(shape, torch.nan, dtype=into)
                    kernels.nf4_dequantise(packed, state, out)
                    assert same(out, wanted.to(into)), (shape, kind, into)


def test_scales_that_are_not_finite_and_other_storage_are_read_too(path: str) -> None:
    packed, state = quantize_4bit(drawn((4, 64), "normal"), blocksize=64, compress_statistics=False, quant_type="nf4")
    state.absmax[:2] = torch.tensor([torch.nan, torch.inf])
    out = torch.empty(4, 64)
    kernels.nf4_dequantise(packed, state, out)
    assert same(out, by_format(packed, state))
    stored, state = quantize_4bit(drawn((4, 64), "normal"), blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=BF16)
    kernels.nf4_dequantise(stored, state, out)
    assert same(out, by_format(stored.view(torch.uint8), state))


@pytest.mark.parametrize("how", [{"quant_type": "fp4", "blocksize": 64}, {"quant_type": "nf4", "blocksize": 128}])
def test_other_forms_are_left_to_bitsandbytes(path: str, how: dict[str, Any]) -> None:
    packed, state = quantize_4bit(drawn((16, 256), "normal").bfloat16(), compress_statistics=True, **how)
    out = torch.empty(16, 256, dtype=BF16)
    kernels.nf4_dequantise(packed, state, out)
    assert same(out, dequantize_4bit(packed, state))


@pytest.mark.parametrize("into", [BF16, FP32])
@pytest.mark.parametrize("stream_from", [0, 1 << 40])
def test_rows_may_lie_apart_and_what_is_between_them_is_left_alone(
    path: str, into: torch.dtype, stream_from: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(kernels, "STREAM_FROM", stream_from)
    packed, state = kernels.nf4_quantise(drawn((70, 1024), "normal").bfloat16())
    memory = torch.full((70, 1024 + 32), 7.0, dtype=into)
    kernels.nf4_dequantise(packed, state, memory[:, :1024])
    assert same(memory[:, :1024], by_format(packed, state).to(into))
    assert bool((memory[:, 1024:] == 7).all())


def test_threads_make_the_same(path: str) -> None:
    weight = drawn((1000, 640), "normal").bfloat16()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        packed, state = kernels.nf4_quantise(weight)
        out = torch.empty_like(weight)
        kernels.nf4_dequantise(packed, state, out)
        found.append((packed, out))
    torch.set_num_threads(before)
    assert all(same(packed, found[0][0]) and same(out, found[0][1]) for packed, out in found[1:])


def layer_of(weight: Tensor, bias: bool = False) -> Any:
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=bias, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def test_checkpoints_are_read_by_either_side(path: str, tmp_path: Path) -> None:
    weight = drawn((96, 256), "normal").bfloat16()
    theirs = layer_of(weight)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    held = load_file(tmp_path / "theirs.safetensors")
    packed = held.pop("weight")
    state = QuantState.from_dict({key.removeprefix("weight."): value for key, value in held.items()}, device=torch.device("cpu"))
    out = torch.empty(96, 256, dtype=BF16)
    kernels.nf4_dequantise(packed, state, out)
    assert same(out, dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))

    packed, state = kernels.nf4_quantise(weight)
    ours = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    save_file(ours, tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    again = layer_of(torch.zeros_like(weight))
    held = load_file(tmp_path / "ours.safetensors")
    again.weight = bnb.nn.Params4bit.from_prequantized(held.pop("weight"), {key[7:]: value for key, value in held.items()}, device="cpu")
    x = drawn((8, 256), "sizes").bfloat16()
    assert same(again(x), theirs(x))


def test_a_layer_packed_for_inference_is_refused_by_name(path: str) -> None:
    layer = layer_of(drawn((64, 64), "normal").bfloat16())
    layer.weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets in an eval forward on processors with avx512_bf16
    with pytest.raises(ValueError, match=r"packed this weight for inference.*load the model again"):
        weights.weight_of(layer, BF16)


def test_weights_share_one_scratch_and_stand_one_below_another(path: str) -> None:
    layers = [layer_of(drawn(shape, "normal").bfloat16()) for shape in ((192, 1024), (64, 1024), (128, 1024))]
    plain = torch.nn.Linear(1024, 32, bias=False).bfloat16()
    wanted = [by_format(layer.weight.data, layer.weight.quant_state) for layer in layers]
    unmade = bnb.nn.Linear4bit(1024, 16, bias=False)  # holds plain numbers until it is moved to its device
    below = weights.weights_below([*layers, plain, unmade], BF16)
    assert same(below, torch.cat([*wanted, plain.weight.data, unmade.weight.data.bfloat16()]))
    assert below.stride(0) == 1024 + 32  # rows of 2,048 bytes lie apart
    place = below.data_ptr()
    for layer, expected in zip(layers, wanted, strict=True):
        one = weights.weight_of(layer, BF16)
        assert same(one, expected)
        if path != "off":  # bitsandbytes makes its own memory
            assert one.data_ptr() == place
        assert same(weights.weight_of(layer, FP32), expected.float())
    assert weights.weight_of(plain, BF16) is plain.weight
    assert same(weights.weights_below(layers[:1], BF16), wanted[0])


@pytest.mark.parametrize("width", [96, 256])  # of the first bitsandbytes' own forward takes wrong scales
@pytest.mark.parametrize(("given", "computes"), [(FP32, FP32), (BF16, BF16), (FP32, BF16)])
def test_a_4_bit_layer_without_an_adapter_multiplies_by_what_its_format_says(
    path: str, width: int, given: torch.dtype, computes: torch.dtype
) -> None:
    layer = layer_of(drawn((64, width), "normal").to(computes), bias=True)
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    weight, bias = by_format(layer.weight.data, layer.weight.quant_state), layer.bias.detach().to(computes)
    assert fuse(torch.nn.Sequential(layer)) == 0  # adapted ones
    x, dy = drawn((3, width), "normal").to(given), drawn((3, 64), "normal").to(given)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = layer(ours), (theirs.to(computes) @ weight.t() + bias).to(given)
    y.backward(dy)
    wanted.backward(dy)
    assert same(y.detach(), wanted.detach())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert same(ours.grad, theirs.grad)


def test_each_thread_has_a_scratch_of_its_own(path: str) -> None:
    first, second = (layer_of(drawn((rows, 256), "normal").bfloat16()) for rows in (100, 200))
    kept = weights.weight_of(first, BF16)
    before = kept.clone()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(weights.weight_of(second, BF16).clone()))
    thread.start()
    thread.join()
    assert same(kept, before)
    assert same(found[0], by_format(second.weight.data, second.weight.quant_state))


def test_a_scratch_first_asked_for_in_inference_mode_serves_training(path: str) -> None:
    layer = layer_of(drawn((64, 128), "normal").bfloat16())
    done: list[bool] = []

    def run() -> None:
        with torch.inference_mode():
            expected = weights.weight_of(layer, BF16).clone()
        done.append(same(weights.weight_of(layer, BF16), expected))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


def test_how_weights_are_dequantised_is_said_with_its_reason() -> None:
    absent = Choice("off", "trimtab-xeon is not installed: plain torch computes")
    assert weights.dequantiser(Choice("avx512", "this processor has AVX-512"), kept=False).value == "trimtab-xeon (avx512)"
    assert weights.dequantiser(absent, kept=True).value == "bitsandbytes"
    worst = weights.dequantiser(absent, kept=False)
    assert worst.value == "bitsandbytes as it is"
    assert worst.reason.startswith("trimtab-xeon is not installed")


def test_the_variable_chooses_the_path(path: str) -> None:
    assert kernels.path() == Choice(path, f"TRIMTAB_XEON={path}")


def test_without_the_library_the_reason_is_said() -> None:
    code = """
        import os, sys
        sys.modules["trimtab_xeon"] = None  # as where no compiler was found
        from trimtab_runtime.xeon import kernels
        print(kernels.path().value, kernels.path().reason, sep=": ")
        kernels.path.cache_clear()
        os.environ[kernels.VARIABLE] = "portable"
        kernels.path()
    """
    environment = {key: value for key, value in os.environ.items() if key != kernels.VARIABLE}
    done = subprocess.run([sys.executable, "-c", dedent(code)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "off: trimtab-xeon is not installed: plain torch computes\n"
    assert "TRIMTAB_XEON=portable, and trimtab-xeon cannot be loaded" in done.stderr
    assert done.stderr.endswith("install it, or unset TRIMTAB_XEON\n")


def test_another_value_is_an_error_that_names_them_all() -> None:
    with pytest.raises(SpecError, match=r"TRIMTAB_XEON=avx2 .*amx, avx512, portable or off"), kernels.forced("avx2"):
        pass
    kernels.path()  # and what was chosen before is chosen again


@pytest.mark.parametrize(
    ("best", "asked", "lacks"), [("avx512", "amx", "AMX"), ("portable", "amx", "AMX"), ("portable", "avx512", "AVX-512")]
)
def test_a_path_that_this_processor_lacks_is_an_error_that_names_its_best(
    best: str, asked: str, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = rf"TRIMTAB_XEON={asked}, and this processor has no {lacks} .*: set it to {best}, or unset it"
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "cpu_flags", lambda: {"avx512f"})
        patch.setitem(sys.modules, "trimtab_xeon", SimpleNamespace(best=lambda: best, use=lambda name: None))
        with pytest.raises(SpecError, match=message), kernels.forced(asked):
            pass
    with kernels.forced("off"):
        pass  # what this processor has is found out again


def test_amx_that_linux_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "cpu_flags", lambda: {"avx512f", "amx_bf16", "amx_tile"})
        patch.setitem(sys.modules, "trimtab_xeon", SimpleNamespace(best=lambda: "avx512", use=lambda name: None))
        kernels.path.cache_clear()
        assert kernels.path().value == "avx512"
        assert "Linux does not let this process use the processor's AMX, as it does from 5.16" in kernels.path().reason
        with pytest.raises(SpecError, match=r"TRIMTAB_XEON=amx, and Linux does not let .*: set it to avx512"), kernels.forced("amx"):
            pass
    with kernels.forced("off"):
        pass


WRONG = {
    "bytes": ("packed must be contiguous uint8", lambda given: given | {"packed": torch.zeros(3, dtype=torch.uint8)}),
    "scales": ("one number a block", lambda given: given | {"absmax": torch.zeros(9)}),
    "their dtype": ("absmax must be fp32", lambda given: given | {"absmax": torch.zeros(4, dtype=torch.float64)}),
    "out": ("bf16 or fp32", lambda given: given | {"out": torch.empty(4, 64, dtype=FP16)}),
    "apart": ("rows of whole blocks", lambda given: given | {"out": torch.empty(64, 4).t()}),
    "book": ("their own scales", lambda given: given | {"book": torch.zeros(256)}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", ["portable"])
def test_an_operator_reads_nothing_that_does_not_fit(path: str, wrong: str) -> None:
    message, spoil = WRONG[wrong]
    given = {"packed": torch.zeros(128, dtype=torch.uint8), "absmax": torch.zeros(4), "book": None, "of_codes": None, "offset": None}
    given |= {"codes_a_scale": 256, "out": torch.empty(4, 64), "twice": False, "stream_from": 0}
    with kernels.forced(path), pytest.raises(RuntimeError, match=message):
        torch.ops.trimtab_xeon.nf4_dequantise(**spoil(given))
