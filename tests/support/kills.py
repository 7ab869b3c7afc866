"""Runs that are killed at random moments and resumed, with nothing lost: the same for every backend on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.backends.run_folder import LocalRuns
from trimtab.events import Checkpoint, Event, Phase, Step
from trimtab.layout import JobDir
from trimtab.run import Run
from trimtab_runtime import manifest

PATIENCE = 300.0

# where in a life a kill comes: what is waited for, how often it is drawn, and at most how many seconds after it
MOMENTS = {"begin": (3, 1.0), "start": (3, 3.0), "load": (2, 1.0), "train": (2, 0.1), "step": (8, 0.1), "checkpoint": (6, 0.05)}


@dataclass
class Killer:
    """Kills the lives of a run by `kill`, and checks after each what must hold at any moment."""

    run: Run
    backend: LocalRuns
    kill: Callable[[], None]
    draw: random.Random
    every: int  # steps from checkpoint to checkpoint
    late: int  # from this step on lives are killed before they train: where kills come late the run must not end first
    said: list[str] = field(default_factory=list)

    @property
    def job(self) -> JobDir:
        return JobDir(self.backend.home / "runs" / self.run.handle.id)

    def one(self, where: str | None = None, within: float | None = None) -> bool:
        """Kill the present life after an event of the kind `where`, `within` so many seconds (None: any); then resume the run.

        False where the kill came too late, after the last thing that a life does.
        """
        events = self.run.events()
        if where is None:
            where = self.draw.choices(list(MOMENTS), weights=[weight for weight, _ in MOMENTS.values()])[0]
            where = where if _last(events) < self.late else "begin"
        after = self.draw.uniform(0, MOMENTS[where][1] if within is None else within)
        self._wait(where)
        time.sleep(after)
        self.kill()
        _until(lambda: self.run.status().done, "its end")
        if where == "save" and self.run.status().state == "succeeded":
            return False
        assert self.run.status().state == "failed", "it ended before it was killed: kill it earlier"
        self._check(events)
        told = self.run.events()
        phase = next((event.name for event in reversed(told[len(events) :]) if isinstance(event, Phase)), "nothing said")
        self.said.append(f"{len(self.said) + 1}. {after:.3f} s after {where}: {phase}, step {_last(told)}")
        self.run.resume()
        return True

    def _wait(self, where: str) -> None:
        position, look = self._position, 0.0
        while where != "begin":
            fresh, position = self.backend.events(self.run.handle, position)
            if any(_is(event, where) for event in fresh):
                return
            if time.monotonic() > look:  # seldom: it reads many events
                assert not self.run.status().done, f"it ended before there was a {where}: {self.run.status().reason}"
                look = time.monotonic() + 1.0
            time.sleep(0.003)

    def _check(self, before: list[Event]) -> None:
        events = self.run.events()
        told = [event.step for event in events if isinstance(event, Checkpoint)]
        there = whole(self.job.checkpoints)
        assert not told or there[-1] >= told[-1], f"of the checkpoints told, {told[-1]} is lost; there are {there}"
        again = [event.step for event in events[len(before) :] if isinstance(event, Step)]
        if again:
            assert again == list(range(again[0], again[-1] + 1))
            assert 0 <= _last(before) - (again[0] - 1) <= self.every, "more than one save interval was repeated, or a step was left out"

    @property
    def _position(self) -> int:
        return self.job.events.stat().st_size if self.job.events.exists() else 0


def lost_nothing(run: Run, straight: Run) -> None:
    """Both runs of one job have told the same losses, and left the same artifact byte for byte."""
    assert run.wait(PATIENCE).state == straight.wait(PATIENCE).state == "succeeded"
    assert losses(run) == losses(straight)
    assert run.artifact() == straight.artifact()
    for name in ("adapter_model.safetensors", "README.md"):
        assert (run.artifact().path / name).read_bytes() == (straight.artifact().path / name).read_bytes()


def losses(run: Run) -> dict[int, set[str]]:
    """Every loss that was told of each step, bit for bit: in all lives one and the same, or the step was not repeated but another."""
    found: dict[int, set[str]] = {}
    for event in run.events():
        if isinstance(event, Step):
            found.setdefault(event.step, set()).add(event.loss.hex())
    return found


def whole(folder: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if manifest.problem(path) is None)


def _last(events: list[Event]) -> int:
    return max((event.step for event in events if isinstance(event, Step)), default=0)


def _is(event: Event, where: str) -> bool:
    match event:
        case Phase():
            return event.name == where
        case Step():
            return where == "step"
        case Checkpoint():
            return where == "checkpoint"
    return False


def _until(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)
