"""What merging costs: how well held-out text is predicted by the tuned model as it was trained, as it can be merged, and by the base.

Channels `model`, `adapters/tuned` (the artifact), `documents` (documents.jsonl: held out), and where there is one `train` (the run's
own rows) -> output/data/losses.json.

    {"computed": str, "left_out": tokens,
     "passages": [{"document": int, "tokens": int}, ...],
     "models": {name: {"nats": [float of each passage], "agreement": float, "divergence": float, "trained": float | null}}}

`unmerged` is the adapter beside the weights it was trained on, `original` and (qlora) `dequantised` are the merged models as merge.py
writes them, `base` is the untuned one. `nats` are summed over a passage's tokens; `trained` is the mean over learned tokens of the run's
documents; `agreement` is the share of places where the likeliest token is the one of `unmerged`, `divergence` the mean Kullback-Leibler
divergence from its predictions, in nats a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from trimtab.errors import StagingError, WeightsError
from trimtab.layout import JobDir
from trimtab_runtime import manifest
from trimtab_runtime.engines.machine import free_memory
from trimtab_runtime.merge import TUNED, Adapter, read_adapter, read_facts, refuse_tied_head, shards_of, trained_dtype
from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.methods.qlora import dequantised_nf4
from trimtab_runtime.prepare import read_records
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.shards import read_header
from trimtab_runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens of a passage
MOST = 32_768  # held-out tokens that are looked at; of longer text the first passages of each document
TRAINED = 512  # tokens of the run's own rows: they are shown, and decide nothing
_TOGETHER = 1_024  # places that go through a model at once: a short passage alone leaves the processor waiting for weights
_PIECE = 128  # places whose predictions over the vocabulary are in memory at once


@dataclass(frozen=True)
class Passage:
    """Tokens [n] of document number `document`, and for each but the first whether it counts."""

    document: int
    ids: list[int]
    counts: list[bool]


@dataclass(frozen=True)
class Scores:
    """Of one passage: nats over the tokens that count, their number, places where both agree, summed divergence, and the last
    hidden states [n - 1, width], from which predictions are made."""

    nats: float
    tokens: int
    agree: int
    divergence: float
    hidden: Tensor


def losses(job: JobDir, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Raises StagingError where the documents hold no text, and what merge.py raises for the adapter."""
    base, tuned = job.channel("model"), job.adapters / TUNED
    facts, adapter = read_facts(tuned), read_adapter(tuned)
    refuse_tied_head(adapter, base)
    tokenizer = Tokenizer(tuned if (tuned / "tokenizer.json").is_file() else base)
    texts = [record["text"] for record in read_records(job.channel("documents") / "documents.jsonl", ("title", "text"))]
    held, left_out = held_out(texts, tokenizer)
    if not held:
        raise StagingError("the held-out documents are empty: give pages with text")
    own = trained(PackedRows(job.channel("train"))) if (job.channel("train") / manifest.NAME).is_file() else []
    disable_progress_bar()
    parameters = sum(math.prod(entry["shape"]) for shard in shards_of(base) for entry in read_header(shard).values())
    dtype, why = compute_dtype(parameters, free_memory())
    say(f"losses: {sum(len(one.counts) for one in held):,} held-out tokens in {len(held)} passages; computed {why}")
    nf4 = trained_dtype(facts) if facts.get("spec", {}).get("method") == "qlora" else None
    names = ("unmerged", *(("dequantised",) if nf4 else ()), "original", "base")
    count = itertools.count(1)
    total = len(names) * (len(held) + len(own))
    models: dict[str, dict[str, Any]] = {}
    trained_states: list[Tensor] = []
    with torch.inference_mode():
        for name in names:
            model = variant(base, adapter, name, nf4, dtype)  # one at a time: a large one fits only once
            scored = []
            for place, (passage, hidden) in enumerate(zip(held, states(model, held), strict=True)):
                scored.append(score(model, passage, hidden, trained_states[place] if trained_states else None))
                progress(next(count), total)
            trained_states = trained_states or [one.hidden for one in scored]
            seen = [0.0, 0]
            for passage, hidden in zip(own, states(model, own), strict=True):
                one = score(model, passage, hidden, None)
                seen = [seen[0] + one.nats, seen[1] + one.tokens]
                progress(next(count), total)
            places = sum(one.tokens for one in scored)
            models[name] = {
                "nats": [one.nats for one in scored],
                "agreement": sum(one.agree for one in scored) / places,
                "divergence": sum(one.divergence for one in scored) / places,
                "trained": seen[0] / seen[1] if seen[1] else None,
            }
            del model
    passages = [{"document": one.document, "tokens": len(one.counts)} for one in held]
    told = {"computed": why, "left_out": left_out, "passages": passages, "models": models}
    manifest.write_json(job.events.parent / "losses.json", told)


