"""An engine that goes silent, control planes that were killed, files that change while they are copied."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from docker import DockerClient

from control_plane import ControlPlane, Settings
from control_plane.container import LABEL, Asked, Engine
from control_plane.instance import StartFailed
from support.cloud import HERE
from support.training_jobs import Jobs, client_at

REAL = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")


class Line:
    """A way to the engine that can be cut, and mended: connections to it end, and new ones at once."""

    def __init__(self, path: Path) -> None:
        self._whole = True
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def cut(self) -> None:
        self._whole = False
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for each in [self._listener, *self._open]:
            each.close()

    def _begin(self, target: Callable[..., None], *given: socket.socket) -> None:
        thread = threading.Thread(target=target, args=given, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            if not self._whole:
                near.close()
                continue
            far = socket.socket(socket.AF_UNIX)
            far.connect(REAL)
            self._open += [near, far]
            self._begin(self._copy, near, far)
            self._begin(self._copy, far, near)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                sink.sendall(piece)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(client: DockerClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    folder = Path(tempfile.mkdtemp(prefix="line-", dir="/tmp"))  # sockets' names are short
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/s")
    with contextlib.closing(Line(folder / "s")) as made:
        yield made
    shutil.rmtree(folder)


def test_a_job_ends_when_its_engine_is_gone_and_nothing_is_left_when_it_is_back(
    jobs: Jobs, localstack: str, line: Line, client: DockerClient
) -> None:
    with (
        ControlPlane(localstack, settings=Settings(grace=1, patience=1)) as plane,
        contextlib.closing(client_at(jobs.sagemaker, plane.url)) as sagemaker,
    ):
        mine = Jobs(plane, sagemaker, jobs.s3, jobs.logs, jobs.bucket, jobs.image)
        name = mine.start("trap '' TERM; echo going; while :; do sleep 0.1; done")
        mine.until_printed(name, "going")
        labelled = {"label": f"{LABEL}={plane.place(plane.account, plane.region).training.engine.mark}"}  # type: ignore[union-attr]
        line.cut()
        assert mine.wait(name)["FailureReason"] == "AlgorithmError: , exit code: 137"
        assert mine.run("")["FailureReason"].startswith("InternalServerError: the Docker engine does not answer")
        line.mend()
        assert len(client.containers.list(filters=labelled)) == 1
    assert client.containers.list(all=True, filters=labelled) == []


def test_closing_does_not_wait_for_an_engine_for_ever(jobs: Jobs, localstack: str, line: Line, client: DockerClient) -> None:
    with (
        ControlPlane(localstack, settings=Settings(patience=1)) as plane,
        contextlib.closing(client_at(jobs.sagemaker, plane.url)) as sagemaker,
    ):
        mine = Jobs(plane, sagemaker, jobs.s3, jobs.logs, jobs.bucket, jobs.image)
        name = mine.start("echo going; exec sleep 300")
        mine.until_printed(name, "going")
        mark = plane.place(plane.account, plane.region).training.engine.mark  # type: ignore[union-attr]
        line.cut()
        began = time.monotonic()
    assert time.monotonic() - began < 20
    line.mend()
    (left,) = client.containers.list(filters={"label": f"{LABEL}={mark}"})
    left.remove(force=True)


def test_what_a_killed_process_left_is_removed_by_the_next(client: DockerClient, base_image: str, tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from control_plane.container import Asked, Engine
engine = Engine(volumes=True)
folder = pathlib.Path(sys.argv[2])
network = engine.network("left", internal=True)
engine.start(Asked("left", sys.argv[1], ["sleep", "300"], {}, {pathlib.PurePosixPath("/opt/ml/model"): folder}, network=network))
print(engine.mark, flush=True)
os.kill(os.getpid(), 9)
"""
    with contextlib.closing(Engine()) as mine:
        kept = mine.start(Asked("kept", base_image, ["sleep", "300"], {}, {}))
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            [sys.executable, "-c", code, base_image, tmp_path], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        labelled = {"label": f"{LABEL}={done.stdout.strip()}"}
        every = (lambda: client.containers.list(all=True, filters=labelled), client.networks.list, client.volumes.list)
        assert [len(look() if look is every[0] else look(filters=labelled)) for look in every] == [1, 1, 1]
        with contextlib.closing(Engine()) as other:
            assert other.client.ping()
        assert [len(look() if look is every[0] else look(filters=labelled)) for look in every] == [0, 0, 0]
        assert kept.poll() is None


def test_no_engine_is_told(line: Line) -> None:
    with contextlib.closing(Engine()) as engine:
        line.cut()
        with pytest.raises(StartFailed, match="no Docker engine answers"):
            engine.image("any:1")
        line.mend()


def test_a_copy_that_breaks_off_leaves_the_one_before(client: DockerClient, base_image: str, tmp_path: Path) -> None:
    """A file grows and shrinks while the engine packs it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "steady").write_text("1")
    script = "cd /opt/ml/checkpoints; while :; do head -c 4000000 /dev/zero >a; : >a; done"
    with contextlib.closing(Engine(volumes=True)) as engine:
        container = engine.start(
            Asked("changing", base_image, ["/bin/sh", "-c", script], {}, {PurePosixPath("/opt/ml/checkpoints"): folder})
        )
        for _ in range(25):
            container.pull(folder)
            assert (folder / "steady").read_text() == "1"
            assert [each.name for each in tmp_path.iterdir()] == ["checkpoints"]
