"""What a job would do, from its spec, its ledger and the place it would run in: tokens, steps, memory, time, price, and why."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from trimtab.counting import counted
from trimtab.errors import StagingError
from trimtab.estimate import ModelFacts, PeakMemory, Rates, RowFacts, optimiser_steps, recompute_layers, step_seconds
from trimtab.layout import JobDir
from trimtab.ledger import Ledger
from trimtab.model_folder import model_bytes
from trimtab.progress import clock
from trimtab.recipes import explained
from trimtab.spec import TrainSpec

Source = Literal["dry run", "rates measured on this machine", "stated table"]

_SECTIONS = ("recipe", "data", "steps", "memory", "time", "place", "price", "permissions", "missing")
_WIDTH = 13  # of the column of section names
_MEASURED = 0.2  # an estimate by measured rates may be so far off
_DRY_RUN = 0.2  # the other steps may take so much more or less than the one that stands for them
_OF_ROLE = "permission of the role "  # begins the name of a finding about what the job, and not its user, may do
_SECTION = {"tokens": "data", "instance": "place", "money": "price"}  # of a reason whose first word is no section's name


@dataclass(frozen=True)
class Finding:
    """Something that a job needs: there (True), not there (False, and `remedy` is what to type), or not known (None)."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""

    @property
    def said(self) -> str:
        """All but its name."""
        return self.detail + (f"  ->  {self.remedy}" if self.remedy else "")

    def __str__(self) -> str:
        return f"{self.name}: {self.said}"


@dataclass(frozen=True)
class Time:
    """Seconds from the start of the place to the end of the run: the likeliest, and from `low` to `high`; `source` says by what."""

    seconds: float
    low: float
    high: float
    source: Source

    def __str__(self) -> str:
        return f"about {clock(self.seconds)} ({clock(self.low)} to {clock(self.high)}), by {_BY[self.source]}"


_BY: dict[Source, str] = {
    "dry run": "two steps that were run",
    "rates measured on this machine": "rates measured on this machine",
    "stated table": "stated rates, which were not measured: --dry-run measures",
}


@dataclass(frozen=True)
class Price:
    """USD, all machines together, from `low` to `high`."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.high < 0.01:
            return "less than $0.01"
        low, high = (f"${usd:,.2f}" for usd in (self.low, self.high))
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Work:
    """What is known of a job's work when its data is prepared. `model` is None where its configuration does not name its sizes, `rows`
    where nothing tells their shape; `model_mb` (2^20 bytes) is what the model's files take."""

    ledger: Ledger
    model: ModelFacts | None = None
    model_mb: int = 0
    rows: RowFacts | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """What `as_json` wrote; of its values only `ledger` has to be there. Raises ValueError for what is no account of a job's work."""
        try:
            model, rows = found.get("model"), found.get("rows")
            return cls(
                Ledger.model_validate(found["ledger"]),
                model=ModelFacts(**model) if model else None,
                model_mb=found.get("model_mb", 0),
                rows=RowFacts.model_validate(rows) if rows else None,
            )
        except (KeyError, TypeError) as exc:
            raise ValueError(f"no account of a job's work: {exc!r}") from exc

    def as_json(self) -> dict[str, Any]:
        """As JSON values, so that a run can be foreseen again where its channels are not."""
        return {
            "ledger": self.ledger.model_dump(mode="json"),
            "model": asdict(self.model) if self.model else None,
            "model_mb": self.model_mb,
            "rows": self.rows.model_dump(mode="json") if self.rows else None,
        }

    @classmethod
    def read(cls, channels: Mapping[str, Path]) -> Work:
        """From the folders `train` and `model`, as a backend gets them. Raises StagingError where the ledger cannot be read."""
        try:
            ledger = Ledger.model_validate_json((channels["train"] / "ledger.json").read_bytes())
        except (OSError, ValueError) as exc:
            raise StagingError(f"{channels['train']} holds no prepared rows ({exc}): run the same command again") from exc
        sizes = _parsed(channels["model"] / "config.json")
        return cls(
            ledger,
            model=ModelFacts.from_config(sizes),
            rows=RowFacts.from_manifest(_parsed(channels["train"] / "manifest.json")),
            model_mb=model_bytes(channels["model"]) >> 20,
        )


