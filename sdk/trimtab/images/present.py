"""The engine, and our images in it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from trimtab.errors import BackendUnavailable
from trimtab.images import context
from trimtab.images.plan import LABEL, missing, refusal

if TYPE_CHECKING:
    from docker import DockerClient

ENGINE_REMEDY = "start it (Linux: systemctl start docker; else Docker Desktop), or name another with DOCKER_HOST, and try again"


@dataclass(frozen=True)
class Image:
    """An image of ours in an engine. `size` is in bytes; `labels` are those that begin with `LABEL`, without it."""

    tag: str
    id: str
    labels: dict[str, str]
    size: int
    created: datetime
    architecture: str

    @property
    def current(self) -> bool:
        """Whether it holds what this trimtab would build now, on whatever base."""
        device, target = self.labels.get("device"), self.labels.get("target")
        if device not in context.DEVICES or target not in context.TARGETS:
            return False
        return self.labels.get("source") == context.digest(context.context(device, target))


def engine(*, timeout: float = 120.0) -> DockerClient:
    """The Docker engine that `DOCKER_HOST` names, else this machine's; `timeout` in seconds bounds each of its answers.

    Raises BackendUnavailable without the docker SDK, or when no engine answers.
    """
    try:
        docker = importlib.import_module("docker")
    except ImportError as exc:
        raise BackendUnavailable("images and the docker backend need the docker SDK:  pip install 'trimtab[docker]'") from exc
    try:
        with contextlib.ExitStack() as on_failure:
            client: DockerClient = docker.from_env(timeout=timeout)
            on_failure.callback(client.close)
            client.ping()
            on_failure.pop_all()
    except (docker.errors.DockerException, OSError) as exc:  # requests' errors are OSErrors
        where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if "Permission denied" in str(exc):
            remedy = "you may not use it; run  sudo usermod -aG docker $USER  , log in again, and try again"
        else:
            remedy = ENGINE_REMEDY
        raise BackendUnavailable(f"no Docker engine answers at {where}: {remedy}") from exc
    return client


@contextlib.contextmanager
def answering(what: str) -> Iterator[None]:
    """BackendUnavailable, in our words, where an engine that was there refuses what it is asked, or goes away meanwhile."""
    errors = importlib.import_module("docker.errors")
    try:
        yield
    except errors.APIError as exc:
        said = str(exc.explanation or exc).strip()
        raise BackendUnavailable(
            f"the Docker engine was asked {what} and refused ({said}): see what  docker info  says, and repeat the command"
        ) from exc
    except (errors.DockerException, OSError) as exc:  # requests' errors are OSErrors
        raise BackendUnavailable(f"the Docker engine was asked {what} and does not answer ({exc}): {ENGINE_REMEDY}") from exc


@contextlib.contextmanager
def using(client: DockerClient | None) -> Iterator[DockerClient]:
    """A client that was given, left open, or one of our own, closed at the end."""
    if client is not None:
        yield client
        return
    with contextlib.closing(engine()) as own:
        yield own


def find(device: str, target: str = "train", client: DockerClient | None = None) -> Image:
    """The image that holds what this trimtab would build now, on whatever base; of several the newest. It is checked.

    Raises BackendUnavailable, which ends with the command that builds it.
    """
    source = context.digest(context.context(device, target))
    with using(client) as asked:
        ours = [image for image in installed(asked) if (image.labels.get("device"), image.labels.get("target")) == (device, target)]
        current = next((image for image in ours if image.labels.get("source") == source), None)
        if current is None:
            raise missing(device, target, others=bool(ours))
        check(current, asked)
    return current


def check(image: Image, client: DockerClient | None = None) -> None:
    """Refuse an image in which a job would not run as asked, before anything is started.

    Raises BackendUnavailable with the next command: for another architecture than the engine's, another spec_version, or a tag that was
    moved to other contents; and where the engine does not answer.
    """
    with using(client) as asked, answering("what it is"):
        machine = asked.version()["Arch"]
    if why := refusal(image.tag, image.labels, image.architecture, machine):
        raise BackendUnavailable(why)


def installed(client: DockerClient | None = None) -> list[Image]:
    """Our images in the engine, the newest first, once for each tag. Raises BackendUnavailable where it does not answer."""
    with using(client) as asked, answering("for its images"):
        listed = asked.api.images(filters={"label": f"{LABEL}context"})
        tags = sorted({tag for entry in listed for tag in entry.get("RepoTags") or [] if tag != "<none>:<none>"})
        found = [image for tag in tags if (image := look_up(asked, tag)) is not None]
    return sorted(found, key=lambda image: image.created, reverse=True)


def inspect(name: str, client: DockerClient | None = None) -> Image:
    """An image by its tag. Raises BackendUnavailable where there is none."""
    with using(client) as asked:
        image = look_up(asked, name)
    if image is None:
        raise BackendUnavailable(f"there is no image {name!r} here; see those that are:  trimtab image list")
    return image


def look_up(client: DockerClient, name: str) -> Image | None:
    """An image by its tag or id, or None. Raises BackendUnavailable where the engine does not answer."""
    errors = importlib.import_module("docker.errors")
    with answering(f"about the image {name}"):
        try:
            facts = client.api.inspect_image(name)
        except errors.NotFound:  # ImageNotFound is one
            return None
        except errors.APIError as exc:
            if "invalid reference format" in str(exc.explanation):  # no image can have such a name
                return None
            raise
    labels = (facts["Config"] or {}).get("Labels") or {}
    return Image(
        tag=name,
        id=facts["Id"],
        labels={key.removeprefix(LABEL): value for key, value in labels.items() if key.startswith(LABEL)},
        size=facts["Size"],
        created=datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", facts["Created"])),
        architecture=facts["Architecture"],
    )
