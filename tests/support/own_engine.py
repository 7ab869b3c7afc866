"""A Docker engine of a test's own, beside the one that the others use, to be killed and brought back."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

import docker


class OwnEngine:
    """dockerd with its own data, sockets and containerd under `root` (a short path: sockets' names are). It has no network."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address = f"unix://{root}/sock"
        self._client: docker.DockerClient | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> docker.DockerClient:
        """One for all its lives, from its first start on: with the engine it agrees upon a version."""
        assert self._client is not None, "it was never started"
        return self._client

    def start(self) -> None:
        for leftover in [self.root / "pid", *(self.root / "exec" / "containerd").glob("containerd*")]:
            leftover.unlink(missing_ok=True)  # of a killed one; the next would take them for a living one's
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        options = [f"--{name}={self.root / folder}" for name, folder in places.items()]
        options += [f"--host={self.address}", "--bridge=none", "--iptables=false", "--ip-forward=false"]
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                # a network namespace of its own: with --bridge=none dockerd removes docker0, which is the shared engine's
                ["unshare", "--net", "dockerd", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError, docker.errors.DockerException):
                self._client = self._client or docker.DockerClient(base_url=self.address)
                self._client.ping()
                return
            said = (self.root / "log").read_text()[-2000:]
            assert self._process.poll() is None, f"dockerd ended:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.1)

    def kill(self) -> None:
        """As a kernel does; its containers go on until it is back."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def remove(self) -> None:
        """End it and all that it has."""
        if self._process is not None and self._process.poll() is not None:
            self.start()  # a dead one has left its containers
        if self._process is not None:
            for container in self._client.containers.list() if self._client else []:
                container.kill()
            self._process.terminate()
            self._process.wait(60)
        if self._client is not None:
            self._client.close()
        while subprocess.run(["umount", self.root / "data"], capture_output=True, check=False).returncode == 0:
            pass  # dockerd mounts its folder on itself, once for each start, and leaves that
        shutil.rmtree(self.root)
