"""What the operations need of the modules that really run something; a control plane without them keeps the books only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from control_plane.faults import Faults
from control_plane.store import Endpoint, EndpointConfig, Model, Request, Store, TrainingJob


class Trains(Protocol):
    """training.py's TrainingRunner."""

    def start(self, job: TrainingJob) -> None: ...
    def close(self) -> None: ...


class LooksAtInputs(Protocol):
    """inputs.py's Inputs."""

    def refuse_empty(self, request: Request) -> None: ...
    def refuse_absent_model(self, container: Request) -> None: ...
    def close(self) -> None: ...


class Hosts(Protocol):
    """hosting.py's HostingRunner. Called to start an endpoint again, it keeps the old container until the new one answers.

    Both return at once; `gone` is called when what served the endpoint has ended.
    """

    def start(self, endpoint: Endpoint, model: Model, config: EndpointConfig) -> None: ...
    def stop(self, endpoint: Endpoint, gone: Callable[[], None]) -> None: ...
    def invoke(self, endpoint_name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], Iterator[bytes]]: ...
    def close(self) -> None: ...


@dataclass
class Place:
    """One account in one region: its state, and what runs its jobs and endpoints and looks at their data (None: nothing does).

    `hub` is a folder of what JumpStart's public hub says of models.
    """

    store: Store
    training: Trains | None = None
    hosting: Hosts | None = None
    inputs: LooksAtInputs | None = None
    faults: Faults = field(default_factory=Faults)
    hub: Path | None = None
