"""Named sets of values for a job's options, each with where it comes from (recipes.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec import TrainSpec, refuse_unknown

FULL_RATE = 2e-5
"""The rate for all parameters where none is given: the one that is published for instruct. The option's own default is for adapters."""

LORA_OPTIONS = {"lora_rank", "lora_alpha", "lora_init", "lora_dropout", "lora_targets", "use_rslora", "use_dora"}
_BESIDE = {"spec_version", "model", "model_digest", "data_digest", "recipe", "seed", "keep_merged"}  # no part of how a model is trained


@dataclass(frozen=True)
class Recipe:
    """`values` of options by name; `reasons` of those that are not from `source`, `notes` on what it leaves to you."""

    name: str
    title: str
    source: str
    values: Mapping[str, Any]
    reasons: Mapping[str, str]
    notes: tuple[str, ...] = ()


@cache
def recipes() -> dict[str, Recipe]:
    """Every recipe by its name, in the order of recipes.toml; the first is the default."""
    tables = tomllib.loads(files("trimtab").joinpath("recipes.toml").read_text(encoding="utf-8"))
    return {name: _recipe(name, table) for name, table in tables.items()}


def _recipe(name: str, table: dict[str, Any]) -> Recipe:
    otherwise = table.get("otherwise", {})
    values = table.get("values", {}) | {option: value for option, (value, _) in otherwise.items()}
    return Recipe(
        name=name,
        title=table["title"],
        source=table["source"],
        values={option: tuple(value) if isinstance(value, list) else value for option, value in values.items()},
        reasons={option: reason for option, (_, reason) in otherwise.items()},
        notes=tuple(table.get("notes", ())),
    )


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the values of their recipe where they give none; all parameters get a rate for them where neither gives one.

    Raises SpecError for a recipe that there is not.
    """
    name = given.get("recipe", next(iter(recipes())))
    if not isinstance(name, str):
        raise SpecError(f"recipe is {name!r}: give the name of one of {', '.join(recipes())}")
    if name not in recipes():
        try:
            refuse_unknown({name: None}, recipes())
        except SpecError as exc:
            raise SpecError(str(exc).replace("option", "recipe")) from exc
    values = recipes()[name].values
    if given.get("method") == "full":
        values = {option: value for option, value in values.items() if option not in LORA_OPTIONS}
    chosen = {**values, **given}
    if chosen.get("method") == "full":
        chosen.setdefault("learning_rate", FULL_RATE)
    return chosen


def explained(spec: TrainSpec) -> list[str]:
    """Where each value of a spec comes from, a line each: the recipe, what was given beside it, and the options' own defaults."""
    recipe = recipes()[spec.recipe]
    lines = [f"recipe {recipe.name}: {recipe.title}", f"recipe source: {recipe.source}"]
    kept = {name: value for name, value in recipe.values.items() if getattr(spec, name) == value}
    by_reason: dict[str, list[str]] = {}
    for name in kept:
        by_reason.setdefault(recipe.reasons.get(name, "as its source has it"), []).append(name)
    lines += [f"recipe gives {_listed(spec, names)}: {reason}" for reason, names in by_reason.items()]
    rest = {name: field.default for name, field in TrainSpec.model_fields.items() if name not in kept and name not in _BESIDE}
    if spec.method == "full":
        rest = {name: default for name, default in rest.items() if name not in LORA_OPTIONS}
    if spec.method == "full" and "learning_rate" in rest and spec.learning_rate == FULL_RATE:
        rest.pop("learning_rate")
        lines.append(f"recipe gives learning_rate {_shown(FULL_RATE)}: as instruct has it for all parameters; the default is for adapters")
    given = [name for name, default in rest.items() if getattr(spec, name) != default]
    if given:
        lines.append(f"recipe is set aside for what was given: {_listed(spec, given)}")
    left = [name for name, default in rest.items() if getattr(spec, name) == default and default not in (None, False, ())]
    lines.append(f"recipe leaves {_listed(spec, left)}: the options' own defaults")
    return lines + [f"recipe note: {note}" for note in recipe.notes]


def _listed(spec: TrainSpec, names: list[str]) -> str:
    return ", ".join(f"{name} {_shown(getattr(spec, name))}" for name in names)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
