"""Endpoints on this machine: all that is the same whether the server is a process or a container."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.backends.run_folder import lines, tail_lines, until
from trimtab.deployers import endpoint_folder
from trimtab.deployers.base import EndpointHandle, EndpointRecord, EndpointState
from trimtab.deployers.endpoint_folder import LOG, Record
from trimtab.errors import EndpointError, TrimtabError
from trimtab.events import Event
from trimtab.layout import JobDir
from trimtab.serving import Serving
from trimtab.transport import HttpTransport

GRACE = 10.0  # seconds from SIGTERM to SIGKILL: whoever closes does not wait for answers

_POLL = 0.05
_LAST = 10  # lines of a log that an error quotes
_DYING = 2.0  # seconds that a server may take to end after it hung up


class LocalEndpoints(ABC):
    """The half of a deployer whose endpoints have a folder here, `home/endpoints/<id>`; `home` is `$TRIMTAB_HOME`, else `~/.trimtab`."""

    name: str

    def __init__(self, home: str | Path | None) -> None:
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()

    @abstractmethod
    def render(
        self, serving: Serving, id: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, detach: bool = False
    ) -> dict[str, Any]: ...

    @abstractmethod
    def _needs_key(self, host: str) -> bool:
        """Whether a key is made where none was given."""

    @abstractmethod
    def _launch(self, folder: Path, record: Record, show: Callable[[Event], None]) -> Record:
        """Start the server of a record; the record with where it runs."""

    @abstractmethod
    def _lives(self, folder: Path, record: Record) -> bool: ...

    @abstractmethod
    def _url(self, folder: Path, record: Record) -> str:
        """Where it answers, "" before it does."""

    @abstractmethod
    def _silence(self, folder: Path, record: Record) -> tuple[EndpointState, str]:
        """How it ended, when it left no reason."""

    @abstractmethod
    def _forget(self, folder: Path) -> None:
        """Let go of what this process held of an endpoint that has ended."""

    @abstractmethod
    def _kill(self, folder: Path, record: Record) -> None:
        """End it: SIGTERM, GRACE seconds, SIGKILL. Quiet when it has ended. Raises EndpointError when it does not."""

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
        serving.refuse_remote()
        for _ in self._present():  # takes away what clients left behind
            pass
        handle, folder = EndpointHandle(self.name, id), self.home / "endpoints" / id
        key = api_key or (endpoint_folder.new_key() if self._needs_key(host) and not serving.spec.open else None)
        request = self.render(serving, id, host=host, port=port, api_key=key, detach=detach)
        record = Record.of(handle, serving, request, host=host, key=key, detach=detach)
        try:
            endpoint_folder.make(folder, record, serving)
        except OSError as exc:
            raise EndpointError(
                f"an endpoint cannot be kept in {folder} ({exc}): make room, or set TRIMTAB_HOME to another folder"
            ) from exc
        try:
            record = self._launch(folder, record, show)
            endpoint_folder.write(folder, record)
            url = self._wait(folder, record, ready_timeout)
            endpoint_folder.write(folder, record.model_copy(update={"answered": True, "url": url}))
            if detach:
                self._release(folder, record)
        except BaseException as exc:  # Ctrl-C too: it has not begun
            with contextlib.suppress(TrimtabError):  # the first error is the one to tell; the next look finds what is left
                self.end(handle)
            if isinstance(exc, OSError):
                raise EndpointError(f"the server cannot be started ({exc}): mend that and repeat the command") from exc
            raise
        return handle

    def transport(self, handle: EndpointHandle) -> HttpTransport:
        folder, record = self._found(handle)
        url = record.url or self._url(folder, record)
        if not url:
            raise EndpointError(f"{handle} does not answer yet: look again with  trimtab endpoints")
        return HttpTransport(url, record.api_key, lambda: self._explain(handle))

    def look(self, handle: EndpointHandle) -> EndpointRecord:
        return self._listed(handle, *self._found(handle))

    def logs(self, handle: EndpointHandle) -> Iterator[str]:
        folder, _ = self._found(handle)
        return lines(folder / LOG, lambda: False)

    def end(self, handle: EndpointHandle) -> None:
        if found := self._look_up(handle):
            self._kill(*found)
            endpoint_folder.remove(found[0])
        folder = self.home / "endpoints" / handle.id
        endpoint_folder.let_go(folder)  # also where somebody else has ended it
        self._forget(folder)

    def endpoints(self) -> list[EndpointRecord]:
        found = [self._listed(EndpointHandle.parse(record.handle), folder, record) for folder, record in self._present()]
        return sorted(found, key=lambda one: one.created, reverse=True)

    def _release(self, folder: Path, record: Record) -> None:
        """A detached one has answered: it goes on without this process."""
        endpoint_folder.let_go(folder)

    def _present(self) -> list[tuple[Path, Record]]:
        """This backend's endpoints, without those whose client is gone: what is left of them is taken away."""
        found = []
        for folder, record in endpoint_folder.folders(self.home):
            handle = EndpointHandle.parse(record.handle)
            if handle.backend != self.name:
                continue
            if endpoint_folder.abandoned(folder, record):
                self.end(handle)
            else:
                found.append((folder, record))
        return found

    def _look_up(self, handle: EndpointHandle) -> tuple[Path, Record] | None:
        folder = self.home / "endpoints" / handle.id
        record = endpoint_folder.read(folder)
        return None if record is None or record.handle != str(handle) else (folder, record)

    def _found(self, handle: EndpointHandle) -> tuple[Path, Record]:
        found = self._look_up(handle)
        if found is None:
            raise EndpointError(f"there is no endpoint {handle} under {self.home}; see which there are:  trimtab endpoints")
        return found

    def _listed(self, handle: EndpointHandle, folder: Path, record: Record) -> EndpointRecord:
        orphan = ""
        if self._lives(folder, record):
            state, reason = (EndpointState.SERVING if record.answered else EndpointState.STARTING), ""
        else:
            state, reason = self._ended(folder, record)
            if not endpoint_folder.has_client(folder):
                orphan = f"it has {state}, and its folder {folder} is left"
        url = record.url or self._url(folder, record)
        return EndpointRecord(handle, record.title, state, record.created, reason, url, None, record.expires, orphan)

    def _ended(self, folder: Path, record: Record) -> tuple[EndpointState, str]:
        if cause := JobDir(folder).cause():
            return EndpointState.FAILED, cause
        if record.expired:
            return EndpointState.ENDED, "its time (ttl) was over"
        return self._silence(folder, record)

    def _wait(self, folder: Path, record: Record, seconds: float) -> str:
        """The address, once it answers there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self._lives(folder, record):
                raise EndpointError(f"the server ended before it answered: {self._ended(folder, record)[1]}{self._tail(folder)}")
            url = self._url(folder, record)
            if url and HttpTransport(url, record.api_key).ready(timeout=2.0):
                return url
            time.sleep(_POLL)
        raise EndpointError(f"the server did not answer within {seconds:g} s: give a larger ready_timeout.{self._tail(folder)}")

    def _explain(self, handle: EndpointHandle) -> str:
        """Why an endpoint does not answer any more; "" while its server lives."""
        try:
            if (found := self._look_up(handle)) is None:
                return f"{handle} was closed: deploy it again"
            if until(lambda: not self._lives(*found), _DYING):
                return f"{handle} has ended: {self._ended(*found)[1]}{self._tail(found[0])}\nDeploy it again."
        except TrimtabError as exc:  # the place where it runs is away, too
            return str(exc)
        return ""

    @staticmethod
    def _tail(folder: Path) -> str:
        found = "".join(f"\n  {line}" for line in tail_lines(folder / LOG, _LAST))
        return f"\nIts log ends:{found}" if found else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
