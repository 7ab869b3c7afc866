"""`trimtab chat`: talk to a run's model, to an endpoint, or to a model as it is."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from trimtab import cli_options
from trimtab.backends import BACKENDS
from trimtab.endpoint_cli import served
from trimtab.progress import display

if TYPE_CHECKING:
    from trimtab.endpoint import Endpoint


@click.command()
@click.argument("where")
@cli_options.settings
@click.option("--question", help="ask this one question and end")
@click.option("--complete", is_flag=True, help="do not chat: each line is a text to go on from")
@click.option("--model", help="which of the endpoint's models  [default: its first]")
@click.option("--system", default="", help="a system message before the conversation")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="longest answer, in tokens")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0: the likeliest token each time")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="draw from this share")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="draw from so many of the likeliest; 0: from all")
@click.option("--seed", type=click.IntRange(0), help="draw the same again")
@click.option("--api-key", envvar="TRIMTAB_API_KEY", show_envvar=True, help="what an address asks for")
def chat(
    where: str,
    settings: tuple[str, ...],
    question: str | None,
    complete: bool,
    system: str,
    max_tokens: int,
    api_key: str | None,
    **options: Any,
) -> None:
    """Talk to WHERE: a run's or an endpoint's handle, an address, or a model. `stop` or Ctrl-D ends it.

    A run and a model are served on this machine for as long as you talk; an endpoint is asked where it is. Answers appear as they come,
    each with its seconds.

    \b
    Example:
      trimtab chat process://trim-7f3a9c21
      trimtab chat process://trim-7f3a9c21 --question "When does the library open?"
      trimtab chat docker://trim-ep-0c5d11ab --temperature 0.7 --top-p 0.9
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = {name: value for name, value in options.items() if value is not None} | {"max_new_tokens": max_tokens}
    before = [{"role": "system", "content": system}] if system else []
    with opened(where, cli_options.pairs(settings), api_key) as endpoint:
        talk = _Talk(endpoint, before, complete, given)
        if question is not None:
            talk.ask(question)
            return
        while (asked := _read_line()) is not None:
            if asked:
                talk.ask(asked)


def opened(where: str, settings: dict[str, Any], api_key: str | None = None) -> Endpoint:
    """The endpoint of an address or a handle, or one on this machine for a run or a model, which ends with the `with` block."""
    from trimtab.deployers.base import PREFIX
    from trimtab.endpoint import Endpoint, deploy

    scheme, _, name = where.partition("://")
    if scheme in ("http", "https"):
        return Endpoint(where, api_key=api_key)
    if scheme in BACKENDS and name.startswith(PREFIX):
        return Endpoint.attach(where, **settings)
    with display() as screen:
        return deploy(**served(where, "process", settings), show=screen.show)


class _Talk:
    """A conversation; what was said stays in it."""

    def __init__(self, endpoint: Endpoint, before: list[dict[str, str]], complete: bool, options: dict[str, Any]) -> None:
        self._endpoint, self._said, self._complete, self._options = endpoint, before, complete, options

    def ask(self, text: str) -> None:
        """Print the answer as it comes, and its seconds."""
        began = time.monotonic()
        first: float | None = None
        self._said.append({"role": "user", "content": text})
        pieces = self._endpoint.stream(text if self._complete else self._said, chat=not self._complete, **self._options)
        answer = ""
        with contextlib.closing(pieces):
            for piece in pieces:
                first = first if first is not None else time.monotonic() - began
                print(piece, end="", flush=True)
                answer += piece
        print(flush=True)
        self._said.append({"role": "assistant", "content": answer})
        early = f", the first words after {first:.1f} s" if first is not None else ""
        print(f"({time.monotonic() - began:.1f} s{early})", file=sys.stderr, flush=True)


def _read_line() -> str | None:
    """What a person types, without blanks around it; None for `stop` and at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing for input()
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "stop" else text
