"""The page of a comparison: whole, offline, and deaf to what models say; the same on a terminal and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trimtab.compare import Answer, Column, Comparison, Difference, Question, Sampling, Score, to_json
from trimtab.compare_cli import compare
from trimtab.compare_page import page, write
from trimtab.compare_table import lines
from trimtab.errors import StagingError
from trimtab.probes import Probe
from trimtab.terminal import plain

HOSTILE = '</p></article><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"\'& [red]no[/]'
PROBES = {"starts": (), "questions": tuple(Probe(f"When was mill {number} built?", ("1874",)) for number in range(10)), "general": ()}


def column(label: str, text: str, right: bool, kind: str = "chat") -> Column:
    answers = (Answer("What is a mill?", text, 2.5, 0.25, 40, True, right), Answer("And a kiln?", "", 0.1, problem=f"refused {text}"))
    probes = {
        "starts": (),
        "questions": tuple(Answer(one.prompt, text, 1.0, 0.1, 5, True, right) for one in PROBES["questions"]),
        "general": (),
    }
    scores = (Score("questions", 10 * right, 10, (0.72, 1.0) if right else (0.0, 0.28)),)
    return Column(label, f"process://{label}", kind, 3.0, answers, probes, scores)  # type: ignore[arg-type]


@pytest.fixture
def found() -> Comparison:
    columns = (column(HOSTILE, HOSTILE, False), column("tuned", "A mill grinds.", True, "completion"))
    differences = (Difference("questions", 1, 0, 10, 0, 10, (0.5, 1.0)),)
    questions = (Question("What is a mill?", "", ("grinds", HOSTILE)), Question(f"And a kiln? {HOSTILE}"))
    return Comparison("2026-11-22T15:00:00+00:00", Sampling(), questions, PROBES, columns, differences, {"trimtab": "0.1.0"})


class Seen(HTMLParser):
    """Elements with their attributes, text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(found: Comparison) -> None:
    text = page(found)
    seen = Seen(text)
    names = {name for name, _ in seen.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "form", "a", "base", "svg"}
    attributes = {name for _, attributes in seen.elements for name in attributes}
    assert not {name for name in attributes if name.startswith("on")} | (attributes & {"src", "href", "action", "srcset"})
    assert "url(" not in text
    assert "@import" not in text
    policy = next(attributes["content"] for name, attributes in seen.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_what_models_say_is_text(found: Comparison) -> None:
    seen = Seen(page(found))
    assert seen.text.count(plain(HOSTILE)) >= 6, "label, answer, problem, accepted, question and probes"
    assert "\x1b" not in seen.text
    assert "\u202e" not in seen.text
    for words in ("200", "0.01", "0.9", "42", "2026-11-22 15:00:00 UTC", "✓ right", "✗ wrong", "no answer", "16.0 tokens/s", "10 of 10"):
        assert words in seen.text, words


def test_the_page_tells_nobody_where_folders_lie(found: Comparison) -> None:
    somewhere = replace(found.columns[1], where="/home/keeper/runs/trim-1/model")
    text = page(replace(found, columns=(found.columns[0], somewhere)))
    assert "trim-1/model" in text
    assert "keeper" not in text


def test_the_page_is_written_whole_or_not_at_all(found: Comparison, tmp_path: Path) -> None:
    write(found, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_text(encoding="utf-8") == page(found)
    (tmp_path / "full").mkdir()
    with pytest.raises(StagingError, match="cannot be written"):
        write(found, tmp_path / "full")  # a folder stands there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "full"]
    broken = replace(found, versions={"lone surrogate": "\ud800"})
    write(broken, tmp_path / "compare.html")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_the_page_is_told_by_the_umask(found: Comparison, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(found, tmp_path / "compare.html")
    finally:
        os.umask(before)
    assert (tmp_path / "compare.html").stat().st_mode & 0o777 == 0o666 & ~umask


def test_rows_of_models_with_one_label_are_told_apart(found: Comparison) -> None:
    twice = replace(found, columns=tuple(replace(one, label="X") for one in found.columns))
    rows = [line for line in page(twice).splitlines() if ">better<" in line]
    assert len(rows) == 1
    assert rows[0].startswith('<tr style="--mark:var(--m1)">')


def test_a_model_that_failed_has_its_reason_and_no_score(found: Comparison) -> None:
    failed = replace(found.columns[0], label="gone", scores=(), problem="the server died")
    one = replace(found, columns=(failed, found.columns[1]), differences=())
    assert "the server died" in Seen(page(one)).text
    assert "10 of 10" in page(one)
    assert any(line.split() == ["gone", "the", "server", "died"] for line in lines(one))
    assert one.problems == found.problems + 1


def test_how_much_of_an_answer_is_looked_at_is_said(found: Comparison) -> None:
    assert "accepted in the first 60 words: grinds" in page(found)
    assert "first 60 words of an answer, or the first 30" in page(found)
    assert "accepted in the first 60 words" in "\n".join(lines(found))
    assert "first 60 words" in " ".join((compare.help or "").split())


def test_a_pipe_gets_plain_lines_that_steer_no_terminal(found: Comparison) -> None:
    text = "\n".join(lines(found))
    assert "\x1b" not in text
    assert "[tuned] right  (2.5 s · 40 tokens · 16.0 tokens/s · first text after 0.25 s)" in text
    assert "  What is a mill?A mill grinds." in text, "a completion stands behind its start"
    assert "10 gained, 0 lost: +100%, +50% to +100%  better" in text
    assert "10 of 10  100%  72% to 100%" in text


def test_json_holds_everything(found: Comparison) -> None:
    told = json.loads(json.dumps(to_json(found)))
    assert told["columns"][1]["answers"][0]["tokens_per_second"] == 16
    assert told["columns"][0]["answers"][0]["text"] == HOSTILE
    assert told["sampling"] == {"max_new_tokens": 200, "temperature": 0.01, "top_p": 0.9, "seed": 42}
    assert found.problems == 2
