"""`trimtab deploy`, `endpoints` and `close`: where a model answers, what answers now, and its end."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab import cli_options
from trimtab.backends import BACKENDS
from trimtab.completion import completes, endpoint_handles, model_aliases, run_handles
from trimtab.errors import BackendError, EndpointError, TrimtabError
from trimtab.named import deploy_arguments, named
from trimtab.progress import clock, display
from trimtab.spec import ServeSpec

if TYPE_CHECKING:
    from trimtab.deployers.base import EndpointRecord
    from trimtab.endpoint import Endpoint

_FIELDS = ("engine", "dtype", "max_context", "max_running", "max_waiting", "cache_gb", "grace_seconds")
_LOOK = 5.0  # seconds between two looks at an endpoint that is held open
_AWAY = 600.0  # seconds that it may be out of reach


def _serving(command: cli_options.Command) -> cli_options.Command:
    """An option for each field of ServeSpec that people set."""
    for name in reversed(_FIELDS):
        command = cli_options.field(name, ServeSpec.model_fields[name])(command)
    return command


@click.command()
@click.argument("what", required=False, shell_complete=completes(run_handles, model_aliases, paths=True))
@cli_options.backend("where it answers  [default: where the run was; process for a model]", default=None)
@cli_options.settings
@click.option("--device", type=click.Choice(["xeon", "gpu"]), default="xeon", show_default=True, help="what computes the answers")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; one that others can reach takes an API key")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="port; 0: any that is free")
@cli_options.api_key
@click.option("--ttl", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="end by itself after so long")
@click.option("--detach", is_flag=True, help="leave it running, print its handle and return; end it with  trimtab close")
@click.option("--merge/--no-merge", default=True, show_default=True, help="merge the adapter into the model, or serve it beside its base")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=HANDLE",
    shell_complete=completes(run_handles),
    help="a run's or a folder's adapter beside the base; may be repeated",
)
@click.option("--trust-remote-code", default="", metavar="OWNER/NAME@COMMIT", help="run the code of a model's author, of this revision")
@_serving
@click.option("--dry-run", is_flag=True, help="print the exact request and start nothing")
@cli_options.as_json
def deploy(
    what: str | None,
    backend: str | None,
    settings: tuple[str, ...],
    adapters: tuple[str, ...],
    detach: bool,
    dry_run: bool,
    api_key_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve WHAT, a run's handle or a model, and print where it answers.

    It answers until Ctrl-C, or with --detach until `trimtab close`. A model is a catalog alias, a Hub id or a folder. Where others can
    reach it, an API key is made unless one is given. On SageMaker a setting may name the model instead: model_uri=s3://... or jumpstart=ID.

    \b
    Example:
      trimtab deploy process://trim-7f3a9c21 --port 8080
      trimtab deploy docker://trim-7f3a9c21 --detach --ttl 120
      trimtab deploy smollm2-135m-instruct --engine transformers
      trimtab deploy sagemaker://trim-7f3a9c21 --ttl 60 --backend-option role=SageMakerExecutionRole
    """
    from trimtab import endpoint as serving

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a half-started endpoint is taken back then, too
    given = {name: value for name, value in options.items() if value is not None}
    beside = cli_options.pairs(adapters, "--adapter", "law=process://trim-7f3a9c21")
    given["adapters"] = {name: named(words).artifact(cli_options.pairs(settings)) or words for name, words in beside.items()}
    asked = deploy_arguments(what, backend, cli_options.pairs(settings), given) | given
    asked |= {"detach": detach, "api_key": cli_options.key(api_key_file)}
    if dry_run:
        print(json.dumps(serving.deploy_request(**asked), indent=2, ensure_ascii=False))
        for finding in serving.deploy_findings(**asked):
            print(finding if finding.ok else f"{'missing' if finding.ok is False else 'not known'}: {finding}", file=sys.stderr)
        return
    with display() as screen:
        endpoint = serving.deploy(**asked, show=screen.show)
    with endpoint:
        try:
            facts = {"handle": str(endpoint.handle), "url": endpoint.url, "needs_key": endpoint.api_key is not None}
            print(json.dumps(facts) if as_json else endpoint.handle if detach else endpoint.url, flush=True)
            for line in _remarks(endpoint, detach):
                print(line, file=sys.stderr, flush=True)
            if not detach:
                _hold(endpoint)
        except KeyboardInterrupt:
            if detach:
                raise


