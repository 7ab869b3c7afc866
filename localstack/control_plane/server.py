"""The control plane over HTTP: JSON 1.1 for SageMaker and Service Quotas, REST for SageMaker's runtime, one port for all.

Signatures are not checked, but a request must be signed: the account and the region are those of its credential, as LocalStack has it (an
access key id of twelve digits is the account).
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from control_plane.exchange import Exchange
from control_plane.faults import Fault, Faults
from control_plane.hosting import HostingRunner
from control_plane.inputs import Inputs
from control_plane.place import Place
from control_plane.refusal import Refused
from control_plane.runner import Settings
from control_plane.store import ACCOUNT, Request, Store
from control_plane.training import TrainingRunner

RECORDED = 100_000


class ControlPlane:
    """The server and everything it knows, for `with`; `url` is where it listens.

    `aws_url` is where S3 and Logs are (LocalStack), `runner` what training jobs and endpoints run in: "docker", "process" (`command`), or
    None for nothing at all, when whoever holds the store moves the jobs. `check_inputs`: whether a job whose channels are empty is refused,
    as SageMaker does (default: when something runs). `work` is a folder for what they need meanwhile (default: a temporary one, removed at
    the end). `settings` are those of all that runs, in every account and region. `port` 0 is any free one. `hub` is a folder with a
    HubContentDocument for each model that JumpStart's public hub is to have, `<model id>.json`. Raises ValueError for a process runner
    without a command.
    """

    def __init__(
        self,
        aws_url: str = "http://127.0.0.1:4566",
        runner: Literal["docker", "process"] | None = "docker",
        command: Sequence[str] | None = None,
        *,
        port: int = 0,
        region: str = "us-east-1",
        account: str = ACCOUNT,
        work: str | Path | None = None,
        check_inputs: bool | None = None,
        settings: Settings | None = None,
        hub: str | Path | None = None,
    ) -> None:
        if runner == "process" and not command:
            raise ValueError('runner="process" needs a command: what the ENTRYPOINT of the jobs\' image would be')
        self.aws_url, self.runner, self.command = aws_url, runner, list(command or ())
        self.region, self.account, self.settings = region, account, settings or Settings()
        self.check_inputs = runner is not None if check_inputs is None else check_inputs
        self.hub = None if hub is None else Path(hub)
        self.faults = Faults()
        self._requests: deque[tuple[str, Request]] = deque(maxlen=RECORDED)
        self.closing = threading.Event()
        self._lock = threading.RLock()
        self._places: dict[tuple[str, str], Place] = {}
        self._own_work = tempfile.TemporaryDirectory(prefix="control-plane-") if work is None else None
        self.work = Path(self._own_work.name if self._own_work is not None else str(work))
        self._server = _Server(("127.0.0.1", port), Exchange, self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="control plane")

    @property
    def requests(self) -> list[tuple[str, Request]]:
        """The last RECORDED operations asked for and their requests as received, in order; invocations without their bodies."""
        with self._lock:
            return list(self._requests)

    def record(self, operation: str, request: Request) -> None:
        with self._lock:
            self._requests.append((operation, request))

    @property
    def store(self) -> Store:
        """The state of the account and region that it was started with."""
        return self.place(self.account, self.region).store

    def place(self, account: str, region: str) -> Place:
        """An account in a region; its runners are made with it. Raises Refused for a new one when this is ending."""
        with self._lock:
            if (account, region) not in self._places:
                if self.closing.is_set():  # nobody would close it
                    raise Refused("ServiceUnavailable", "This control plane is ending.", 503)
                self._places[account, region] = self._new_place(account, region)
            return self._places[account, region]

    def _new_place(self, account: str, region: str) -> Place:
        place = Place(Store(account, region), faults=self.faults, hub=self.hub)
        if self.check_inputs:
            place.inputs = Inputs(self.aws_url, account, region)
        if self.runner is not None:
            given = (self.aws_url, region, self.work / account / region, self.runner, self.command, self.settings, account)
            place.training, place.hosting = TrainingRunner(*given), HostingRunner(*given)
        return place

    def fault(self, **members: Any) -> None:
        """Adds a fault; its members are Fault's. Raises ValueError for one that is none."""
        self.faults.add(Fault.read(members))

    def set_quota(self, name: str, value: float, region: str | None = None) -> None:
        """Raises ValueError for a name that is none."""
        self.place(self.account, region or self.region).store.quotas.set(name, value)

    def interrupt(self, job: str) -> None:
        """Takes the spot instances of a job away now. Raises LookupError when no such job runs on spot instances."""
        with self._lock:
            stores = [each.store for each in self._places.values()]
        for store in stores:
            found = store.jobs.get(job)
            if found is not None and found.spot and not found.ended.is_set():
                found.interrupt()
                return
        raise LookupError(f"no job {job} runs on spot instances")

    def start(self) -> ControlPlane:
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends connections, jobs and endpoints. A second time it does nothing."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._server.shutdown()
        self._server.end_connections()
        self._thread.join()
        with self._lock:
            places = list(self._places.values())
        for place in places:
            for each in (place.training, place.hosting, place.inputs):
                if each is not None:
                    each.close()
        self._server.server_close()
        if self._own_work is not None:
            self._own_work.cleanup()

    def __enter__(self) -> ControlPlane:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    """A thread for each connection; all are ended with it, so that none outlives `close`."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Exchange], plane: ControlPlane) -> None:
        self.plane = plane
        self._open: set[Any] = set()
        self._guard = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        with self._guard:
            for each in self._open:
                with contextlib.suppress(OSError):  # the client was quicker
                    each.shutdown(socket.SHUT_RDWR)
