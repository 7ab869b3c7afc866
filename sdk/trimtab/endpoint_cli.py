"""`trimtab deploy` and `trimtab chat`: a run's model, served and asked."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING

import click

from trimtab import cli_options
from trimtab.errors import EndpointError
from trimtab.run import Run

if TYPE_CHECKING:
    from trimtab.endpoint import Endpoint


@click.command()
@click.argument("handle")
@cli_options.settings
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="port on 127.0.0.1; 0: any that is free", show_default=True)
def deploy(handle: str, settings: tuple[str, ...], port: int) -> None:
    """Serve a run's model on this machine until Ctrl-C, and print the address.

    \b
    Example:
      trimtab deploy process://trim-7f3a9c21 --port 8080
    """
    run = Run.attach(handle, **cli_options.pairs(settings))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with run.deploy(port=port) as endpoint:
        print(endpoint.url, flush=True)
        print("It speaks OpenAI's interface under /v1. Ctrl-C ends it.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            while endpoint.ready(timeout=60):
                time.sleep(5)
            raise EndpointError(f"{endpoint.url} answers no more: deploy it again with  trimtab deploy {handle}")


@click.command()
@click.argument("handle")
@cli_options.settings
@click.option("--question", help="ask this one question and end")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="longest answer, in tokens")
def chat(handle: str, settings: tuple[str, ...], question: str | None, max_tokens: int) -> None:
    """Talk to a run's model. `stop` or Ctrl-D ends it.

    \b
    Example:
      trimtab chat process://trim-7f3a9c21
      trimtab chat process://trim-7f3a9c21 --question "When does the library open?"
    """
    run = Run.attach(handle, **cli_options.pairs(settings))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with run.deploy() as endpoint:
        if question is not None:
            _ask(endpoint, [], question, max_tokens)
            return
        conversation: list[dict[str, str]] = []
        while (asked := _read_line()) is not None:
            if asked:
                _ask(endpoint, conversation, asked, max_tokens)


def _read_line() -> str | None:
    """What a person types, without blanks around it; None for `stop` and at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing for input()
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "stop" else text


def _ask(endpoint: Endpoint, conversation: list[dict[str, str]], question: str, max_tokens: int) -> None:
    """Print the answer and its seconds, and add both sides to the conversation."""
    conversation.append({"role": "user", "content": question})
    began = time.monotonic()
    answer = endpoint.chat(conversation, max_new_tokens=max_tokens)
    conversation.append({"role": "assistant", "content": answer})
    print(answer, flush=True)
    print(f"({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
