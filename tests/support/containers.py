"""Containers and small images of tests, gone when the test is over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.images import context
from trimtab.layout import JobDir

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

SOMEONE = os.getuid() or 4321  # without a name in the image, and not root


@contextlib.contextmanager
def container(client: DockerClient, image: str, job: JobDir | None = None, **how: object) -> Iterator[Container]:
    """A container with a read-only root, no network and no powers that it was not given, gone at the end."""
    volumes = {} if job is None else {str(job.root): {"bind": "/opt/ml", "mode": "rw"}}
    settings = {
        "volumes": volumes,
        "read_only": True,
        "tmpfs": {"/tmp": "mode=1777"},
        "network_mode": "none",
        "environment": {"OMP_NUM_THREADS": "1"},
    }
    started = client.containers.run(image, detach=True, labels={"trimtab-test": "images"}, **{**settings, **how})
    try:
        yield started
    finally:
        started.remove(force=True, v=True)


def ended(started: Container, code: int) -> str:
    """What it printed; its exit code is checked."""
    found = started.wait(timeout=300)["StatusCode"]
    said = started.logs().decode()
    assert found == code, said
    return said


def own(root: Path, user: int) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


@contextlib.contextmanager
def small_image(client: DockerClient, base: str, *lines: str, labels: dict[str, str] | None = None) -> Iterator[str]:
    """An image on the base, with some more lines of a Dockerfile."""
    tag = f"trimtab-test-small:{os.getpid()}"
    files = {"Dockerfile": "\n".join([f"FROM {base}", *lines]).encode()}
    client.images.build(fileobj=context.archive(files), custom_context=True, tag=tag, labels=labels, rm=True, forcerm=True)
    try:
        yield tag
    finally:
        client.images.remove(tag, force=True)
