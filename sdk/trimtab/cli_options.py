"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from trimtab.backends import BACKENDS

Command = TypeVar("Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="print one JSON value instead of text")

settings = click.option(
    "--backend-option",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="a setting of the backend, such as memory=8g for docker or region=us-east-1 for sagemaker; may be repeated",
)


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
