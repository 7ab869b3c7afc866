"""`trimtab image`: builds, lists, shows, pushes and prunes the images in which jobs run and models are served."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trimtab import images
from trimtab.cli_options import Commands
from trimtab.cli_options import as_json as _as_json
from trimtab.errors import SpecError
from trimtab.images.context import DEVICES

if TYPE_CHECKING:
    from rich.progress import TaskID

_Command = TypeVar("_Command", bound=Callable[..., Any])

_device = click.argument("device", type=click.Choice(DEVICES))


def _target(command: _Command) -> _Command:
    return click.option(
        "--target", type=click.Choice(images.TARGETS), default="train", show_default=True, help="train: runs jobs; serve: answers"
    )(command)


@click.group(cls=Commands)
def image() -> None:
    """Build, list, show, push and prune the images in which jobs run (target train) and models are served (target serve).

    \b
    Example:
      trimtab image build xeon
      trimtab image build xeon --target serve
      trimtab image list
    """


@image.command()
@_device
@_target
@click.option(
    "--base",
    help="image with Python 3.11 or 3.12 that it stands on; gpu serve: with vLLM  [default: TRIMTAB_BASE_IMAGE, else the Dockerfile's]",
)
@click.option(
    "--find-links", type=click.Path(path_type=Path), help="folder of wheels for pip  [default, xeon train: pip's, with a CPU torch]"
)
@click.option("--offline", is_flag=True, help="take packages from that folder alone")
@click.option("--arg", "pairs", multiple=True, metavar="NAME=VALUE", help="another ARG of the Dockerfile; may be repeated")
@click.option("--force", is_flag=True, help="build although it is there, without the engine's cache")
@click.option("--dry-run", is_flag=True, help="build nothing, ask no engine: print what would be built, of what")
@_as_json
def build(
    device: str,
    target: str,
    base: str | None,
    find_links: Path | None,
    offline: bool,
    pairs: tuple[str, ...],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build the image for DEVICE, or find it built, and print its tag.

    \b
    Example:
      trimtab image build xeon
      trimtab image build gpu --target serve --dry-run
      trimtab image build xeon --base python:3.12-slim-bookworm --find-links wheels/ --offline
    """
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise SpecError(f"--arg {wrong[0]} has no value: write it as  --arg NAME=VALUE")
    arguments = dict(pair.split("=", 1) for pair in pairs)
    if dry_run:
        _print_plan(images.Plan.of(device, target, base, arguments), as_json)
        return
    with closing(images.engine()) as client, _screen("build") as (say, advance):
        tag = images.build(
            device,
            target,
            base=base,
            find_links=find_links,
            offline=offline,
            arguments=arguments,
            client=client,
            say=say,
            show=lambda step: advance(step.step, step.of, f"{step.step}/{step.of} {step.command.split(';')[0][:60]}"),
            force=force,
        )
        found = images.inspect(tag, client)
    print(json.dumps(_facts(found)) if as_json else tag)


def _print_plan(plan: images.Plan, as_json: bool) -> None:
    files = {name: len(content) for name, content in plan.files.items()}
    dockerfile = plan.files["Dockerfile"].decode()
    if as_json:
        said = {"tag": plan.tag, "base": plan.base, "arguments": dict(plan.arguments), "labels": plan.labels(), "files": files}
        print(json.dumps({**said, "dockerfile": dockerfile, "requirements": plan.files["requirements.txt"].decode().splitlines()}))
        return
    print(f"would build {plan.tag}\n  base          {plan.base}")
    for name, value in plan.arguments.items():
        print(f"  argument      {name}={value}")
    for name, size in files.items():
        print(f"  file          {name}  {size:,} bytes")
    print(f"\n{dockerfile}", end="")


@image.command(name="list")
@_as_json
def list_images(as_json: bool) -> None:
    """List our images, the newest first: tag, size, when it was made, and whether it holds what would be built now.

    \b
    Example:
      trimtab image list
    """
    with closing(images.engine()) as client:
        found = images.installed(client)
    if as_json:
        print(json.dumps([_facts(one) for one in found]))
        return
    width = max((len(one.tag) for one in found), default=0)
    for one in found:
        state = "current" if one.current else "outdated"
        base = one.labels.get("base", "")
        print(f"{one.tag:<{width}}  {one.size / 1e6:>6,.0f} MB  {one.created.astimezone():%Y-%m-%d %H:%M}  {state:<8}  {base}")
    if any(images.outdated(one) for one in found):
        print("images: outdated ones take up room; remove them with  trimtab image prune", file=sys.stderr)


