"""What docs/ and the README say in tables is what the code says: forms, recipes, methods, models, messages, options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trimtab import errors
from trimtab.catalog import markdown
from trimtab.cli import every_command
from trimtab.data.forms import canonical, learned
from trimtab.job import OPTIONS
from trimtab.recipes import recipes
from trimtab.spec import TrainSpec

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def rows(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called so, without its head."""
    lines = page.read_text(encoding="utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(f"| {first} |")]
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_the_records_shown_are_of_their_forms_and_learned_as_said():
    shown = rows(README, "form")
    for form, record, said in shown:
        read = canonical(json.loads(record.strip("`")))
        assert (read.name, learned(read.name, "auto")) == (form, said)
        assert read.left_out == ()
    in_detail = [row[0] for row in rows(ROOT / "docs" / "data.md", "form")]
    assert sorted(in_detail) == sorted(form for form, *_ in shown)


def test_the_recipes_shown_are_those_that_there_are():
    expected = [[f"`{each.name}`", each.title, each.source] for each in recipes().values()]
    assert rows(ROOT / "docs" / "training.md", "recipe") == expected
    assert rows(README, "recipe") == [row[:2] for row in expected]


def test_every_method_is_explained():
    methods = TrainSpec.model_fields["method"].annotation.__args__
    assert [row[0] for row in rows(ROOT / "docs" / "training.md", "`--method`")] == [f"`{name}`" for name in methods]


def test_the_table_of_models_is_the_catalogs():
    assert markdown() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_message_explained_is_one_that_can_come():
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for place in ("sdk/trimtab", "entrypoints/trimtab_runtime")
        for file in (ROOT / place).rglob("*.py")
    )
    pieces = [piece for row in rows(ROOT / "docs" / "errors.md", "message") for piece in re.findall(r"`([^`]+)`", row[0])]
    assert len(pieces) > 10
    assert [piece for piece in pieces if piece not in code] == []


def test_every_class_of_errors_is_explained():
    said = {name for row in rows(ROOT / "docs" / "errors.md", "class") for name in re.findall(r"`(\w+)`", row[0])}
    there = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.TrimtabError)}
    assert said - {"ValueError"} == there - {"TrimtabError"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_named_is_one_of_some_command(page):
    known = {opt for _, command in every_command() for one in command.params for opt in (*one.opts, *one.secondary_opts)} | {"--help"}
    for code in re.findall(r"`[^`\n]*`", page.read_text(encoding="utf-8")):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known, f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_is_there(page):
    known = {" ".join(words[:2]) for words, _ in every_command()}
    text = page.read_text(encoding="utf-8")
    for said in re.findall(r"`trimtab ([a-z]+)\b", text):
        assert f"trimtab {said}" in known, said


def test_options_of_jobs_named_in_python_are_there():
    for name in re.findall(r"`(\w+)=", README.read_text(encoding="utf-8")):
        assert name in {*OPTIONS, "wait", "dry_run"}, name
