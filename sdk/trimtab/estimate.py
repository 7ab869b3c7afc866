"""What a spec costs before it runs, from facts alone: memory and seconds of a step. Pure; both sides of the wall use it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from trimtab.sizes import EXPLICIT_UP_TO, Facts, ModelFacts, RowFacts, RowShape
from trimtab.spec import TrainSpec

__all__ = [
    "BF16_FLAGS", "EXPLICIT_UP_TO", "LOGITS_AT_ONCE", "ModelFacts", "PeakMemory", "Rates", "Recompute", "RowFacts", "RowShape",
    "attention_scratch", "dtype_of", "elementwise_bytes", "epoch_steps", "optimiser_steps", "peak_memory", "recompute_layers",
    "step_seconds",
]  # fmt: skip

LOGITS_AT_ONCE = 512
"""Tokens whose logits exist at once."""

BF16_FLAGS = ("gpu_bf16", "amx_bf16", "avx512_bf16")
"""For which a run that may choose computes in bf16: a GPU's only flag, and what Linux calls the processors' instructions."""


def optimiser_steps(spec: TrainSpec, rounds: Sequence[int], nodes: int = 1) -> tuple[int, int]:
    """(steps of the run, steps of all its epochs); they differ by max_steps. `rounds`: packed rows of each round."""
    whole = sum(epoch_steps(spec, rounds, epoch, nodes) for epoch in range(spec.epochs))
    return (whole if spec.max_steps is None else min(whole, spec.max_steps)), whole


def epoch_steps(spec: TrainSpec, rounds: Sequence[int], epoch: int, nodes: int = 1) -> int:
    """Steps of an epoch (from 0), which takes the next round in turn.

    A step takes `batch_rows * accumulation` rows on each of `nodes` (machines, or ranks of them: `TrainSpec.sharing`); the last one of an
    epoch takes what is left.
    """
    return math.ceil(rounds[epoch % len(rounds)] / (spec.batch_rows * spec.accumulation * nodes))


def dtype_of(asked: str, flags: Collection[str]) -> str:
    """What a run computes in when `asked` is a spec's dtype and `flags` what the processor can do: bf16 where it multiplies it.

    Elsewhere bf16 would be emulated, and slower than fp32.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if any(flag in flags for flag in BF16_FLAGS) else "float32"


@dataclass(frozen=True)
class PeakMemory:
    """The parts of a training process' peak, in MB (2^20 bytes): of its resident set on a CPU; on a GPU of what it allocates there

    (CUDA itself takes more)."""

    runtime: int
    base: int
    trained: int  # with its gradients and its optimiser
    activations: int
    logits: int
    loading: int = 0  # what loading and quantising take beyond all that

    @property
    def total(self) -> int:
        return self.runtime + self.base + self.trained + self.activations + self.logits + self.loading

    def __str__(self) -> str:
        parts = {"libraries": self.runtime, "model": self.base, "trained and optimiser": self.trained, "activations": self.activations}
        parts |= {"logits": self.logits, "loading": self.loading}
        return ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)


_LIBRARIES_MB = 485  # torch, transformers, peft and bitsandbytes, imported and used
_NF4 = 0.53  # bytes for a weight: 4 bits, and the scales of each 64 in 8 bits (arXiv:2305.14314, double quantisation)
_QUANTISING = 11  # times the largest map: the heap keeps what quantising and its correction took for it
_SPLIT = 1.1  # of a GPU's activations: blocks that its allocator cannot put together; assumed
_SCORES = 512  # queries whose scores exist at once
_THREADS = 64  # of a process, that attention's memory is counted for: how many there will be is not known


