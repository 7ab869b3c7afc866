"""What runs, endpoints and artifacts look like in a notebook, and the progress that a notebook shows while a run is waited for.

HTML without scripts, style sheets or anything fetched: text takes the colour of the page around it, and lines and bars have colours
that stand at 3 : 1 or more on white as on black (WCAG 2.2, 1.4.11), so one form serves light and dark themes. It is well-formed XML, too.
"""

from __future__ import annotations

import html
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trimtab.errors import RunFailed, TrimtabError
from trimtab.events import Event, Finished, Phase, Progress, Step
from trimtab.progress import clock, sentence

if TYPE_CHECKING:
    from trimtab.artifact import Artifact
    from trimtab.endpoint import Endpoint
    from trimtab.run import Run

ACCENT = "#3b82f6"
_COLOURS = {"succeeded": "#16a34a", "failed": "#dc2626", "stopped": "#b45309", "running": ACCENT, "serving": "#16a34a"}
_GREY = "#7b7b7b"
_MUTED = "opacity:0.75"

_WIDTH, _HEIGHT = 360, 110  # of the curve, and what its labels take of it
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 18
_POINTS = 180  # of a line at most: two pixels each
_FEW = 20  # steps that need no running mean

_NO_LOSS = 1e30  # from here on, and of NaN and infinity, there is nothing to draw

_PAUSE = 0.3  # seconds between two drawings
_LINES = 200  # sentences that are kept


def card(
    title: str,
    state: str,
    *,
    progress: float | None = None,
    facts: Mapping[str, str] | None = None,
    steps: Sequence[Step] = (),
    lines: Sequence[str] = (),
    note: str = "",
) -> str:
    """One box: a title and a state, a bar of `progress` (0 to 1), facts by name, the loss of `steps`, the last of `lines`, a note."""
    colour = _COLOURS.get(state, _GREY)
    parts = [
        f'<div style="display:flex;justify-content:space-between;gap:1em"><code>{_text(title)}</code>'
        f'<span style="white-space:nowrap"><span style="color:{colour}">\u25cf</span> {_text(state)}</span></div>'
    ]
    if progress is not None:
        share = min(1.0, max(0.0, progress if math.isfinite(progress) else 0.0))
        parts.append(
            f'<div role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share * 100:.0f}" '
            'style="height:8px;margin:6px 0;border-radius:4px;overflow:hidden;background:rgba(127,127,127,0.3)">'
            f'<div style="height:8px;width:{share:.1%};background:{colour}"></div></div>'
        )
    if facts:
        said = " ".join(
            f'<span style="display:inline-block;margin-right:1.2em"><span style="{_MUTED}">{_text(name)}</span> {_text(value)}</span>'
            for name, value in facts.items()
            if value
        )
        parts.append(f"<div>{said}</div>")
    if len(steps) > 1:
        parts.append(loss_curve(steps))
    if note:
        parts.append(f'<div style="margin-top:4px;white-space:pre-wrap">{_text(note)}</div>')
    if lines:
        parts.append(
            f'<details><summary style="{_MUTED}">{_text(lines[-1])}</summary>'
            f'<div style="white-space:pre-wrap;font-family:monospace;font-size:90%">{_text(chr(10).join(lines))}</div></details>'
        )
    box = "max-width:560px;padding:8px 12px;margin:4px 0;border:1px solid rgba(127,127,127,0.45);border-radius:6px;line-height:1.5"
    return f'<div style="{box}">{"".join(parts)}</div>'


def loss_curve(steps: Sequence[Step]) -> str:
    """The loss of each step as an inline SVG; from 20 steps on thin, with its running mean over it. Losses that are no numbers are gaps."""
    points = [(one.step, one.loss) for one in steps if abs(one.loss) < _NO_LOSS]
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    wide, tall = max(1, last - first), (high - low) or 1.0

    def line(some: Sequence[tuple[int, float]], style: str) -> str:
        places = " ".join(
            f"{_LEFT + (step - first) / wide * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_TOP + (high - loss) / tall * (_HEIGHT - _TOP - _BOTTOM):.1f}"
            for step, loss in _thinned(some)
        )
        return f'<polyline points="{places}" fill="none" stroke="{ACCENT}" stroke-linejoin="round" {style}/>'

    lines = [line(points, 'stroke-width="1.6"')]
    if len(points) >= _FEW:
        lines = [line(points, 'stroke-width="1" opacity="0.4"'), line(_smoothed(points), 'stroke-width="2"')]
    base = _HEIGHT - _BOTTOM
    said = f"loss {points[0][1]:.3f} at step {first}, {points[-1][1]:.3f} at step {last}"
    labels = [
        (_LEFT - 4, _TOP + 8, "end", f"{high:.3g}"),
        (_LEFT - 4, base, "end", f"{low:.3g}"),
        (_LEFT, _HEIGHT - 5, "start", f"step {first}"),
        (_WIDTH - _RIGHT, _HEIGHT - 5, "end", f"{last}"),
        (_WIDTH / 2, _HEIGHT - 5, "middle", "loss"),
    ]
    texts = "".join(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{_text(words)}</text>' for x, y, anchor, words in labels)
    return (
        f'<svg role="img" aria-label="{_text(said)}" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'style="display:block;margin-top:6px;max-width:100%"><title>{_text(said)}</title>'
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}" fill="none" stroke="currentColor" opacity="0.4"/>{"".join(lines)}'
        f'<g font-size="10" fill="currentColor" opacity="0.8">{texts}</g></svg>'
    )


