"""What a place that can serve has to be able to do, and the words for how an endpoint stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from trimtab.errors import EndpointError
from trimtab.events import Event

if TYPE_CHECKING:
    from trimtab.plan import Finding
    from trimtab.serving import Serving
    from trimtab.spec import ServeSpec
    from trimtab.transport import Transport

PREFIX = "trim-ep-"

_HANDLE = re.compile(r"([a-z]+)://([A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)")


class EndpointState(StrEnum):
    """Where an endpoint stands. The last two are final."""

    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(frozen=True)
class EndpointHandle:
    """An endpoint's name as text, such as `docker://trim-ep-7f3a9c21`: another process, another day, can ask it."""

    backend: str
    id: str

    @classmethod
    def parse(cls, text: str | EndpointHandle) -> EndpointHandle:
        """The handle that a text names. Raises EndpointError for a text that is none."""
        if isinstance(text, EndpointHandle):
            return text
        match = _HANDLE.fullmatch(text.strip())
        if match is None:
            raise EndpointError(
                f"no endpoint is called {text!r}; a handle looks like process://{PREFIX}7f3a9c21; see those there are:  trimtab endpoints"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{self.backend}://{self.id}"


@dataclass(frozen=True)
class EndpointRecord:
    """An endpoint as `trimtab endpoints` shows it. Times have a zone; `expires` is when its ttl ends it.

    `orphan` says why nothing will end it by itself or nobody can ask it ("" for one in order): a container without a folder, a folder
    without a process, a model without an endpoint. `trimtab close HANDLE` removes what is left of it.
    """

    handle: EndpointHandle
    title: str
    state: EndpointState
    created: datetime
    reason: str = ""
    url: str = ""
    usd_per_hour: float | None = None
    expires: datetime | None = None
    orphan: str = ""


class Deployer(Protocol):
    """A place that can serve a model. Every verb raises EndpointError for a handle without an endpoint and when the place refuses."""

    @property
    def name(self) -> str: ...

    def check(self, device: str) -> None:
        """Refuse before anything is fetched or merged what cannot be served here. Raises EndpointError or BackendUnavailable."""
        ...

    def render(
        self, serving: Serving, id: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, detach: bool = False
    ) -> dict[str, Any]:
        """The exact request or requests, as JSON values, without the key's text. Pure."""
        ...

    def start(
        self,
        serving: Serving,
        id: str,
        *,
        host: str,
        port: int,
        api_key: str | None,
        detach: bool,
        ready_timeout: float,
        show: Callable[[Event], None],
    ) -> EndpointHandle:
        """Start it and return when it answers. Whatever goes wrong, Ctrl-C too, leaves nothing.

        Without `detach` it ends when this process does, however that dies. Port 0 is any that is free.
        """
        ...

    def transport(self, handle: EndpointHandle) -> Transport:
        """How to ask it, key and all."""
        ...

    def look(self, handle: EndpointHandle) -> EndpointRecord: ...

    def logs(self, handle: EndpointHandle) -> Iterator[str]:
        """The lines that it printed so far, without line ends."""
        ...

    def end(self, handle: EndpointHandle) -> None:
        """End it and remove all that belongs to it. Quiet when it is gone."""
        ...

    def endpoints(self) -> list[EndpointRecord]:
        """Those of this machine or account, newest first, orphans too."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A deployer whose machines are found first, and which may serve what is not on this one."""

    def patience(self, serving: Serving) -> float:
        """Seconds that a start may take where nothing else is asked for."""
        ...

    def findings(self, serving: Serving) -> list[Finding]:
        """What the account has and lacks for it, as far as it tells."""
        ...

    def elsewhere(self, spec: ServeSpec, device: Literal["xeon", "gpu"], title: str = "") -> Serving | None:
        """What is served where the deployer's own settings name the model; None where they do not."""
        ...
