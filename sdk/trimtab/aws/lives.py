"""A run's training jobs, one for each life (after a resume there is another), and what they said as far as it was read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from trimtab.aws.logs import LogReader
from trimtab.aws.refusals import asking
from trimtab.aws.request import life_name, life_number
from trimtab.aws.session import Aws
from trimtab.aws.standing import DONE
from trimtab.aws.submission import is_absent
from trimtab.backends.base import RunHandle
from trimtab.errors import BackendError, RunNotFound
from trimtab.events import Event, Finished, Phase, parse

GROUP = "/aws/sagemaker/TrainingJobs"
SETTLING = 10.0  # seconds without a line after which an ended job says no more
LONG_AGO = 600.0  # seconds after its end in which no line can still be on its way
FIRST_HOST = "algo-1"


@dataclass
class Life:
    """A training job. `lines` are what its machines printed, but for events; `events` what the first machine said, and where it stood."""

    name: str
    reader: LogReader
    described: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    transitions: int = 0
    settled: bool = False
    quiet_since: float = 0.0

    @property
    def done(self) -> bool:
        return self.described.get("TrainingJobStatus") in DONE


class Lives:
    """The lives of the run `handle`; `all` of those that were seen, the oldest first. What was read once is kept.

    `known` tells that there is such a run, before it was looked at.
    """

    def __init__(self, aws: Aws, handle: RunHandle, *, known: bool = False) -> None:
        self._aws, self.handle, self._known = aws, handle, known
        self.all: list[Life] = []
        self._events: list[Event] = []

    def look(self) -> Life:
        """Ask how the run stands: its newest life. Raises RunNotFound when there is none."""
        if not self.all:
            first = self._new(life_name(self.handle.id, 1))
            try:
                self._describe(first)
            except BackendError as exc:
                if is_absent(exc):
                    raise RunNotFound(self._absent()) from exc
                raise
            self.all.append(first)
        else:
            self._describe(self.all[-1])
        if self.all[-1].done:  # else nobody can have begun another
            known = {life.name for life in self.all}
            for name in self._names():
                if name not in known:
                    self.add(name)
        return self.all[-1]

    def add(self, name: str) -> None:
        """A further life, whose training job is there: lists may be late to tell of it."""
        life = self._new(name)
        self._describe(life)
        self.all.append(life)

    def _new(self, name: str) -> Life:
        return Life(name, LogReader(self._aws.client("logs"), GROUP, name))

    def _absent(self) -> str:
        place = f"account {self._aws.account}, region {self._aws.region}"
        return (
            f"there is no run {self.handle} in {place}; see which there are with  trimtab list --backend sagemaker , or name another place "
            "with  --backend-option region=...  and  profile=..."
        )

    @property
    def known(self) -> bool:
        """Whether the run was ever there."""
        return self._known or bool(self.all)

    def read(self, *, settle: bool = True) -> list[Event]:
        """Read what was said since the last time; every event of all lives. With `settle` an ended life's last lines are waited for."""
        self.look()
        for life in self.all:
            while not life.settled:
                self._read(life)
                if life.settled or not (settle and life.done):
                    break
                time.sleep(0.2)
        return self._events

    def _read(self, life: Life) -> None:
        done = life.done  # asked before reading: what was written until the end is read
        found = life.reader.read(eager=done or not life.lines)
        new: list[Event] = []
        for transition in life.described.get("SecondaryStatusTransitions", [])[life.transitions :]:
            life.transitions += 1
            said = ": ".join(part for part in (transition["Status"], transition.get("StatusMessage", "")) if part)
            new.append(Phase(name=self.handle.backend, at=transition["StartTime"].timestamp(), detail=said))
        for line in found:
            event = parse(line.text)
            if event is None:
                life.lines.append(line.text if line.host == FIRST_HOST else f"[{line.host}] {line.text}")
            elif line.host == FIRST_HOST:
                new.append(event)
        life.events += new
        self._events += new
        if done:
            now = time.monotonic()
            life.quiet_since = now if found or not life.quiet_since else life.quiet_since
            last = next((event for event in reversed(life.events) if getattr(event, "name", "") != self.handle.backend), None)
            said_all = isinstance(last, Finished) and not found  # its failure is printed after its last word
            late = now - life.quiet_since > SETTLING or (_ended_seconds_ago(life.described) > LONG_AGO and not found)
            life.settled = said_all or late or life.described.get("TrainingStartTime") is None

    def _describe(self, life: Life) -> None:
        client = self._aws.client("sagemaker")
        with asking(f"how {life.name} stands", action="sagemaker:DescribeTrainingJob"):
            life.described = client.describe_training_job(TrainingJobName=life.name)

    def _names(self) -> list[str]:
        """The training jobs of the run, by their numbers."""
        pages = self._aws.client("sagemaker").get_paginator("list_training_jobs")
        with asking(f"for the training jobs of {self.handle}", action="sagemaker:ListTrainingJobs"):
            names = [job["TrainingJobName"] for page in pages.paginate(NameContains=self.handle.id) for job in page["TrainingJobSummaries"]]
        return sorted(
            (name for name in names if life_number(self.handle.id, name)), key=lambda name: life_number(self.handle.id, name) or 0
        )


def _ended_seconds_ago(described: dict[str, Any]) -> float:
    """By AWS's clock and this machine's, which may differ."""
    ended = described.get("TrainingEndTime")
    return (datetime.now(UTC) - ended).total_seconds() if ended else 0.0
