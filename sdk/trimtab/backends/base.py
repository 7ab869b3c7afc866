"""What a place that runs jobs can do: five verbs that every backend has, and abilities that some have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict

from trimtab.errors import RunNotFound
from trimtab.events import Event, Step
from trimtab.ledger import Ledger
from trimtab.plan import Finding, Foreseen, Work
from trimtab.spec import JobSpec

_HANDLE = re.compile(r"([a-z]+)://([A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)")


class RunState(StrEnum):
    """Where a run stands. The last three are final, but for a resume."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RunHandle:
    """A run's name as text, such as `process://trim-7f3a9c21`: another process, another day, can pick the run up."""

    backend: str
    id: str

    @classmethod
    def parse(cls, text: str | RunHandle) -> RunHandle:
        """The handle that a text names. Raises RunNotFound for a text that is none."""
        if isinstance(text, RunHandle):
            return text
        match = _HANDLE.fullmatch(text.strip())
        if match is None:
            near = f"did you mean process://{text.strip()}?" if re.fullmatch(r"trim-[0-9a-f]{8}", text.strip()) else "see:  trimtab list"
            raise RunNotFound(f"no run is called {text!r}; a handle looks like process://trim-7f3a9c21; {near}")
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{self.backend}://{self.id}"


class RunStatus(BaseModel):
    """How a run stands. `progress` is a share of its steps, 0 to 1; `eta` its own estimate in seconds; `step` its last step."""

    model_config = ConfigDict(frozen=True)

    state: RunState
    reason: str = ""
    progress: float = 0.0
    eta: float | None = None
    step: Step | None = None

    @property
    def done(self) -> bool:
        return self.state in (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED)


@dataclass(frozen=True)
class RunRecord:
    """A run as `trimtab list` shows it."""

    handle: RunHandle
    created: datetime
    model: str
    status: RunStatus


class Backend(Protocol):
    """A place that can run a job. Five verbs; a place that cannot do one of them is not a Backend.

    `render` says what `submit` will send, and does nothing. Every verb raises RunNotFound for a handle without a run
    and BackendError when the place refuses.
    """

    @property
    def name(self) -> str: ...

    @property
    def poll_seconds(self) -> float:
        """How often a run that is waited for is looked at."""
        ...

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The exact request, as JSON values. Pure."""
        ...

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        """Start the run; `channels` are folders of input data by name, `train` and `model`. Returns when it is started."""
        ...

    def status(self, handle: RunHandle) -> RunStatus: ...

    def logs(self, handle: RunHandle, *, follow: bool = False) -> Iterator[str]:
        """The lines the run printed, without line ends; with `follow` also those to come, until the run is done."""
        ...

    def stop(self, handle: RunHandle) -> None:
        """Ask the run to write a checkpoint and end; return when it has. Stopping what is done is quiet."""
        ...

    def artifact(self, handle: RunHandle) -> Path:
        """The folder with the artifact. Raises BackendError when the run has left none."""
        ...


@runtime_checkable
class Preflight(Protocol):
    """A backend that can refuse a job before anything is fetched, staged or paid for."""

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable or SpecError with the remedy."""
        ...


@runtime_checkable
class Priced(Protocol):
    """A backend that is paid for, and can say before what a job would take there."""

    def foresee(self, spec: JobSpec, work: Work) -> Foreseen:
        """The machine, memory, time and price, with the reason of each choice. Nothing is asked of anyone.

        Raises SpecError for a job that cannot run there.
        """
        ...

    def findings(self, spec: JobSpec, foreseen: Foreseen) -> list[Finding]:
        """The permissions and quotas that the job needs there, as far as the place tells. Raises nothing for what it does not tell."""
        ...


@runtime_checkable
class Typed(Protocol):
    """A backend whose machines have types, of which it chooses one by the whole job's work."""

    def on(self, instance: str) -> Self:
        """The same place with this type for every job. What the two know of their runs is one."""
        ...


@runtime_checkable
class Uploading(Protocol):
    """A backend whose runs read copies of the channels elsewhere."""

    def upload(self, spec: JobSpec, channels: Mapping[str, Path], show: Callable[[Event], None]) -> None:
        """Bring the channels there; what is there already is not sent again. Raises StagingError; what arrived until then is kept."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A backend that can hand on what a run says of itself while it runs."""

    def events(self, handle: RunHandle, start: int = 0) -> tuple[list[Event], int]:
        """The events from position `start` on, and the position to ask from next time. Positions mean nothing else."""
        ...

    def ledger(self, handle: RunHandle) -> Ledger: ...


@runtime_checkable
class Merging(Protocol):
    """A backend whose runs can leave a model that needs no base where endpoints can read it."""

    def merged_uri(self, handle: RunHandle) -> str:
        """Where it lies; "" where the run left none."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """A backend that can start the same run again; training goes on from its newest complete checkpoint."""

    def resume(self, handle: RunHandle) -> None:
        """Raises BackendError for a run that is still running or has succeeded."""
        ...


@runtime_checkable
class Listable(Protocol):
    """A backend that knows its runs."""

    def runs(self) -> list[RunRecord]:
        """Newest first."""
        ...


@runtime_checkable
class Removable(Protocol):
    """A backend that can delete a run."""

    def remove(self, handle: RunHandle) -> None:
        """Log, checkpoints, artifact and all. Raises BackendError for a run that is still running."""
        ...
