"""What a spec costs before it runs, from facts alone: memory and seconds of a step. Pure; both sides of the wall use it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.spec import TrainSpec

EXPLICIT_UP_TO = 512
"""Tokens of a sample whose attention weights are computed and kept; a longer one goes to the flash kernel, which computes them again."""

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
class ModelFacts:
    """The sizes of a Llama-like model, as its config.json names them. `head_width` is that of one attention head."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    stored: int = 2  # bytes a weight has in its file

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelFacts | None:
        """From the fields of a transformers configuration; None for one that does not name these sizes (Falcon's), and for a mixture of
        experts, whose sizes do not say what they are taken to say here."""
        if any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
            return None
        try:
            layers, hidden, intermediate, heads, vocabulary = (
                int(config[name]) for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
            )
            kv_heads, width = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        stored = 4 if config.get("dtype", config.get("torch_dtype")) in (None, "float32") else 2
        return cls(layers, hidden, intermediate, heads, kv_heads, width, vocabulary, bool(config.get("tie_word_embeddings", False)), stored)

    def gpus_used(self, present: int) -> int:
        """The most of the GPUs present on which its layers can be split (Shoeybi et al. 2019, arXiv:1909.08053): each has as many heads.

        Heads of keys and values are shared among as many, or repeated; vLLM refuses any other number.
        """
        fits = (n for n in range(max(present, 1), 1, -1) if self.heads % n == 0 and (self.kv_heads % n == 0 or n % self.kv_heads == 0))
        return next((n for n in fits if self.intermediate % n == 0), 1)

    @property
    def linear(self) -> int:
        """Weights of the layers' linear maps."""
        query, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return self.layers * self.hidden * (2 * query + 2 * keys + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights, norms too; tied ones count once."""
        return self.linear + self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def largest(self) -> int:
        """Weights of the largest linear map of a layer."""
        return self.hidden * max(self.intermediate, self.heads * self.head_width)

    def adapter(self, rank: int) -> int:
        """Weights of adapters of this rank on every linear map of the layers."""
        return sum(rank * times * (out + inner) for times, out, inner in self._adapted(()))

    def _adapted(self, targets: Sequence[str]) -> list[tuple[int, int, int]]:
        """(in how many layers, out, in) of each linear map that gets adapters, by the ends of their names as `lora_targets` has them.

        Names that no Llama has are taken for all maps.
        """
        query, keys, hidden, inner = self.heads * self.head_width, self.kv_heads * self.head_width, self.hidden, self.intermediate
        maps = {"q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query)}
        maps |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        ends = [target.rpartition(".")[::2] for target in targets]
        if not all(name in maps for _, name in ends) or not ends:
            return [(self.layers, *shape) for shape in maps.values()]
        found = []
        for name, shape in maps.items():
            of_it = {path for path, end in ends if end == name}
            numbered = {path for path in of_it if any(part.isdigit() for part in path.split("."))}
            found.append((min(self.layers, len(numbered)) if numbered == of_it else self.layers, *shape))
        return found

    def trained(self, spec: TrainSpec) -> int:
        """Numbers that the spec's method trains."""
        if spec.method == "full":
            return self.parameters
        adapted = self._adapted(spec.lora_targets)
        return sum(times * (spec.lora_rank * (out + inner) + (out if spec.use_dora else 0)) for times, out, inner in adapted)


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RowShape(_Facts):
    """What of a packed row costs memory and time; a mean of several need not be whole. `learned` places have their logits computed.

    Attention gathers samples of like length into groups, each padded to its longest: `groups` of them, with `padded` places,
    `explicit` pairs of places in those of up to 512 tokens, and `flash` pairs in longer ones.
    """

    tokens: float = Field(ge=0)
    learned: float = Field(ge=0)
    groups: float = Field(ge=0)
    padded: float = Field(ge=0)
    explicit: float = Field(ge=0)
    flash: float = Field(ge=0)

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], learned: int) -> RowShape:
        """Of a row whose samples, by their tokens, are attended to in these groups."""
        squares = [(len(group), max(group)) for group in groups]
        return cls(
            tokens=sum(sum(group) for group in groups),
            learned=learned,
            groups=len(groups),
            padded=sum(count * longest for count, longest in squares),
            explicit=sum(count * longest**2 for count, longest in squares if longest <= EXPLICIT_UP_TO),
            flash=sum(count * longest**2 for count, longest in squares if longest > EXPLICIT_UP_TO),
        )

    def times(self, factor: float) -> RowShape:
        """That many such rows as one."""
        return RowShape(**{name: value * factor for name, value in self.model_dump().items()})