def of_step(step: Step | None) -> dict[str, str]:
    """Facts of a run's last step, for a card."""
    if step is None:
        return {}
    left = clock(step.seconds_left) if step.step < step.of else ""
    speed = f"{step.tokens_per_second:,.0f} tokens/s" if step.tokens_per_second else ""
    return {"step": f"{step.step}/{step.of}", "loss": f"{step.loss:.4f}", "left": left, "speed": speed}


class Live:
    """A `progress.Display` that draws one card again and again where the notebook's cell writes.

    `publish` takes what to show, by media type, in place of what it got before.
    """

    def __init__(self, publish: Callable[[dict[str, str]], None] | None = None) -> None:
        self._publish = publish or _in_place()
        self._lines: list[str] = []
        self._steps: dict[int, Step] = {}
        self._title, self._state, self._share = "trimtab", "", 0.0
        self._counted = ""
        self._drawn = -math.inf

    def say(self, text: str) -> None:
        self._lines = [*self._lines, text][-_LINES:]
        if text.startswith("run ") and "://" in text:
            self._title = text.removeprefix("run ")
        self._draw(now=True)  # sentences are few, and after one it may be quiet for long

    def show(self, event: Event) -> None:
        match event:
            case Step():
                self._steps[event.step] = event
                self._state, self._share, self._counted = "running", event.step / event.of, ""
                self._draw()
                return
            case Progress():
                self._share, self._counted = event.done / max(1, event.of), f"{event.name} {event.done:,}/{event.of:,}"
                self._draw()
                return
            case Phase():
                self._state, self._counted = event.name, ""
                self._share = self._share if self._steps else 0.0
            case Finished():
                self._state = event.state
        if text := sentence(event):
            self.say(text)

    def _draw(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._drawn < _PAUSE:
            return
        self._drawn = time.monotonic()
        steps = [self._steps[number] for number in sorted(self._steps)]
        facts = {"": self._counted} | of_step(steps[-1] if steps else None)
        drawn = card(self._title, self._state, progress=self._share, facts=facts, steps=steps, lines=self._lines)
        text = self._counted or (self._lines[-1] if self._lines else "")
        self._publish({"text/html": drawn, "text/plain": steps[-1].line() if steps else text})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RunFailed):  # which it may have been without a last word of its own
            self._state = "failed"
            self._lines.append(error.reason)
        if self._lines or self._steps:
            self._draw(now=True)


def _in_place() -> Callable[[dict[str, str]], None]:
    """What shows something in the running cell, each time in place of the last."""
    handle: Any = None

    def publish(data: dict[str, str]) -> None:
        nonlocal handle
        if handle is None:
            handle = importlib.import_module("IPython.display").display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)

    return publish


def of_run(run: Run) -> dict[str, str]:
    """A run as it stands, by media type: `text/html` with its loss curve, `text/plain` as one line. Raises nothing."""
    try:
        status = run.status()
    except TrimtabError as exc:
        return {"text/plain": f"{run!r}: {exc}", "text/html": card(str(run.handle), "not known", note=str(exc))}
    try:
        steps = run.metrics()
    except TrimtabError:  # a place that hands on no events, or not now
        steps = []
    facts = of_step(status.step)
    if status.done:
        facts.pop("left", None)
    drawn = card(str(run.handle), status.state, progress=status.progress, facts=facts, steps=steps, note=status.reason)
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if value and name != "speed")
    return {"text/plain": f"{run.handle} is {status.state} {status.progress:.0%}" + (f": {said}" if said else ""), "text/html": drawn}


def of_endpoint(endpoint: Endpoint) -> str:
    """An endpoint as it stands, as HTML, without its key. Raises nothing."""
    handle, facts, state, note = endpoint.handle, {"address": endpoint.url}, "", ""
    if handle is not None:
        try:
            found = endpoint.status()
            state, note = found.state, found.reason
            facts |= {"model": found.title, "costs": f"${found.usd_per_hour:.2f} an hour" if found.usd_per_hour is not None else ""}
            facts |= {"ends": f"{found.expires.astimezone():%Y-%m-%d %H:%M}" if found.expires else ""}
        except TrimtabError as exc:
            state, note = "not known", str(exc)
    facts |= {"key": "asked for" if endpoint.api_key else ""}
    return card(str(handle or endpoint.url), state, facts=facts, note=note)


def of_artifact(artifact: Artifact) -> str:
    """What a run left, as HTML, from its manifest. Raises nothing."""
    facts, note = {}, ""
    try:
        spec, metrics = artifact.spec, artifact.manifest.get("metrics") or {}
        facts = {"model": spec.model, "method": spec.method, "recipe": spec.recipe}
        for name, key in (("steps", "steps"), ("first loss", "first_loss"), ("last loss", "last_loss")):
            if isinstance(value := metrics.get(key), int | float):
                facts[name] = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    except TrimtabError as exc:
        note = str(exc)
    return card(str(artifact.path), "artifact", facts=facts, note=note)


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook. IPython is not imported for that: there it is already."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _text(words: str) -> str:
    # a page is no place for control characters; XML refuses them even escaped
    return html.escape("".join(each for each in words if each in "\n\t" or each.isprintable() or each == "\xa0"))


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most so many points that a line needs no more: of each stretch its lowest and its highest, in order."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(len(points) / (_POINTS // 2))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda each: each[1]), max(stretch, key=lambda each: each[1])})
    return kept


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The exponential running mean over about an eighth of the points, 20 at most, bias-corrected as Adam's moments are."""
    keep = 1 - 1 / min(20.0, max(2.0, len(points) / 8))
    mean, found = 0.0, []
    for number, (step, loss) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * loss
        found.append((step, mean / (1 - keep**number)))
    return found
