"""The Docker engine as far as runs need it: containers by label, and its refusals and silences in our words."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import docker
from docker import DockerClient

from trimtab import images
from trimtab.backends.base import RunHandle
from trimtab.backends.container import (
    FOLDER_LABEL,
    GPU_REMEDY,
    RUN_LABEL,
    USER_LABEL,
    Limits,
    has_gpu_runtime,
    on_another_machine,
    parse_cpus,
)
from trimtab.errors import BackendError, BackendUnavailable
from trimtab.images.present import ENGINE_REMEDY

# what the engine says, and what to do about it
_REMEDIES = {
    r"could not select device driver|nknown runtime specified": f"it has no GPU runtime: {GPU_REMEDY}",
    r"Requested CPUs are not available": "choose others with  --backend-option cpus=...",
    r"bind source path does not exist": "repeat  trimtab fit   on the machine where the engine is",
    r"No such image": "build it:  trimtab image build xeon   and name it with  --backend-option image=TAG",
    r"no space left on device": "free some with  docker system prune",
    r"is already in use by container": "remove that container with  docker rm -f NAME  and repeat the command",
    r"non-overlapping IPv4 address pool": "remove networks that nothing uses with  docker network prune  and repeat the command",
    r"network \S+ not found": "see those there are with  docker network ls  or leave --backend-option network out",
}


@dataclass(frozen=True)
class Found:
    """A container or a network of a run, by its labels."""

    id: str
    running: bool
    handle: RunHandle
    folder: Path
    ours: bool  # of this user


class Engine:
    """What runs ask a Docker engine for. Every question raises BackendError when it refuses, BackendUnavailable when it is silent."""

    def __init__(self, client: DockerClient) -> None:
        self.client = client
        self._api: Any = client.api  # typed in part only

    @property
    def address(self) -> str:
        return str(self._api.base_url)

    def info(self) -> dict[str, Any]:
        with asking("to say what it is"):
            facts: dict[str, Any] = self._api.info()
        return facts

    def containers(self, handle: RunHandle | None = None) -> list[Found]:
        """The containers of all runs, or of one, that have not been removed."""
        label = RUN_LABEL if handle is None else f"{RUN_LABEL}={handle.id}"
        with asking("for its containers"):
            listed: list[dict[str, Any]] = self._api.containers(all=True, filters={"label": label})
        return [_found(facts) for facts in listed]

    def inspect(self, container: str) -> dict[str, Any] | None:
        """All of a container's facts, by its id or name; None where it is gone."""
        with asking("about a container"), contextlib.suppress(docker.errors.NotFound):
            facts: dict[str, Any] = self._api.inspect_container(container)
            return facts
        return None

    def create(self, name: str, body: Mapping[str, Any]) -> str:
        """The id of a new container of the request's very body, not started."""
        with asking(f"to make the container {name}"):
            return str(self._api.create_container_from_config(dict(body), name=name)["Id"])

    def start(self, container: str) -> None:
        with asking("to start a container"):
            self._api.start(container)

    def stop(self, container: str, grace: int) -> None:
        """SIGTERM, up to `grace` seconds, SIGKILL. Quiet for a container that is gone."""
        with asking("to stop a container"), contextlib.suppress(docker.errors.NotFound):
            self._api.stop(container, timeout=grace)

    def remove(self, container: str) -> None:
        """Also a running one. Quiet for a container that is gone, or that somebody else is removing."""
        with asking("to remove a container"):
            try:
                self._api.remove_container(container, v=True, force=True)
            except docker.errors.APIError as exc:
                if exc.status_code not in (404, 409):
                    raise

    def create_network(self, body: Mapping[str, Any]) -> None:
        with asking(f"to make the network {body['Name']}"):
            self._api.create_network(
                body["Name"], driver=body["Driver"], internal=body["Internal"], labels=body["Labels"], check_duplicate=True
            )

    def networks(self) -> list[Found]:
        """The networks of all runs on several machines."""
        with asking("for its networks"):
            listed: list[dict[str, Any]] = self._api.networks(filters={"label": RUN_LABEL})
        return [_found({**facts, "State": ""}) for facts in listed]

    def remove_networks(self, handle: RunHandle) -> None:
        """The networks of a run, which has no container any more. Quiet for one that is gone."""
        with asking("to remove a network"):
            for network in self._api.networks(filters={"label": f"{RUN_LABEL}={handle.id}"}):
                with contextlib.suppress(docker.errors.NotFound):
                    self._api.remove_network(network["Id"])

    def output(self, container: str, *, follow: bool) -> Iterator[bytes]:
        """What a container printed, in pieces; with `follow` until it ends. Nothing more of one that is gone."""
        with asking("for a log"), contextlib.suppress(docker.errors.NotFound):
            try:
                stream = self._api.logs(container, stdout=True, stderr=True, stream=True, follow=follow)
            except docker.errors.APIError as exc:
                if _GOING in str(exc.explanation):
                    return
                raise
            try:
                yield from stream
            finally:
                stream._response.close()  # its own close() leaves the socket open, as docker 7.2 does at the end of the log


