"""Which models are compared, from what a user names: runs, artifacts, endpoints, models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimtab import weights
from trimtab.artifact import Artifact
from trimtab.endpoint import Endpoint, deploy
from trimtab.errors import SpecError
from trimtab.events import Event
from trimtab.named import named, own, refuse_foreign

_LABEL = re.compile(r"([^=:/#@]+)=(.+)", re.DOTALL)  # not the = of an address's query
_OF_RUN = ("base", "tuned")


@dataclass(frozen=True)
class Target:
    """A model to ask, and its title. `where` is what names it, `name` which of an endpoint's models (None: its first).

    kind tuned: `artifact` merged onto its base; model: a base model alone, served on this machine; endpoint: what already answers.
    """

    kind: Literal["tuned", "model", "endpoint"]
    label: str
    where: str
    name: str | None = None
    artifact: Artifact | None = field(default=None, compare=False)

    @property
    def served_here(self) -> bool:
        return self.kind != "endpoint"

    def is_base_of(self, other: Target) -> bool:
        return self.kind == "model" and other.kind == "tuned" and other.artifact is not None and other.artifact.spec.model == self.where


def targets(given: Sequence[str], settings: Mapping[str, Any]) -> list[Target]:
    """The models that a user's words name, in their order, none twice, each with a label of its own.

    A run's handle, or an artifact's folder, means its base model and its tuned one; with `#base` or `#tuned` one of them. Of an endpoint,
    by handle or address, `#NAME` is one of its models. `LABEL=` before any of them is its title. Raises SpecError for a part that a run
    does not have, and what attaching to a run raises.
    """
    found: list[Target] = []
    labelled = [match.groups() if (match := _LABEL.fullmatch(words)) else ("", words) for words in given]
    refuse_foreign(settings, *(named(name.partition("#")[0]).settings for _, name in labelled))
    for label, name in labelled:
        some = _targets(name, settings)
        if label:
            some = [replace(one, label=label.strip() + (f" ({one.kind})" if len(some) > 1 else "")) for one in some]
        found += [one for one in some if (one.kind, one.where, one.name) not in {(old.kind, old.where, old.name) for old in found}]
    if not found:
        raise SpecError("there is nothing to compare: give the handle of a run, or the names of models")
    times = Counter(one.label for one in found)
    return [replace(one, label=f"{one.label}, {one.where.rpartition('/')[2]}") if times[one.label] > 1 else one for one in found]


def _targets(words: str, settings: Mapping[str, Any]) -> list[Target]:
    name, _, part = words.partition("#")
    what = named(name)
    if what.kind in ("address", "endpoint"):
        return [Target("endpoint", f"{part} at {name}" if part else name, name, part or None)]
    artifact = what.artifact(settings)
    if artifact is None:
        return [Target("model", title(words), words)]
    if part and part not in _OF_RUN:
        raise SpecError(f"{name} has no model {part!r}: leave out #{part}, or write #base or #tuned")
    model = artifact.spec.model
    base, tuned = (
        Target("model", title(model), model, artifact=artifact),
        Target("tuned", f"{title(model)}, tuned", name, artifact=artifact),
    )
    return {"base": [base], "tuned": [tuned]}.get(part, [base, tuned])


def title(model: str) -> str:
    """A model's name without its commit; of a folder the last part."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model.partition("@")[0]


def opened(target: Target, settings: Mapping[str, Any], api_key: str | None, show: Callable[[Event], None]) -> Endpoint:
    """What answers for it; at the end of its `with` block a server that was started for it ends. Raises what deploying raises."""
    if target.kind == "endpoint":
        what = named(target.where)
        if what.kind == "address":
            return Endpoint(target.where, api_key=api_key)
        return Endpoint.attach(target.where, **own(settings, what.settings))
    if target.kind == "tuned":
        return deploy(target.artifact, title=target.where, show=show)
    # the base of a run is the one that it was trained on, whatever its name means by now
    base = weights.resolve_trained(target.artifact).folder if target.artifact else target.where
    return deploy(base_model=base, title=target.where, show=show)
