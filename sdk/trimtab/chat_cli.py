"""`trimtab chat`: talk to a run's model, to an endpoint, or to a model as it is."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab import cli_options
from trimtab.completion import completes, endpoint_handles, model_aliases, run_handles
from trimtab.errors import EndpointError

if TYPE_CHECKING:
    from trimtab.endpoint import Endpoint


@click.command()
@click.argument("where", shell_complete=completes(run_handles, endpoint_handles, model_aliases, paths=True))
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
@cli_options.api_key
def chat(
    where: str,
    settings: tuple[str, ...],
    question: str | None,
    complete: bool,
    system: str,
    max_tokens: int,
    api_key_file: Path | None,
    **options: Any,
) -> int:
    """Talk to WHERE: a run's or an endpoint's handle, an address, or a model. `stop` or Ctrl-D ends it.

    A run and a model are served on this machine for as long as you talk; an endpoint is asked where it is. Answers appear as they come,
    each with its seconds; Ctrl-C cuts one off. Exit code 1 where something could not be answered.

    \b
    Example:
      trimtab chat process://trim-7f3a9c21
      trimtab chat process://trim-7f3a9c21 --question "When does the library open?"
      trimtab chat docker://trim-ep-0c5d11ab --temperature 0.7 --top-p 0.9
    """
    from trimtab.named import opened
    from trimtab.progress import display

    signal.signal(signal.SIGTERM, _end)
    given = {name: value for name, value in options.items() if value is not None} | {"max_new_tokens": max_tokens}
    before = [{"role": "system", "content": system}] if system else []
    with display() as screen:
        endpoint = opened(where, cli_options.pairs(settings), cli_options.key(api_key_file), screen.show)
    with endpoint:
        talk = _Talk(endpoint, before, complete, given)
        if question is not None:
            talk.ask(question)
            return 0
        failed = 0
        while (asked := _read_line()) is not None:
            if asked:
                try:
                    talk.ask(asked)
                except EndpointError as exc:  # such as a conversation that is too long by now: the next line may be shorter
                    failed = 1
                    print(exc, file=sys.stderr, flush=True)
        return failed


class _Talk:
    """A conversation; what was said stays in it, and what was refused does not."""

    def __init__(self, endpoint: Endpoint, before: list[dict[str, str]], complete: bool, options: dict[str, Any]) -> None:
        self._endpoint, self._said, self._complete, self._options = endpoint, before, complete, options

    def ask(self, text: str) -> None:
        """Print the answer as it comes, and its seconds. Raises EndpointError for a refusal; Ctrl-C cuts the answer off."""
        began = time.monotonic()
        first: float | None = None
        asked = [*self._said, {"role": "user", "content": text}]
        pieces = self._endpoint.stream(text if self._complete else asked, chat=not self._complete, **self._options)
        answer, how = "", ""
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    first = first if first is not None else time.monotonic() - began
                    print(piece, end="", flush=True)
                    answer += piece
        except KeyboardInterrupt:
            how = ", cut off"
        finally:
            if first is not None:
                print(flush=True)
        self._said = [*asked, {"role": "assistant", "content": answer}]
        early = f", the first words after {first:.1f} s" if first is not None else ""
        print(f"({time.monotonic() - began:.1f} s{early}{how})", file=sys.stderr, flush=True)


def _read_line() -> str | None:
    """What a person types, without blanks around it; None for `stop` and at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing for input()
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "stop" else text


def _end(*_: object) -> None:
    """Ended by SIGTERM, in the middle of an answer too."""
    raise click.Abort