def peak_memory(
    spec: TrainSpec,
    model: ModelFacts,
    dtype: str,
    rows: RowFacts | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    again: int = 0,
) -> PeakMemory:
    """What training takes on each machine when it computes in `dtype` on these rows; without them, on the costliest there can be.
    `again`: layers whose forward pass is done again in the backward pass (`recompute_layers`).

    With s bytes a number, n tokens in one forward pass, L layers, h hidden, f intermediate, a heads, d the width of one, k the width of
    all keys, r the rank, and l the tokens of the longest sample:

        base         s bytes a weight, with qlora 0.53 for those of the layers; with full the copies in bf16. On a CPU, of a model that
                     is not read layer by layer, the pages of its file that are read, and s bytes a weight more where its type is another
        trained      16 bytes for each number that is: fp32 value, gradient and AdamW's two moments
        activations  of each layer that is one step (Llama's kind on a CPU, adapters without dropout and DoRA), what it keeps, and at once
                     the gradients of one:
                         (L - again) n (s (2 h + 2 a d + 2 k + 2 f + 7 r) + 4 a + 8) + again n s h
                         + max(n s (2 f + 4 h), n s (5 a d + 4 k) + max(8 n k + 16 k/d 512 l, attention_scratch))
                     (its attention is that of plain torch, or the compiled kernels' where these take more, by 64 threads)
                     and with qlora the largest weights that are dequantised at once, s max(2 f h, h (a d + 2 k)); of other layers
                         (L - again) n (8 h + s (2 h + 4 f + 7 r + 2 a d + 2 k) + 4 a) + again n s h + s * adapters in bf16
                     and on a CPU the temporaries of every layer, for glibc's heap does not give an aligned block that was freed to
                     the next of the same size, so the gaps stay between what is kept:
                         L n (16 h + 4 s h + 3 s (a d + k), in bf16 4 h more); a GPU has them for one layer
        logits       s * vocabulary * min(learned places, 512), in bf16 4 more for a copy in fp32, which plain torch makes of them and
                     the compiled kernels do not (they may be absent, so it is counted); with full the head's gradient, twice, too
        loading      beyond all that, where a model is quantised layer by layer: a layer's original weights, and what two rows are on
                     their way through it, 2 n (s (4 f + 6 h) + 8 f), or two numbers in fp32 for each of the largest map; elsewhere
                     what the heap got to quantise the largest map (11 times its size), on a GPU, to which the model goes before it
                     is quantised, s bytes for each weight where these are more

    Of layers that are one step four runs of a random Llama (300 million weights in 4 layers, 512 and 2,048 tokens, lora and qlora) took
    0.96 to 1.08 times as much. The other formula's 485 MB and 11 were fitted on earlier runs of three models, with an attention that kept
    its weights. Not measured: a GPU (1.1 is assumed), models beyond 300M.
    """
    size = 2 if dtype == "bfloat16" else 4
    rows = rows or RowFacts.worst(spec)
    row, trained = rows.most.times(spec.batch_rows), model.trained(spec)
    quantised = _NF4 * model.linear if spec.method == "qlora" else 0.0
    fused = device == "cpu" and _fused(spec, model)
    again = min(again, model.layers - 1)  # of the last one all is there while its backward pass goes on
    kept = _kept(spec, model, size, row, fused) * (model.layers - again) + size * model.hidden * row.tokens * again
    passing = _passing_fused(spec, model, size, row) if fused else _passing(model, size, row)
    if size == 2 and spec.method != "full" and not fused:
        kept += size * trained  # copies in bf16
    logits = (6 if size == 2 else 4) * model.vocabulary * min(row.learned, LOGITS_AT_ONCE)
    if device == "gpu":
        left = model.parameters - (model.linear if quantised else 0)
        base, activations = size * left + quantised, _SPLIT * (kept + passing)
        if spec.method == "full" and size == 4:
            base = 0.0  # the fp32 values are the model
        while_training = base + 16 * trained + activations + 2 * logits
        return PeakMemory(
            runtime=0,
            base=_mb(base),
            trained=_mb(16 * trained),
            activations=_mb(activations),
            logits=_mb(2 * logits),
            loading=_mb(max(0.0, size * model.parameters - while_training)),
        )
    activations = kept + passing if fused else kept + passing * model.layers
    if model.blocks and spec.method != "full":  # read layer by layer
        base = size * (model.parameters - (model.linear if quantised else 0)) + quantised
        looked_at = 2 * rows.most.tokens * (size * (4 * model.intermediate + 6 * model.hidden) + 8 * model.intermediate)
        of_layer = size * model.linear / model.layers + max((8 + size) * model.largest, looked_at) if quantised else 0.0
        loading = max(0.0, of_layer - 12 * trained - activations - logits)
    else:
        base, loading = _mapped(spec, model, size, rows, logits, activations, quantised)
        logits += model.vocabulary * model.hidden * (2 * size + (4 if row.learned > LOGITS_AT_ONCE else 0)) * (spec.method == "full")
    return PeakMemory(
        runtime=_LIBRARIES_MB,
        base=_mb(base),
        trained=_mb(16 * trained),
        activations=_mb(activations),
        logits=_mb(logits),
        loading=_mb(loading),
    )


