"""The command `trimtab`. Options of `fit` and `plan` are the spec's fields: one name, one default, one sentence, said once.

Results go to standard output, everything else to standard error. Exit codes: 0; 1 with a TrimtabError's message; 2 for a command
line that is none; 130 when interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from trimtab import cli_options
from trimtab.backends import load_backend
from trimtab.backends.base import Listable, RunState, RunStatus
from trimtab.chat_cli import chat
from trimtab.compare_cli import compare
from trimtab.doctor.command import doctor
from trimtab.endpoint_cli import close, deploy, endpoints
from trimtab.errors import BackendError, TrimtabError
from trimtab.image_cli import image
from trimtab.job import OPTIONS, Job
from trimtab.merge_cli import merge
from trimtab.progress import clock, display
from trimtab.run import Run, detach_or_stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process' own) and return its exit code."""
    code = None
    try:
        code = trimtab.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="trimtab", standalone_mode=False)
        sys.stdout.flush()
    except TrimtabError as exc:
        print(f"trimtab: {exc}", file=sys.stderr)
        return 1
    except click.exceptions.NoArgsIsHelpError as exc:
        print(exc.format_message())
        return 2
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("trimtab: interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit):  # the reader has seen enough; SystemExit is click's word for that
        sys.stdout = None  # so that nothing is flushed to it at the end
    return code if isinstance(code, int) else 0  # a command's own word, else what it returned, which is nothing


@click.group()
def trimtab() -> None:
    """Tune a language model on your own pages and ask it.

    \b
    Example:
      trimtab fit https://example.com/handbook.html --model smollm2-135m-instruct
      trimtab chat process://trim-7f3a9c21
    """


for command in (chat, close, compare, deploy, doctor, endpoints, image, merge):
    trimtab.add_command(command)


def _options(command: cli_options.Command) -> cli_options.Command:
    """An option for each field of the specs but the data, which are arguments. What is not given keeps the field's own default."""
    for name, field in reversed(OPTIONS.items()):
        if name != "data":
            command = cli_options.field(name, field)(command)
    command = cli_options.backend("where to run")(cli_options.settings(command))
    return click.argument("data", nargs=-1, required=True)(command)


def _job(data: tuple[str, ...], backend: str, options: dict[str, Any]) -> Job:
    settings = cli_options.pairs(options.pop("settings"))
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return Job(data=data, backend=load_backend(backend, settings) if settings else backend, **given)


class _DryRunAlone(click.Command):
    """A command whose `--dry-run` may stand alone before DATA: only what follows an equals sign is its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        named = ["--dry-run=run" if place < end and word == "--dry-run" else word for place, word in enumerate(args)]
        return super().parse_args(ctx, named)


@trimtab.command(cls=_DryRunAlone)
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
    """Tune a model on DATA: URLs, files and folders.

    Prints the run's handle at the end. Ctrl-C ends the waiting; the run goes on. A dry run is ended by it.

    \b
    Example:
      trimtab fit https://example.com/a.html notes/ --model smollm2-135m-instruct --epochs 4
      trimtab fit notes/ --model smollm2-135m-instruct --dry-run
      trimtab fit notes/ --model smollm2-135m-instruct --dry-run=render
    """
    job = _job(data, backend, options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a half-made folder is removed then, too
    if dry_run == "render":
        print(json.dumps(job.fit(dry_run="render"), indent=2, ensure_ascii=False))
        return
    if dry_run:
        trial = job.fit(dry_run=True)
        print(json.dumps(asdict(trial)) if as_json else "\n".join(trial.lines()))
        return
    run = job.fit(wait=not detach)
    if as_json:
        print(json.dumps({"handle": str(run.handle), **_facts(run.status())}))
    else:
        print(run.handle)


@trimtab.command()
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
    found = _job(data, backend, options).plan(dry_run=dry_run)
    print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))
    return 1 if found.missing else 0


@trimtab.command()
@click.argument("handle")
@cli_options.settings
@cli_options.as_json
def status(handle: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Say how a run stands.

    \b
    Example:
      trimtab status process://trim-7f3a9c21
    """
    found = Run.attach(handle, **cli_options.pairs(settings)).status()
    if as_json:
        print(json.dumps({"handle": handle, **_facts(found)}))
        return
    print(f"{handle} is {_state(found)}")
    if found.step is not None:
        print(found.step.line())
    if found.reason:
        print(found.reason)


@trimtab.command()
@click.argument("handle")
@cli_options.settings
@click.option("-f", "--follow", is_flag=True, help="go on until the run is done; exit code 1 when it fails")
def logs(handle: str, settings: tuple[str, ...], follow: bool) -> None:
    """Print what a run printed. With --follow Ctrl-C asks whether to leave the run or to stop it.

    \b
    Example:
      trimtab logs -f process://trim-7f3a9c21
    """
    run = Run.attach(handle, **cli_options.pairs(settings))
    try:
        for line in run.logs(follow=follow):
            print(line, flush=follow)
        found = run.status() if follow else None
    except KeyboardInterrupt:
        if follow:
            detach_or_stop(run)
        raise
    if found is not None and found.state is RunState.FAILED:
        raise BackendError(f"{handle} failed: {found.reason}")


@trimtab.command()
@click.argument("handle")
@cli_options.settings
def stop(handle: str, settings: tuple[str, ...]) -> None:
    """Stop a run: it writes a checkpoint and ends. Quiet when it is done already.

    \b
    Example:
      trimtab stop process://trim-7f3a9c21
    """
    run = Run.attach(handle, **cli_options.pairs(settings))
    run.stop()
    print(f"{handle} is {_state(run.status())}", file=sys.stderr)


@trimtab.command(name="list")
@cli_options.backend("whose runs")
@cli_options.settings
@cli_options.as_json
def list_runs(backend: str, settings: tuple[str, ...], as_json: bool) -> None:
    """List runs, the newest first.

    \b
    Example:
      trimtab list
    """
    place = load_backend(backend, cli_options.pairs(settings))
    runs = place.runs() if isinstance(place, Listable) else []
    if as_json:
        rows = [{"handle": str(run.handle), "created": run.created.isoformat(), "model": run.model, **_facts(run.status)} for run in runs]
        print(json.dumps(rows))
        return
    for run in runs:
        print(f"{run.handle}  {run.created.astimezone():%Y-%m-%d %H:%M}  {_state(run.status):<16}  {run.model}")


@trimtab.command()
@click.argument("handle")
@cli_options.settings
@click.option("--detach", is_flag=True, help="start the run and return")
def resume(handle: str, settings: tuple[str, ...], detach: bool) -> None:
    """Go on with a run that was stopped, or died, from its newest checkpoint.

    \b
    Example:
      trimtab resume process://trim-7f3a9c21
      trimtab resume docker://trim-7f3a9c21 --backend-option memory=16g
    """
    run = Run.attach(handle, **cli_options.pairs(settings)).resume()
    if not detach:
        try:
            with display() as screen:
                run.wait(progress=screen)
        except KeyboardInterrupt:
            detach_or_stop(run)
            raise
    print(run.handle)


@trimtab.command()
@click.argument("handle")
@cli_options.settings
def remove(handle: str, settings: tuple[str, ...]) -> None:
    """Delete a run that is done: its log, its checkpoints and its artifact.

    \b
    Example:
      trimtab remove process://trim-7f3a9c21
    """
    Run.attach(handle, **cli_options.pairs(settings)).remove()


def _state(found: RunStatus) -> str:
    if found.done:
        return str(found.state)
    left = f", {clock(found.eta)} left" if found.eta is not None else ""
    return f"{found.state} {found.progress:.0%}{left}"


def _facts(found: RunStatus) -> dict[str, Any]:
    return {"done": found.done, **found.model_dump(mode="json")}