def _remarks(endpoint: Endpoint, detach: bool) -> Iterator[str]:
    """What a person should know of an endpoint that answers now."""
    handle = endpoint.handle
    if handle is None:
        return
    how = "by InvokeEndpoint" if handle.backend == "sagemaker" else "with OpenAI's interface under /v1"
    yield f"It answers at {endpoint.url}, {how}." if detach else f"{handle} answers, {how}."
    if (usd := endpoint.status().usd_per_hour) is not None:
        yield f"It costs about ${usd:.2f} an hour until it ends."
    if endpoint.api_key:
        yield f"It asks for a key; see it with  trimtab endpoints --backend {handle.backend} --keys"
    yield f"End it with  trimtab close {handle}" if detach else f"Ctrl-C ends it; meanwhile, elsewhere:  trimtab chat {handle}"


def _hold(endpoint: Endpoint) -> None:
    """Wait until the endpoint's own end. Raises EndpointError for one that failed, or that cannot be asked for long."""
    from trimtab.deployers.base import EndpointState

    seen = time.monotonic()
    while True:
        try:
            found = endpoint.status()
        except (BackendError, EndpointError):  # what cannot be asked now is not gone: it may be the way there
            if time.monotonic() - seen > _AWAY:
                raise
        else:
            seen = time.monotonic()
            if found.state not in (EndpointState.STARTING, EndpointState.SERVING):
                break
        time.sleep(_LOOK)
    if found.state is EndpointState.FAILED:
        raise EndpointError(f"{endpoint.handle} has failed: {found.reason}")
    print(f"{endpoint.handle} has ended: {found.reason}", file=sys.stderr)


@click.command()
@click.option(
    "--backend", "backends", type=click.Choice(list(BACKENDS)), multiple=True, help="where; may be repeated  [default: this machine]"
)
@cli_options.settings
@click.option("--keys", is_flag=True, help="show the API keys, too")
@click.option("--close-orphans", is_flag=True, help="end what was left behind, and what is past its time")
@cli_options.as_json
def endpoints(backends: tuple[str, ...], settings: tuple[str, ...], keys: bool, close_orphans: bool, as_json: bool) -> None:
    """List what answers: since when, at what cost per hour, until when, and what was left behind.

    \b
    Example:
      trimtab endpoints
      trimtab endpoints --backend sagemaker --backend-option region=us-east-1 --close-orphans
    """
    from trimtab import endpoint as serving

    given = cli_options.pairs(settings)
    found: list[EndpointRecord] = []
    for backend in backends or ("process", "docker"):
        try:
            found += serving.endpoints(backend, **given)
        except BackendError as exc:
            if backends:
                raise
            print(f"{backend}: {str(exc).partition(';')[0]}", file=sys.stderr)
    if not backends:
        print("SageMaker was not asked:  trimtab endpoints --backend sagemaker", file=sys.stderr)
    secret = {str(each.handle): _key(each, given) for each in found} if keys else {}
    if as_json:
        print(json.dumps([_facts(each) | ({"api_key": secret[str(each.handle)]} if keys else {}) for each in found]))
    else:
        for each in found:
            print(_line(each) + (f"  key {secret[str(each.handle)]}" if secret.get(str(each.handle)) else ""))
    for each in found if close_orphans else ():
        if each.orphan:
            serving.close(each.handle, **given)
            print(f"closed {each.handle}: {each.orphan}", file=sys.stderr)


def _key(record: EndpointRecord, settings: Mapping[str, Any]) -> str | None:
    from trimtab.endpoint import Endpoint

    try:
        with Endpoint.attach(record.handle, **settings) as endpoint:
            return endpoint.api_key
    except TrimtabError:  # it has ended: nobody needs its key
        return None


def _line(each: EndpointRecord) -> str:
    now = datetime.now(UTC)
    parts = [str(each.handle), f"{each.state:<8}", f"since {each.created.astimezone():%Y-%m-%d %H:%M}"]
    parts += [f"${each.usd_per_hour:.2f}/h"] if each.usd_per_hour is not None else []
    parts += [f"ends in {clock(max(0.0, (each.expires - now).total_seconds()))}"] if each.expires else []
    parts += [each.url, each.title, each.reason]
    return "  ".join(filter(None, parts)) + (
        f"\n    left behind: {each.orphan}; remove it with  trimtab close {each.handle}" if each.orphan else ""
    )


def _facts(each: EndpointRecord) -> dict[str, Any]:
    times = {"created": each.created.isoformat(), "expires": each.expires.isoformat() if each.expires else None}
    return asdict(each) | {"handle": str(each.handle)} | times


@click.command()
@click.argument("handles", nargs=-1, required=True, metavar="HANDLE...", shell_complete=completes(endpoint_handles))
@cli_options.settings
def close(handles: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """End endpoints and remove all that belongs to them. Quiet for one that is gone.

    \b
    Example:
      trimtab close docker://trim-ep-7f3a9c21
    """
    from trimtab import endpoint as serving

    for handle in handles:
        serving.close(handle, **cli_options.pairs(settings))
