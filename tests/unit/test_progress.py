"""What a person sees: every event has its line, many steps do not flood, and a terminal gets a bar."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from trimtab.events import Checkpoint, Choice, Finished, Phase, Progress, Step
from trimtab.progress import Bar, Lines, Silent, clock, display, sentence


def step(number: int, of: int) -> Step:
    return Step(step=number, of=of, epoch=1, loss=2.5, lr=1e-3, grad_norm=1, tokens_per_second=1234.5, seconds_left=75, memory_mb=9)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Choice(name="dtype", value="bfloat16", reason="this Xeon has amx_bf16"), "dtype bfloat16: this Xeon has amx_bf16"),
        (Phase(name="load", at=0), "load"),
        (Phase(name="train", at=0, detail="30 steps"), "train: 30 steps"),
        (Progress(name="generate", done=3, of=8), "generate 3/8"),
        (step(4, 30), "step 4/30: loss 2.5000, 1,234 tokens/s, 1:15 left"),
        (Checkpoint(step=5, path="step-5", reason="every 5 steps"), "checkpoint at step 5: every 5 steps"),
        (Finished(state="succeeded", seconds=3723), "succeeded after 1:02:03"),
        (Finished(state="failed", seconds=2, reason="no memory"), "failed after 0:02: no memory"),
    ],
)
def test_an_event_is_a_line_for_people(event, line):
    assert sentence(event) == line


def test_what_data_is_called_steers_no_terminal(capsys):
    name = "train\x1b]0;mine\x07\x1b[2Jx\u202e.csv"
    with Lines() as lines, Bar() as bar:
        for screen in (lines, bar):
            screen.say(f"data: {name}")
            screen.show(Phase(name="read", at=0, detail=name))
    said = capsys.readouterr().err
    assert "\x1b]0;" not in said
    assert said.count("train]0;mine[2Jx.csv") == 4
    assert "\u202e" not in said


def test_few_steps_are_all_shown_and_many_are_not(capsys):
    with Lines() as screen:
        for number in range(1, 7):
            screen.show(step(number, 6))
    assert len(capsys.readouterr().err.splitlines()) == 6
    with Lines() as screen:
        for number in range(1, 1001):
            screen.show(step(number, 1000))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/1000", "step 1000/1000"]


def test_nothing_is_shown_when_not_asked_for(capsys):
    with display(enabled=False) as screen:
        assert isinstance(screen, Silent)
        screen.say("x")
        screen.show(step(1, 2))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left():
    code = (
        "from trimtab.progress import display; from trimtab.events import Phase, Step\n"
        "with display() as screen:\n"
        "    screen.show(Phase(name='train', at=0, detail='[30] steps'))\n"
        "    for n in (1, 2):\n"
        "        facts = dict(epoch=1, loss=2.5, lr=0, grad_norm=1, tokens_per_second=1234, seconds_left=75, memory_mb=9)\n"
        "        screen.show(Step(step=n, of=3, **facts))\n"
        "    screen._bar.refresh()\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert child.wait(20) == 0
    text = seen.decode()
    assert "train: [30] steps" in text
    for fact in ("2/3", "loss 2.500", "1,234 tokens/s", "1:15 left"):
        assert fact in text


def test_time_is_written_like_a_clock():
    assert [clock(seconds) for seconds in (-3, 0.4, 59.6, 3600)] == ["0:00", "0:00", "1:00", "1:00:00"]
