"""What is done with a run by its handle: `trimtab status`, `logs`, `stop`, `list`, `resume` and `remove`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from trimtab import cli_options
from trimtab.backends import load_backend
from trimtab.completion import completes, run_handles
from trimtab.errors import BackendError
from trimtab.terminal import plain

if TYPE_CHECKING:
    from trimtab.backends.base import RunStatus

_handle = click.argument("handle", shell_complete=completes(run_handles))


@click.command()
@_handle
@cli_options.settings
@cli_options.as_json
def status(handle: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Say how a run stands.

    \b
    Example:
      trimtab status process://trim-7f3a9c21
    """
    from trimtab.run import Run

    found = Run.attach(handle, **cli_options.pairs(settings)).status()
    if as_json:
        print(json.dumps({"handle": handle, **facts(found)}))
        return
    print(f"{handle} is {_state(found)}")
    if found.step is not None:
        print(found.step.line())
    if found.reason:
        print(plain(found.reason))


@click.command()
@_handle
@cli_options.settings
@click.option("-f", "--follow", is_flag=True, help="go on until the run is done; exit code 1 when it fails")
def logs(handle: str, settings: tuple[str, ...], follow: bool) -> None:
    """Print what a run printed. With --follow Ctrl-C asks whether to leave the run or to stop it.

    \b
    Example:
      trimtab logs -f process://trim-7f3a9c21
    """
    from trimtab.backends.base import RunState
    from trimtab.run import Run, detach_or_stop

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


@click.command()
@_handle
@cli_options.settings
def stop(handle: str, settings: tuple[str, ...]) -> None:
    """Stop a run: it writes a checkpoint and ends. Quiet when it is done already.

    \b
    Example:
      trimtab stop process://trim-7f3a9c21
    """
    from trimtab.run import Run

    run = Run.attach(handle, **cli_options.pairs(settings))
    run.stop()
    print(f"{handle} is {_state(run.status())}", file=sys.stderr)


@click.command(name="list")
@cli_options.backend("whose runs")
@cli_options.settings
@cli_options.as_json
def list_runs(backend: str, settings: tuple[str, ...], as_json: bool) -> None:
    """List runs, the newest first.

    \b
    Example:
      trimtab list
    """
    from trimtab.backends.base import Listable

    place = load_backend(backend, cli_options.pairs(settings))
    runs = place.runs() if isinstance(place, Listable) else []
    if as_json:
        rows = [{"handle": str(run.handle), "created": run.created.isoformat(), "model": run.model, **facts(run.status)} for run in runs]
        print(json.dumps(rows))
        return
    for run in runs:
        print(f"{run.handle}  {run.created.astimezone():%Y-%m-%d %H:%M}  {_state(run.status):<16}  {run.model}")


@click.command()
@_handle
@cli_options.settings
@click.option("--detach", is_flag=True, help="start the run and return")
def resume(handle: str, settings: tuple[str, ...], detach: bool) -> None:
    """Go on with a run that was stopped, or died, from its newest checkpoint.

    \b
    Example:
      trimtab resume process://trim-7f3a9c21
      trimtab resume docker://trim-7f3a9c21 --backend-option memory=16g
    """
    from trimtab.progress import display
    from trimtab.run import Run, detach_or_stop

    run = Run.attach(handle, **cli_options.pairs(settings)).resume()
    if not detach:
        try:
            with display() as screen:
                run.wait(progress=screen)
        except KeyboardInterrupt:
            detach_or_stop(run)
            raise
    print(run.handle)


@click.command()
@_handle
@cli_options.settings
def remove(handle: str, settings: tuple[str, ...]) -> None:
    """Delete a run that is done: its log, its checkpoints and its artifact.

    \b
    Example:
      trimtab remove process://trim-7f3a9c21
    """
    from trimtab.run import Run

    Run.attach(handle, **cli_options.pairs(settings)).remove()


def _state(found: RunStatus) -> str:
    from trimtab.progress import clock

    if found.done:
        return str(found.state)
    left = f", {clock(found.eta)} left" if found.eta is not None else ""
    return f"{found.state} {found.progress:.0%}{left}"


def facts(found: RunStatus) -> dict[str, Any]:
    """How a run stands, as JSON values."""
    return {"done": found.done, **found.model_dump(mode="json")}
