"""A linear layer with NF4 weights beside the same unquantised, forward and backward:  python benchmarks/linear.py --check

  plain          y = x W', dx = dy W by oneDNN: what the others are divided by
  ours           the same products, W dequantised before each into memory that all layers share (xeon/weights.py)
  bitsandbytes   its Linear4bit and autograd function, with our allocator settings
  ... as it is   the same in a process of its own, in which the allocator is as glibc has it

Shapes are outputs x inputs of the layers of a 1.1B and a 13B Llama. The weights are the same in all: double quantisation, blocks of 64, and
in this run our dequantised numbers are held against bitsandbytes' bit for bit. So is our quantiser: the packed bytes and all of the state.
The quantisers' seconds are for each GB of bf16 weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from trimtab_runtime.xeon import allocator

ALONE = "--as-it-is"
ALLOCATOR = "glibc's defaults" if ALONE in sys.argv else allocator.keep_large_blocks()  # before torch loads

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from measure import Figure, Seconds, alternate, dtype_of, machine, parser, ratio, report  # noqa: E402
from trimtab_runtime.methods.qlora import library, quantised  # noqa: E402
from trimtab_runtime.xeon import kernels  # noqa: E402
from trimtab_runtime.xeon.weights import weight_of  # noqa: E402

library()  # bitsandbytes, without its warnings
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit  # noqa: E402

SHAPES = ("2048x2048", "5632x2048", "2048x5632", "5120x5120", "13824x5120", "5120x13824")
PLAIN, JUDGED, BARS, QUANTISER_BAR = "plain", "5120x5120", {2048: 1.06, 256: 1.25}, 0.5
Variant = Callable[[], object]


def layer_of(shape: str, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    out, inner = map(int, shape.split("x"))
    layer = nn.Linear(inner, out, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
    layer.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return layer


def by_bitsandbytes(small: nn.Module, x: Tensor, dy: Tensor) -> Variant:
    """Its layer as a model calls it: forward, and the gradient of the input."""
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(small(leaf), leaf, dy)


def inputs(shape: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out, inner = map(int, shape.split("x"))
    draw = torch.Generator().manual_seed(1)
    return torch.randn(tokens, inner, generator=draw).to(dtype), torch.randn(tokens, out, generator=draw).to(dtype)


class AsItIs:
    """bitsandbytes in a process of its own, with the allocator's defaults; told what to do by lines, it tells its seconds."""

    def __init__(self, threads: int, dtype: str) -> None:
        tuned = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
        self.child = subprocess.Popen(
            [sys.executable, __file__, ALONE, "--threads", str(threads), "--dtype", dtype],
            env={name: value for name, value in os.environ.items() if not name.startswith(tuned)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, line: str) -> float:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        told = self.child.stdout.readline()
        if not told:
            raise SystemExit("linear: the process with the allocator's defaults has ended, see above")
        return float(told)

    def close(self) -> None:
        self.child.communicate()


def answer(threads: int, dtype: torch.dtype) -> int:
    """The other end: `make SHAPE TOKENS` and `time`, seconds for an answer."""
    clock = time.process_time if threads == 1 else time.perf_counter
    call: Variant = lambda: None  # noqa: E731
    for line in sys.stdin:
        began = clock()
        if line.startswith("make"):
            _make, shape, tokens = line.split()
            call = by_bitsandbytes(quantised(layer_of(shape, dtype), dtype), *inputs(shape, int(tokens), dtype))
        else:
            call()
        print(clock() - began, flush=True)
    return 0


def products(shape: str, tokens: int, dtype: torch.dtype, rounds: int, threads: int, other: AsItIs) -> Seconds:
    """Each variant's seconds for forward and backward, round by round."""
    layer, (x, dy) = layer_of(shape, dtype), inputs(shape, tokens, dtype)
    small = quantised(layer, dtype)
    theirs = dequantize_4bit(small.weight.data, small.weight.quant_state)
    if not torch.equal(theirs, weight_of(small, dtype)):
        raise SystemExit(f"linear: {shape} is not dequantised as bitsandbytes does it")
    layer.weight.data.copy_(theirs)
    weight = layer.weight.data
    del theirs
    other(f"make {shape} {tokens}")

    def plain() -> tuple[Tensor, Tensor]:
        return torch.mm(x, weight.t()), torch.mm(dy, weight)

    def ours() -> tuple[Tensor, Tensor]:
        y = torch.mm(x, weight_of(small, dtype).t())
        return y, torch.mm(dy, weight_of(small, dtype))

    expected = plain()
    for found, wanted in zip(ours(), expected, strict=True):  # the same numbers, in rows that may lie apart: oneDNN may sum them otherwise
        if (found.float() - wanted.float()).norm() > 2e-3 * wanted.float().norm():
            raise SystemExit(f"linear: the products of {shape} are not those of the same weights in {dtype}")
    variants = {PLAIN: plain, "ours": ours, "bitsandbytes": by_bitsandbytes(small, x, dy), "as it is": lambda: other("time")}
    return alternate(variants, rounds=rounds, threads=threads)


def quantisers(shape: str, rounds: int, threads: int) -> Seconds:
    """Seconds for each GB of bf16 weights, ours and bitsandbytes'; both must give the same bits."""
    weight = layer_of(shape).weight.data
    (packed, state), (their_packed, theirs) = kernels.nf4_quantise(weight), by_bitsandbytes_quantised(weight)
    mine, other = state.as_dict(packed=True), theirs.as_dict(packed=True)
    if (
        not torch.equal(packed, their_packed)
        or mine.keys() != other.keys()
        or not all(torch.equal(mine[name], other[name]) for name in mine)
    ):
        raise SystemExit(f"linear: {shape} is not quantised as bitsandbytes does it")
    taken = alternate(
        {"ours": lambda: kernels.nf4_quantise(weight), "bitsandbytes": lambda: by_bitsandbytes_quantised(weight)},
        rounds=rounds,
        threads=threads,
    )
    size = weight.numel() * weight.itemsize / 1e9
    return {name: [each / size for each in seconds] for name, seconds in taken.items()}


def by_bitsandbytes_quantised(weight: Tensor) -> tuple[Tensor, QuantState]:
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> int:
    bars = ", ".join(f"M = {tokens} {bar}" for tokens, bar in BARS.items())
    made = parser(__doc__, f"ours / unquantised, {JUDGED}, {bars}; quantiser {QUANTISER_BAR} s a GB", rounds=9)
    made.add_argument("--shape", action="append", choices=SHAPES, help="only this one; may be repeated")
    made.add_argument(ALONE, action="store_true", help="be the process with the allocator's defaults")
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.as_it_is:
        return answer(asked.threads, getattr(torch, asked.dtype))
    on = machine(ALLOCATOR, dtype_of(asked))
    rows, found, figures = [], {}, []
    other = AsItIs(asked.threads, on.dtype)
    for shape in asked.shape or SHAPES:
        for tokens in BARS:
            taken = products(shape, tokens, getattr(torch, on.dtype), asked.rounds, asked.threads, other)
            against = {name: ratio(seconds, taken[PLAIN]) for name, seconds in taken.items()}
            work = 4 * tokens * layer_of(shape).weight.numel() / 1e9
            rows.append(
                [shape, str(tokens), f"{work / median(taken[PLAIN]):.0f}", *(str(one) for name, one in against.items() if name != PLAIN)]
            )
            found[f"{shape}, M = {tokens}"] = taken
            if shape == JUDGED:
                figures.append(Figure(f"ours / {on.dtype}, {shape}, M = {tokens}", against["ours"].middle, BARS[tokens]))
    other.close()
    seconds = quantisers(JUDGED, min(asked.rounds, 3), asked.threads)
    found["quantiser, seconds a GB"] = seconds
    said = [f"{name} {median(taken):.2f}" for name, taken in seconds.items()]
    figures.append(Figure(f"quantiser, seconds a GB ({', '.join(said)}; the same bits)", median(seconds["ours"]), QUANTISER_BAR))
    head = ["weight", "M", f"{on.dtype} GFLOP/s", "ours / it", "bitsandbytes / it", "... as it is / it"]
    return report(asked, on, head, rows, figures, found)


if __name__ == "__main__":
    sys.exit(main())
