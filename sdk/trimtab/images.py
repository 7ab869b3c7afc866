"""Names, finds, checks and builds the images in which jobs run. Nothing is imported of the docker SDK before it is used.

An image is called after what is in it, `trimtab-<device>-<target>:<version>-<digest>`: the digest is that of its build context and of the
arguments of its build. So it is built again when something of it changed, and only then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import image_context
from trimtab.errors import BackendError, BackendUnavailable
from trimtab.find_links import served
from trimtab.spec import SPEC_VERSION

if TYPE_CHECKING:
    from docker import DockerClient

TARGETS = ("train",)
LABEL = "trimtab."  # what our labels begin with
BASE_VARIABLE = "TRIMTAB_BASE_IMAGE"  # a base image for every build, as --base for one
ENGINE_REMEDY = "start it (Linux: systemctl start docker; else Docker Desktop), or name another with DOCKER_HOST, and try again"

_WRONG_PYTHON = 86  # the Dockerfiles' exit code for a base without the right Python
_DISK_FULL = "no space left on device"


@dataclass(frozen=True)
class Image:
    """An image of ours in an engine. `size` is in bytes, `labels` are those that begin with `LABEL`, without it."""

    tag: str
    id: str
    labels: dict[str, str]
    size: int
    created: datetime
    architecture: str

    @property
    def current(self) -> bool:
        """Whether it holds what this trimtab would build now, on whatever base."""
        device = self.labels.get("device")
        return device in image_context.DEVICES and self.labels.get("source") == image_context.digest(image_context.context(device))


@dataclass(frozen=True)
class Progress:
    """A step of a build that begins: the `step`-th of `of`, from 1."""

    step: int
    of: int
    command: str


def engine(*, timeout: float = 120.0) -> DockerClient:
    """The Docker engine that `DOCKER_HOST` names, else this machine's; `timeout` in seconds bounds each of its answers.

    Raises BackendUnavailable without the docker SDK, or when no engine answers.
    """
    try:
        docker = importlib.import_module("docker")
    except ImportError as exc:
        raise BackendUnavailable("images and the docker backend need the docker SDK:  pip install 'trimtab[docker]'") from exc
    try:
        client: DockerClient = docker.from_env(timeout=timeout)
        client.ping()
    except (docker.errors.DockerException, OSError) as exc:  # requests' errors are OSErrors
        if "Permission denied" in str(exc):
            remedy = "you may not use it: sudo usermod -aG docker $USER, log in again, and try again"
        else:
            remedy = ENGINE_REMEDY
        where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        raise BackendUnavailable(f"no Docker engine answers at {where}: {remedy}") from exc
    return client


def tag_of(device: str, target: str = "train", *, base: str | None = None) -> str:
    """The name that an image built now would have, such as `trimtab-xeon-train:0.1.0-3f2a9c81d0aa`."""
    return _Plan.of(device, target, base).tag


def build(
    device: str,
    target: str = "train",
    *,
    base: str | None = None,
    find_links: Path | None = None,
    offline: bool = False,
    client: DockerClient | None = None,
    say: Callable[[str], None] = print,
    show: Callable[[Progress], None] = lambda progress: None,
    force: bool = False,
    cpus: str | None = None,
) -> str:
    """Build an image, or find it built, and return its tag.

    `base` is the image that it stands on (default: `TRIMTAB_BASE_IMAGE`, else the Dockerfile's); `find_links` a folder of wheels for pip,
    served to the build on loopback; `offline` takes packages from there alone; `force` builds although it is there, without the engine's
    cache. `say` gets the build's log, `show` its steps; `cpus` binds the build to CPUs, such as "0,1".

    Raises BackendUnavailable without an engine; BackendError with the remedy when the build fails.
    """
    client = client or engine()
    plan = _Plan.of(device, target, base)
    if not force and (there := _inspect(client, plan.tag)) is not None and there.labels.get("context") == plan.context_digest:
        check(there, client)
        say(f"image: {plan.tag} is there")
        return plan.tag
    if offline and find_links is None:
        raise BackendError("an offline build takes its packages from a folder of wheels: name it with --find-links")
    say(f"image: building {plan.tag} on {plan.base}")
    with contextlib.ExitStack() as open_while_building:
        extra: dict[str, Any] = {}
        arguments = {"BASE": plan.base}
        if find_links is not None:
            address = open_while_building.enter_context(served(find_links))
            arguments |= {"PIP_FIND_LINKS": address} | ({"PIP_NO_INDEX": "1"} if offline else {})
            extra["network_mode"] = "host"  # the folder is served on the loopback of the engine's machine alone
        if cpus is not None:
            extra["container_limits"] = {"cpusetcpus": cpus}
        stream = client.api.build(
            fileobj=image_context.archive(plan.files),
            custom_context=True,
            encoding=None,
            tag=plan.tag,
            target=target,
            buildargs=arguments,
            labels={f"{LABEL}{name}": value for name, value in plan.labels().items()},
            nocache=force,
            rm=True,
            forcerm=True,
            decode=True,
            **extra,
        )
        _follow(_answers(stream), plan, say, show)
    return plan.tag


def find(device: str, target: str = "train", client: DockerClient | None = None) -> Image:
    """The image that holds what this trimtab would build now, on whatever base; of several the newest. It is checked.

    Raises BackendUnavailable, which ends with the command that builds it.
    """
    client = client or engine()
    source = image_context.digest(image_context.context(device))
    ours = [image for image in images(client) if (image.labels.get("device"), image.labels.get("target")) == (device, target)]
    current = [image for image in ours if image.labels.get("source") == source]
    if not current:
        what = f"the {device} {target} images here are of other sources than this trimtab" if ours else f"there is no {device} image here"
        raise BackendUnavailable(f"{what}; build it:  {_build_command(device, target)}")
    check(current[0], client)
    return current[0]


def check(image: Image, client: DockerClient | None = None) -> None:
    """Refuse an image in which a job would not run as asked, before anything is started.

    Raises BackendUnavailable with the next command: for another architecture than the engine's, another spec_version, or a tag that was
    moved to other contents.
    """
    client = client or engine()
    again = _build_command(image.labels.get("device", "xeon"), image.labels.get("target", "train"), "--force")
    if "context" not in image.labels:
        raise BackendUnavailable(f"{image.tag} was not built by trimtab: it has none of its labels; build one:  {again}")
    machine = client.version()["Arch"]
    if image.architecture != machine:
        raise BackendUnavailable(f"{image.tag} is for {image.architecture}, this engine runs {machine}; build it here:  {again}")
    if (found := image.labels.get("spec_version")) != str(SPEC_VERSION):
        raise BackendUnavailable(
            f"{image.tag} understands jobs of spec_version {found}, this trimtab writes {SPEC_VERSION}; build it:  {again}"
        )
    suffix = image.tag.rpartition("-")[2]
    if re.fullmatch(r"[0-9a-f]{12}", suffix) and not image.labels["context"].startswith(suffix):
        raise BackendUnavailable(
            f"{image.tag} was moved: it holds the image of digest {image.labels['context'][:12]}, not the one that it is named after; "
            f"build it:  {again}"
        )


def images(client: DockerClient | None = None) -> list[Image]:
    """Our images in the engine, the newest first, once for each tag."""
    client = client or engine()
    listed = client.api.images(filters={"label": f"{LABEL}context"})
    tags = sorted({tag for entry in listed for tag in entry.get("RepoTags") or [] if tag != "<none>:<none>"})
    found = [image for tag in tags if (image := _inspect(client, tag)) is not None]
    return sorted(found, key=lambda image: image.created, reverse=True)


def inspect(name: str, client: DockerClient | None = None) -> Image:
    """An image by its tag. Raises BackendUnavailable where there is none."""
    client = client or engine()
    if (image := _inspect(client, name)) is None:
        raise BackendUnavailable(f"there is no image {name!r} here; see those that are with  trimtab image list")
    return image


@dataclass(frozen=True)
class _Plan:
    """What would be built: everything that the tag depends on."""

    device: str
    target: str
    base: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, device: str, target: str, base: str | None) -> _Plan:
        if target not in TARGETS:
            raise BackendUnavailable(f"there is no image target {target!r}: targets are {', '.join(TARGETS)}")
        files = image_context.context(device)
        return cls(device, target, base or os.environ.get(BASE_VARIABLE) or image_context.default_base(files), files)

    @property
    def context_digest(self) -> str:
        return image_context.digest(self.files, {"BASE": self.base, "target": self.target})

    @property
    def tag(self) -> str:
        version = image_context.version().replace("+", "_")  # a tag may not hold a plus
        return f"trimtab-{self.device}-{self.target}:{version}-{self.context_digest[:12]}"

    def labels(self) -> dict[str, str]:
        return {
            "version": image_context.version(),
            "spec_version": str(SPEC_VERSION),
            "source": image_context.digest(self.files),
            "context": self.context_digest,
            "device": self.device,
            "target": self.target,
            "base": self.base,
        }


def _build_command(device: str, target: str, *options: str) -> str:
    return " ".join(["trimtab image build", *options, device, *([] if target == "train" else ["--target", target])])


def _inspect(client: DockerClient, name: str) -> Image | None:
    errors = importlib.import_module("docker.errors")
    try:
        facts = client.api.inspect_image(name)
    except errors.NotFound:  # ImageNotFound is one
        return None
    labels = (facts["Config"] or {}).get("Labels") or {}
    return Image(
        tag=name,
        id=facts["Id"],
        labels={key.removeprefix(LABEL): value for key, value in labels.items() if key.startswith(LABEL)},
        size=facts["Size"],
        created=datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", facts["Created"])),
        architecture=facts["Architecture"],
    )


def _answers(stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The engine's answers; its going away is ours to report."""
    errors = importlib.import_module("docker.errors")
    try:
        yield from stream
    except errors.APIError as exc:
        yield {"error": str(exc.explanation or exc)}
    except (errors.DockerException, OSError) as exc:
        raise BackendUnavailable(f"the Docker engine went away during the build ({exc}): {ENGINE_REMEDY}") from exc


def _follow(answers: Iterable[dict[str, Any]], plan: _Plan, say: Callable[[str], None], show: Callable[[Progress], None]) -> None:
    last: deque[str] = deque(maxlen=40)
    for answer in answers:
        if "error" in answer:
            raise BackendError(failure(str(answer["error"]), last, plan.base, _build_command(plan.device, plan.target)))
        for line in str(answer.get("stream", answer.get("status", ""))).splitlines():
            if not line.strip():
                continue
            if step := re.match(r"Step (\d+)/(\d+) : (.*)", line):
                show(Progress(int(step[1]), int(step[2]), step[3]))
            last.append(line.rstrip())
            say(line.rstrip())


def failure(error: str, last: Iterable[str], base: str, again: str) -> str:
    """What a failed build is told as: from the engine's error and the last lines of the log, ending with what to do."""
    log = "\n  ".join(line for line in last if not line.startswith(("Step ", " ---> ", "Removing intermediate")))
    if _DISK_FULL in f"{error}\n{log}".lower():
        return f"the disk of the Docker engine is full: free some with  docker system prune  and build again:  {again}"
    if re.search(rf"returned a non-zero code: {_WRONG_PYTHON}\b", error) or ("non-zero code: 127" in error and "python" in error):
        return f"the base image {base} has no Python 3.11 or 3.12: name one that has:  {again} --base python:3.11-slim-bookworm"
    if "non-zero code" not in error:
        return f"the build stopped ({error.strip()}): is the base image {base} here, or within reach? Name another:  {again} --base IMAGE"
    return f"the image could not be built ({error.strip()}); its last lines were:\n  {log}\nMend that and build again:  {again}"