def held_out(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[list[Passage], int]:
    """The texts in passages of at most `WINDOW` tokens, each for itself; and how many tokens beyond `MOST` are left out."""
    found = []
    for number, text in enumerate(texts):
        ids = tokenizer.text(text)
        for turn, start in enumerate(range(0, len(ids), WINDOW - 1)):
            piece = [tokenizer.document_start, *ids[start : start + WINDOW - 1]]
            found.append((turn, Passage(number, piece, [True] * (len(piece) - 1))))
    found.sort(key=lambda item: item[0])  # stable: the first passage of every document, then the second ones
    sizes = list(itertools.accumulate(len(passage.counts) for _, passage in found))
    kept = [passage for (_, passage), upto in zip(found, sizes, strict=True) if upto <= MOST]
    return kept, (sizes[-1] if sizes else 0) - sum(len(passage.counts) for passage in kept)


def trained(rows: PackedRows) -> list[Passage]:
    """Samples of the run's own documents, one of each of its rows in turn, about `TRAINED` learned tokens in all; nothing rehearsed."""
    step = max(1, len(rows) // 16)
    order = [place for first in range(step) for place in range(first, len(rows), step)]
    found, seen = list[Passage](), 0
    samples: list[Iterator[Passage]] = [samples_of(rows, index) for index in order]
    while samples:
        turn, samples = samples, []
        for row in turn:
            if seen < TRAINED and (sample := next(row, None)):
                found.append(sample)
                seen += sum(sample.counts)
                samples.append(row)
    return found


def samples_of(rows: PackedRows, index: int) -> Iterator[Passage]:
    """The samples of one row of which something was learned that was not rehearsed, as far as a window reaches."""
    row = rows[index]
    begin, learned = 0, row.learned & (row.teacher < 0)
    for length in row.lengths:
        counts = learned[begin : begin + length][1:WINDOW].tolist()
        if any(counts):
            yield Passage(-1, row.tokens[begin : begin + length][:WINDOW].tolist(), counts)
        begin += length


def compute_dtype(parameters: int, room: int) -> tuple[torch.dtype | None, str]:
    """fp32 where the model fits so into `room` bytes, else (None) the type in which it is stored; and why, as in "computed ..."."""
    if parameters * 4 * 1.6 <= room:  # the stored weights lie beside them while they are loaded
        return torch.float32, "in fp32, so that only the weights differ"
    return (
        None,
        f"as it is stored: in fp32 {parameters * 4 / 1e9:.0f} GB do not fit well into the {room / 1e9:.0f} GB that are free here",
    )


def variant(base: Path, adapter: Adapter, name: str, nf4: torch.dtype | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of that name, with its weights as they are or would be stored; it computes in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True)
    layers = dict(model.named_modules())
    if absent := sorted(adapter.factors.keys() - layers.keys()):
        raise WeightsError(f"the base model has no layer {absent[0]}, which the adapter needs: it belongs to another model")
    if name == "unmerged":
        for layer in linear_layers(model) if nf4 else ():
            weight = layers[layer].weight
            weight.data = dequantised_nf4(weight.data.to(nf4)).to(dtype or weight.dtype)
    elif name != "base":
        through_nf4 = set(linear_layers(model)) if name == "dequantised" else set[str]()
        for layer in {*adapter.factors, *through_nf4}:
            weight = layers[layer].weight
            weight.data = adapter.merged(layer, weight.data, nf4 if layer in through_nf4 else None)
    model = model.to(dtype) if dtype else model
    if name == "unmerged":
        for layer, (b, a) in adapter.factors.items():
            scale, gain = adapter.scales[layer], None
            if layer in adapter.magnitudes:
                whole = torch.addmm(layers[layer].weight.float(), b.float(), a.float(), alpha=scale)
                gain = adapter.gain(layer, whole).to(model.dtype)
            layers[layer].register_forward_hook(beside(b.to(model.dtype), a.to(model.dtype), scale, gain))
    return model.eval()


def beside(b: Tensor, a: Tensor, scale: float, gain: Tensor | None = None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds an adapter's part to a layer's output; with `gain` [out] (DoRA) that much of all but the bias."""

    def added(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found = output + functional.linear(functional.linear(inputs[0], a), b) * scale
        if gain is None:
            return found
        bias = getattr(module, "bias", None)
        return found * gain if bias is None else (found - bias) * gain + bias

    return added


def batches(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """The passages in their order, as many together as take at most `_TOGETHER` places when all are as long as the longest."""
    batch: list[Passage] = []
    for passage in passages:
        if batch and (len(batch) + 1) * max(len(one.ids) for one in (*batch, passage)) > _TOGETHER:
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def states(model: PreTrainedModel, passages: Sequence[Passage]) -> Iterator[Tensor]:
    """The last hidden states [n - 1, width] of each passage. What fills up a shorter one stands behind it, where it cannot look."""
    for batch in batches(passages):
        ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        yield from (row[: len(one.ids) - 1].clone() for row, one in zip(hidden, batch, strict=True))


def score(model: PreTrainedModel, passage: Passage, hidden: Tensor, trained: Tensor | None) -> Scores:
    """A passage by its hidden states under a model, and how far its predictions are from those made of the `trained` one's."""
    ids = torch.tensor(passage.ids)
    head = model.get_output_embeddings()
    counts = torch.tensor(passage.counts)
    nats, agree, divergence = 0.0, 0, 0.0
    for places in counts.nonzero().squeeze(1).split(_PIECE):
        said = head(hidden[places]).float().log_softmax(-1)
        nats -= said.gather(1, ids[places + 1][:, None]).double().sum().item()
        if trained is not None:
            wanted = head(trained[places]).float().log_softmax(-1)
            agree += int((said.argmax(-1) == wanted.argmax(-1)).sum())
            divergence += float(functional.kl_div(said, wanted, reduction="none", log_target=True).sum(-1).double().sum())
    tokens = int(counts.sum())
    return Scores(nats, tokens, agree if trained is not None else tokens, divergence, hidden)
