"""Attention of packed rows, forward and backward, ours beside what torch offers:  python benchmarks/attention.py

  loop           each sample by itself through torch's attention, which is causal and takes grouped heads: correct, and the usual remedy
  padded groups  samples of like length gathered into padded batches; up to 512 tokens weights are computed and kept, beyond by torch
  dense mask     one mask over the whole row: every pair of places is computed, and most are thrown away
  full causal    samples see each other, which is wrong; what a row costs where nothing is packed
  ours, off      blocks of torch's products, without the compiled kernels
  ours           with them, on the path that this processor takes

query, key and value are views of one tensor, as a product for all three makes them. `error` is the furthest of output and gradients from
the loop's in fp64, relative to its norm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from trimtab_runtime.xeon import allocator

ALLOCATOR = allocator.keep_large_blocks()  # before torch loads

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from measure import Figure, alternate, dtype_of, machine, parser, ratio, report  # noqa: E402
from trimtab_runtime.xeon import kernels  # noqa: E402
from trimtab_runtime.xeon.attention import attend, attend_backward, block_diagonal, plan_groups  # noqa: E402

# time over that of the best of those that are correct: in fp32 torch is near what the processor can, and so are we
TIME_BAR = {"bfloat16": 0.5, "float32": 0.75}
ERROR_BAR = {"bfloat16": 1.1, "float32": 10.0}  # over the loop's own: about 5e-7 in fp32, where ours sums all heads that share a key head
LOOP, OURS, WRONG = "loop", "ours", "full causal"
_EXPLICIT = 512  # tokens of a sample whose weights are computed and kept by "padded groups"


@dataclass(frozen=True)
class Case:
    """Heads of queries and keys, their width, and the samples of a row by their tokens."""

    name: str
    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]


CASES = (
    Case("Llama-1.1B, 4 samples", 32, 4, 64, (1100, 500, 300, 148)),
    Case("Llama-1.1B, 1 sample", 32, 4, 64, (2048,)),
    Case("SmolLM2-135M, 13 samples", 9, 3, 64, (300, 180, 120, 90, 80, 60, 50, 40, 30, 30, 20, 14, 10)),
    Case("32 x 128, mean 100", 32, 32, 128, (220, 190, 170, 160, 150, 140, 130, 120, 110, 100, 95, 90, 80, 70, 60, 50, 40, 30, 25, 18)),
    Case("32 x 128, mean 400", 32, 32, 128, (700, 500, 350, 250, 148, 100)),
    Case("32 x 128, mean 1000", 32, 32, 128, (1100, 800, 148)),
)  # fmt: skip


class Row:
    """One row's numbers, and each way to compute its attention: forward alone, or with the gradients of query, key and value."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.dtype, self.groups, self.scale = case, dtype, plan_groups(list(case.lengths)), case.width**-0.5
        tokens, heads = sum(case.lengths), case.heads + 2 * case.kv_heads
        draw = torch.Generator().manual_seed(0)
        self.qkv = torch.randn(tokens, heads * case.width, generator=draw).to(dtype)
        self.d_out = torch.randn(tokens, case.heads, case.width, generator=draw).to(dtype)
        self.mask = block_diagonal(torch.cat([torch.arange(length) for length in case.lengths])[None], dtype)

    def parts(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        width = self.case.width
        heads = (self.case.heads, self.case.kv_heads, self.case.kv_heads)
        split = self.qkv.to(dtype or self.dtype).split([of_each * width for of_each in heads], dim=1)
        return [part.view(len(part), -1, width) for part in split]

    def torchs(self, way: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype | None = None) -> Callable[[bool], list[Tensor]]:
        def compute(both: bool) -> list[Tensor]:
            leaves = [part.detach().requires_grad_(both) for part in self.parts(dtype)]
            out = way(*leaves)
            return [out.detach(), *(torch.autograd.grad(out, leaves, self.d_out.to(out.dtype)) if both else ())]

        return compute

    def loop(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lengths = list(self.case.lengths)
        samples = zip(*(part.split(lengths) for part in (query, key, value)), strict=True)
        return torch.cat([_causal(*(part[None] for part in sample))[0] for sample in samples])

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (part.transpose(0, 1)[None] for part in (query, key, value))
        return functional.scaled_dot_product_attention(*parts, attn_mask=self.mask, enable_gqa=True)[0].transpose(0, 1)

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = []
        for group in self.groups:
            gathered = (part.index_select(0, group.gather.reshape(-1)).unflatten(0, group.gather.shape) for part in (query, key, value))
            way = _explicit if group.gather.shape[1] <= _EXPLICIT else _causal
            pieces.append(way(*gathered).flatten(0, 1).index_select(0, group.valid))
        scatter = torch.cat([group.scatter for group in self.groups])
        return torch.cat(pieces).index_select(0, scatter.argsort())

    def ours(self, both: bool) -> list[Tensor]:
        out, lse = attend(*self.parts(), self.groups, self.scale)
        return [out, *(attend_backward(self.d_out, *self.parts(), out, lse, self.groups, self.scale) if both else ())]

    def without_kernels(self, both: bool) -> list[Tensor]:
        with kernels.forced("off"):
            return self.ours(both)

    def ways(self) -> dict[str, Callable[[bool], list[Tensor]]]:
        return {
            LOOP: self.torchs(self.loop),
            "padded groups": self.torchs(self.padded),
            "dense mask": self.torchs(self.dense),
            WRONG: self.torchs(lambda query, key, value: _causal(query[None], key[None], value[None])[0]),
            "ours, off": self.without_kernels,
            OURS: self.ours,
        }


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[samples, length, heads, width] -> the same."""
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2)


def _explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with weights in memory; query heads that share a key head are rows of one product."""
    samples, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    rows = query.reshape(samples, kv_heads, -1, width) * width**-0.5
    scores = torch.matmul(rows, key.transpose(2, 3)).view(samples, kv_heads, -1, length, length)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights.flatten(2, 3), value).view(samples, heads, length, width).transpose(1, 2)


def _furthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def main() -> int:
    made = parser(__doc__, "time over that of the best other that is correct, and error over torch's", rounds=5)
    made.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one; may be repeated")
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    on = machine(ALLOCATOR, dtype_of(asked))
    rows, found, figures = [], {}, []
    for case in CASES:
        if asked.case and case.name not in asked.case:
            continue
        row = Row(case, getattr(torch, on.dtype))
        ways, exact = row.ways(), row.torchs(row.loop, torch.float64)(True)
        errors = {name: _furthest(way(True), exact) for name, way in ways.items()}
        taken = {
            both: alternate(
                {name: lambda way=way, both=both: way(both) for name, way in ways.items()}, rounds=asked.rounds, threads=asked.threads
            )
            for both in (False, True)
        }
        medians = {both: {name: sorted(seconds)[len(seconds) // 2] for name, seconds in taken[both].items()} for both in taken}
        others = [name for name in ways if name not in (WRONG, OURS, "ours, off")]
        best = min(others, key=lambda name: medians[True][name])
        for name in ways:
            forward, both = (medians[which][name] * 1e3 for which in (False, True))
            against = ratio(taken[True][OURS], taken[True][name])
            rows.append([f"{case.name}: {name}", f"{forward:.1f}", f"{both - forward:.1f}", str(against), f"{errors[name]:.1e}"])
        figures.append(Figure(f"{case.name}: time / {best}", ratio(taken[True][OURS], taken[True][best]).middle, TIME_BAR[on.dtype]))
        figures.append(Figure(f"{case.name}: error / {LOOP}", errors[OURS] / errors[LOOP], ERROR_BAR[on.dtype]))
        found[case.name] = {
            "lengths": case.lengths, "heads": case.heads, "kv_heads": case.kv_heads, "width": case.width,
            "forward_ms": {name: round(seconds * 1e3, 2) for name, seconds in medians[False].items()},
            "both_ms": {name: round(seconds * 1e3, 2) for name, seconds in medians[True].items()}, "error": errors, "best": best,
        }  # fmt: skip
    head = ("row", "forward ms", "backward ms", "ours / it", "error")
    return report(asked, on, head, rows, figures, found)


if __name__ == "__main__":
    sys.exit(main())
