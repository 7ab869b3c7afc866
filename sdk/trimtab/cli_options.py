"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from trimtab.backends import BACKENDS

KEY_VARIABLE = "TRIMTAB_API_KEY"

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="print one JSON value instead of text")

settings = click.option(
    "--backend-option",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="a setting of the backend, such as memory=8g for docker or region=us-east-1 for sagemaker; may be repeated",
)

api_key = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="file that holds the API key; else it is taken from TRIMTAB_API_KEY",
)


def key(file: Path | None) -> str | None:
    """The API key of a file, else of the environment: what stands on a command line, others can read."""
    return (file.read_text(encoding="utf-8", errors="replace").strip() if file else os.environ.get(KEY_VARIABLE)) or None


def field(name: str, one: FieldInfo) -> Callable[[Command], Command]:
    """The option of a spec's field: its name, default and description."""
    return click.option(f"--{name.replace('_', '-')}", name, **_kind(one))


def backend(meaning: str, *, default: str | None = "process") -> Callable[[Command], Command]:
    """`--backend`; without a default it is None where it is not given."""
    return click.option("--backend", type=click.Choice(list(BACKENDS)), default=default, show_default=default is not None, help=meaning)


def pairs(values: Sequence[str], option: str = "--backend-option", example: str = "memory=8g") -> dict[str, str]:
    """NAME=VALUE, each once. Raises UsageError for what is none."""
    split = [value.partition("=") for value in values]
    for name, equals, _ in split:
        if not (name and equals):
            raise click.UsageError(f"{option} takes NAME=VALUE, such as {example}, not {name + equals!r}")
    return {name: value for name, _, value in split}


def _kind(one: FieldInfo) -> dict[str, Any]:
    """click's settings for a field, from its type, default and description."""
    settings: dict[str, Any] = {"help": one.description}
    kind: Any = one.annotation
    if get_origin(kind) is UnionType:  # such as int | None
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        settings |= {"multiple": True, "help": f"{one.description}; may be repeated"}
    if kind is bool:
        settings |= {"is_flag": True, "flag_value": True}
    else:
        settings["type"] = click.Choice(list(get_args(kind))) if get_origin(kind) is Literal else kind
    settings |= {"required": True} if one.is_required() else {"default": None}
    if kind is not bool and not one.is_required() and one.default is not None:
        default = one.default
        settings["help"] += f"  [default: {' '.join(default) if isinstance(default, tuple) else default}]"
    return settings