class RowFacts(_Facts):
    """The packed rows of a channel: their `mean`, and a row that has the `most` of each. `distinct`: how many different tokens occur."""

    mean: RowShape
    most: RowShape
    distinct: int = Field(ge=0)

    @classmethod
    def of(cls, rows: Iterable[RowShape], distinct: int) -> RowFacts:
        """Of one row at least. They are looked at one after the other, and none is kept; sums of whole numbers are exact up to 2^53."""
        names, count = tuple(RowShape.model_fields), 0
        total, most = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for row in rows:
            count += 1
            for name in names:
                figure = getattr(row, name)
                total[name] += figure
                most[name] = max(most[name], figure)
        mean = {name: round(total[name] / count, 3) for name in names}
        return cls(mean=RowShape(**mean), most=RowShape(**most), distinct=distinct)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> RowFacts | None:
        """From the parsed manifest.json of a channel `train`; None where it tells nothing of its rows."""
        try:
            return cls.model_validate(manifest["shape"])
        except (KeyError, TypeError, ValidationError):
            return None

    @classmethod
    def worst(cls, spec: TrainSpec) -> RowFacts:
        """Where no rows are known: every row full, all of it learned, each sample as long as costs most memory."""
        tokens, longest = spec.max_seq_len, min(EXPLICIT_UP_TO, spec.max_seq_len)
        row = RowShape(tokens=tokens, learned=tokens, groups=2, padded=1.1 * tokens, explicit=tokens * longest, flash=0)
        return cls(mean=row, most=row, distinct=1 << 31)


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


