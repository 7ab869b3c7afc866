"""What a notebook shows: well-formed HTML without scripts, that reads on light and dark pages, and a card that follows a run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimtab import Endpoint, Run, notebook
from trimtab.artifact import Artifact
from trimtab.backends.base import RunHandle
from trimtab.backends.process import ProcessBackend
from trimtab.errors import RunFailed
from trimtab.events import Checkpoint, Choice, Finished, Phase, Progress, Step
from trimtab.layout import JobDir
from trimtab.spec import JobSpec, TrainSpec


def steps(*losses: float, of: int = 0) -> list[Step]:
    return [
        Step(
            step=n,
            of=of or len(losses),
            epoch=1.0,
            loss=loss,
            lr=1e-4,
            grad_norm=1.0,
            tokens_per_second=900.0,
            seconds_left=12.0,
            memory_mb=9,
        )
        for n, loss in enumerate(losses, 1)
    ]


def parsed(drawn: str) -> ElementTree.Element:
    """The HTML as a tree: well-formed, without anything that acts or is fetched."""
    tree = ElementTree.fromstring(drawn)
    for element in tree.iter():
        assert element.tag in {"div", "span", "code", "svg", "title", "path", "polyline", "g", "text", "details", "summary"}
        assert not [name for name in element.attrib if name.startswith("on") or name in ("href", "src", "class", "id")]
        assert "url(" not in element.get("style", "")
    return tree


def places(tree: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [line.attrib["points"].split() for line in tree.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in lines]


@pytest.fixture
def run(tmp_path):
    """A run that said something and failed, for which no model was trained."""
    folder = tmp_path / "home" / "runs" / "trim-0000aaaa"
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    backend = ProcessBackend(tmp_path / "home", python=str(python))
    handle = backend.submit(JobSpec(train=TrainSpec(model="a/model"), data=("x",)), {}, "trim-0000aaaa")
    said = [*steps(2.0, 1.5, 1.0, of=4), Finished(state="failed", reason="<b>no</b> room & no time", seconds=3.0)]
    Run(handle, backend).stop()
    JobDir(folder).events.write_text("".join(json.dumps(event.model_dump(mode="json")) + "\n" for event in said))
    return Run(handle, backend)


def test_a_run_shows_its_state_progress_last_loss_and_curve(run):
    bundle = run._repr_mimebundle_()
    tree = parsed(run._repr_html_())
    said = " ".join(tree.itertext())
    for word in ("process://trim-0000aaaa", "failed", "3/4", "1.0000", "<b>no</b> room & no time"):
        assert word in said
    assert next(bar for bar in tree.iter() if bar.get("role") == "progressbar").attrib["aria-valuenow"] == "75"
    ((first, *_, last),) = places(tree)
    assert first[0] < last[0]
    assert first[1] < last[1]  # down the page: the loss fell
    assert bundle["text/plain"] == "process://trim-0000aaaa is failed 75%: step 3/4, loss 1.0000"
    assert repr(run) == "Run('process://trim-0000aaaa')"


def test_what_cannot_be_asked_is_said_and_raises_nothing(tmp_path):
    gone = Run(RunHandle("process", "trim-0000dead"), ProcessBackend(tmp_path))
    assert "trimtab list" in " ".join(parsed(gone._repr_html_()).itertext())
    assert "there is no run" in gone._repr_mimebundle_()["text/plain"]


def test_an_artifact_shows_what_it_was_made_of_and_a_damaged_one_what_to_do(tmp_path):
    spec = TrainSpec(model="a/model", method="lora").model_dump(mode="json")
    (tmp_path / "trimtab.json").write_text(json.dumps({"spec": spec, "metrics": {"steps": 12, "first_loss": 3.25, "last_loss": 1.5}}))
    said = " ".join(parsed(Artifact(tmp_path)._repr_html_()).itertext())
    for word in ("a/model", "lora", "12", "3.25", "1.5"):
        assert word in said
    (tmp_path / "trimtab.json").write_text("{")
    assert "copy the artifact there again" in " ".join(parsed(Artifact(tmp_path)._repr_html_()).itertext())


def test_an_endpoint_shows_its_address_and_not_its_key():
    with Endpoint("http://127.0.0.1:9", api_key="sesame-9b1") as endpoint:
        drawn = endpoint._repr_html_()
    assert "sesame" not in drawn
    assert "http://127.0.0.1:9" in " ".join(parsed(drawn).itertext())


def test_few_steps_are_a_line_and_many_get_a_mean_and_stay_small():
    assert notebook.loss_curve(steps(1.0)) == ""
    assert len(places(parsed(notebook.loss_curve(steps(3.0, 2.0))))) == 1
    losses = [2.0 + math.sin(n) for n in range(50_000)]
    drawn = notebook.loss_curve(steps(*losses))
    noisy, mean = places(parsed(drawn))
    assert len(drawn) < 12_000
    assert max(y for _, y in noisy) - min(y for _, y in noisy) > 5 * (max(y for _, y in mean[20:]) - min(y for _, y in mean[20:]))


@example([1e308, -1e308, 0.0, math.nan], "\x00\ud800", "]]>", math.inf)
@given(st.lists(st.floats(), max_size=40), st.text(), st.text(), st.floats())
def test_whatever_a_run_says_the_html_is_well_formed(losses, title, state, progress):
    drawn = notebook.card(title, state, progress=progress, facts={state: title}, steps=steps(*losses), lines=[title, state], note=title)
    tree = parsed(drawn)
    for line in places(tree):
        assert all(0 <= x <= 360 and 0 <= y <= 110 for x, y in line)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_stand_out_on_light_and_dark_pages():
    colours = set(re.findall(r"#[0-9a-f]{6}", Path(notebook.__file__).read_text(encoding="utf-8")))
    assert notebook.ACCENT in colours
    for colour in colours:
        for page in ("#ffffff", "#111111"):  # JupyterLab's two
            light, dark = sorted((luminance(colour) + 0.05, luminance(page) + 0.05), reverse=True)
            assert light / dark >= 3, (colour, page)


def test_a_card_follows_a_run_that_is_waited_for():
    shown: list[dict[str, str]] = []
    with notebook.Live(shown.append) as screen:
        screen.say("run process://trim-1")
        screen.show(Phase(name="load", at=0.0, detail="the model"))
        screen.show(Progress(name="quantise", done=3, of=6))
        screen.show(Choice(name="dtype", value="bfloat16", reason="this Xeon has amx_bf16"))
        for step in steps(3.0, 2.0, 1.0):
            screen.show(step)
        screen.show(Checkpoint(step=3, path="x", reason="the end"))
        screen.show(Finished(state="succeeded", seconds=3.0))
    trees = [parsed(each["text/html"]) for each in shown]
    assert "the model" in " ".join(trees[1].itertext())
    said = " ".join(trees[-1].itertext())
    for word in ("process://trim-1", "succeeded", "3/3", "checkpoint at step 3", "this Xeon has amx_bf16"):
        assert word in said
    assert shown[-1]["text/plain"].startswith("step=3/3")


def test_quick_steps_are_not_drawn_one_by_one():
    shown: list[dict[str, str]] = []
    with notebook.Live(shown.append) as screen:
        for step in steps(*[1.0] * 500):
            screen.show(step)
    assert len(shown) < 50
    assert "500/500" in shown[-1]["text/html"]


def test_a_run_that_failed_without_a_word_is_shown_as_failed():
    shown: list[dict[str, str]] = []
    screen = notebook.Live(shown.append)
    screen.show(steps(1.0, of=3)[0])
    with pytest.raises(RunFailed), screen:
        raise RunFailed("process://trim-1", "its process ended without a word")
    said = " ".join(parsed(shown[-1]["text/html"]).itertext())
    assert "failed" in said
    assert "without a word" in said


def test_outside_of_notebooks_nothing_changes_and_ipython_is_not_loaded():
    code = "import sys, trimtab.progress as p, trimtab.notebook as n; "
    code += "print(type(p.display()).__name__, n.in_notebook(), 'IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Lines", "False", "False"]
