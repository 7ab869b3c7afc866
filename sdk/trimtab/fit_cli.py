"""`trimtab fit` and `trimtab plan`. Their options are the specs' fields: one name, one default, one sentence, said once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from trimtab import cli_options
from trimtab.backends import load_backend
from trimtab.job import OPTIONS, Job
from trimtab.run_cli import facts
from trimtab.terminal import plain


def _options(command: cli_options.Command) -> cli_options.Command:
    """An option for each field of the specs but the data, which are arguments. What is not given keeps the field's own default."""
    for name, field in reversed(OPTIONS.items()):
        if name != "data":
            command = cli_options.field(name, field)(command)
    command = cli_options.backend("where to run")(cli_options.settings(command))
    return click.argument("data", nargs=-1, required=True, type=click.Path())(command)


def _job(data: tuple[str, ...], backend: str, options: dict[str, Any]) -> Job:
    settings = cli_options.pairs(options.pop("settings"))
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return Job(data=data, backend=load_backend(backend, settings) if settings else backend, **given)


class _DryRunAlone(cli_options.InSections):
    """A command whose `--dry-run` may stand alone before DATA: only what follows an equals sign is its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        named = ["--dry-run=run" if place < end and word == "--dry-run" else word for place, word in enumerate(args)]
        return super().parse_args(ctx, named)


@click.command(cls=_DryRunAlone)
@_options
@click.option("--detach", is_flag=True, help="start the run, print its handle and return")
@click.option(
    "--dry-run",
    type=click.Choice(["run", "render"]),
    metavar="[=render]",
    help="run two steps, say what the whole job would take, and leave nothing; =render: run nothing, print the exact request",
)
@cli_options.as_json
def fit(data: tuple[str, ...], backend: str, detach: bool, dry_run: str | None, as_json: bool, **options: Any) -> None:
    """Tune a model on DATA: URLs, files, folders and datasets, of pages and of records.

    What is not given comes from the recipe, and then from the defaults named here. Prints the run's handle at the end. Ctrl-C ends the
    waiting; the run goes on. A dry run is ended by it.

    \b
    Example:
      trimtab fit https://example.com/a.html notes/ --model smollm2-135m-instruct --epochs 4
      trimtab fit chats.jsonl --model qwen2.5-0.5b-instruct --recipe instruct --method lora --max-seq-len 2048
      trimtab fit notes/ --model smollm2-135m-instruct --dry-run
      trimtab fit notes/ --model smollm2-135m-instruct --dry-run=render
    """
    job = _job(data, backend, options)
    cli_options.ends_like_ctrl_c()
    if dry_run == "render":
        print(json.dumps(job.fit(dry_run="render"), indent=2, ensure_ascii=False))
        return
    if dry_run:
        trial = job.fit(dry_run=True)
        print(json.dumps(asdict(trial)) if as_json else plain("\n".join(trial.lines())))
        return
    run = job.fit(wait=not detach)
    if as_json:
        print(json.dumps({"handle": str(run.handle), **facts(run.status())}))
    else:
        print(run.handle)


@click.command(cls=cli_options.InSections)
@_options
@click.option("--dry-run", is_flag=True, help="run two steps of the job first, where it would run: time and memory are then measured")
@cli_options.as_json
def plan(data: tuple[str, ...], backend: str, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Say what `fit` would do with DATA and what it would take.

    Tokens, steps, memory, time, place, price, permissions and what is missing, each with its reason. Prepares the data, starts nothing.
    A place that is paid for is asked what you may do there. Exit code 1 when something is missing that would stop the job.

    \b
    Example:
      trimtab plan notes/ --model smollm2-135m-instruct --epochs 4
      trimtab plan notes/ --model smollm2-135m-instruct --dry-run
    """
    job = _job(data, backend, options)
    cli_options.ends_like_ctrl_c()
    found = job.plan(dry_run=dry_run)
    print(json.dumps(asdict(found)) if as_json else plain("\n".join(found.lines())))
    return 1 if found.missing else 0
