"""Endpoints as containers of a Docker engine on this machine, in the very image that a cloud would run.

Beside what every endpoint's folder holds (endpoint_folder.py):

    ended.json   how the container of a detached endpoint ended, once somebody looked

A container is found by its labels, by any client. One that is not detached reads from a connection that its client holds, ends with that
however the client dies, and is removed by the engine; its client writes its log down meanwhile. A detached one stays until somebody
looks after its end: then log and exit code are put into the folder, and it is removed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.utils.socket import frames_iter

from trimtab import images
from trimtab.backends.container import FOLDER_LABEL, USER_LABEL, Limits
from trimtab.backends.engine import Engine, OnEngine, asking
from trimtab.backends.life import Ended
from trimtab.backends.run_folder import read_json, split, until, write_json
from trimtab.deployers import endpoint_folder
from trimtab.deployers.base import EndpointHandle, EndpointRecord, EndpointState
from trimtab.deployers.endpoint_folder import LOG, Record
from trimtab.deployers.local import GRACE, LocalEndpoints
from trimtab.deployers.serve_container import ENDPOINT_LABEL, NOBODY, PORT, body, choices, open_to_others
from trimtab.errors import BackendError, BackendUnavailable, EndpointError, SpecError
from trimtab.events import Event
from trimtab.layout import JobDir
from trimtab.serving import Serving

_ENDED = "ended.json"
_KILLED = 137  # 128 + SIGKILL
_REMOVAL = 10.0  # seconds that the engine may take to remove a container that has ended


class DockerDeployer(OnEngine, LocalEndpoints):
    """Servers as containers on this machine. An endpoint's folder is `home/endpoints/<id>`; `home` as for processes.

    `image` is a tag (default: the serve image that this trimtab would build), `cpus`, `memory`, `shm_size`, `network` and `client` are as
    the docker backend's, but that the network is the engine's own (bridge) when none is named. Raises SpecError for a wrong value.
    """

    name = "docker"

    def __init__(
        self,
        home: str | Path | None = None,
        image: str | None = None,
        cpus: str | None = None,
        memory: str | int | None = None,
        shm_size: str | int | None = None,
        network: str | None = None,
        client: DockerClient | None = None,
    ) -> None:
        LocalEndpoints.__init__(self, home)
        if network in ("none", "host"):
            raise SpecError(f"network={network}: an endpoint publishes a port of its own; leave network out, or name another network")
        OnEngine.__init__(self, image, Limits.parse(cpus=cpus, memory=memory, shm_size=shm_size, network=network), client)

    def check(self, device: str) -> None:
        """Raises BackendUnavailable for what cannot be served here, before anything is fetched or merged."""
        self.refuse_unable(device)
        self._image(device)

    def render(
        self, serving: Serving, id: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, detach: bool = False
    ) -> dict[str, Any]:
        """The body of the engine's request, the image that its tag means now, and the folder it works in."""
        folder, image = self.home / "endpoints" / id, self._image(serving.device)
        return {
            "handle": str(EndpointHandle(self.name, id)),
            "folder": str(folder),
            "image": image.tag,
            "container": body(
                id, image.id, folder, serving, self.limits, self.engine.info(), host=host, port=port, detach=detach
            ),
        }  # fmt: skip

    def logs(self, handle: EndpointHandle) -> Iterator[str]:
        folder, record = self._found(handle)
        if record.detach and self._lives(folder, record):
            return split(self.engine.output(record.container, follow=False))
        return super().logs(handle)

    def end(self, handle: EndpointHandle) -> None:
        super().end(handle)
        if handle.backend == self.name:
            self._clear(handle, politely=True)  # of a container without a folder

    def endpoints(self) -> list[EndpointRecord]:
        found = super().endpoints()
        known = {one.handle.id for one in found}
        for facts in self._containers():
            labels, id = facts["Labels"], facts["Labels"][ENDPOINT_LABEL]
            if id in known or labels.get(USER_LABEL) != str(os.getuid()):
                continue
            handle, folder = EndpointHandle(self.name, id), Path(labels.get(FOLDER_LABEL, "/"))
            if (record := endpoint_folder.read(folder)) is not None:
                found.append(self._listed(handle, folder, record))  # under another home
                continue
            state = EndpointState.SERVING if facts["State"] == "running" else EndpointState.ENDED
            orphan = f"a container without its folder {folder}, so without its key"
            found.append(EndpointRecord(handle, "", state, datetime.fromtimestamp(facts["Created"], UTC), orphan=orphan))
        return sorted(found, key=lambda one: one.created, reverse=True)

    def _present(self) -> list[tuple[Path, Record]]:
        found = super()._present()
        for facts in self._containers():  # which the engine had just made when their clients died, and somebody removed the folders
            labels = facts["Labels"]
            if (
                labels.get(USER_LABEL) == str(os.getuid())
                and facts["State"] == "created"
                and not Path(labels.get(FOLDER_LABEL, "/")).exists()
            ):
                self.engine.remove(facts["Id"])
        return found

    def _needs_key(self, host: str) -> bool:
        return True  # its port is every local user's, and every container's on its network

    def _look_up(self, handle: EndpointHandle) -> tuple[Path, Record] | None:
        """Also an endpoint whose folder lies under another home, while it has a container."""
        if (found := super()._look_up(handle)) or handle.backend != self.name:
            return found
        for facts in self._containers(handle.id):
            folder = Path(facts["Labels"].get(FOLDER_LABEL, "/"))
            record = endpoint_folder.read(folder)
            if record is not None and record.handle == str(handle):
                return folder, record
        return None

    def _launch(self, folder: Path, record: Record, show: Callable[[Event], None]) -> Record:
        request, id = record.request, EndpointHandle.parse(record.handle).id
        for choice in choices(request["image"], request["container"]):
            show(choice)
        job = JobDir(folder)
        job.scratch.mkdir()
        if request["container"]["User"] == f"{NOBODY}:{NOBODY}":
            for path in (job.api_key.parent, *job.api_key.parent.iterdir(), job.failure.parent, job.endpoint.parent, job.scratch):
                os.chown(path, NOBODY, NOBODY)
            open_to_others(folder)
        try:
            container = self.engine.create(id, request["container"])
            record = record.model_copy(update={"container": container})
            endpoint_folder.write(folder, record)
            if not record.detach:
                _tethers[folder] = _Tether(self.engine, container, folder / LOG)
            self.engine.start(container)
        except BackendError as exc:
            if "port is already allocated" in str(exc) or "address already in use" in str(exc):
                binding = request["container"]["HostConfig"]["PortBindings"][PORT][0]
                where = f"{binding['HostIp']}:{binding['HostPort']}"
                raise EndpointError(f"cannot listen on {where}, something else does: choose another port, or 0 for any") from exc
            raise
        return record

    def _lives(self, folder: Path, record: Record) -> bool:
        if (folder / _ENDED).exists():
            return False
        facts = self.engine.inspect(record.container or EndpointHandle.parse(record.handle).id)
        if facts is None or (not record.detach and facts["State"]["Status"] in ("removing", "exited", "dead")):
            if tether := _tethers.get(folder):
                tether.wait()  # for its last lines
            return False
        state = facts["State"]
        if state["Running"] or state["Status"] == "created":
            return True
        if record.detach:
            self._take_in(folder, facts)
        return False

    def _take_in(self, folder: Path, facts: dict[str, Any]) -> None:
        """Put what an ended container left into the folder, and remove it. Raises EndpointError where it cannot be written."""
        state = facts["State"]
        ended = Ended(exit_code=state["ExitCode"], oom_killed=state["OOMKilled"], at=state["FinishedAt"], error=state.get("Error", ""))
        try:
            log = b"".join(self.engine.output(facts["Id"], follow=False))
            if (self.engine.inspect(facts["Id"]) or {"State": {"Status": "removing"}})["State"]["Status"] == "removing":
                return  # another client took it in meanwhile
            (folder / LOG).write_bytes(log)
            write_json(folder / _ENDED, ended.model_dump(mode="json"))
        except OSError as exc:
            raise EndpointError(f"the end of {folder.name} cannot be written to {folder} ({exc}): make room there and repeat") from exc
        self.engine.remove(facts["Id"])

    def _url(self, folder: Path, record: Record) -> str:
        if not endpoint_folder.said(JobDir(folder)):
            return ""
        facts = self.engine.inspect(record.container)
        bound = ((facts or {}).get("NetworkSettings", {}).get("Ports") or {}).get(PORT)
        if not bound:
            return ""
        host = "127.0.0.1" if bound[0]["HostIp"] in ("", "0.0.0.0", "::") else bound[0]["HostIp"]
        return f"http://{host}:{bound[0]['HostPort']}"

    def _silence(self, folder: Path, record: Record) -> tuple[EndpointState, str]:
        told = endpoint_folder.said(JobDir(folder))  # who ends in order takes it away
        if not (folder / _ENDED).exists():
            if record.answered and not told:
                return EndpointState.ENDED, "it was told to end"
            return EndpointState.FAILED, "its container is gone without a word (docker rm, out of memory, or the engine was restarted)"
        ended = Ended.model_validate(read_json(folder / _ENDED))
        limit = self.limits.memory or record.request["container"]["HostConfig"].get("Memory", 0)
        if ended.oom_killed:
            bound = f"its container's limit of {limit / (1 << 30):.1f} GiB" if limit else "the limit of the machine"
            return EndpointState.FAILED, f"out of memory, at {bound}: deploy it again with a larger memory=, or a smaller cache_gb="
        if ended.exit_code == 0:
            return EndpointState.ENDED, "it was told to end"
        killed = " (killed from outside)" if ended.exit_code == _KILLED else ""
        return EndpointState.FAILED, f"exit code {ended.exit_code}{killed}{ended.error and ': '}{ended.error}"

    def _kill(self, folder: Path, record: Record) -> None:
        self._clear(EndpointHandle.parse(record.handle), politely=record.answered)

    def _forget(self, folder: Path) -> None:
        if tether := _tethers.pop(folder, None):
            tether.close()

    def _clear(self, handle: EndpointHandle, *, politely: bool) -> None:
        """End and remove the endpoint's containers, `politely` with SIGTERM first; also one just made for a client that has died."""

        def clear() -> bool:
            found = self._containers(handle.id)
            for facts in found:
                if politely and facts["State"] == "running":
                    self.engine.stop(facts["Id"], int(GRACE))
                self.engine.remove(facts["Id"])
            return not found

        if not until(clear, GRACE + _REMOVAL):
            raise EndpointError(f"{handle} does not end: look at it with  docker inspect {handle.id}")

    def _containers(self, id: str = "") -> list[dict[str, Any]]:
        """The engine's facts of the containers of all endpoints, or of one."""
        label = f"{ENDPOINT_LABEL}={id}" if id else ENDPOINT_LABEL
        with asking("for its containers"):
            found: list[dict[str, Any]] = self.engine.client.api.containers(all=True, filters={"label": label})
        return found

    def _image(self, device: str) -> images.Image:
        image = self.own_image(device, "serve")
        for label, wanted in (("device", device), ("target", "serve")):
            if (made_for := image.labels.get(label, wanted)) != wanted:
                raise BackendUnavailable(f"{image.tag} is a {made_for} image: choose one of  trimtab image list  with {label} {wanted}")
        return image


class _Tether:
    """The connection that a container lives by: its standard input. What it prints comes the same way, and is written down."""

    def __init__(self, engine: Engine, container: str, log: Path) -> None:
        with asking("to attach to a container"):
            self._socket: Any = engine.client.api.attach_socket(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._file = log.open("ab", buffering=0)
        self._thread = threading.Thread(target=self._read, daemon=True, name=f"log of {container[:12]}")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is written down that an ended container printed."""
        self._thread.join(2.0)

    def close(self) -> None:
        """Let go; the container ends."""
        self.wait()
        getattr(self._socket, "_sock", self._socket).close()  # what docker hands out is a reader of it, which leaves it open
        self._socket.close()

    def _read(self) -> None:
        with self._file as file, contextlib.suppress(OSError, ValueError):  # closed here, or at the other end
            for _, part in frames_iter(self._socket, tty=False):
                with contextlib.suppress(OSError):  # a full disk: read on, or the server waits for its words to be taken
                    file.write(part)


_tethers: dict[Path, _Tether] = {}  # of the containers that live by this process, by folder
