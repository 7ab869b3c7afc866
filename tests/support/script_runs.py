"""Docker runs whose image does what a shell script says, for what the runtime never does; fixtures for the tests of containers."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docker import DockerClient

from trimtab.backends.base import RunHandle
from trimtab.backends.container import has_gpu_runtime
from trimtab.backends.docker import DockerBackend
from trimtab.backends.engine import Engine
from trimtab.spec import JobSpec, TrainSpec

ANY_JOB = JobSpec(train=TrainSpec(model="smollm2-135m-instruct"), data=("notes.txt",))
MINE = f"trimtab-docker-test-{os.getpid()}-"  # other tests may use the engine at the same time
SCRIPT_IMAGE = f"{MINE}script:latest"


def derived(client: DockerClient, tag: str, *lines: str) -> str:
    """An image of these Dockerfile lines; its tag."""
    text = "\n".join(lines).encode()
    with io.BytesIO() as context:
        with tarfile.open(fileobj=context, mode="w") as archive:
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        context.seek(0)
        client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, forcerm=True)
    return tag


@pytest.fixture(scope="session")
def script_image(client: DockerClient, base_image: str) -> Iterator[str]:
    """An image with our labels that runs the script of its channel, for what the runtime never does."""
    labels = " ".join(f"trimtab.{name}={value}" for name, value in {"context": "0", "spec_version": 1, "device": "xeon"}.items())
    entry = 'ENTRYPOINT ["/bin/sh", "/opt/ml/input/data/train/script"]'
    yield derived(client, SCRIPT_IMAGE, f"FROM {base_image}", f"LABEL {labels}", entry)
    client.images.remove(SCRIPT_IMAGE)


@pytest.fixture
def channels(tmp_path: Path) -> dict[str, Path]:
    """Folders as staging gives them: a script, and a model that is a link to a file beside other files."""
    theirs = tmp_path / "their folder, größer"
    for folder in (theirs, tmp_path / "train", tmp_path / "model"):
        folder.mkdir()
    (theirs / "weights").write_text("weights\n")
    (theirs / "diary").write_text("dear diary\n")
    (tmp_path / "model" / "model 1.bin").symlink_to(theirs / "weights")
    return {"train": tmp_path / "train", "model": tmp_path / "model"}


@pytest.fixture
def run_script(tmp_path, channels, script_image, client) -> Iterator[Callable[..., tuple[DockerBackend, RunHandle]]]:
    """Start a shell script as a run: (backend, handle)."""
    started = []

    def start(text: str, **settings: str) -> tuple[DockerBackend, RunHandle]:
        (channels["train"] / "script").write_text(text)
        backend = DockerBackend(tmp_path / "home", image=script_image, client=client, **settings)
        started.append(backend.submit(ANY_JOB, channels))
        return backend, started[-1]

    yield start
    for handle in started:
        for container in containers_of(client, handle):
            Engine(client).remove(container)


def containers_of(client: DockerClient, handle: RunHandle) -> list[str]:
    return [container.id for container in Engine(client).containers(handle)]


def printed(backend: DockerBackend, handle: RunHandle) -> list[str]:
    """What the container printed, without the choices that are said before."""
    return list(backend.logs(handle))[2:]


@contextlib.contextmanager
def no_engine_there() -> Iterator[None]:
    """For questions to an engine that is not there: the docker SDK leaves the socket of a failed connection to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture
def no_gpu(client: DockerClient) -> None:
    """For tests of what is refused where no GPU can be had; the rule itself is tested everywhere (tests/unit/test_container.py)."""
    if has_gpu_runtime(client.info(), shutil.which("nvidia-container-runtime-hook")):
        pytest.skip("this engine has a GPU runtime, and would not refuse")
