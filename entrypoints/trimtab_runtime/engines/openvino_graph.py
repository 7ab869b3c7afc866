"""A Hugging Face folder as an OpenVINO model, without torch: the graph from config.json, the weights from mapped safetensors.

The families are Llama's relatives: RMS norms, rotary positions, grouped attention, a gated feed-forward. The form is the
stateful one that OpenVINO's SDPAToPagedAttention pass takes (keys and values as variables, gathered by `beam_idx`).
Several adapters stand beside the base in one graph: a token's id says whose it is (`id + vocabulary * model`, 0 the base), and
so do the ids that come out, so that requests to all of them share each step and no cached keys are mistaken for another's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.op.util import Variable, VariableInfo

from trimtab.errors import WeightsError
from trimtab_runtime.engines.adapters import Adapter
from trimtab_runtime.engines.families import Sizes, refusal
from trimtab_runtime.engines.mapped import Mapped
from trimtab_runtime.engines.rope import frequencies

_TYPES = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}
_WIDENED = re.compile(
    r'(type="Convert" version="opset1">\s*<data destination_type="f32" />)(?=\s*<input>\s*<port id="0" precision="B?F(?:P)?16">)'
)
_NEVER = -1e30  # a logit that is never drawn; finite, so that bfloat16 and a small temperature keep it a number


def write(config: Mapping[str, Any], weights: Mapping[str, Mapped], folder: Path, adapters: Sequence[Adapter] = ()) -> None:
    """Save the model as the two files that an OpenVINO pipeline loads, weights in their stored precision.

    Raises WeightsError for a model that `refusal` names, and for a tensor that is missing or of another shape.
    """
    file = folder / "openvino_model.xml"
    ov.serialize(build(config, weights, adapters), file, file.with_suffix(".bin"))
    # without the mark the plugin keeps every bfloat16 weight a second time, as float32; Python cannot set it on a node
    file.write_text(_WIDENED.sub(r"\1<rt_info><attribute name='decompression' version='0'/></rt_info>", file.read_text("utf-8")), "utf-8")


def build(config: Mapping[str, Any], weights: Mapping[str, Mapped], adapters: Sequence[Adapter] = ()) -> ov.Model:
    """The model as a stateful graph over the mapped weights, which it does not copy: they must outlive it.

    Inputs `input_ids` and `position_ids` [rows, columns], `beam_idx` [rows], with adapters `sampled_tokens_indices` [places];
    output `logits` [rows, columns, vocabulary], with adapters [places, 1, vocabulary * (1 + adapters)]. Raises WeightsError for a
    model that `refusal` names, and for a tensor that is missing or of another shape.
    """
    if why := refusal(config):
        raise WeightsError(f"the OpenVINO engine does not take this model: {why}. Choose  --engine transformers")
    return _Graph(Sizes.of(config), weights, adapters).model()


class _Graph:
    """One model being built. Node names follow the weights' names, so that a profile can be read."""

    def __init__(self, sizes: Sizes, weights: Mapping[str, Mapped], adapters: Sequence[Adapter]) -> None:
        self.sizes, self.weights, self.adapters = sizes, weights, adapters
        self.ids = _parameter("input_ids", ov.Type.i64, [-1, -1])
        self.positions = _parameter("position_ids", ov.Type.i64, [-1, -1])
        self.beams = _parameter("beam_idx", ov.Type.i32, [-1])
        self.parameters = [self.ids, self.positions, self.beams]
        self.sinks: list[ov.Node] = []
        self.variables: list[Variable] = []
        self.columns: ov.Node | None = None  # which columns of the adapters' first products are each token's own
        self.whose: ov.Node | None = None
        self.adapted: set[str] = set()  # layers to which an adapter was added

    def model(self) -> ov.Model:
        tokens: ov.Node = self.ids
        if self.adapters:
            size = _integers([self.sizes.vocabulary])
            self.whose = ops.divide(self.ids, size)
            tokens = ops.subtract(self.ids, ops.multiply(self.whose, size))
            self.columns = ops.gather(_floats(self._ownership()), self.whose, _integers(0))
        table = self._weight("model.embed_tokens.weight", (self.sizes.vocabulary, self.sizes.hidden))
        hidden = ops.gather(table, ops.convert(tokens, "i32"), _integers(0))
        cosine, sine = self._rotations()
        for layer in range(self.sizes.layers):
            hidden = self._layer(f"model.layers.{layer}", hidden, cosine, sine)
        hidden = self._norm("model.norm.weight", hidden, self.sizes.hidden)
        if left := sorted({name for adapter in self.adapters for name in adapter.factors} - self.adapted):
            raise WeightsError(f"an adapter changes {left[0]}, which this engine does not adapt: choose  --engine transformers")
        head = table if self.sizes.tied else self._weight("lm_head.weight", (self.sizes.vocabulary, self.sizes.hidden))
        logits = self._logits(hidden, head)
        logits.output(0).set_names({"logits"})
        return ov.Model([ops.result(logits)], self.sinks, self.parameters, self.variables, "language_model")

    def _logits(self, hidden: ov.Node, head: ov.Node) -> ov.Node:
        if self.whose is None:
            return ops.matmul(hidden, head, False, True)
        places = _parameter("sampled_tokens_indices", ov.Type.i64, [-1])
        self.parameters.append(places)
        logits = ops.matmul(ops.gather(hidden, places, _integers(0)), head, False, True)  # [places, 1, vocabulary]
        whose = ops.gather(self.whose, places, _integers(0))  # [places, 1]
        models = _integers([[list(range(len(self.adapters) + 1))]])
        own = ops.equal(ops.unsqueeze(whose, _integers(2)), models)  # [places, 1, models]
        spread = ops.select(ops.unsqueeze(own, _integers(3)), ops.unsqueeze(logits, _integers(2)), _floats(_NEVER))
        return ops.reshape(spread, _integers([0, 0, -1]), True)

    def _ownership(self) -> NDArray[np.float32]:
        """[models, ranks]: 1 where a column of the first products belongs to the model; the base has none."""
        ranks = [adapter.rank for adapter in self.adapters]
        found = np.zeros((len(ranks) + 1, sum(ranks)), dtype=np.float32)
        for number, rank in enumerate(ranks):
            begin = sum(ranks[:number])
            found[number + 1, begin : begin + rank] = 1
        return found

    def _rotations(self) -> tuple[ov.Node, ov.Node]:
        """Cosine and sine [rows, 1, columns, width] of each position."""
        inverse, strength = frequencies(self.sizes.rope, self.sizes.width)
        positions = ops.convert(ops.unsqueeze(self.positions, _integers(1)), "f32")
        angles = ops.transpose(ops.matmul(_floats(inverse.reshape(1, -1, 1)), positions, False, False), _integers([0, 2, 1]))
        both = ops.concat([angles, angles], -1)
        found = [ops.cos(both), ops.sin(both)]
        if strength != 1.0:
            found = [ops.multiply(one, _floats(strength)) for one in found]
        cosine, sine = (ops.unsqueeze(one, _integers(1)) for one in found)
        return cosine, sine

    def _layer(self, name: str, hidden: ov.Node, cosine: ov.Node, sine: ov.Node) -> ov.Node:
        sizes = self.sizes
        normed = self._norm(f"{name}.input_layernorm.weight", hidden, sizes.hidden)
        attention = f"{name}.self_attn"
        query = self._heads(f"{attention}.q", normed, sizes.heads)
        key = self._heads(f"{attention}.k", normed, sizes.kv_heads)
        value = self._heads(f"{attention}.v", normed, sizes.kv_heads)
        keys = self._all_heads(self._past(f"{name}.key", _rotate(key, cosine, sine, sizes.width)))
        values = self._all_heads(self._past(f"{name}.value", value))
        found = ops.scaled_dot_product_attention(
            _rotate(query, cosine, sine, sizes.width),
            keys,
            values,
            _floats(np.zeros((1, 1, 1, 1), dtype=np.float32)),  # the paged form knows what comes before what
            _floats(1 / math.sqrt(sizes.width)),
            causal=False,
        )
        together = ops.reshape(ops.transpose(found, _integers([0, 2, 1, 3])), _integers([0, 0, sizes.heads * sizes.width]), True)
        hidden = ops.add(hidden, self._linear(f"{attention}.o_proj", together, sizes.hidden))
        normed = self._norm(f"{name}.post_attention_layernorm.weight", hidden, sizes.hidden)
        gate = ops.swish(self._linear(f"{name}.mlp.gate_proj", normed))
        gated = ops.multiply(gate, self._linear(f"{name}.mlp.up_proj", normed))
        return ops.add(hidden, self._linear(f"{name}.mlp.down_proj", gated, sizes.hidden))

    def _heads(self, name: str, hidden: ov.Node, heads: int) -> ov.Node:
        """Queries, keys or values [rows, heads, columns, width]; normalised head by head where the family does (Qwen3)."""
        width = self.sizes.width
        found = ops.reshape(self._linear(f"{name}_proj", hidden, heads * width), _integers([0, 0, heads, width]), True)
        if f"{name}_norm.weight" in self.weights:
            found = self._norm(f"{name}_norm.weight", found, width)
        return ops.transpose(found, _integers([0, 2, 1, 3]))

    def _past(self, name: str, new: ov.Node) -> ov.Node:
        """What was computed for the tokens before, then the new ones; kept in a variable."""
        heads, width = self.sizes.kv_heads, self.sizes.width
        nothing = ops.broadcast(_floats(0.0), _integers([1, heads, 0, width]))
        known = VariableInfo()
        known.variable_id, known.data_type, known.data_shape = name, ov.Type.f32, ov.PartialShape([-1, heads, -1, width])
        variable = Variable(known)
        past = ops.gather(ops.read_value(nothing, variable), self.beams, _integers(0))
        found = ops.concat([past, new], -2)
        self.sinks.append(ops.assign(found, variable))
        self.variables.append(variable)
        return found

    def _all_heads(self, found: ov.Node) -> ov.Node:
        """Keys or values repeated for each query head of their group."""
        heads, kv_heads, width = self.sizes.heads, self.sizes.kv_heads, self.sizes.width
        if heads == kv_heads:
            return found
        times = _integers([1, 1, heads // kv_heads, 1, 1])
        repeated = ops.broadcast(ops.unsqueeze(found, _integers(2)), times, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(repeated, _integers([0, heads, -1, width]), True)

    def _norm(self, name: str, hidden: ov.Node, width: int) -> ov.Node:
        """Root mean square layer norm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last axis."""
        ones = [1] * (len(hidden.get_output_partial_shape(0)) - 1)
        mean = ops.reduce_mean(ops.power(hidden, _floats(np.full([*ones, 1], 2, dtype=np.float32))), _integers([-1]), True)
        root = ops.sqrt(ops.add(mean, _floats(np.full([*ones, 1], self.sizes.epsilon, dtype=np.float32))))
        scaled = ops.multiply(hidden, ops.divide(_floats(np.ones([*ones, 1], dtype=np.float32)), root))
        return ops.multiply(self._weight(name, (width,), (*ones, width)), scaled)

    def _linear(self, name: str, hidden: ov.Node, outputs: int | None = None) -> ov.Node:
        """A linear layer, its bias where there is one, and what the adapters add to it."""
        inputs = hidden.get_output_partial_shape(0)[-1].get_length()
        weight = self._weight(f"{name}.weight", (outputs, inputs))
        found = ops.matmul(hidden, weight, False, True)
        if f"{name}.bias" in self.weights:
            width = self.weights[f"{name}.bias"].array.size
            found = ops.add(found, self._weight(f"{name}.bias", (width,), (1, 1, width)))
        if self.columns is not None and any(name in adapter.factors for adapter in self.adapters):
            self.adapted.add(name)
            first, second = _stack(self.adapters, name)
            narrow = ops.multiply(ops.matmul(hidden, _floats(first), False, True), self.columns)
            found = ops.add(found, ops.matmul(narrow, _floats(second), False, True))
        return found

    def _weight(self, name: str, shape: tuple[int | None, ...], shown: tuple[int, ...] | None = None) -> ov.Node:
        """A weight as single-precision numbers; the file's own precision is what is stored."""
        found = self.weights.get(name)
        if found is None:
            raise WeightsError(f"the weights have no {name!r}, which config.json promises: copy the model again")
        if len(shape) != found.array.ndim or any(want not in (None, is_) for want, is_ in zip(shape, found.array.shape, strict=True)):
            wanted = " x ".join(str(size or "any") for size in shape)
            raise WeightsError(f"{name} is {found.array.shape}, config.json promises {wanted}: copy the model again")
        constant = ops.constant(ov.Tensor(found.array, list(shown or found.array.shape), _TYPES[found.dtype]), shared_memory=True)
        constant.set_friendly_name(name)
        return constant if found.dtype == "F32" else ops.convert(constant, "f32")


def _stack(adapters: Sequence[Adapter], name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [ranks, in] and B [out, ranks] of a layer, adapter by adapter; zeros for one that leaves the layer alone."""
    shapes = next((a.shape[1], b.shape[0]) for a, b in (one.factors[name] for one in adapters if name in one.factors))
    first = np.zeros((sum(one.rank for one in adapters), shapes[0]), dtype=np.float32)
    second = np.zeros((shapes[1], len(first)), dtype=np.float32)
    begin = 0
    for adapter in adapters:
        if name in adapter.factors:
            a, b = adapter.factors[name]
            first[begin : begin + len(a)], second[:, begin : begin + len(a)] = a, b
        begin += adapter.rank
    return first, second


def _rotate(states: ov.Node, cosine: ov.Node, sine: ov.Node, width: int) -> ov.Node:
    """Each head's halves turned by its position's angles; written as the plugin's fused rotation expects it."""
    half, end, last = _integers([width // 2]), _integers([2**63 - 1]), _integers([3])
    one, nought = _integers([1]), _integers([0])
    turned = ops.concat(
        [ops.multiply(ops.slice(states, half, end, one, last), _floats(-1.0)), ops.slice(states, nought, half, one, last)], -1
    )
    return ops.add(ops.multiply(states, cosine), ops.multiply(turned, sine))


def _parameter(name: str, kind: ov.Type, shape: list[int]) -> ov.Node:
    found = ops.parameter(ov.PartialShape(shape), kind)
    found.set_friendly_name(name)
    found.output(0).set_names({name})
    return found


def _integers(value: object) -> ov.Node:
    return ops.constant(np.array(value, dtype=np.int64))


def _floats(value: object) -> ov.Node:
    return ops.constant(np.array(value, dtype=np.float32))