@dataclass(frozen=True)
class Foreseen:
    """What a place says of a job before anything is sent; None is what it cannot say.

    `instance` is the machine's type where it has types, `memory` what training takes on one, `max_seconds` the place's hard stop. Each
    reason begins with its subject: place, instance, memory, time, price or money.
    """

    instance: str | None = None
    memory: PeakMemory | None = None
    time: Time | None = None
    price: Price | None = None
    reasons: tuple[str, ...] = ()
    max_seconds: int | None = None


@dataclass(frozen=True)
class Plan:
    """`steps` optimiser steps over `rows` rows see `tokens` tokens, each pass counted; `reasons` says where every figure comes from.

    `memory_mb` (2^20 bytes) is an estimate of what training takes in each rank of each machine, and `memory` its parts; None where the
    model's sizes are not known. `place` is the backend; `time` is the whole job's, `price` the whole job's on `nodes` machines of type
    `instance`; None where nobody can say, and of a price where nothing is paid.
    `findings` is what the place was asked for, such as permissions and quotas; `missing` what would stop the job, each with what to type.
    """

    rows: int
    tokens: int
    steps: int
    reasons: tuple[str, ...]
    memory_mb: int | None = None
    memory: PeakMemory | None = None
    nodes: int = 1
    place: str = ""
    instance: str | None = None
    time: Time | None = None
    price: Price | None = None
    findings: tuple[Finding, ...] = ()
    missing: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The plan as a person reads it, in sections: recipe, data, steps, memory, time, place, price, permissions, missing."""
        sections: dict[str, list[str]] = {name: [] for name in _SECTIONS}
        sections["data"].append(counted(self.rows, "row"))
        sections["time"].append(str(self.time) if self.time else "not known; --dry-run runs two steps of the job, and knows it by them")
        sections["place"].append(f"{self.place}, {self.nodes} machines" if self.nodes > 1 else self.place)
        sections["price"].append(str(self.price) if self.price else "nothing is paid")
        for reason in self.reasons:
            subject, _, rest = reason.partition(" ")
            name = _SECTION.get(subject, subject)
            sections[name].append(rest if subject in (*sections, "instance") else reason)
        asked = [finding for finding in self.findings if finding.name not in sections]
        for finding in self.findings:
            if finding.ok and finding.name in sections:
                sections[finding.name].append(finding.detail)
        there = [finding.name for finding in asked if finding.ok]
        of_role = [name.removeprefix(_OF_ROLE) for name in there if name.startswith(_OF_ROLE)]
        if own := [name.removeprefix("permission ") for name in there if not name.startswith(_OF_ROLE)]:
            sections["permissions"].append(f"there: {', '.join(own)}")
        if of_role:
            sections["permissions"].append(f"there for the role: {', '.join(of_role)}")
        unknown: dict[str, list[str]] = {}  # what has the same reason is one line
        for finding in asked:
            if finding.ok is None:
                unknown.setdefault(finding.said, []).append(finding.name)
        sections["permissions"] += [f"not known: {', '.join(names)}: {why}" for why, names in unknown.items()]
        sections["missing"] += self.missing or ["nothing that is known"]
        return [
            f"{'' if number else name:<{_WIDTH}}{line}"
            for name, lines in sections.items()
            for number, line in enumerate(filter(None, lines))
        ]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _parsed(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def plan(
    spec: TrainSpec,
    ledger: Ledger,
    nodes: int = 1,
    memory: PeakMemory | None = None,
    foreseen: Foreseen | None = None,
    findings: Sequence[Finding] = (),
) -> Plan:
    """The rows of one step are `batch_rows * accumulation` on each machine; the last step of an epoch takes what is left.

    What `foreseen` says of the place comes before `memory`, which is an estimate for this machine.
    """
    foreseen = foreseen or Foreseen()
    memory = foreseen.memory or memory
    sharing = spec.sharing(nodes)
    steps, whole = optimiser_steps(spec, ledger.rounds, sharing)
    in_step, per_row = spec.batch_rows * spec.accumulation * sharing, ledger.total.trained / max(1, ledger.rows)
    rows = sum(ledger.rounds[epoch % len(ledger.rounds)] for epoch in range(spec.epochs))
    tokens = round(per_row * rows * steps / whole) if whole else 0
    reasons = [
        *explained(spec),
        f"steps {steps:,}: "
        + (
            f"max_steps, of {whole:,}"
            if steps < whole
            else f"{counted(spec.epochs, 'epoch')} of {_short(whole / spec.epochs)}, {counted(in_step, 'row')} in each"
        ),
        f"tokens {tokens:,}: what {steps:,} steps see, each pass counted",
    ]
    if spec.ranks == "auto":
        reasons.append("steps are those of one rank on a machine; with ranks auto there are as many fewer as it has clusters of cores")
    if spec.max_minutes is not None:
        reasons.append(f"time at most {spec.max_minutes:g} min: max_minutes; the run may stop before its last step")
    if memory is not None:
        reasons.append(
            f"memory about {memory.total:,} MB: model {memory.base:,}, trained {memory.trained:,}, activations of {spec.batch_rows} x "
            f"{spec.max_seq_len:,} tokens up to {memory.activations:,}, logits {memory.logits:,}, libraries {memory.runtime:,}"
            + (f", loading {memory.loading:,}" if memory.loading else "")
            + (f"; in each rank, and there are {spec.ranks} on a machine" if spec.ranks != 1 else "")
            + "; --dry-run measures it"
        )
    return Plan(
        rows=ledger.rows,
        tokens=tokens,
        steps=steps,
        reasons=(*reasons, *foreseen.reasons),
        memory_mb=memory.total if memory is not None else None,
        memory=memory,
        nodes=nodes,
        instance=foreseen.instance,
        time=foreseen.time,
        price=foreseen.price,
        findings=tuple(findings),
        missing=tuple(str(finding) for finding in findings if finding.ok is False),
    )


def measured(found: Plan, seconds: float, memory_mb: int) -> Plan:
    """The plan with what a dry run says of the whole job; a price goes with the time."""
    time = Time(seconds, seconds * (1 - _DRY_RUN), seconds * (1 + _DRY_RUN), "dry run")
    price = found.price
    if price is not None and found.time is not None:
        price = Price(price.low * time.low / found.time.low, price.high * time.high / found.time.high)
    said = f"memory about {memory_mb:,} MB: what two steps took, or the estimate where rows of longer samples may take more"
    reasons = (said, *(reason for reason in found.reasons if not reason.startswith("memory ")))
    return replace(found, time=time, price=price, memory_mb=memory_mb, reasons=reasons)


def rates_of(channels: Mapping[str, Path]) -> Rates | None:
    """What the runtime's `measure` found on this machine, in the job tree where the rows were prepared; None where it was not run."""
    try:
        return Rates.model_validate_json(JobDir(channels["train"].parents[2]).events.with_name("rates.json").read_bytes())
    except (OSError, ValueError):
        return None


