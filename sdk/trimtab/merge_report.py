"""What merging costs, measured on text that was not trained on, and onto which weights an adapter is merged for it.

A qlora adapter is trained beside weights in NF4. Merged onto what NF4 makes of the base's weights it is the model that was trained, but
for one rounding; merged onto the original weights it is another one, which can be better or worse: only held-out text tells.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab import data
from trimtab.artifact import Artifact
from trimtab.cache import cache_dir
from trimtab.command import refuse_missing_runtime
from trimtab.counting import counted
from trimtab.errors import DataError, StagingError
from trimtab.events import Event
from trimtab.intervals import mean
from trimtab.layout import JobDir
from trimtab.merge import lay_out, pick_file, refuse_other_base, refuse_whole
from trimtab.probes import plain_words
from trimtab.staging import run_verb
from trimtab.weights import BaseModel

FEWEST = 5  # documents from which an interval is taken
SEEN = 0.5  # of a document's sentences; more, and it was trained on
_SHORTEST = 5  # words of a sentence that is looked for

Way = Literal["unmerged", "dequantised", "original", "base"]

WAYS: dict[Way, str] = {
    "unmerged": "adapter beside the weights it was trained on",
    "dequantised": "merged onto those weights, rounded once",
    "original": "merged onto the base's original weights",
    "base": "the base model, untuned",
}


@dataclass(frozen=True)
class Measured:
    """`loss` is the mean over held-out tokens, `trained` over the learned tokens of the run's own documents (None: they are not here), in
    nats a token. `agreement` is the share of held-out tokens before which the likeliest next token is the one of `unmerged`, `divergence`
    the mean Kullback-Leibler divergence from its predictions, in nats a token."""

    loss: float
    trained: float | None
    agreement: float
    divergence: float


@dataclass(frozen=True)
class MergeReport:
    """`difference` is the loss merged onto the original weights less that onto the dequantised ones, `interval` holds it with 95 %
    confidence (None: too few documents to tell, or nothing to choose from). `pick` is onto which weights to merge, `reason` why."""

    text: str
    documents: int
    tokens: int
    left_out: int
    computed: str
    models: dict[Way, Measured]
    difference: float | None
    interval: tuple[float, float] | None
    pick: Literal["dequantised", "original"]
    reason: str

    def lines(self) -> list[str]:
        """For people, a table and what follows from it."""
        has_own = any(one.trained is not None for one in self.models.values())
        head = ["", "held out", *(["trained on"] if has_own else []), "same token", "divergence", ""]
        rows = [head]
        for name, one in self.models.items():
            own = ["-" if one.trained is None else f"{one.trained:.4f}"] if has_own else []
            rows.append([name, f"{one.loss:.4f}", *own, f"{one.agreement:.1%}", f"{one.divergence:.5f}", WAYS[name]])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = f", {self.left_out:,} more left out" if self.left_out else ""
        lines = [
            f"held out: {self.text}, {self.tokens:,} tokens of {counted(self.documents, 'document')}{left}; "
            f"nats a token, computed {self.computed}"
        ]
        for title, *cells, meaning in rows:
            numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False))
            lines.append("  ".join([title.ljust(widths[0]), *numbers, meaning]).rstrip())
        return [*lines, f"merge onto the {self.pick} weights: {self.reason}"]


def measure(
    artifact: Artifact,
    base: BaseModel,
    documents: Sequence[data.Document] = (),
    *,
    show: Callable[[Event], None] = lambda event: None,
) -> MergeReport:
    """How well text that was not trained on is predicted, unmerged, merged in each way and by the base; remembers what it picks.

    Without `documents` the text is the general prose of held_out.txt, which no run rehearses. The better merged model is picked where it is
    better by more than chance, else the one that was trained. Raises DataError for a document that the run was trained on, WeightsError
    for another base model, StagingError with the runtime's reason.
    """
    refuse_whole(artifact)
    refuse_other_base(artifact, base)
    if again := trained_on(documents, artifact):
        raise DataError(f"{again[0].source} is among the pages that the run was trained on: give pages that it has not seen")
    refuse_missing_runtime(sys.executable)
    if documents:
        text, records = "the pages given", [{"title": one.title, "text": one.text} for one in documents]
    else:
        text, records = "general prose that no run rehearses", [{"title": "", "text": one} for one in general_prose()]
    with tempfile.TemporaryDirectory(prefix="trimtab-losses-") as root:
        job = lay_out(Path(root), artifact, base).make()
        job.channel("documents").mkdir()
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (job.channel("documents") / "documents.jsonl").write_text(lines, encoding="utf-8")
        for rows in own_channels(artifact, "train"):
            job.channel("train").symlink_to(rows.resolve(), target_is_directory=True)
            break
        run_verb("losses", job, show, doing="the losses could not be measured")
        told = json.loads((job.events.parent / "losses.json").read_text(encoding="utf-8"))
    found = report(told, text)
    remember(found, pick_file(artifact, base))
    return found


def report(told: dict[str, Any], text: str) -> MergeReport:
    """What follows from the runtime's losses.json."""
    passages, models = told["passages"], told["models"]
    tokens = sum(one["tokens"] for one in passages)
    measured = {
        name: Measured(sum(one["nats"]) / tokens, one["trained"], one["agreement"], one["divergence"]) for name, one in models.items()
    }
    documents = len({one["document"] for one in passages})
    facts = (text, documents, tokens, told["left_out"], told["computed"], measured)
    if "dequantised" not in models:
        return MergeReport(*facts, None, None, "original", "the adapter was trained on them")
    pairs = [
        (one["document"], original - dequantised, one["tokens"])
        for one, original, dequantised in zip(passages, models["original"]["nats"], models["dequantised"]["nats"], strict=True)
    ]
    difference = measured["original"].loss - measured["dequantised"].loss
    units = by_document(pairs)
    interval = mean(units) if len(units) >= FEWEST else None
    return MergeReport(*facts, difference, interval, *choose(difference, interval, len(units)))


