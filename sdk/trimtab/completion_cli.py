"""`trimtab completion`: the script with which a shell completes commands, options, handles and names."""

from __future__ import annotations

import os
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class, split_arg_string

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_TRIMTAB_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value
    COMPREPLY=()
    for line in $(env COMP_TYPED="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1"); do
        type=${line%%%%,*} value=${line#*,}
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            *) COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """click's own, but for words with a colon, as handles are: bash takes each side of one for a word of its own."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        typed = os.environ["COMP_TYPED"]
        words = split_arg_string(typed)[1:]
        self._word = words.pop() if words and not typed[-1:].isspace() else ""
        return words, self._word

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """What takes the place of that part of the word behind bash's last break in it."""
        breaks = set(os.environ.get("COMP_BREAKS", "")) & set(":=")
        kept = self._word[: max((self._word.rfind(each) + 1 for each in breaks), default=0)]
        value = str(item.value)
        for head in (kept, kept.partition("=")[2]):  # --option=value is completed by the value alone
            value = value.removeprefix(head)
        return f"{item.type},{value}"


add_completion_class(Bash)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes commands, options, handles, models and recipes.

    For bash put  eval "$(trimtab completion bash)"  into ~/.bashrc; for zsh the same with zsh into ~/.zshrc, after compinit.

    \b
    Example:
      trimtab completion bash
      trimtab completion fish > ~/.config/fish/completions/trimtab.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(context.find_root().command, {}, "trimtab", VARIABLE).source(), end="")