def steps_time(spec: TrainSpec, work: Work, rates: Rates) -> Time | None:
    """Of all steps on a machine of these rates; None for a model that does not name its sizes. Steps were found within 20 % of it."""
    if work.model is None:
        return None
    steps, _ = optimiser_steps(spec, work.ledger.rounds, spec.sharing())
    again = recompute_layers(spec, work.model, rates.dtype, work.rows, memory_here() // spec.sharing()).layers
    seconds = steps * step_seconds(spec, work.model, rates, work.rows, again=again)
    own = spec.max_minutes * 60 if spec.max_minutes is not None else math.inf
    low, likely, high = (min(own, share * seconds) for share in (1 - _MEASURED, 1, 1 + _MEASURED))
    return Time(likely, low, high, "rates measured on this machine")


def memory_here() -> int:
    """MB (2^20 bytes) of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def room(memory: PeakMemory | None, ranks: int = 1) -> list[Finding]:
    """Whether this machine has the memory that training takes in each of `ranks` on it; nothing where that is not known."""
    if memory is None:
        return []
    there = memory_here()
    needed = ranks * memory.total
    detail = f"{needed:,} MB needed{f' by {ranks} ranks' if ranks > 1 else ''}, {there:,} MB in this machine"
    if needed <= there:
        return [Finding("memory", True, detail)]
    return [Finding("memory", False, detail, "lower max_seq_len or batch_rows, or plan it elsewhere with  --backend sagemaker")]
