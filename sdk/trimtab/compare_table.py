"""A comparison on a terminal: answers side by side; to a pipe one after the other, plain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trimtab.compare import Answer, Column, Comparison
from trimtab.compare_page import TITLES, times
from trimtab.probes import WORDS
from trimtab.terminal import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_NARROW = 28  # characters that an answer's column takes at least; with less, answers stand below each other


def lines(found: Comparison) -> Iterator[str]:
    """Plain text, for pipes and narrow terminals."""
    for number, question in enumerate(found.questions):
        yield f"# {plain(question.question)}"
        for column in found.columns:
            answer = column.answers[number]
            yield f"[{plain(column.label)}]{_verdict(answer)}  ({times(answer)})"
            if answer.note:
                yield f"  ({answer.note})"
            yield from (f"  {line}" for line in _said(column, answer).splitlines())
        yield ""
    yield from scores(found)


def scores(found: Comparison) -> Iterator[str]:
    """Right answers to the probes, each with its interval, and the differences between models."""
    width = max(len(plain(column.label)) for column in found.columns)
    for kind in (kind for kind, some in found.probes.items() if some):
        yield f"{TITLES[kind]}: accepted in the first {WORDS[kind]} words, and the interval that holds the true share with 95 % confidence"
        for column in found.columns:
            score = next((score for score in column.scores if score.kind == kind), None)
            if score is None:
                yield f"  {plain(column.label):<{width}}  {plain(column.problem)}"
                continue
            low, high = score.interval
            counts = f"{score.right:>4} of {score.of}  {score.right / score.of:>4.0%}"
            yield f"  {plain(column.label):<{width}}  {counts}  {low:.0%} to {high:.0%}"
        for one in (one for one in found.differences if one.kind == kind):
            low, high = one.interval
            sure = "" if low <= 0 <= high else "  better" if low > 0 else "  worse"
            counts = f"{one.gained} gained, {one.lost} lost: {(one.gained - one.lost) / one.of:+.0%}, {low:+.0%} to {high:+.0%}{sure}"
            yield f"  {plain(found.columns[one.model].label)} against {plain(found.columns[one.against].label)}: {counts}"
        yield ""


def show(found: Comparison) -> None:
    """Print it to standard output."""
    from rich.console import Console

    console = Console()
    if not sys.stdout.isatty() or console.width < (_NARROW + 3) * len(found.columns):
        print("\n".join(lines(found)).rstrip())
        return
    for number, question in enumerate(found.questions):
        console.print(_side_by_side(found, number, question.question))
    print("\n".join(scores(found)).rstrip())


def _side_by_side(found: Comparison, number: int, question: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain(question), style="bold"), title_justify="left", expand=True)
    cells = []
    for column in found.columns:
        answer = column.answers[number]
        table.add_column(Text(plain(column.label)), ratio=1, overflow="fold")
        cell = Text()
        if verdict := _verdict(answer).strip():
            cell.append(f"{verdict}\n", style="green" if answer.right else "red" if answer.right is False else "yellow")
        if column.kind == "completion" and not answer.problem:
            cell.append(plain(answer.prompt), style="italic dim")
        cell.append(plain(answer.text) if column.kind == "completion" else plain(answer.text.strip()))
        if answer.problem:
            cell.append(plain(answer.problem), style="yellow")
        cell.append(f"\n{times(answer)}" + (f" · {answer.note}" if answer.note else ""), style="dim")
        cells.append(cell)
    table.add_row(*cells)
    return table


def _said(column: Column, answer: Answer) -> str:
    if answer.problem and not answer.text:
        return plain(answer.problem)
    text = f"{answer.prompt}{answer.text}" if column.kind == "completion" else answer.text.strip()
    return plain(text + (f"\n{answer.problem}" if answer.problem else "")) or "(nothing)"


def _verdict(answer: Answer) -> str:
    if answer.problem:
        return " no answer"
    return "" if answer.right is None else " right" if answer.right else " wrong"
