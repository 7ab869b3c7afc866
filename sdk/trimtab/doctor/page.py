"""What the doctor says: a table on a terminal, a line for each finding elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trimtab.doctor.judge import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "dim"}


def show(findings: Sequence[Finding], place: str) -> None:
    """Print findings on standard output; on a terminal red is what keeps jobs from `place`."""
    if sys.stdout.isatty():
        _table(findings, place)
    else:
        print("\n".join(line(finding) for finding in findings))


def line(finding: Finding) -> str:
    """`state`, name, what was found and, after an arrow, the remedy."""
    return f"{finding.state:<8} {finding.name:<16} {finding.found}" + (f"  ->  {finding.remedy}" if finding.remedy else "")


def verdict(findings: Sequence[Finding], place: str, *, gpu: bool = False) -> str:
    """The one sentence that the exit code stands for."""
    names = [finding.name for finding in findings if finding.stops(place)]
    if gpu:
        return f"the GPU image is not proven here: {', '.join(names)}" if names else "the GPU image works on this GPU"
    if names:
        return f"{place} cannot run jobs here yet: {', '.join(names)} missing; what to type stands beside each"
    return f"{place} can run jobs here"


def _table(findings: Sequence[Finding], place: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.found)
        if finding.remedy:
            said.append(f"\n→ {finding.remedy}", style="bold")
        colour = "bold red" if finding.stops(place) else _COLOURS[finding.state]
        table.add_row(Text(finding.state, style=colour), finding.name, said)
    Console().print(table)