def _mapped(
    spec: TrainSpec, model: ModelFacts, size: int, rows: RowFacts, logits: float, activations: float, quantised: float
) -> tuple[float, float]:
    """(base, loading) in bytes of a model whose file is mapped as a whole."""
    read = model.parameters - (0 if model.tied else max(0, model.vocabulary - rows.distinct) * model.hidden)
    pages, base, loaded = model.stored * read, model.stored * read + quantised, 0.0
    if spec.method == "full":
        base = size * model.parameters if size == 2 else 0  # the file's pages go once it is loaded
    elif size != model.stored:
        base += size * (model.parameters - (model.linear if quantised else 0))
        loaded = pages + size * model.parameters
    heap = _QUANTISING * size * model.largest if quantised else 0.0
    return base, max(heap, loaded - base - 16 * model.trained(spec) - activations - logits)


def _fused(spec: TrainSpec, model: ModelFacts) -> bool:
    """Whether each decoder layer is one step on a CPU, with its backward pass written by hand."""
    return model.blocks and spec.method != "full" and not spec.lora_dropout and not spec.use_dora


def _kept(spec: TrainSpec, model: ModelFacts, size: int, row: RowShape, fused: bool) -> float:
    """Bytes that a layer's forward pass of a row keeps for its backward pass, in numbers of `size` bytes."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    a_token = size * (2 * model.hidden + 2 * query + 2 * keys + _of_adapters(spec, model)) + 4 * model.heads
    a_token += 2 * size * model.intermediate + 8 if fused else 4 * size * model.intermediate + 8 * model.hidden
    return row.tokens * a_token


def _of_adapters(spec: TrainSpec, model: ModelFacts) -> float:
    """Numbers a token and layer that adapters keep: between their two products, and with DoRA each map's output before it is scaled."""
    if spec.method == "full":
        return 0.0
    adapted = model.adapted(spec.lora_targets)
    return sum(times * (spec.lora_rank + (out if spec.use_dora else 0)) for times, out, _ in adapted) / model.layers


def _passing(model: ModelFacts, size: int, row: RowShape) -> float:
    """Bytes that a layer makes and frees on its way."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    return row.tokens * ((16 + 4 * size + (4 if size == 2 else 0)) * model.hidden + 3 * size * (query + keys))


def _passing_fused(spec: TrainSpec, model: ModelFacts, size: int, row: RowShape) -> float:
    """The same at once of a layer that is one step, in its backward pass, where most of them are; and its dequantised weights."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    longest = min(row.tokens, max(math.sqrt(row.flash), min(EXPLICIT_UP_TO, math.sqrt(row.explicit))))
    of_mlp = row.tokens * size * (2 * model.intermediate + 4 * model.hidden)
    scores = 16 * model.kv_heads * _SCORES * longest
    by_torch, by_kernels = 8 * row.tokens * keys + scores, attention_scratch(model, size, row.tokens, longest, _THREADS)
    of_attention = row.tokens * size * (5 * query + 4 * keys) + max(by_torch, by_kernels)
    weights = size * model.hidden * max(2 * model.intermediate, query + 2 * keys) if spec.method == "qlora" else 0
    return max(of_mlp, of_attention) + weights


