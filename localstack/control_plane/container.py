"""Instances as containers of a Docker engine.

SageMaker's container is root's and finds `/opt/ml/input`, `model`, `output` and its checkpoints folder mounted, owned by root, mode 0755.
Where this process is root the machine's folders are bind-mounted as they are. Where it is not, its files would be another user's in there
and what root writes could not be read here: then each folder is a volume of the engine, filled and read through the engine's archive calls.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import re
import shutil
import socket
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import docker
import docker.errors
from docker.types import Mount
from requests.exceptions import RequestException

from control_plane.instance import Ended, StartFailed

LABEL, OWNER_LABEL, NAME_LABEL = "sagemaker.control-plane", "sagemaker.owner", "sagemaker.name"
UNREACHABLE = (docker.errors.DockerException, RequestException, OSError)
_MOMENT = 0.1
_REGISTRY = re.compile(r"^(?:localhost|[^/]*[.:][^/]*)/")
_ECR = re.compile(r"^\d{12}\.dkr\.ecr\.")


@dataclass(frozen=True)
class Network:
    """One of the engine's networks, and the addresses in it by host: each host knows them all from its beginning on."""

    name: str
    addresses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What one container is to be. `mounts` are folders here by their places inside."""

    name: str
    image: str
    command: Sequence[str]
    environment: Mapping[str, str]
    mounts: Mapping[PurePosixPath, Path]
    entrypoint: Sequence[str] | None = None
    hostname: str = ""
    network: Network = Network("bridge")
    port: int | None = None  # published on a free port of the loopback interface, but for an isolated network


class Engine:
    """The engine that DOCKER_HOST names, else this machine's; what it is asked to make bears this object's label. Close it.

    At its first use it removes what processes of this machine have left in the engine that were killed.
    """

    def __init__(self, *, shm_size: str = "1g", memory: str | None = None, volumes: bool | None = None, patience: float = 30.0) -> None:
        """`patience`: seconds of the engine's silence after which a container counts as killed."""
        self.mark = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.volumes = os.getuid() != 0 if volumes is None else volumes
        self.patience = patience
        self._options: dict[str, Any] = {"shm_size": shm_size, "log_config": docker.types.LogConfig(type="json-file")}
        if memory is not None:
            self._options |= {"mem_limit": memory, "memswap_limit": memory}
        self._lock = threading.Lock()
        self._client: docker.DockerClient | None = None

    @property
    def client(self) -> docker.DockerClient:
        """Raises StartFailed where no engine answers."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = docker.from_env(max_pool_size=64)
                except UNREACHABLE as exc:
                    raise StartFailed(f"InternalServerError: no Docker engine answers ({exc})") from exc
                self._remove(OWNER_LABEL, lambda labels: _is_gone(labels[OWNER_LABEL]))
            return self._client

    def image(self, name: str) -> str | None:
        """The id of the image that SageMaker would find by this name; None where there is none.

        The engine's image of exactly that name, else that of the name without its registry, else a pulled one, but from no ECR. Raises
        StartFailed where no engine answers.
        """
        for each in dict.fromkeys((name, _REGISTRY.sub("", name))):
            try:
                return str(self.client.images.get(each).id)
            except docker.errors.APIError:  # there is none, or that is no image's name
                continue
            except UNREACHABLE as exc:
                raise StartFailed(f"InternalServerError: the Docker engine does not answer ({exc})") from exc
        if _ECR.match(name):
            return None
        try:
            return str(self.client.images.pull(name, tag=None if ":" in name.rpartition("/")[2] or "@" in name else "latest").id)
        except UNREACHABLE:
            return None

    def start(self, asked: Asked) -> Container:
        """Raises StartFailed, and leaves nothing then."""
        api = self.client.api
        labels = self._labels(asked.name)
        made: list[str] = []
        mounts = []
        try:
            for place, folder in asked.mounts.items():
                source = str(folder)
                if self.volumes:
                    source = str(self.client.volumes.create(labels=labels).name)
                    made.append(source)
                mounts.append(Mount(str(place), source, type="volume" if self.volumes else "bind", no_copy=self.volumes))
            ports: dict[int | str, Any] = (
                {} if asked.port is None or asked.network.name != "bridge" else {f"{asked.port}/tcp": ("127.0.0.1", None)}
            )
            host = api.create_host_config(
                mounts=mounts,
                network_mode=asked.network.name,
                port_bindings=ports,
                extra_hosts=dict(asked.network.addresses) or None,
                **self._options,
            )
            alone = asked.network.name in ("bridge", "none")
            network: Any = None if alone else {"EndpointsConfig": {asked.network.name: _endpoint(asked)}}
            created = api.create_container(
                asked.image,
                list(asked.command),
                entrypoint=None if asked.entrypoint is None else list(asked.entrypoint),
                environment=dict(asked.environment),
                hostname=asked.hostname or None,
                user="0:0",
                labels=labels,
                ports=[(asked.port, "tcp")] if ports else None,
                host_config=host,
                networking_config=network,
                name=re.sub(r"[^A-Za-z0-9_.-]", "-", f"{asked.name}-{self.mark}"),
            )
        except UNREACHABLE as exc:
            self._remove_volumes(made)
            raise StartFailed(f"InternalServerError: the Docker engine refused a container ({_said(exc)})") from exc
        container = Container(self, str(created["Id"]), asked, made)
        try:
            if self.volumes:
                for place, folder in asked.mounts.items():
                    with tarred(folder) as archive:
                        api.put_archive(container.id, str(place), archive)
            api.start(container.id)
        except UNREACHABLE as exc:
            container.remove()
            if re.search(r"executable file not found|no such file|permission denied", _said(exc)):
                raise StartFailed(f"AlgorithmError: {_said(exc)}, exit code: 127") from exc
            raise StartFailed(f"InternalServerError: the Docker engine could not start a container ({_said(exc)})") from exc
        return container

    def network(self, name: str, hosts: Sequence[str] = (), *, internal: bool) -> Network:
        """A network of its own, with an address for each host; `internal` leads nowhere else. Raises StartFailed."""
        name, labels = f"sagemaker-{name}-{self.mark}", self._labels(name)
        api = self.client.api
        for last in (False, False, True):
            try:
                api.create_network(name, driver="bridge", internal=internal, labels=labels)
                if not hosts:
                    return Network(name)
                # addresses can be given only in a network whose subnet was given: it becomes the one that the engine has just chosen
                subnet = ipaddress.ip_network(api.inspect_network(name)["IPAM"]["Config"][0]["Subnet"])
                api.remove_network(name)
                given = docker.types.IPAMConfig(pool_configs=[docker.types.IPAMPool(subnet=str(subnet))])
                api.create_network(name, driver="bridge", internal=internal, labels=labels, ipam=given)
            except docker.errors.APIError as exc:
                if last:
                    raise StartFailed(f"InternalServerError: the Docker engine could not make a network ({_said(exc)})") from exc
                self.remove_network(name)  # another one was quicker to take the subnet
            except UNREACHABLE as exc:
                raise StartFailed(f"InternalServerError: the Docker engine could not make a network ({_said(exc)})") from exc
            else:
                return Network(name, {host: str(subnet[number]) for number, host in enumerate(hosts, 2)})  # 1 is the gateway's
        raise AssertionError("the last try returns or raises")

    def remove_network(self, name: str) -> None:
        with contextlib.suppress(*UNREACHABLE):
            self.client.api.remove_network(name)

    def close(self) -> None:
        """Ends and removes everything that bears the label."""
        if self._client is None:
            return
        self._remove(LABEL, lambda labels: labels[LABEL] == self.mark)
        self._client.close()
        self._client = None

    def _labels(self, name: str) -> dict[str, str]:
        return {LABEL: self.mark, OWNER_LABEL: f"{_machine()}/{os.getpid()}", NAME_LABEL: name}

    def _remove(self, label: str, wanted: Callable[[Mapping[str, str]], bool]) -> None:
        """Containers, networks and volumes that bear a label, and whose labels are wanted."""
        assert self._client is not None
        api, filters = self._client.api, {"label": label}
        with contextlib.suppress(*UNREACHABLE):
            for container in api.containers(all=True, filters=filters):
                if wanted(container["Labels"]):
                    with contextlib.suppress(*UNREACHABLE):  # one that somebody else is just removing, too
                        api.remove_container(container["Id"], force=True, v=True)
            for network in api.networks(filters=filters):
                if wanted(network["Labels"]):
                    with contextlib.suppress(*UNREACHABLE):
                        api.remove_network(network["Id"])
            for volume in api.volumes(filters=filters)["Volumes"] or []:
                if wanted(volume["Labels"]):
                    with contextlib.suppress(*UNREACHABLE):
                        api.remove_volume(volume["Name"], force=True)

    def _remove_volumes(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(*UNREACHABLE):
                self.client.api.remove_volume(name, force=True)


class Container:
    """A started container: an Instance."""

    def __init__(self, engine: Engine, container: str, asked: Asked, volumes: Sequence[str]) -> None:
        self.id, self._engine, self._asked, self._volumes = container, engine, asked, volumes
        self._api = engine.client.api
        self._ended: Ended | None = None
        self._answered = time.monotonic()

    def output(self) -> Iterator[bytes]:
        """An engine that is busy ends a followed log before its last lines: what follows its end is read once more, when all is there."""
        seen = 0
        while True:
            over, at = self.poll() is not None, 0
            for piece in self._log(follow=not over):
                at += len(piece)
                if at > seen:
                    yield piece[max(0, len(piece) - (at - seen)) :]
                    seen = at
            if over:
                return
            time.sleep(_MOMENT)

    def _log(self, *, follow: bool) -> Iterator[bytes]:
        with contextlib.suppress(*UNREACHABLE):
            stream: Any = self._api.logs(self.id, stdout=True, stderr=True, stream=True, follow=follow)
            try:
                yield from stream
            finally:
                stream._response.close()  # its own close() leaves the socket open, as docker 7.2 does at the end of the log

    def poll(self) -> Ended | None:
        """A container that somebody removed counts as killed, and so does one whose engine has gone silent."""
        if self._ended is None:
            self._ended = self._look()
        return self._ended

    def _look(self) -> Ended | None:
        try:
            state = self._api.inspect_container(self.id)["State"]
        except docker.errors.NotFound:
            return Ended(137)
        except UNREACHABLE:  # asked again soon
            return Ended(137) if time.monotonic() - self._answered > self._engine.patience else None
        self._answered = time.monotonic()
        if state["Status"] in ("created", "running", "paused", "restarting"):
            return None
        return Ended(state["ExitCode"], out_of_memory=bool(state["OOMKilled"]) and state["ExitCode"] == 137)

    def terminate(self) -> None:
        self._signal("SIGTERM")

    def kill(self) -> None:
        self._signal("SIGKILL")

    def address(self) -> tuple[str, int]:
        """Host and port where its port is reached. Raises StartFailed for a container that is gone."""
        try:
            found = self._api.inspect_container(self.id)["NetworkSettings"]
            if published := (found["Ports"] or {}).get(f"{self._asked.port}/tcp"):
                return str(published[0]["HostIp"]), int(published[0]["HostPort"])
            return str(found["Networks"][self._asked.network.name]["IPAddress"]), int(self._asked.port or 0)
        except (*UNREACHABLE, LookupError) as exc:
            raise StartFailed(f"the container has no address ({_said(exc)})") from exc

    def pull(self, folder: Path) -> None:
        """Only what lies in volumes is copied: files of `folder`, which is one of the mounted ones, are replaced, or stay if it fails."""
        if not self._engine.volumes:
            return
        place = next(place for place, here in self._asked.mounts.items() if here == folder)
        with tempfile.TemporaryFile() as archive:
            try:
                stream, _ = self._api.get_archive(self.id, str(place))
                for piece in stream:
                    archive.write(piece)
            except UNREACHABLE:  # it is gone
                return
            archive.seek(0)
            fresh = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                with tarfile.open(fileobj=archive) as tar:
                    tar.extractall(fresh, filter=_harmless)
            except tarfile.TarError:  # the engine breaks an archive off when a file changes under it
                shutil.rmtree(fresh)
                return
        shutil.rmtree(folder, ignore_errors=True)
        (fresh / place.name).rename(folder)
        fresh.rmdir()

    def remove(self) -> None:
        with contextlib.suppress(*UNREACHABLE):
            self._api.remove_container(self.id, force=True, v=True)
        self._engine._remove_volumes(self._volumes)

    def _signal(self, name: str) -> None:
        with contextlib.suppress(*UNREACHABLE):
            self._api.kill(self.id, name)


def _machine() -> str:
    """Where a process id is one: this host and, in a container, its own space of them."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # no Linux
        space = ""
    return f"{socket.gethostname()}/{space}"


def _is_gone(owner: str) -> bool:
    """Whether the owner that a label names was a process of this machine, and is no more."""
    machine, _, pid = owner.rpartition("/")
    if machine != _machine():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        return False
    return False


@contextlib.contextmanager
def tarred(folder: Path) -> Iterator[io.BufferedRandom]:
    """A folder's content as root's, as a tar file."""

    def roots(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return entry

    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            tar.add(folder, ".", filter=roots)
        file.seek(0)
        yield file


def _harmless(entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """What of a container's folder is unpacked here: not what leads out of it, and no devices."""
    try:
        return tarfile.data_filter(entry, folder)
    except tarfile.FilterError:
        return None


def _endpoint(asked: Asked) -> dict[str, Any]:
    address = asked.network.addresses.get(asked.hostname)
    return {"Aliases": [asked.hostname]} | ({"IPAMConfig": {"IPv4Address": address}} if address else {})


def _said(exc: BaseException) -> str:
    return str(getattr(exc, "explanation", None) or exc).strip()