_GOING = "dead or marked for removal"  # the engine's words for a container that another client removes just now


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    try:
        yield
    except docker.errors.APIError as exc:
        said = str(exc.explanation or exc).strip()
        remedy = next((remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, said)), "mend that and repeat the command")
        raise BackendError(f"the Docker engine was asked {what} and refused ({said}): {remedy}") from exc
    except (docker.errors.DockerException, OSError) as exc:  # requests' errors are OSErrors
        raise BackendUnavailable(f"the Docker engine was asked {what} and does not answer ({exc}): {ENGINE_REMEDY}") from exc


def _found(facts: Mapping[str, Any]) -> Found:
    labels = facts["Labels"]
    return Found(
        id=facts["Id"],
        running=facts["State"] in ("running", "paused", "restarting"),
        handle=RunHandle("docker", labels[RUN_LABEL]),
        folder=Path(labels.get(FOLDER_LABEL, "/")),
        ours=labels.get(USER_LABEL) == str(os.getuid()),
    )


class OnEngine:
    """What runs and endpoints on a Docker engine have in common: the engine, what it must be able to do, and the image."""

    def __init__(self, image: str | None, limits: Limits, client: DockerClient | None) -> None:
        self.image, self.limits, self._client = image, limits, client

    @cached_property
    def engine(self) -> Engine:
        """Raises BackendUnavailable when none answers."""
        client = self._client
        if client is None:
            client = images.engine()
            weakref.finalize(self, client.close)  # else its sockets are left to the garbage collector
        return Engine(client)

    def refuse_unable(self, device: str) -> None:
        """Raise BackendUnavailable where the engine cannot mount this machine's folders, lacks a GPU runtime, or the CPUs asked for."""
        info = self.engine.info()
        if on_another_machine(self.engine.address):
            raise BackendUnavailable(
                f"the Docker engine at {self.engine.address} is another machine's and cannot mount folders of this one: unset DOCKER_HOST"
            )
        if device == "gpu" and not has_gpu_runtime(info, shutil.which("nvidia-container-runtime-hook")):
            raise BackendUnavailable(f"the Docker engine has no GPU runtime: {GPU_REMEDY}")
        if self.limits.cpus is not None and max(parse_cpus(self.limits.cpus)) >= info["NCPU"]:
            raise BackendUnavailable(
                f"cpus={self.limits.cpus}: the engine has the CPUs 0-{info['NCPU'] - 1}; choose others with  --backend-option cpus=..."
            )

    def own_image(self, device: str, target: str) -> images.Image:
        """The image that was named, else the one of these sources. Raises BackendUnavailable where it is not there or does not fit."""
        client = self.engine.client
        with asking("for its images"):
            if self.image is None:
                return images.find(device, target, client)
            image = images.inspect(self.image, client)
            images.check(image, client)
        return image
