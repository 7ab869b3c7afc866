"""Every command's help: its examples are command lines that click takes, its options are in sections, its page in docs/ is not stale."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from trimtab.cli import COMMANDS, every_command, main, trimtab
from trimtab.cli_options import SECTIONS
from trimtab.fit_cli import fit, plan
from trimtab.job import OPTIONS, Job

WRITE_HELP = Path(__file__).parents[2] / "docs" / "write_help.py"
EVERY = list(every_command())

WITHOUT_JSON = {
    "trimtab": "a group", "trimtab data": "a group", "trimtab image": "a group",
    "trimtab chat": "a conversation", "trimtab completion": "a script", "trimtab logs": "the run's own lines",
    "trimtab stop": "nothing on standard output", "trimtab remove": "nothing", "trimtab close": "nothing",
    "trimtab resume": "the handle alone",
}  # fmt: skip


def examples(command: click.Command) -> list[str]:
    """The lines under "Example:" that type `trimtab`."""
    after = (command.help or "").partition("Example:")[2]
    return [line.strip() for line in after.splitlines() if line.strip().startswith("trimtab")]


def parsed(line: str) -> tuple[list[str], dict[str, Any]]:
    """Let click parse a command line down to its last command, and do nothing; the words of the commands, and the last one's values.

    Raises click's UsageError.
    """
    words = shlex.split(line, comments=True)
    words = words[: next((place for place, word in enumerate(words) if word in (">", "|", ">>")), len(words))]
    named, command, rest = [words[0]], trimtab, words[1:]
    context = trimtab.make_context("trimtab", rest)
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None
        named.append(name)
        context = command.make_context(name, rest, parent=context)
    return named, context.params


@pytest.mark.parametrize(("words", "command"), EVERY, ids=[" ".join(words) for words, _ in EVERY])
def test_every_help_has_examples_that_click_takes(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key.txt").write_text("k")  # files that an example names and click looks for
    lines = examples(command)
    assert lines, f"{' '.join(words)} --help has no example"
    for line in lines:
        named, values = parsed(line)
        assert named[: len(words)] == list(words)
        if words[-1] in ("fit", "plan"):  # and what they ask for is a job
            Job(**{name: value for name, value in values.items() if name in OPTIONS and value not in (None, ())})


@pytest.mark.parametrize("line", ["trimtab statsu x", "trimtab status", "trimtab status x --jsn", "trimtab fit x --model m --method ful"])
def test_a_wrong_example_would_be_found(line):
    with pytest.raises(click.UsageError):
        parsed(line)


def test_every_command_says_its_example_and_ends_well(capsys):
    for words, _ in EVERY:
        assert main([*words[1:], "--help"]) == 0
        assert f"{' '.join(words)} ".strip() in capsys.readouterr().out.partition("Example:")[2]


def test_what_is_listed_can_be_had_as_json():
    without = {" ".join(words) for words, command in EVERY if not any(each.name == "as_json" for each in command.params)}
    assert without == set(WITHOUT_JSON) & {" ".join(words) for words, _ in EVERY}


@pytest.mark.parametrize("line", ["list", "endpoints --backend process", "models", "recipes"])
def test_a_list_as_json_is_one_value_on_standard_output_and_nothing_else(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    assert main([*line.split(), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_models_and_recipes_are_listed_for_people_and_as_json(capsys):
    for what, name in [("models", "alias"), ("recipes", "name")]:
        assert main([what, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert main([what]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(rows) >= 5
        for row in rows:
            assert any(re.match(rf"{re.escape(row[name])}\b", line) for line in lines), row


def test_the_values_of_a_recipe_are_written_as_they_are_typed(capsys):
    assert main(["recipes"]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--")]
    assert said
    for line in said:
        fit.make_context("fit", ["x", "--model", "m", *shlex.split(line.partition("  (")[0])])


@pytest.mark.parametrize("command", [fit, plan])
def test_each_option_of_a_job_stands_in_one_section(command):
    placed = [name for names in SECTIONS.values() for name in names]
    assert sorted(placed) == sorted({*(set(OPTIONS) - {"data"}), "backend", "settings"})
    said = command.get_help(click.Context(command, info_name=command.name))
    for one in command.params:
        if isinstance(one, click.Option):
            assert len(re.findall(rf"^  (?:-\w, )?{one.opts[-1]}\b(?!-)", said, re.MULTILINE)) == 1, one.name
    assert [title for title in (*SECTIONS, "Options") if f"\n{title}:\n" not in said] == []


def test_commands_are_in_the_table_under_their_own_names():
    for name in COMMANDS:
        assert trimtab.get_command(click.Context(trimtab), name).name == name


def test_the_page_of_all_helps_is_what_the_commands_say():
    done = subprocess.run([sys.executable, WRITE_HELP, "--check"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_stale_page_is_refused_with_what_to_type(tmp_path):
    (tmp_path / "help.md").write_text("# Commands\n")
    copied = tmp_path / "write_help.py"
    copied.write_text(WRITE_HELP.read_text(encoding="utf-8"), encoding="utf-8")
    stale = subprocess.run([sys.executable, copied, "--check"], capture_output=True, text=True, check=False)
    assert (stale.returncode, stale.stdout) == (1, "")
    assert stale.stderr.rstrip().endswith("make docs")
    subprocess.run([sys.executable, copied], check=True)
    subprocess.run([sys.executable, copied, "--check"], check=True)
    assert "/home/" not in (tmp_path / "help.md").read_text(encoding="utf-8")