def attention_scratch(model: ModelFacts, size: int, tokens: float, longest: float, threads: int) -> float:
    """Bytes that the compiled attention's backward pass takes beside its tensors, at most, in numbers of `size` bytes.

    Of a row of `tokens` whose samples are all as long as its `longest`: with samples of other lengths it is less, or about as much. Each
    thread lays out a key head's keys and values anew. Gradients of keys and values are summed in fp32, for a whole sample: by each thread
    for itself, or where samples and key heads are fewer than threads, for each part of a sample (attention.h, `tasks_of`).
    """
    samples = max(1.0, tokens // longest) if longest else 0.0
    heads, width = samples * model.kv_heads, math.ceil(model.head_width / 16) * 16
    if not heads:
        return 0.0
    blocks = math.ceil(longest * model.heads / model.kv_heads / 128)
    parts = min(math.ceil(max(threads, min(4 * threads, 16)) / heads), (blocks + 3) // 4)
    at_work = min(threads, heads * parts)
    sums = heads * parts if parts > 1 else at_work
    return width * (8 * longest * sums + (3 * size * longest + 4096) * at_work)


@dataclass(frozen=True)
class Recompute:
    """How many decoder layers, the first ones, do their forward pass again in the backward pass, and why."""

    layers: int
    reason: str


_ROOM = 0.92  # of the memory that is there; estimates were up to 13 % below what was measured, mostly of small models


def recompute_layers(
    spec: TrainSpec, model: ModelFacts, dtype: str, rows: RowFacts | None, memory_mb: int | None, device: Literal["cpu", "gpu"] = "cpu"
) -> Recompute:
    """As few as let `peak_memory` stay within 92 % of `memory_mb`, the memory that is there (2^20 bytes; None: not known).

    Each keeps its input alone, and costs a third of its time again, half with adapters (`step_seconds`).
    """
    if memory_mb is None:
        return Recompute(0, "how much memory there is is not known, so all is kept")
    totals = [peak_memory(spec, model, dtype, rows, device, again).total for again in (0, model.layers)]
    room = int(_ROOM * memory_mb)
    there = f"{room:,} MB ({_ROOM:.0%} of the {memory_mb:,} that are there)"
    if totals[0] <= room:
        return Recompute(0, f"all that layers keep fits: about {totals[0]:,} MB of {there}")
    if totals[1] > room:
        return Recompute(model.layers, f"even so about {totals[1]:,} MB of {there}; {totals[0]:,} with all kept")
    enough = next(n for n in range(1, model.layers + 1) if peak_memory(spec, model, dtype, rows, device, n).total <= room)
    total = peak_memory(spec, model, dtype, rows, device, enough).total
    return Recompute(enough, f"of {model.layers}: about {total:,} MB of {there}; {totals[0]:,} with all kept")


class Rates(Facts):
    """What a machine does in a second when it computes in `dtype` with all that it has: measured there at a model's own shapes
    (`python -m trimtab_runtime measure`), or stated. JSON both ways (pydantic).
    """

    dtype: Literal["bfloat16", "float32"]
    linear: float = Field(gt=0, description="FLOP/s of the frozen linear maps")
    adapters: float = Field(gt=0, description="FLOP/s of the low-rank products")
    explicit: float = Field(gt=0, description="attention weights, forward and backward, of samples up to 512 tokens")
    flash: float = Field(gt=0, description="the same of longer samples, masked ones counted")
    gathered: float = Field(gt=0, description="numbers that several groups' attention gathers and puts back, forward and backward")
    logits: float = Field(gt=0, description="logits turned into loss and gradient, products not counted")
    dequantised: float = Field(gt=0, description="4-bit weights made into numbers")
    bandwidth: float = Field(gt=0, description="bytes that elementwise operations read and write")
    layer_seconds: float = Field(ge=0, description="seconds that a layer takes forward and backward, however few its tokens")
    group_seconds: float = Field(ge=0, description="the same of each group of samples in attention")
    network: float | None = Field(None, gt=0, description="bytes between two machines; None: not known, not counted")

    @classmethod
    def stated(cls, dtype: Literal["bfloat16", "float32"], flops: float, bandwidth: float, network: float | None = None) -> Rates:
        """From two figures of a machine's description: FLOP/s of a large product in `dtype`, and bytes a second from memory.

        The shares of them that a run gets are assumed, not measured: good for an order of magnitude.
        """
        return cls(
            dtype=dtype, linear=flops * 0.7, adapters=flops * 0.1, explicit=bandwidth / 30, flash=flops / 1000, gathered=bandwidth / 20,
            logits=bandwidth / 24,
            dequantised=bandwidth / 4, bandwidth=bandwidth * 0.5, layer_seconds=1e-3, group_seconds=2e-4, network=network,
        )  # fmt: skip


def step_seconds(
    spec: TrainSpec, model: ModelFacts, rates: Rates, rows: RowFacts | None = None, nodes: int = 1, *, again: int = 0
) -> float:
    """Seconds of one optimiser step on the mean row, without checkpoints; `nodes` machines alike, each with its own rows.

    `again` layers do their forward pass again (`recompute_layers`): of a row's products with frozen weights a half more, a third of those
    with adapters, of attention and of what is elementwise (three parts backward to one forward are counted as two to one, for
    attention makes its weights again anyway), and their weights are dequantised once more.

    Several ranks of a machine are taken to compute side by side, each at its share of the machine's rates: that they gain by nearer
    memory, and what they tell each other, is not counted.

    Not counted: in bf16 oneDNN makes a kernel for each product of a new shape, so a row whose lengths were not seen before takes longer.
    On two million parameters, rows of 512 tokens and an EPYC with avx512_bf16 these were 144 kernels of 0.5 ms in five rows (its verbose
    log): 15 ms of a step of 66. Large models need as many, beside steps of seconds.
    """
    size = 2 if rates.dtype == "bfloat16" else 4
    row = (rows or RowFacts.worst(spec)).mean.times(spec.batch_rows)
    trained, full = model.trained(spec), spec.method == "full"
    forward_and_backward = (
        row.tokens * (6 if full else 4) * model.linear / rates.linear
        + (0 if full else row.tokens * 6 * trained / rates.adapters)
        + row.explicit * model.heads * model.layers / rates.explicit
        + row.flash * model.heads * model.layers / rates.flash
        + row.learned * model.vocabulary * ((6 if full else 4) * model.hidden / rates.linear + 1 / rates.logits)
        + row.tokens * model.layers * elementwise_bytes(model, size) / rates.bandwidth
        + model.layers * (rates.layer_seconds + row.groups * rates.group_seconds)
    )
    if row.groups > spec.batch_rows:
        places = row.padded * 2 * (model.heads + model.kv_heads) * model.head_width
        forward_and_backward += model.layers * places / rates.gathered
    if spec.method == "qlora":
        forward_and_backward += 2 * model.linear / rates.dequantised
    if spec.use_dora:  # the norms of each weight's rows, and each output once more both ways
        outs = sum(times * out for times, out, _ in model.adapted(spec.lora_targets))
        forward_and_backward += 2 * model.linear * spec.lora_rank / rates.linear + row.tokens * outs * 8 * size / rates.bandwidth
    if again:
        share = again / model.layers
        forward_and_backward += share * (
            row.tokens * 2 * model.linear / rates.linear
            + (0 if full else row.tokens * 2 * trained / rates.adapters)
            + (row.explicit / rates.explicit + row.flash / rates.flash) * model.heads * model.layers / 3
            + row.tokens * model.layers * elementwise_bytes(model, size) / rates.bandwidth / 3
            + (model.linear / rates.dequantised if spec.method == "qlora" else 0)
        )
    # AdamW reads and writes values, moments and gradients, which were clipped before; gradients in bf16 and copies come on top of it
    update = (52 if full and size == 2 else 40) * trained / rates.bandwidth
    shared = 8 * trained * (nodes - 1) / nodes / rates.network if rates.network else 0.0
    return spec.sharing() * (spec.accumulation * forward_and_backward + update) + shared


def elementwise_bytes(model: ModelFacts, size: int) -> int:
    """What a layer reads and writes a token outside its products, forward and backward: norms and sums in fp32, rotation, gate."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    return model.hidden * (100 + 40 * size) + 14 * size * model.intermediate + 20 * size * (query + keys)


def _mb(size: float) -> int:
    return math.ceil(size / 2**20)
