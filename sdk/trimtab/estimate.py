"""What a spec costs before it runs, from facts alone. Pure; both sides of the wall use it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.spec import TrainSpec


def optimiser_steps(spec: TrainSpec, rounds: Sequence[int], nodes: int = 1) -> tuple[int, int]:
    """(steps of the run, steps of all its epochs); they differ by max_steps. `rounds`: packed rows of each round."""
    whole = sum(epoch_steps(spec, rounds, epoch, nodes) for epoch in range(spec.epochs))
    return (whole if spec.max_steps is None else min(whole, spec.max_steps)), whole


def epoch_steps(spec: TrainSpec, rounds: Sequence[int], epoch: int, nodes: int = 1) -> int:
    """Steps of an epoch (from 0), which takes the next round in turn.

    A step takes `batch_rows * accumulation` rows on each of `nodes` machines; the last one of an epoch takes what is left.
    """
    return math.ceil(rounds[epoch % len(rounds)] / (spec.batch_rows * spec.accumulation * nodes))


BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""What Linux calls the instructions for which a run that may choose computes in bf16."""

_RUNTIME_MB = 400  # torch, transformers, peft and bitsandbytes, imported
_SLACK = 1.45  # of activations: the heap keeps the gaps that temporaries leave (measured 1.25 to 1.65)
_EXPLICIT_UP_TO = 512  # tokens of a sample whose attention weights are kept; those of longer ones are computed again
_CHUNK = 512  # tokens whose logits exist at once
_NF4 = 0.53  # bytes for a weight: 4 bits, and the scales of each 64 in 8 bits (arXiv:2305.14314, double quantisation)


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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelFacts | None:
        """From the fields of a transformers configuration; None for one that does not name these sizes."""
        try:
            layers, hidden, intermediate, heads, vocabulary = (
                int(config[name]) for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
            )
            kv_heads, width = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        return cls(layers, hidden, intermediate, heads, kv_heads, width, vocabulary, bool(config.get("tie_word_embeddings", False)))

    @property
    def linear(self) -> int:
        """Weights of the layers' linear maps."""
        query, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return self.layers * self.hidden * (2 * query + 2 * keys + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights, norms too; tied ones count once."""
        return self.linear + self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    def adapter(self, rank: int) -> int:
        """Weights of adapters of this rank on every linear map of the layers."""
        query, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return self.layers * rank * (2 * (self.hidden + query) + 2 * (self.hidden + keys) + 3 * (self.hidden + self.intermediate))


@dataclass(frozen=True)
class PeakMemory:
    """The parts of a training process' peak resident set on a CPU, in MB (2^20 bytes)."""

    runtime: int
    base: int
    adapters: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.runtime + self.base + self.adapters + self.activations + self.logits


def peak_memory(spec: TrainSpec, model: ModelFacts, dtype: str) -> PeakMemory:
    """What training takes on each machine when it computes in `dtype` ("bfloat16" or "float32"), for the costliest row there can be.

    With s bytes a number, n tokens in one forward pass, L layers, h hidden, f intermediate, a heads, d the width of one, k the width of
    all keys, r the rank, and t = min(512, max_seq_len) tokens of the longest sample whose attention is computed explicitly:

        base         parameters * s, pages of the mapped file included; with qlora 0.53 bytes more for each weight of the layers
        adapters     16 bytes a weight: fp32 value, gradient and AdamW's two moments
        activations  1.45 * n * L * (8 h + 3 s h + 4 s f + s (a d + 2 k) + 7 s r + a t (4 and, in bf16, 2 more))
        logits       (8 + s) * vocabulary * min(n, 512)

    The sums are of what the layers save for their backward pass, counted with hooks on saved tensors; 1.45 is what the heap takes for
    each byte of it. Runs of a random 2M and a 135M Llama, rows of 128 to 2,048 tokens, took 0.68 to 1.11 times as much: the less, the
    fewer of their samples are as long as t. Not counted: the file's pages while it is loaded in another dtype.
    """
    size = 2 if dtype == "bfloat16" else 4
    tokens, longest = spec.batch_rows * spec.max_seq_len, min(_EXPLICIT_UP_TO, spec.max_seq_len)
    query, keys = model.heads * model.head_width, model.kv_heads * model.head_width
    saved = (
        (8 + 3 * size) * model.hidden
        + 4 * size * model.intermediate
        + size * (query + 2 * keys)
        + 7 * size * spec.lora_rank
        + model.heads * longest * (6 if size == 2 else 4)
    )
    quantised = _NF4 * model.linear if spec.method == "qlora" else 0
    return PeakMemory(
        runtime=_RUNTIME_MB,
        base=_mb(size * model.parameters + quantised),
        adapters=_mb(16 * model.adapter(spec.lora_rank)),
        activations=_mb(_SLACK * tokens * model.layers * saved),
        logits=_mb((8 + size) * model.vocabulary * min(tokens, _CHUNK)),
    )


def dtype_of(asked: str, flags: Collection[str]) -> str:
    """What a run computes in when `asked` is a spec's dtype and `flags` what the processor can do: the rule that the run follows."""
    if asked != "auto":
        return asked
    return "bfloat16" if any(flag in flags for flag in BF16_FLAGS) else "float32"


def _mb(size: float) -> int:
    return math.ceil(size / 2**20)
