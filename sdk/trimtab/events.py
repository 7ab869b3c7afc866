"""What a run says of itself: one JSON line an event, and for each step a line for people and for metric patterns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class Phase(_Event):
    """The run begins something: `generate`, `prepare`, `load`, `train`, `save`."""

    event: Literal["phase"] = "phase"
    name: str
    at: float
    detail: str = ""


class Progress(_Event):
    """How far a phase is that has no steps: `done` of `of` items."""

    event: Literal["progress"] = "progress"
    name: str
    done: int
    of: int


class Choice(_Event):
    """An automatic choice and its reason."""

    event: Literal["choice"] = "choice"
    name: str
    value: str
    reason: str


class Step(_Event):
    """One optimiser step. `seconds_left` is an estimate; `memory_mb` the process' peak resident set."""

    event: Literal["step"] = "step"
    step: int
    of: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    memory_mb: int

    def line(self) -> str:
        """For people, and for metric patterns such as `loss=([0-9.eE+-]+)`."""
        return (
            f"step={self.step}/{self.of} epoch={self.epoch:.2f} loss={self.loss:.4f} lr={self.lr:.3e} grad_norm={self.grad_norm:.3f} "
            f"tokens_per_second={self.tokens_per_second:.0f} seconds_left={self.seconds_left:.0f} memory_mb={self.memory_mb}"
        )


class Checkpoint(_Event):
    """A complete checkpoint exists for this step."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    reason: str


class Finished(_Event):
    """The run's last word. `state` is `succeeded`, `stopped` or `failed`."""

    event: Literal["finished"] = "finished"
    state: Literal["succeeded", "stopped", "failed"]
    reason: str = ""
    seconds: float


Event = Phase | Progress | Choice | Step | Checkpoint | Finished
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse(line: str) -> Event | None:
    """The event on a line, or None for a line that is none (a half-written last line, a newer kind)."""
    try:
        return _EVENT.validate_json(line)
    except ValidationError:
        return None


def read(path: Path) -> Iterator[Event]:
    """Every event of a file, in order; an absent file has none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            event = parse(line)
            if event is not None:
                yield event


def read_from(path: Path, start: int) -> tuple[list[Event], int]:
    """The complete events of a file from byte `start` on, and the byte to read from next time; an absent file has none."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    end = data.rfind(b"\n") + 1
    events = [event for line in data[:end].split(b"\n") if (event := parse(line.decode(errors="replace"))) is not None]
    return events, start + end


class EventLog:
    """Appends events to a file, each flushed as it comes, so that a killed run loses none; `also` gets each line, too."""

    def __init__(self, path: Path, also: Callable[[str], None] | None = None) -> None:
        self._also = also
        path.parent.mkdir(parents=True, exist_ok=True)
        # the line a kill cut short stays unreadable by itself; it must not swallow the next one
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._file.write("\n")

    def write(self, event: Event) -> None:
        line = json.dumps(event.model_dump(mode="json"))
        self._file.write(line + "\n")
        if self._also is not None:
            self._also(line)

    def close(self) -> None:
        self._file.close()
