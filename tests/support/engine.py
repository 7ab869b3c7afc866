"""A Docker engine for the session, brought up by .ci/engine, and the images that its tests run: built once, and not when nothing changed.

Where no engine can be had these tests fail. With TRIMTAB_TEST_ENGINE=none they are skipped, counted, and named in the summary.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trimtab import images

if TYPE_CHECKING:
    from docker import DockerClient

SCRIPT = Path(__file__).parents[2] / ".ci" / "engine"


@pytest.fixture(scope="session")
def base_image() -> str:
    """The name of an image with Python, in an engine that answers; builds of this session stand on it."""
    if os.environ.get("TRIMTAB_TEST_ENGINE") == "none":
        pytest.skip("not run, because TRIMTAB_TEST_ENGINE=none: what needs a Docker engine")
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        pytest.fail((done.stderr.strip().splitlines() or [f"{SCRIPT} ended with exit code {done.returncode}"])[-1], pytrace=False)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def client(base_image: str) -> Iterator[DockerClient]:
    with contextlib.closing(images.engine()) as found:
        yield found


@pytest.fixture(scope="session")
def volumes_before(client: DockerClient) -> set[str]:
    """What there was before this session's tests ran a container."""
    return {volume.id for volume in client.volumes.list()}


@pytest.fixture(scope="module")
def left_behind(client: DockerClient, volumes_before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What this session's runs have left in the engine: containers and networks of runs whose folders are its own, and new volumes.

    Further folders of its own are given by how their paths begin.
    """
    base = str(tmp_path_factory.getbasetemp())

    def look(*further: str) -> list[str]:
        labelled = [(container.name, container.labels) for container in client.containers.list(all=True, ignore_removed=True)]
        labelled += [(network.name, network.attrs["Labels"] or {}) for network in client.networks.list()]
        found = [name for name, labels in labelled if labels.get("trimtab.folder", "").startswith((base, *further))]
        return found + sorted({volume.id for volume in client.volumes.list()} - volumes_before)

    return look


@pytest.fixture(scope="session")
def xeon_image(client: DockerClient, base_image: str) -> str:
    """The tag of the Xeon train image of this checkout."""
    return images.build("xeon", base=base_image, client=client, say=lambda line: None)


@pytest.fixture(scope="session")
def xeon_serve_image(client: DockerClient, base_image: str) -> str:
    """The tag of the Xeon serve image of this checkout."""
    return images.build("xeon", "serve", base=base_image, client=client, say=lambda line: None)
