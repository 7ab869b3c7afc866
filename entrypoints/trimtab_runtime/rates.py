"""What this machine does in a second, measured in some seconds at a model's own shapes, with the code that trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab.errors import SpecError
from trimtab.estimate import LOGITS_AT_ONCE, ModelFacts, Rates, elementwise_bytes
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime.choices import cpu_flags, pick_dtype
from trimtab_runtime.manifest import write_json
from trimtab_runtime.methods.lora import add_adapters
from trimtab_runtime.model import read_config
from trimtab_runtime.rows import shape_of_row
from trimtab_runtime.xeon import attention, kernels
from trimtab_runtime.xeon.block import fuse
from trimtab_runtime.xeon.loss import linear_cross_entropy

_TOKENS = 1024  # of a typical row
_SHORT = 48  # of a row so small that a layer's own overhead is most of its time
_SAMPLES = (400, 112)  # tokens of two samples that are not attended to together, as in a typical row
_TINY = (6, 12, 24, 48)  # the same of samples whose attention is mostly overhead
_MOST = 4e11  # operations in one measured pass, so that a large model takes seconds too
_QUANTISED = 1 << 23  # weights: quantising them takes far longer than back
_WEIGHTS = 1 << 26  # bytes of weights in turn, so that they, and what layers keep of a row, come from memory as a model's do


def measure(job: JobDir, spec: TrainSpec, say: Callable[[str], None]) -> Rates:
    """The rates of this machine for the model of channel `model`, written to `job.rates`, too. Its weights are not read.

    Raises SpecError for a model that does not name its sizes.
    """
    dtype = getattr(torch, pick_dtype(spec.dtype, cpu_flags()).value)
    began = time.monotonic()
    rates = rates_for(job.channel("model"), spec, dtype)
    write_json(job.rates, rates.model_dump(mode="json"))
    say(
        f"rates in {rates.dtype}, measured in {time.monotonic() - began:.0f} s: products {rates.linear / 1e9:,.0f} GFLOP/s, see {job.rates}"
    )
    return rates


def rates_for(folder: Path, spec: TrainSpec, dtype: torch.dtype) -> Rates:
    """The same for the model whose config.json lies in `folder`."""
    model = ModelFacts.from_config(read_config(folder))
    if model is None:
        raise SpecError(f"the model in {folder} does not name its sizes as Llamas do, so nothing is estimated for it: use --dry-run")
    name: Literal["bfloat16", "float32"] = "bfloat16" if dtype is torch.bfloat16 else "float32"
    size = dtype.itemsize
    # a layer's own time is found beside adapters, whatever is trained
    asked = TrainSpec(model=spec.model, method="lora") if spec.method == "full" else spec.model_copy(update={"use_dora": False})
    a_layer = model.linear // model.layers
    copies = _copies(a_layer * size)
    tokens = max(_SHORT * 2, min(_TOKENS, spec.batch_rows * spec.max_seq_len, int(_MOST / (4 * a_layer))))
    with torch.enable_grad():
        linear, adapters = _products(model, asked.lora_rank, tokens, dtype)
        alone = sum(_seconds(_attention(model, [length], dtype)) for length in _SAMPLES)
        together = _seconds(_attention(model, [*_SAMPLES], dtype))
        a_place = 2 * (model.heads + model.kv_heads) * model.head_width
        gathered = sum(_SAMPLES) * a_place / max(together - alone, 0.05 * together)
        flash = model.heads * 1024**2 / _seconds(_attention(model, [1024], dtype))
        # alone = groups * group + weights / explicit, and the same of groups so small that it is most of their time
        weights, few = (model.heads * sum(length**2 for length in lengths) for lengths in (_SAMPLES, _TINY))
        tiny = max(0.0, _seconds(_attention(model, [*_TINY], dtype)) - sum(_TINY) * a_place / gathered)
        share = len(_SAMPLES) / len(_TINY)
        explicit = (weights - share * few) / max(alone - share * tiny, 0.5 * alone)
        group = max(0.0, tiny - few / explicit) / len(_TINY)
        layer, rest = {}, {}
        for count in (_SHORT, tokens):
            lengths = _lengths(count)
            row = shape_of_row(lengths, [True] * count)
            layer[count] = _seconds(_layers(folder, asked, lengths, copies, dtype)) / copies
            known = count * (4 * a_layer / linear + 6 * model.trained(asked) / model.layers / adapters) + row.groups * group
            known += model.heads * (row.explicit / explicit + row.flash / flash)
            rest[count] = layer[count] - known - (row.padded * a_place / gathered if row.groups > 1 else 0)
    moved = elementwise_bytes(model, size)
    # what a token adds beyond the products, at least a fiftieth of the layer: noise may hide it
    a_token = max((rest[tokens] - rest[_SHORT]) / (tokens - _SHORT), 0.02 * layer[tokens] / tokens)
    return Rates(
        dtype=name, linear=linear, adapters=adapters, explicit=explicit, flash=flash, gathered=gathered,
        logits=_logits(model, dtype), dequantised=_dequantised(model, dtype), bandwidth=moved / a_token,
        layer_seconds=max(0.0, rest[_SHORT] - _SHORT * a_token), group_seconds=group,
    )  # fmt: skip


def _seconds(work: Callable[[], object], *, least: float = 0.25, times: int = 5) -> float:
    """The median of several passes, at least so many and for so long, after one that is not counted.

    One thread's are seconds of its processor: what others do on the machine is no part of its rates.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    taken: list[float] = []
    while len(taken) < times or sum(taken) < least:
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken)


