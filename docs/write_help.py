"""Write docs/help.md: the help of every command as the command prints it. With --check: write nothing, fail where the page is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from trimtab.cli import every_command

PAGE = Path(__file__).with_name("help.md")
WIDTH = 100

_TOP = "# Commands\n\nEach as `trimtab COMMAND --help` says it. Written by `make docs`; `make lint` fails where it is stale.\n"


def page() -> str:
    """The whole page, the same on every machine."""
    parts = [_TOP]
    for words, command in every_command():
        with click.Context(command, info_name=" ".join(words), terminal_width=WIDTH) as context:
            said = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {' '.join(words)}\n\n```text\n{said}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """The exit code: 1 where the page is stale and was to be checked."""
    if sys.argv[1:] not in ([], ["--check"]):
        print("usage: write_help.py [--check]", file=sys.stderr)
        return 2
    wanted = page()
    if not sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        print("docs/help.md is not what the commands say. Write it again with:  make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
