"""The loss behind a linear head and the gradient of the hidden states, without the full logits and with:  python benchmarks/loss.py

Shapes: the head of a 13B Llama over 2,048 learned places, the same where half of a row's places are learned, and SmolLM2-135M's head.

  full, fp32     as transformers' causal models do it: all logits, made fp32, torch's cross-entropy and its backward
  full, bf16     in bf16, the same without making them fp32: the loss is then off, see the column
  checkpointed   chunks of 512 by torch.utils.checkpoint: what is not kept is computed again in the backward pass
  ours, off      chunks of 512 whose gradient is taken in the forward pass, without the compiled kernels
  ours           with them, on the path that this processor takes
  products       the two matrix products that are in each of them, of the learned places alone: what is left is the loss itself

Where half is learned, the first three compute all places, as transformers does, with the label -100; ours computes the learned ones.
Memory is the highest resident set above what there was before the call. Gradients are held against the first one's in the same run.
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
from torch.utils.checkpoint import checkpoint  # noqa: E402

from measure import Figure, alternate, dtype_of, machine, parser, peak_bytes, ratio, report  # noqa: E402
from trimtab.estimate import LOGITS_AT_ONCE  # noqa: E402
from trimtab_runtime.xeon import kernels  # noqa: E402
from trimtab_runtime.xeon.loss import linear_cross_entropy  # noqa: E402

TIME_BAR, MEMORY_BAR, GRADIENT_BAR = 1.2, 0.35, 1e-3  # against the products alone; against full fp32 logits, and their gradients
FULL, OURS, PRODUCTS = "full, fp32", "ours", "products"


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    learned: int
    width: int
    vocabulary: int


SHAPES = (
    Shape("13B", 2048, 2048, 5120, 32_000),
    Shape("13B, half learned", 2048, 1024, 5120, 32_000),
    Shape("SmolLM2-135M", 2048, 2048, 576, 49_152),
)


def variants(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], tuple[float, Tensor]]]:
    """Each computes (the summed loss, its gradient by the learned places' hidden states) from the same numbers."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, generator=draw).to(dtype)
    head = (torch.randn(shape.vocabulary, shape.width, generator=draw) * shape.width**-0.5).to(dtype)
    places = torch.randperm(shape.tokens, generator=draw)[: shape.learned].sort().values
    targets = torch.randint(0, shape.vocabulary, (shape.learned,), generator=draw)
    labels = torch.full((shape.tokens,), -100).index_put_((places,), targets)

    def by_autograd(loss_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        leaf = hidden.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad[places]

    def full(leaf: Tensor) -> Tensor:
        return functional.cross_entropy((leaf @ head.t()).float(), labels, reduction="sum")

    def full_as_it_is(leaf: Tensor) -> Tensor:
        return functional.cross_entropy(leaf @ head.t(), labels, reduction="sum")

    def checkpointed(leaf: Tensor) -> Tensor:
        def of_chunk(some: Tensor, wanted: Tensor) -> Tensor:
            return functional.cross_entropy((some @ head.t()).float(), wanted, reduction="sum")

        chunks = zip(leaf.split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE), strict=True)
        return torch.stack([checkpoint(of_chunk, some, wanted, use_reentrant=False) for some, wanted in chunks]).sum()

    def ours(leaf: Tensor) -> Tensor:
        return linear_cross_entropy(leaf.index_select(0, places), head, targets, scale=1.0)

    def without_kernels() -> tuple[float, Tensor]:
        with kernels.forced("off"):
            return by_autograd(ours)

    def products() -> tuple[float, Tensor]:
        some, into = hidden.index_select(0, places), torch.empty(shape.learned, shape.width, dtype=hidden.dtype)
        for chunk, of_chunk in zip(some.split(LOGITS_AT_ONCE), into.split(LOGITS_AT_ONCE), strict=True):
            torch.mm(torch.mm(chunk, head.t()), head, out=of_chunk)
        return 0.0, into

    bf16 = {"full, bf16": lambda: by_autograd(full_as_it_is)} if dtype == torch.bfloat16 else {}
    return {
        FULL: lambda: by_autograd(full),
        **bf16,
        "checkpointed": lambda: by_autograd(checkpointed),
        "ours, off": without_kernels,
        OURS: lambda: by_autograd(ours),
        PRODUCTS: products,
    }


def main() -> int:
    bars = f"time {TIME_BAR} of the products', memory {MEMORY_BAR} of full fp32 logits', gradient {GRADIENT_BAR} off theirs"
    made = parser(__doc__, bars, rounds=5)
    made.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], help="only this one; may be repeated")
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    on = machine(ALLOCATOR, dtype_of(asked))
    rows, found, figures = [], {}, []
    for shape in SHAPES:
        if asked.shape and shape.name not in asked.shape:
            continue
        calls = variants(shape, getattr(torch, on.dtype))
        loss, gradient = calls[FULL]()
        results, peaks = {}, {}
        for name, call in calls.items():
            of_call, of_hidden = call()
            results[name] = (of_call / loss - 1, float((of_hidden.float() - gradient.float()).norm() / gradient.float().norm()))
            peaks[name] = peak_bytes(call)
        del gradient, of_hidden
        taken = alternate(calls, rounds=asked.rounds, threads=asked.threads)
        for name, seconds in taken.items():
            off = ("", "") if name == PRODUCTS else tuple(f"{value:.1e}" for value in results[name])
            against = ratio(seconds, taken[FULL])
            rows.append([shape.name, name, f"{sorted(seconds)[len(seconds) // 2]:.3f}", str(against), f"{peaks[name] / 1e6:.0f}", *off])
        found[shape.name] = {"seconds": taken, "peak_bytes": peaks, "off": results}
        figures += [
            Figure(f"{shape.name}: time, ours / the products alone", ratio(taken[OURS], taken[PRODUCTS]).middle, TIME_BAR),
            Figure(f"{shape.name}: memory, ours / full fp32", peaks[OURS] / peaks[FULL], MEMORY_BAR),
            Figure(f"{shape.name}: gradient, ours off full fp32's", results[OURS][1], GRADIENT_BAR),
        ]
    head = ["shape", "variant", "seconds", "/ full, fp32", "peak MB", "loss off", "gradient off"]
    return report(asked, on, head, rows, figures, found)


if __name__ == "__main__":
    sys.exit(main())