def by_document(pairs: Sequence[tuple[int, float, int]]) -> list[tuple[float, int]]:
    """Differences in nats and tokens of whole documents, from (document, difference, tokens) of each passage: the passages of one
    document depend on each other, so that only documents count."""
    documents: dict[int, tuple[float, int]] = {}
    for document, nats, tokens in pairs:
        before = documents.get(document, (0.0, 0))
        documents[document] = (before[0] + nats, before[1] + tokens)
    return list(documents.values())


def choose(difference: float, interval: tuple[float, float] | None, documents: int) -> tuple[Literal["dequantised", "original"], str]:
    """The better weights where they are better by more than chance, else those that the adapter was trained on; and why."""
    trained = "the adapter was trained on them"
    over = counted(documents, "document")
    if interval is None:
        few = f"{over} {'is' if documents == 1 else 'are'} too few to tell which of the two is better"
        return "dequantised", f"{trained}; {few} (give at least {FEWEST} documents)"
    span = f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}, paired over {over}"
    if interval[0] <= 0 <= interval[1]:
        return "dequantised", f"{trained}, and the original ones predict no better or worse than by chance ({difference:+.4f}; {span})"
    better: Literal["dequantised", "original"] = "dequantised" if difference > 0 else "original"
    return better, f"held-out text is predicted better by {abs(difference):.4f} nats a token (original less dequantised: {span})"


def remember(found: MergeReport, file: Path) -> None:
    """Keep the report where `merged(onto="auto")` looks for its pick."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
        written.replace(file)
    except OSError as exc:
        raise StagingError(f"the report cannot be kept in {file.parent} ({exc}): make room there, or set TRIMTAB_CACHE") from exc


def own_channels(artifact: Artifact, name: str) -> Iterator[Path]:
    """The folders on this machine that hold a channel of the artifact's run: beside it, or where its data was prepared."""
    digest = artifact.spec.preparation_digest()
    for root in (artifact.path.parent, *sorted((cache_dir() / "data").glob(f"{digest[:16]}-*"))):
        try:
            facts = json.loads((JobDir(root).channel("train") / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        folder = JobDir(root).channel(name)
        if facts.get("preparation_digest") == digest and folder.is_dir():
            yield folder


def trained_on(documents: Sequence[data.Document], artifact: Artifact) -> list[data.Document]:
    """Those of which most sentences stand in what the run was trained on; none where that is not on this machine any more."""
    for folder in own_channels(artifact, "documents"):
        try:
            lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
            known = {sentence for line in lines for sentence in sentences(json.loads(line)["text"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [one for one in documents if (said := sentences(one.text)) and len(said & known) >= SEEN * len(said)]
    return []


def sentences(text: str) -> set[str]:
    """What is compared of a text: its sentences in lower case without marks, but for short ones, which any page may have."""
    parts = (plain_words(part) for part in re.split(r"[.!?]\s|\n", text))
    return {" ".join(words) for words in parts if len(words) >= _SHORTEST}


def general_prose() -> list[str]:
    """The texts of held_out.txt, written for this project on everyday subjects."""
    text = (Path(__file__).parent / "held_out.txt").read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if part.strip()]
