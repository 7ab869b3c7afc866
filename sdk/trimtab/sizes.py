"""Sizes that memory and time are estimated from: a model's, by its config.json, and packed rows'. Pure; both sides of the wall use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.spec import TrainSpec

EXPLICIT_UP_TO = 512
"""Tokens of a sample up to which attention is measured, and counted, as that of a short one."""

_BLOCKS = ("llama", "mistral", "qwen2", "qwen3")


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
    blocks: bool = False  # of a type whose decoder layers the runtime computes in one step each

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
        tied, blocks = bool(config.get("tie_word_embeddings", False)), config.get("model_type") in _BLOCKS
        return cls(layers, hidden, intermediate, heads, kv_heads, width, vocabulary, tied, stored, blocks)

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
        return sum(rank * times * (out + inner) for times, out, inner in self.adapted(()))

    def adapted(self, targets: Sequence[str]) -> list[tuple[int, int, int]]:
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
        adapted = self.adapted(spec.lora_targets)
        return sum(times * (spec.lora_rank * (out + inner) + (out if spec.use_dora else 0)) for times, out, inner in adapted)


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RowShape(Facts):
    """What of a packed row costs memory and time; a mean of several need not be whole. `learned` places have their logits computed.

    Attention gathers samples of like length into groups, each padded to its longest: `groups` of them, with `padded` places,
    `explicit` pairs of places in those of up to 512 tokens, and `flash` pairs in longer ones, which attention computes at another rate.
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


class RowFacts(Facts):
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
        """Where no rows are known: every row is one sample, and all of it is learned."""
        tokens = spec.max_seq_len
        explicit, flash = (tokens**2, 0) if tokens <= EXPLICIT_UP_TO else (0, tokens**2)
        row = RowShape(tokens=tokens, learned=tokens, groups=1, padded=tokens, explicit=explicit, flash=flash)
        return cls(mean=row, most=row, distinct=1 << 31)
