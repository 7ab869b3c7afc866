"""`trimtab models` and `trimtab recipes`: the short names that `--model` and `--recipe` take, and what stands behind them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from trimtab import cli_options
from trimtab.catalog import catalog


@click.command()
@cli_options.as_json
def models(as_json: bool) -> None:
    """List the models that have a short name. Any other model is given by its Hub id or its folder.

    \b
    Example:
      trimtab models
      trimtab models --json
    """
    entries = catalog().values()
    if as_json:
        print(json.dumps([asdict(each) | {"page": each.page} for each in entries]))
        return
    width = max(len(each.alias) for each in entries)
    for each in entries:
        print(f"{each.alias:<{width}}  {each.hub_id}")


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
