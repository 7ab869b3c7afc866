"""What `trimtab data preview` shows of a packed row."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.style import Style

from support.job_tree import PAGES, make_job
from trimtab.data_cli import data
from trimtab.errors import StagingError
from trimtab.layout import JobDir
from trimtab.preview import SHADES, Shades, coloured, lines, print_preview
from trimtab.spec import TrainSpec
from trimtab_runtime.prepare import prepare
from trimtab_runtime.preview import preview
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.tokenizer import Tokenizer

TALK = {
    "form": "chat",
    "messages": [
        {"role": "user", "content": "Who keeps the key? 🗝️"},
        {"role": "assistant", "content": "The keeper\n\tdoes — always.\x1b[2J"},
    ],
    "source": "talks.jsonl:1",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    pages = {**PAGES, "The Brine Mill": PAGES["The Brine Mill"] * 3}
    made = make_job(tmp_path_factory.mktemp("job"), tiny_model, pages, max_seq_len=100, views=("document",))
    records = [TALK, {"form": "completion", "prompt": "When?\n", "completion": "At dawn.", "source": "faq.jsonl:1"}]
    (made.channel("documents") / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(made, TrainSpec.from_hyperparameters(json.loads(made.hyperparameters.read_text())), lambda line: None)
    return made


def look(job: JobDir, **asked: int) -> dict[str, Any]:
    job.preview_asked.write_text(json.dumps(asked))
    found = preview(job)
    assert json.loads(job.preview.read_text()) == found
    return found


@given(st.text(max_size=60))
def test_the_texts_of_tokens_together_are_the_text(tiny_model: Path, text: str) -> None:
    tokenizer = tokenizers.setdefault(tiny_model, Tokenizer(tiny_model)) if tiny_model not in tokenizers else tokenizers[tiny_model]
    ids = tokenizer.text(text)
    found = tokenizer.pieces(ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


tokenizers: dict[Path, Tokenizer] = {}


def test_a_row_is_shown_token_by_token(job: JobDir, tiny_model: Path) -> None:
    rows, tokenizer = PackedRows(job.channel("train")), Tokenizer(tiny_model)
    for number in range(1, len(rows) + 1):
        found = look(job, row=number)
        row = rows[number - 1]
        assert (found["row"], found["rows"], found["row_tokens"]) == (number, len(rows), 100)
        assert [token for one in found["samples"] for token in one["ids"]] == row.tokens.tolist()
        assert [len(one["ids"]) for one in found["samples"]] == row.lengths
        targets = row.learned.copy()
        targets[np.cumsum([0, *row.lengths[:-1]])] = False  # nothing predicts a sample's first token
        assert [flag for one in found["samples"] for flag in one["learned"]] == targets.tolist()
        for one in found["samples"]:
            written = [text for text, control in zip(one["texts"], one["control"], strict=True) if not control]
            assert "".join(written) == tokenizer.decode(one["ids"])


def test_a_sample_is_found_by_its_place_in_the_data(job: JobDir) -> None:
    found = [look(job, sample=number) for number in range(1, 7)]
    assert [one["samples"][0]["kind"] for one in found] == ["document"] * 4 + ["chat", "completion"]
    assert [{piece["sample"] for piece in one["samples"]} for one in found] == [{number} for number in range(1, 7)]
    mill = "".join(text for piece in found[0]["samples"] for text in piece["texts"])
    assert mill.startswith("The Brine Mill\nThe Brine Mill was built in 1874"), "pieces of a long one in their order"
    assert len(found[0]["samples"]) > 1
    assert "learned" not in "".join(found[4]["samples"][0]["texts"])


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"row": 99}, "no row 99: give  --row N"),
        ({"row": 0}, "no row 0: give  --row N  with N from 1"),
        ({"sample": 7}, "no sample 7: .* from 1 to 6"),
        ({"sample": 0}, "no sample 0: .* from 1 to 6"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(job: JobDir, asked: dict[str, int], reason: str) -> None:
    with pytest.raises(StagingError, match=reason):
        look(job, **asked)


def test_plain_lines_tell_learned_from_context_and_steer_no_terminal(job: JobDir) -> None:
    shown = "\n".join(lines(look(job, sample=5)))
    assert "-- sample 5, chat: " in shown
    assert "⟦The│" in shown.replace("⟦The keeper", "⟦The│ keeper")
    assert "<|im_end|>⟧│⏎" in shown
    assert "\x1b" not in shown
    assert "◌│" in shown
    assert shown.splitlines()[-1] == "⟦learned⟧ and context; │ between tokens, ⏎ a line's end, ⇥ a tab, ◌ part of a letter"
    assert shown.replace("│", "").count("Who keeps the key?") == 1


def test_colours_tell_learned_from_context_and_one_token_from_the_next(job: JobDir) -> None:
    found = look(job, sample=5)
    shown = list(coloured(found, 40, SHADES["truecolor"]))
    assert all(line.cell_len <= 40 for line in shown[2:-1])
    assert "\x1b" not in "".join(line.plain for line in shown)
    for learned, shades in ((True, ("#1b6e3c", "#2f8f57")), (False, ("#2a2a2a", "#3a3a3a"))):
        (one,) = found["samples"]
        text = "".join(text for text, flag in zip(one["texts"], one["learned"], strict=True) if flag is learned)
        spans = [span for line in shown[2:-1] for span in line.spans if any(shade in str(span.style) for shade in shades)]
        assert sum(span.end - span.start for span in spans) >= len(text.replace("\x1b", "")) > 0
        assert all(any(shade in str(span.style) for span in spans) for shade in shades)


def test_every_kind_of_terminal_has_green_for_what_is_learned_and_two_shades_of_all() -> None:
    for colours, shades in SHADES.items():
        backgrounds = {name: [Style.parse(style).bgcolor for style in getattr(shades, name)] for name in Shades._fields}
        shown = {
            name: [colour.downgrade(Console(color_system=colours)._color_system) for colour in each] for name, each in backgrounds.items()
        }
        assert shown == backgrounds, f"{colours}: the terminal has these colours as they are"
        assert len({colour.get_ansi_codes(foreground=False) for each in shown.values() for colour in each}) == 6
        for colour in shown["learned"]:
            red, green, blue = colour.get_truecolor()
            assert green > max(red, blue) + 40


@pytest.mark.parametrize(
    ("variables", "green"),
    [
        ({"TERM": "xterm"}, b"\x1b[30;42m"),
        ({"TERM": "xterm-256color"}, b"48;5;22m"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, b"48;2;27;110;60m"),
        ({"TERM": "dumb"}, "⟦".encode()),
        ({"TERM": "xterm", "PYTHONIOENCODING": "latin-1"}, b"[["),
    ],
)
def test_a_terminal_gets_what_it_can_show(tmp_path: Path, variables: dict[str, str], green: bytes) -> None:
    assert green in _printed(tmp_path, terminal=True, **variables)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_output_without_the_signs_gets_ascii(tmp_path: Path, encoding: str) -> None:
    said = _printed(tmp_path, terminal=False, PYTHONIOENCODING=encoding).decode(encoding)
    assert "[[ the|ke?per \\n\n]]" in said
    assert said.splitlines()[-1].startswith("[[learned]] and context; | between tokens, \\n a line's end")


def _printed(folder: Path, *, terminal: bool, **variables: str) -> bytes:
    """What another process prints of one sample, on a terminal or into a pipe."""
    one = {"kind": "chat", "row": 1, "sample": 1, "ids": [1, 2, 3], "texts": ["Who", " the", "ke\u0113per \n"]}
    one |= {"learned": [0, 1, 1], "taught": [0, 0, 0], "control": [0, 0, 0]}
    found = {"row": 1, "rows": 1, "row_tokens": 9, "samples": [one]}
    code = "import json, sys; from trimtab.preview import print_preview; print_preview(json.loads(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLORTERM", "FORCE_COLOR")}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, json.dumps(found)]
    with (folder / "said").open("wb") as file:
        child = subprocess.Popen(command, stdout=theirs if terminal else file, env=environment | variables)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody holds any more
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert child.wait(30) == 0
    return seen if terminal else (folder / "said").read_bytes()


def test_no_colours_go_into_a_pipe(job: JobDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = look(job, row=1)
    assert not sys.stdout.isatty()
    print_preview(found)
    assert capsys.readouterr().out == "\n".join(lines(found)) + "\n"


def test_the_command_prepares_and_prints_a_row_and_the_numbers_of_it(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mill.md").write_text("# The mill\n\nThe mill was built in 1874. It grinds salt and barley.")
    command = ["preview", str(notes), "--model", str(tiny_model), "--questions", "1"]
    shown = CliRunner().invoke(data, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "⟦" in shown.stdout
    assert "question: " in shown.stdout
    assert "replay: not made up for a preview" in shown.stderr
    numbers = CliRunner().invoke(data, [*command, "--sample", "1", "--json"], catch_exceptions=False)
    found = json.loads(numbers.stdout)
    assert "prepared before" in numbers.stderr
    assert found["samples"][0]["kind"] == "document"
    assert CliRunner().invoke(data, [*command, "--sample", "1", "--row", "1"]).exit_code == 2
