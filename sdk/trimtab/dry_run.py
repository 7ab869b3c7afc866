"""Two steps of a job, run for real where the job would run, to know what all of its steps would take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.backends.base import Backend, Removable, Reporting, RunHandle, RunState, Typed
from trimtab.errors import BackendError, RunNotFound, TrimtabError
from trimtab.events import Event, Phase, Step
from trimtab.plan import Plan
from trimtab.progress import Display, clock
from trimtab.run import Run
from trimtab.spec import JobSpec

STEPS = 2  # the first warms caches and allocator up, the second is like those to come
LONGEST_MINUTES = 60.0  # of a trial's steps: it ends by itself, whatever the job's own limits are


@dataclass(frozen=True)
class DryRun:
    """What two steps took, and what the whole job would take by them.

    `start_seconds` pass between the request and the first step: the start of the place, the loading of the model, and for qlora its
    quantisation. `first_step_seconds` is a warm-up; `seconds_per_step` and `tokens_per_second` are the second step's (of a job
    with a single step, that one's). `peak_memory_mb` (2^20 bytes) is the training process' peak resident set in these steps; rows of
    longer samples need more than others, so `memory_mb` is that or the plan's estimate, whichever is more. The whole job has `steps`
    optimiser steps which see `tokens` tokens, each pass counted; `seconds` is start and steps together, cut off at max_minutes;
    checkpoints and the writing of the artifact come on top.
    """

    start_seconds: float
    first_step_seconds: float
    seconds_per_step: float
    tokens_per_second: float
    peak_memory_mb: int
    memory_mb: int
    steps: int
    tokens: int
    seconds: float

    def lines(self) -> list[str]:
        """What a person wants to know, a line each."""
        whole = self.start_seconds + self.steps * self.seconds_per_step
        lines = [
            f"start      {self.start_seconds:,.1f} s until the first step",
            f"step       {self.seconds_per_step:,.3g} s, after a first one of {self.first_step_seconds:,.3g} s",
            f"speed      {self.tokens_per_second:,.0f} tokens/s",
            f"memory     {self.peak_memory_mb:,} MB at its peak (the training process' resident set)",
            f"whole job  {clock(self.seconds)}: {self.steps:,} steps, {self.tokens:,} tokens",
        ]
        if self.memory_mb > self.peak_memory_mb:
            lines[3] += f"; rows of longer samples may take it to {self.memory_mb:,}"
        if self.seconds < whole:
            lines[-1] += f"; all of them would take {clock(whole)}, max_minutes ends it before"
        return lines


def trial_of(spec: JobSpec) -> JobSpec:
    """The same job, ended after two steps or an hour of them, without checkpoints on the way."""
    ends = {"max_steps": STEPS, "max_minutes": LONGEST_MINUTES, "save_every_steps": STEPS, "save_every_minutes": 1e6}
    return spec.model_copy(update={"train": spec.train.model_copy(update=ends)})


def projection(events: Sequence[Event], plan: Plan, *, submitted: float, max_minutes: float | None) -> DryRun:
    """What a trial run's events say of the whole job. `submitted` is when it was asked for, in seconds since the epoch.

    Raises BackendError for a trial without both a loop's beginning and end, or without steps.
    """
    began = next((event.at for event in events if isinstance(event, Phase) and event.name == "train"), None)
    ended = next((event.at for event in events if isinstance(event, Phase) and event.name == "save"), None)
    steps = [event for event in events if isinstance(event, Step)]
    if began is None or ended is None or not steps:
        raise BackendError("the trial run did not say when its steps began and ended: its trimtab is another version; use the same one")
    first = steps[0].seconds_left or ended - began  # of two steps, what is left after the first is estimated to take as long as it did
    per_step = max(0.0, ended - began - first) if len(steps) > 1 else first
    peak = max(step.memory_mb for step in steps)
    start = max(0.0, began - submitted)
    whole = start + plan.steps * per_step
    return DryRun(
        start_seconds=start,
        first_step_seconds=first,
        seconds_per_step=per_step,
        tokens_per_second=steps[-1].tokens_per_second,
        peak_memory_mb=peak,
        memory_mb=max(peak, plan.memory_mb or 0),
        steps=plan.steps,
        tokens=plan.tokens,
        seconds=whole if max_minutes is None else min(whole, max_minutes * 60),
    )


def try_out(backend: Backend, spec: JobSpec, channels: Mapping[str, Path], run_id: str, plan: Plan, screen: Display) -> DryRun:
    """Run the trial to its end and remove it. Ctrl-C ends and removes it; one that fails is kept, so that its log can be read.

    It runs on the type of machine that `plan` names: two steps alone might be given another than the whole job.

    Raises RunFailed with the trial's own reason, and BackendError on a place that hands on no events.
    """
    if not isinstance(backend, Reporting):
        raise BackendError(f"the {backend.name} backend does not hand on events: see what would be sent with  --dry-run=render")
    if plan.instance is not None and isinstance(backend, Typed):
        backend = backend.on(plan.instance)
    handle = RunHandle(backend.name, run_id)
    submitted = time.time()
    try:
        run = Run(backend.submit(trial_of(spec), channels, run_id), backend)
        screen.say(f"trial run of {STEPS} steps: {run.handle}")
        status = run.wait(progress=screen)
        events = run.events()
    except KeyboardInterrupt:
        screen.say(f"ending the trial run {handle}")
        with contextlib.suppress(RunNotFound):  # interrupted before there was one
            backend.stop(handle)
            _remove(backend, handle, screen)
        raise
    if status.state is RunState.STOPPED:
        raise BackendError(f"the trial run {handle} was stopped before its end ({status.reason or 'by request'}): run the command again")
    found = projection(events, plan, submitted=submitted, max_minutes=spec.train.max_minutes)
    _remove(backend, handle, screen)
    return found


def _remove(backend: Backend, handle: RunHandle, screen: Display) -> None:
    """Remove the trial; what prevents it is said, for what was measured holds all the same."""
    if not isinstance(backend, Removable):
        screen.say(f"the {backend.name} backend keeps the trial run {handle}")
        return
    try:
        backend.remove(handle)
    except TrimtabError as exc:
        screen.say(f"the trial run {handle} is still there: {exc}")
