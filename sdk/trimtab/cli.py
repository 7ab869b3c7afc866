"""The command `trimtab`: what there is, each command in a module that is imported when it is used, and how a command line ends.

Results go to standard output, everything else to standard error. Exit codes: 0; 1 with a TrimtabError's message; 2 for a command
line that is none; 130 when interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence

import click

from trimtab.cli_options import Commands
from trimtab.errors import TrimtabError
from trimtab.terminal import plain

COMMANDS = {
    "chat": "trimtab.chat_cli:chat",
    "close": "trimtab.endpoint_cli:close",
    "compare": "trimtab.compare_cli:compare",
    "completion": "trimtab.completion_cli:completion",
    "data": "trimtab.data_cli:data",
    "deploy": "trimtab.endpoint_cli:deploy",
    "doctor": "trimtab.doctor.command:doctor",
    "endpoints": "trimtab.endpoint_cli:endpoints",
    "fit": "trimtab.fit_cli:fit",
    "image": "trimtab.image_cli:image",
    "list": "trimtab.run_cli:list_runs",
    "logs": "trimtab.run_cli:logs",
    "merge": "trimtab.merge_cli:merge",
    "models": "trimtab.models_cli:models",
    "plan": "trimtab.fit_cli:plan",
    "recipes": "trimtab.models_cli:recipes",
    "remove": "trimtab.run_cli:remove",
    "resume": "trimtab.run_cli:resume",
    "status": "trimtab.run_cli:status",
    "stop": "trimtab.run_cli:stop",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process' own) and return its exit code."""
    code = None
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the terminal's encoding lacks is no reason to end
    try:
        if "_TRIMTAB_COMPLETE" in os.environ:  # a shell asks how a word may go on
            from trimtab import completion_cli  # noqa: F401  bash's own way of asking

        code = trimtab.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="trimtab", standalone_mode=False)
        sys.stdout.flush()
    except TrimtabError as exc:
        print(plain(f"trimtab: {exc}"), file=sys.stderr)
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


@click.group(cls=Commands, places=COMMANDS)
def trimtab() -> None:
    """Tune a language model on your own pages and ask it.

    \b
    Example:
      trimtab fit https://example.com/handbook.html --model smollm2-135m-instruct
      trimtab chat process://trim-7f3a9c21
    """


def every_command() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """`trimtab` itself and every command, each with the words that name it; a group comes before its commands."""
    waiting: list[tuple[tuple[str, ...], click.Command]] = [(("trimtab",), trimtab)]
    while waiting:
        words, command = waiting.pop(0)
        yield words, command
        if isinstance(command, click.Group):
            with click.Context(command, info_name=" ".join(words)) as context:
                inner = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
            waiting[:0] = [((*words, name), one) for name, one in inner if one is not None]
