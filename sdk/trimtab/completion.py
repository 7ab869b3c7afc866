"""What a shell may put in place of a half-typed word: handles of what lies on this machine, and names of models and recipes.

Nothing here loads more than click and the standard library, and nothing is asked of a place that is elsewhere: a shell waits for it.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def run_handles() -> Iterator[str]:
    """Of the runs on this machine, and of those of SageMaker whose artifact was fetched to it; newest first."""
    home = _home()
    yield from _recorded(home / "runs", "run.json", lambda record: record["request"]["handle"])
    yield from (f"sagemaker://{folder.name}" for folder in _newest(home / "sagemaker"))


def endpoint_handles() -> Iterator[str]:
    """Of the endpoints on this machine; newest first."""
    yield from _recorded(_home() / "endpoints", "record.json", lambda record: record["handle"])


def model_aliases() -> Iterator[str]:
    """The catalog's, but those of models that are still coming."""
    yield from (name for name, table in _tables("catalog.toml").items() if not table.get("coming"))


def recipe_names() -> Iterator[str]:
    yield from _tables("recipes.toml")


def completes(*kinds: Callable[[], Iterable[str]], paths: bool = False) -> Completer:
    """For `shell_complete=`: what the kinds yield and what was typed begins; with `paths`, files where none of them does."""

    def complete(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
        label, equals, rest = typed.rpartition("=")  # such as law=process://
        found = [CompletionItem(label + equals + name) for kind in kinds for name in kind() if name.startswith(rest)]
        return found or ([CompletionItem(typed, type="file")] if paths else [])

    return complete


def _home() -> Path:
    return Path(os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()


def _newest(place: Path) -> list[Path]:
    """The folders in a place, those that were made or changed last first."""
    try:
        entries = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:  # there is none, or it is not ours to read
        return []
    return [Path(path) for _, path in sorted(entries, reverse=True)]


def _recorded(place: Path, name: str, handle: Callable[[Any], Any]) -> Iterator[str]:
    for folder in _newest(place):
        try:
            yield str(handle(json.loads((folder / name).read_bytes())))
        except (OSError, ValueError, KeyError, TypeError):  # half-made, damaged, or another user's: nothing to offer
            continue


def _tables(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("trimtab").joinpath(name).read_text(encoding="utf-8"))