def _shapes(model: ModelFacts) -> list[tuple[int, int]]:
    """[out, in] of a layer's linear maps."""
    query, keys, hidden, inner = model.heads * model.head_width, model.kv_heads * model.head_width, model.hidden, model.intermediate
    return [(query, hidden), (keys, hidden), (keys, hidden), (hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)]


def _copies(layer: int) -> int:
    """How many layers of so many bytes are worked on in turn."""
    return max(1, min(8, _WEIGHTS // layer))


def _lengths(tokens: int) -> list[int]:
    """The samples of a row of so many tokens."""
    times, left = divmod(tokens, sum(_SAMPLES))
    return [*_SAMPLES * times, *([left] if left else [])]


def _products(model: ModelFacts, rank: int, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a layer's frozen maps, forward and towards the input; and of their adapters' products."""
    shapes = _shapes(model)
    a_layer = sum(out * inner for out, inner in shapes)
    copies = max(2, _copies(a_layer * dtype.itemsize))
    layers = [[torch.rand(shape, dtype=dtype) - 0.5 for shape in shapes] for _ in range(copies)]
    inputs = {width: torch.rand(tokens, width, dtype=dtype) for pair in shapes for width in pair}
    turn = 0

    def frozen() -> None:
        nonlocal turn
        turn += 1
        for weight in layers[turn % copies]:
            out, inner = weight.shape
            torch.mm(inputs[inner], weight.t())
            torch.mm(inputs[out], weight)

    low = {width: torch.rand(rank, width, dtype=dtype) for width in inputs}

    def low_rank() -> None:
        for out, inner in shapes:
            x, dy, a, b = inputs[inner], inputs[out], low[inner], low[out].t()
            within = torch.mm(x, a.t())
            torch.empty_like(dy).addmm_(within, b.t(), beta=0)
            back = torch.mm(dy, b)
            torch.mm(dy.t(), within).float()
            torch.mm(back.t(), x).float()
            torch.empty_like(x).addmm_(back, a, beta=0)

    adapter = model.adapter(rank) // model.layers
    return 4 * a_layer * tokens / _seconds(frozen), 6 * adapter * tokens / _seconds(low_rank)


def _attention(model: ModelFacts, lengths: list[int], dtype: torch.dtype) -> Callable[[], object]:
    """Attention of one layer over a row of such samples, forward and backward."""
    groups = attention.plan_groups(lengths)
    module = nn.Module()
    query, key, value = (
        torch.rand(1, heads, sum(lengths), model.head_width, dtype=dtype).requires_grad_()
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    )

    def both_ways() -> None:
        out, _ = attention.packed_attention(module, query, key, value, None, packed_groups=groups)
        torch.autograd.backward(out, torch.ones_like(out))
        query.grad = key.grad = value.grad = None

    return both_ways


def _layers(folder: Path, spec: TrainSpec, lengths: list[int], count: int, dtype: torch.dtype) -> Callable[[], object]:
    """So many layers of the model with adapters, random weights, over a row of such samples, forward and backward."""
    attention.register()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    few = {"vocab_size": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    config.update(few | {"num_hidden_layers": count})
    base: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, attn_implementation=attention.NAME
    )
    model = add_adapters(base, spec)
    fuse(model)
    decoder: Any = base.get_decoder().train()  # type: ignore[no-untyped-call]
    positions = torch.cat([torch.arange(length) for length in lengths])
    given = {"position_ids": positions[None], "packed_groups": attention.plan_groups(lengths)}
    embedded = torch.rand(1, sum(lengths), config.hidden_size, dtype=dtype).requires_grad_()

    def both_ways() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16 and spec.lora_dropout > 0):
            out = decoder(inputs_embeds=embedded, **given).last_hidden_state
        torch.autograd.backward(out, torch.ones_like(out))
        model.zero_grad(set_to_none=True)
        embedded.grad = None

    return both_ways


def _logits(model: ModelFacts, dtype: torch.dtype) -> float:
    """Logits turned into loss and gradient; the head's two products are taken off."""
    count = LOGITS_AT_ONCE
    hidden = torch.rand(count, model.hidden, dtype=dtype).requires_grad_()
    head = torch.rand(model.vocabulary, model.hidden, dtype=dtype) - 0.5
    targets = torch.zeros(count, dtype=torch.int64)
    upstream = torch.rand(count, model.vocabulary, dtype=dtype)
    whole = _seconds(lambda: linear_cross_entropy(hidden, head, targets, scale=1.0), times=3)
    products = _seconds(lambda: (torch.mm(hidden.detach(), head.t()), torch.mm(upstream, head)), times=3)
    return count * model.vocabulary / max(whole - products, 0.1 * whole)


def _dequantised(model: ModelFacts, dtype: torch.dtype) -> float:
    """4-bit weights made into numbers, in memory that is there."""
    out, inner = model.intermediate, model.hidden
    weight = torch.rand(max(1, min(out, _QUANTISED // inner)), inner, dtype=dtype)
    packed, state = kernels.nf4_quantise(weight)
    return weight.numel() / _seconds(lambda: kernels.nf4_dequantise(packed, state, weight))
