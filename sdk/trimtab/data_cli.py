"""`trimtab data`: what training data becomes, before anything is trained on it."""

from __future__ import annotations

import json
from typing import Any

import click

from trimtab import cli_options
from trimtab.job import OPTIONS, Job
from trimtab.preview import preview, print_preview
from trimtab.progress import display
from trimtab.spec import PREPARATION_FIELDS

_SOURCES = {"on_error", "allow_private_hosts", "max_page_mb", "max_page_seconds"}
_TAKEN = [name for name in OPTIONS if name in {"model", "recipe", *PREPARATION_FIELDS, *_SOURCES}]


@click.group(cls=cli_options.Commands)
def data() -> None:
    """Look at training data as the model will see it.

    \b
    Example:
      trimtab data preview notes/ --model smollm2-135m-instruct
    """


def _options(command: cli_options.Command) -> cli_options.Command:
    for name in reversed(_TAKEN):
        command = cli_options.field(name, OPTIONS[name])(command)
    return click.argument("data", nargs=-1, required=True, type=click.Path())(command)


@data.command(name="preview", cls=cli_options.InSections)
@_options
@click.option("--row", type=click.IntRange(1), help="which packed row  [default: 1]")
@click.option("--sample", type=click.IntRange(1), help="which sample instead, as it came: pages first, then records")
@cli_options.as_json
def preview_command(data: tuple[str, ...], row: int | None, sample: int | None, as_json: bool, **options: Any) -> None:
    """Print a packed row of DATA with what is learned in colour.

    Prepares the data as fit would, without replay, and finds it prepared the next time. Each token has a shade of its own; the
    tokens that are learned are green, those that are only read are grey.

    \b
    Example:
      trimtab data preview chats.jsonl --model smollm2-135m-instruct
      trimtab data preview chats.jsonl --model smollm2-135m-instruct --sample 17
      trimtab data preview notes/ --model smollm2-135m-instruct --row 2 --json
    """
    if row is not None and sample is not None:
        raise click.UsageError("--row and --sample are two ways to choose: give one of them")
    job = Job(data=data, **{name: value for name, value in options.items() if value not in (None, ())})
    cli_options.ends_like_ctrl_c()
    with display() as screen:
        found = preview(job.spec, row=row, sample=sample, say=screen.say, show=screen.show)
    if as_json:
        print(json.dumps(found))
    else:
        print_preview(found)
