"""What a person sees while a run goes on: a bar on a terminal, a card in a notebook, plain lines elsewhere, nothing when not asked for."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from trimtab.events import Checkpoint, Choice, Event, Finished, Phase, Progress, Step
from trimtab.terminal import plain

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0
FEW_STEPS = 30  # so few that each is a line


class Display(Protocol):
    """Shows events and sentences. A context manager: what it drew is tidied up at its end."""

    def say(self, text: str) -> None: ...

    def show(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def display(*, enabled: bool = True) -> Display:
    """A card in a notebook, a bar when the error stream is a terminal, else plain lines on it; standard output stays free for results."""
    if not enabled:
        return Silent()
    if "IPython" in sys.modules:
        from trimtab.notebook import Live, in_notebook

        if in_notebook():
            return Live()
    return Bar() if sys.stderr.isatty() else Lines()


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    def show(self, event: Event) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Lines(Silent):
    """A line for each thing said; of steps and counts every one when they are few, else one in a few seconds and the last."""

    def __init__(self) -> None:
        self._due = 0.0

    def say(self, text: str) -> None:
        print(plain(text), file=sys.stderr, flush=True)

    def show(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Step | Progress):
            done, last = (event.step, event.step == event.of) if isinstance(event, Step) else (event.done, event.done == event.of)
            few = isinstance(event, Step) and event.of <= FEW_STEPS
            if not (few or last or done == 1 or now >= self._due):
                return
            self._due = now + SECONDS_BETWEEN_LINES
        text = sentence(event)
        if text:
            self.say(text)


class Bar:
    """One bar a phase: steps or items done, loss, tokens per second and time left. Sentences scroll above it."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._name = ""

    def say(self, text: str) -> None:
        self._open().console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        if isinstance(event, Step):
            facts = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s  {clock(event.seconds_left)} left"
            self._move("train", event.step, event.of, facts)
        elif isinstance(event, Progress):
            self._move(event.name, event.done, event.of, "")
        elif text := sentence(event):
            self.say(text)
            if isinstance(event, Phase):
                self._move(event.name, 0, None, "")

    def _open(self) -> RichProgress:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[facts]}"), console=Console(stderr=True), transient=True)
            self._bar.start()
        return self._bar

    def _move(self, name: str, done: int, of: int | None, facts: str) -> None:
        bar = self._open()
        if self._task is None or name != self._name:
            if self._task is not None:
                bar.remove_task(self._task)
            self._name, self._task = name, bar.add_task(name, total=of, facts=facts)
        bar.update(self._task, completed=done, total=of, facts=facts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def sentence(event: Event) -> str:
    """An event as a person reads it; empty for what nobody needs to read."""
    match event:
        case Phase():
            return f"{event.name}: {event.detail}" if event.detail else event.name
        case Choice():
            return f"{event.name} {event.value}: {event.reason}"
        case Progress():
            return f"{event.name} {event.done}/{event.of}"
        case Step():
            facts = f"loss {event.loss:.4f}, {event.tokens_per_second:,.0f} tokens/s, {clock(event.seconds_left)} left"
            return f"step {event.step}/{event.of}: {facts}"
        case Checkpoint():
            return f"checkpoint at step {event.step}: {event.reason}"
        case Finished():
            return f"{event.state} after {clock(event.seconds)}" + (f": {event.reason}" if event.reason else "")


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `2:03:04`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