def peak_memory(
    spec: TrainSpec, model: ModelFacts, dtype: str, rows: RowFacts | None = None, device: Literal["cpu", "gpu"] = "cpu"
) -> PeakMemory:
    """What training takes in each rank when it computes in `dtype` on these rows; without them, on the costliest there can be.

    With s bytes a number, n tokens in one forward pass, L layers, h hidden, f intermediate, a heads, d the width of one, k the width of
    all keys, r the rank, and for a row's groups of samples p padded places and e pairs of places in explicit attention:

        base         on a CPU the pages of the model's file that are read (all, but for rows of an embedding that is not the head, too);
                     where the file has another dtype s bytes a weight more, with qlora not for those of the layers; with qlora 0.53 bytes
                     more for each weight of the layers; with full only the copies in bf16. On a GPU s bytes a weight, with qlora 0.53 for
                     those of the layers
        trained      16 bytes for each number that is: fp32 value, gradient and AdamW's two moments
        activations  kept for the backward pass (counted with hooks on saved tensors):
                         L (n (8 h + s (2 h + 4 f + 7 r)) + p s (2 a d + 2 k) + e a (4, in bf16 6)) + s * adapters in bf16
                     and on a CPU the temporaries of every layer, for glibc's heap does not give an aligned block that was freed to
                     the next of the same size, so the gaps stay between what is kept:
                         L (n (16 h + 4 s h + 3 s (a d + k), in bf16 4 h more) + 2 s e a); a GPU has them for one layer
        logits       (4 + s) * vocabulary * min(learned places, 512); with full the head's gradient, twice, too
        loading      beyond all that, what the heap got to quantise the largest map (11 times its size); on a GPU, to which the model
                     goes before it is quantised, s bytes for each weight where these are more

    485 MB and 11 were fitted, and temporaries were counted in full, on runs of two random Llamas (2M; 300M in 4 layers) and SmolLM2-135M,
    lora and qlora, 512 to 2,048 tokens; 18 in bf16 took 0.92 to 1.05 times as much, 5 in fp32 0.90 to 1.03. The six cases of
    `python benchmarks/estimate.py` with adapters, other rows of the same three models, took 0.86 to 1.10 times; full in bf16 at
    512 tokens 0.96 (2M), 0.87 (SmolLM2) and 1.13 (300M). Not measured: a GPU (1.1 is assumed), other models, models beyond 300M.
    """
    size = 2 if dtype == "bfloat16" else 4
    rows = rows or RowFacts.worst(spec)
    row, trained = rows.most.times(spec.batch_rows), model.trained(spec)
    quantised = _NF4 * model.linear if spec.method == "qlora" else 0.0
    kept, passing = _kept(spec, model, size, row), _passing(model, size, row)
    logits = (4 + size) * model.vocabulary * min(row.learned, LOGITS_AT_ONCE)
    if device == "gpu":
        left = model.parameters - (model.linear if quantised else 0)
        base, activations = size * left + quantised, _SPLIT * (kept + passing / model.layers)
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
    read = model.parameters - (0 if model.tied else max(0, model.vocabulary - rows.distinct) * model.hidden)
    pages, base, loaded = model.stored * read, model.stored * read + quantised, 0.0
    if spec.method == "full":
        base = size * model.parameters if size == 2 else 0  # the file's pages go once it is loaded
        logits += model.vocabulary * model.hidden * (2 * size + (4 if row.learned > LOGITS_AT_ONCE else 0))
    elif size != model.stored:
        base += size * (model.parameters - (model.linear if quantised else 0))
        loaded = pages + size * model.parameters
    heap = _QUANTISING * size * model.largest if quantised else 0.0
    return PeakMemory(
        runtime=_LIBRARIES_MB,
        base=_mb(base),
        trained=_mb(16 * trained),
        activations=_mb(kept + passing),
        logits=_mb(logits),
        loading=_mb(max(heap, loaded - base - 16 * trained - kept - passing - logits)),
    )


def _kept(spec: TrainSpec, model: ModelFacts, size: int, row: RowShape) -> float:
    """Bytes that the forward pass of a row keeps for its backward pass, in numbers of `size` bytes."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    a_token = 8 * model.hidden + size * (2 * model.hidden + 4 * model.intermediate) + size * _of_adapters(spec, model)
    a_place = size * (2 * query + 2 * keys) + (0 if row.groups <= spec.batch_rows else size * query)
    a_score = 6 if size == 2 else 4
    low = size * model.trained(spec) if size == 2 and spec.method != "full" else 0  # their copies in bf16
    return low + model.layers * (row.tokens * a_token + row.padded * a_place + row.explicit * model.heads * a_score)


def _of_adapters(spec: TrainSpec, model: ModelFacts) -> float:
    """Numbers a token and layer that adapters keep: between their two products, and with DoRA each map's output before it is scaled."""
    if spec.method == "full":
        return 0.0
    adapted = model._adapted(spec.lora_targets)
    return sum(times * (spec.lora_rank + (out if spec.use_dora else 0)) for times, out, _ in adapted) / model.layers


def _passing(model: ModelFacts, size: int, row: RowShape) -> float:
    """Bytes that the same pass makes and frees on its way."""
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    a_token = (16 + 4 * size + (4 if size == 2 else 0)) * model.hidden + 3 * size * (query + keys)
    return model.layers * (row.tokens * a_token + row.explicit * model.heads * 2 * size)


class Rates(_Facts):
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


def step_seconds(spec: TrainSpec, model: ModelFacts, rates: Rates, rows: RowFacts | None = None, nodes: int = 1) -> float:
    """Seconds of one optimiser step on the mean row, without checkpoints; `nodes` machines alike, each with its own rows.

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
        outs = sum(times * out for times, out, _ in model._adapted(spec.lora_targets))
        forward_and_backward += 2 * model.linear * spec.lora_rank / rates.linear + row.tokens * outs * 8 * size / rates.bandwidth
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
