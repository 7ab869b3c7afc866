"""`trimtab models` and `trimtab recipes`: the short names that `--model` and `--recipe` take, and what stands behind them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from trimtab import cli_options
from trimtab.catalog import rows


@click.command()
@cli_options.as_json
def models(as_json: bool) -> None:
    """List the models that have a short name. Any other model is given by its Hub id or its folder.

    \b
    Example:
      trimtab models
      trimtab models --json
    """
    found = rows()
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    lines = [("alias", "model on the Hub", "weights", "context", "kind", "family", "licence", "")]
    for row in found:
        remark = "coming" if row["coming"] else "gated: needs your Hub token" if row["gated"] else ""
        sizes = _short(row["parameters"]), f"{row['context_length']:,}"
        lines.append((row["alias"], row["hub_id"], *sizes, row["kind"], row["family"], row["licence"], remark))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    for row in found:
        if row["coming"]:
            print(f"{row['alias']}: {row['coming']}", file=sys.stderr)


@click.command()
@cli_options.as_json
def recipes(as_json: bool) -> None:
    """List the recipes: named values for options that are not given, with where they come from.

    \b
    Example:
      trimtab recipes
      trimtab recipes --json
    """
    from trimtab.recipes import recipes as known

    found = known().values()
    if as_json:
        print(json.dumps([asdict(each) for each in found], ensure_ascii=False))
        return
    for number, each in enumerate(found):
        print(f"{each.name}: {each.title}" + ("  [default]" if number == 0 else ""))
        print(f"    source: {each.source}")
        for name, value in each.values.items():
            print(f"    {as_options(name, value)}" + (f"  ({each.reasons[name]})" if name in each.reasons else ""))
        for note in each.notes:
            print(f"    note: {note}")


def as_options(name: str, value: Any) -> str:
    """A field's value as it is typed: `--views document --views sentence`, `--use-dora`; "" for what is not asked for."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else ""
    return " ".join(f"{option} {each}" for each in (value if isinstance(value, tuple | list) else (value,)))


def _short(weights: int) -> str:
    """`135M`, `1.7B`, `70.6B`."""
    return f"{weights / 1e6:.0f}M" if weights < 999_500_000 else f"{weights / 1e9:.1f}B"