@image.command()
@click.argument("name", metavar="TAG|DEVICE")
@_target
@_as_json
def inspect(name: str, target: str, as_json: bool) -> None:
    """Show an image, by its tag or as the current one of a device, and check that a job would run in it.

    \b
    Example:
      trimtab image inspect xeon
      trimtab image inspect xeon --target serve
    """
    with closing(images.engine()) as client:
        found = images.find(name, target, client) if name in DEVICES else images.inspect(name, client)
        images.check(found, client)
    if as_json:
        print(json.dumps(_facts(found)))
        return
    print(found.tag)
    facts = {
        "id": found.id,
        "size": f"{found.size / 1e6:,.0f} MB",
        "created": found.created.isoformat(),
        "architecture": found.architecture,
    }
    for key, value in {**facts, "current": "yes" if found.current else "no", **found.labels}.items():
        print(f"  {key:<13} {value}")


@image.command()
@click.argument("name", metavar="TAG|DEVICE")
@click.argument("repository")
@_target
@_as_json
def push(name: str, repository: str, target: str, as_json: bool) -> None:
    """Push an image, by its tag or as the current one of a device, to REPOSITORY under its own tag, and print where it lies.

    Logins are those of `docker login`; for Amazon ECR the AWS credentials here are used.

    \b
    Example:
      trimtab image push xeon registry.example.com/team/trimtab-xeon
      trimtab image push xeon registry.example.com/team/trimtab-xeon-serve --target serve
    """
    with closing(images.engine()) as client, _screen("push") as (say, advance):
        pushed = images.push(
            name,
            repository,
            target,
            client=client,
            say=say,
            show=lambda done, of: advance(done, of, f"{done / 1e6:,.0f} of {of / 1e6:,.0f} MB"),
        )
    print(json.dumps(dataclasses.asdict(pushed)) if as_json else f"{pushed.name}@{pushed.digest}")


@image.command()
@click.option("--dry-run", is_flag=True, help="remove nothing: list what would be")
@_as_json
def prune(dry_run: bool, as_json: bool) -> None:
    """Remove our images that are not current, on whatever base they stand, but for those that a container uses.

    Images derived from ours under names of their own stay, too.

    \b
    Example:
      trimtab image prune --dry-run
    """
    with closing(images.engine()) as client:
        pruned = images.prune(client, dry_run=dry_run)
    if as_json:
        in_use = [{**_facts(one), "containers": users} for one, users in pruned.in_use]
        removed = [_facts(one) for one in pruned.removed]
        print(json.dumps({"dry_run": dry_run, "removed": removed, "in_use": in_use, "freed": pruned.freed}))
        return
    for one in pruned.removed:
        print(f"{'would remove' if dry_run else 'removed'}  {one.tag}  {one.size / 1e6:,.0f} MB")
    for one, users in pruned.in_use:
        print(f"left alone  {one.tag}  used by {', '.join(users)}: remove that with  docker rm NAME  and prune again")
    if not pruned.removed:
        print("nothing to remove")
    elif dry_run:
        print(f"{len(pruned.removed)} to remove; layers that they share with images that stay are not freed")
    else:
        freed = "" if pruned.freed is None else f", {pruned.freed / 1e6:,.0f} MB freed (layers that other images use stay)"
        print(f"{len(pruned.removed)} removed{freed}")


def _facts(found: images.Image) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "created": found.created.isoformat(), "current": found.current}


@contextmanager
def _screen(doing: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int, str], None]]]:
    """What takes lines and progress: a bar with the lines above it on a terminal, else the lines alone."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True), lambda done, of, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(doing), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task: TaskID = bar.add_task("", total=None)

        def advance(done: int, of: int, what: str) -> None:
            bar.update(task, completed=done - 1 if doing == "build" else done, total=of, description=what)

        yield lambda line: bar.console.print(line, style="dim", markup=False, highlight=False), advance
