"""What a packed row holds, token by token: which tokens are learned, and where one sample ends and another begins."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.counting import counted
from trimtab.events import Event
from trimtab.layout import JobDir
from trimtab.spec import JobSpec, TrainSpec
from trimtab.staging import complete, run_verb, stage
from trimtab.terminal import plain

if TYPE_CHECKING:
    from rich.text import Text

PART = "◌"  # a token that ends in the middle of a letter
_CONTROL = " italic"
_ASCII = str.maketrans({"⟦": "[[", "⟧": "]]", "│": "|", "⏎": "\\n", "⇥": "\\t", PART: "?"})  # for an output that has no such signs


class Shades(NamedTuple):
    """Styles of tokens, each two in turns, so that tokens are told apart."""

    learned: tuple[str, str]
    context: tuple[str, str]
    taught: tuple[str, str]


SHADES = {
    "truecolor": Shades(
        ("bold white on #1b6e3c", "bold white on #2f8f57"),
        ("#9a9a9a on #2a2a2a", "#9a9a9a on #3a3a3a"),
        ("white on #1d4f8b", "white on #2c6cb5"),
    ),
    "256": Shades(
        ("bold color(231) on color(22)", "bold color(231) on color(28)"),
        ("color(247) on color(235)", "color(247) on color(238)"),
        ("color(231) on color(24)", "color(231) on color(31)"),
    ),
    "standard": Shades(
        ("black on green", "black on bright_green"), ("white on black", "black on white"), ("white on blue", "black on bright_blue")
    ),
}
"""By what rich calls the colours that a terminal has: left to its own rounding, greens become greys and shades one."""


def preview(
    spec: JobSpec,
    *,
    row: int | None = None,
    sample: int | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    show: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Prepare the job's data, or find it prepared, and take a `row` of it, or all of a `sample`, both counted from 1.

    Nothing is rehearsed, which would take the model minutes, but where the data was prepared so before: then that is shown.

    Returns `row`, `rows`, `row_tokens`, `ledger` (lines), and `samples`: of each its `kind`, `row`, `sample`, and for each of its tokens
    `ids`, `texts`, `learned`, `taught` (matched with the base model's prediction) and `control`.

    Raises what `stage` does; StagingError for a row or a sample that there is not.
    """
    alone = spec.model_copy(update={"train": spec.train.model_copy(update={"replay": 0.0})})
    staged = stage(alone, cache=cache, say=say, show=show)
    channels = staged.channels
    if spec.train.replay > 0:
        folder = channels["train"].parents[2]
        rehearsed = TrainSpec(**{**staged.train.model_dump(), "replay": spec.train.replay})
        before = folder.with_name(f"{rehearsed.preparation_digest()[:16]}-{folder.name.partition('-')[2]}")
        if complete(before):
            channels = {name: JobDir(before).channel(name) for name in channels}
            say(f"data: prepared with replay before, in {before}")
        else:
            say("replay: not made up for a preview, which takes the model minutes; fit does it")
    with tempfile.TemporaryDirectory(prefix="trimtab-preview-") as root:
        job = JobDir(Path(root)).make()
        for name, folder in channels.items():
            job.channel(name).symlink_to(folder.absolute())
        job.preview_asked.write_text(json.dumps({"row": row, "sample": sample}), encoding="utf-8")
        run_verb("preview", job, show, doing="the row could not be shown")
        found: dict[str, Any] = json.loads(job.preview.read_text(encoding="utf-8"))
    return found


def print_preview(found: dict[str, Any]) -> None:
    """To standard output: in colour on a terminal that has colours, with signs elsewhere and where NO_COLOR is set. Where the output has
    no such letters, signs are of ASCII and other letters question marks."""
    text, encoding = "\n".join(lines(found)), sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        print(text.translate(_ASCII).encode(encoding, "replace").decode(encoding))
        return
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console

        console = Console()
        if (colours := console.color_system) is not None:
            for line in coloured(found, console.width, SHADES.get(colours, SHADES["standard"])):
                console.print(line, soft_wrap=True)
            return
    print(text)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Plain text: "│" between tokens, ⟦ ⟧ around what is learned."""
    yield _title(found)
    for one in found["samples"]:
        yield f"-- {_heading(one)} --"
        text, before = "", False
        for token, learned in zip(_texts(one), _learned(one), strict=True):
            text += "⟧" * (before and not learned) + ("⟦" if learned and not before else "│" if text else "") + token
            before = learned
        yield from (text + "⟧" * before).removesuffix("\n").split("\n")
    yield "⟦learned⟧ and context; │ between tokens" + _signs(found)


def coloured(found: dict[str, Any], width: int, shades: Shades) -> Iterator[Text]:
    """Lines for a terminal of that width."""
    from rich.cells import cell_len
    from rich.text import Text

    yield Text(_title(found), style="bold")
    for one in found["samples"]:
        heading = f"── {_heading(one)} "
        yield Text(heading + "─" * max(0, width - cell_len(heading)), style="cyan")
        line, place = Text(), 0
        for number, (text, style) in enumerate(zip(_texts(one), _styles(one, shades), strict=True)):
            shade, part = style[number % 2] + _CONTROL * one["control"][number], ""
            for letter in text:
                if letter == "\n" or place + cell_len(letter) > width:
                    yield line.append(part, style=shade)
                    line, part, place = Text(), "", 0
                if letter != "\n":
                    part += letter
                    place += cell_len(letter)
            line.append(part, style=shade)
        if line:
            yield line
    legend = Text.assemble((" learned ", shades.learned[0]), " ", (" context ", shades.context[0]))
    if any(any(one["taught"]) for one in found["samples"]):
        legend.append(" ").append(" rehearsed: matched with the base model's own prediction ", style=shades.taught[0])
    yield legend.append(f"  a shade for each token, control tokens slanted{_signs(found)}")


def _title(found: dict[str, Any]) -> str:
    tokens = sum(len(one["ids"]) for one in found["samples"])
    learned = sum(sum(_learned(one)) for one in found["samples"])
    rows = {one["row"] for one in found["samples"]}
    where = f"row {found['row']:,} of {found['rows']:,}" if len(rows) == 1 else f"{len(rows)} rows of {found['rows']:,}"
    return (
        f"{where}: {tokens:,} tokens in a row of {found['row_tokens']:,}, {learned:,} learned, {counted(len(found['samples']), 'sample')}"
    )


def _heading(one: dict[str, Any]) -> str:
    return f"sample {one['sample']:,}, {one['kind']}: {len(one['ids']):,} tokens, {sum(_learned(one)):,} learned"


def _learned(one: dict[str, Any]) -> list[bool]:
    return [bool(flag) for flag in one["learned"]]


def _styles(one: dict[str, Any], shades: Shades) -> Iterator[tuple[str, str]]:
    for learned, taught in zip(one["learned"], one["taught"], strict=True):
        yield shades.taught if taught else shades.learned if learned else shades.context


def _texts(one: dict[str, Any]) -> Iterator[str]:
    """What is printed for each token."""
    for text in one["texts"]:
        yield plain(text).replace("\n", "⏎\n").replace("\t", "⇥") or PART


def _signs(found: dict[str, Any]) -> str:
    shown = {letter for one in found["samples"] for text in _texts(one) for letter in text}
    signs = {"⏎": "a line's end", "⇥": "a tab", PART: "part of a letter"}
    return "".join(f", {sign} {meaning}" for sign, meaning in signs.items() if sign in shown)
