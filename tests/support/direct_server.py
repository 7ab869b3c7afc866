"""The runtime's server as a container starts it: `python -m trimtab_runtime serve` in a tree, with nothing of the client around it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.endpoint import Endpoint
from trimtab.layout import JobDir
from trimtab.spec import ServeSpec


def tree(root: Path, model: Path, artifact: Path | None = None, key: str | None = None) -> JobDir:
    """A base model in its channel, an artifact beside it, a key."""
    job = JobDir(root)
    job.channel("model").parent.mkdir(parents=True)
    job.channel("model").symlink_to(model)
    if artifact is not None:
        job.model.symlink_to(artifact)
    if key is not None:
        job.api_key.parent.mkdir(parents=True)
        job.api_key.write_text(f"{key}\n")
    return job


class DirectServer:
    """A server process. It is killed at the end of the `with` block, whatever happened."""

    def __init__(self, job: JobDir, spec: ServeSpec | None = None, *, stdin: int | None = subprocess.DEVNULL, **environment: str) -> None:
        self.job, self.log = job, job.root / "log.txt"
        own = {
            "TRIMTAB_ROOT": str(job.root),
            "TRIMTAB_PORT": "0",
            "TRIMTAB_SERVE": (spec or ServeSpec()).to_text(),
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("ab") as log:
            command = [sys.executable, "-P", "-m", "trimtab_runtime", "serve"]
            self.process = subprocess.Popen(
                command, env={**os.environ, **own, **environment}, stdin=stdin, stdout=log, stderr=log, start_new_session=True
            )

    def record(self, seconds: float = 60.0) -> dict[str, Any]:
        """What endpoint.json says, once it is there."""
        deadline = time.monotonic() + seconds
        while not self.job.endpoint.exists():
            assert self.process.poll() is None, self.written()
            assert time.monotonic() < deadline, self.written()
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(self.job.endpoint.read_text())
        return found

    def endpoint(self) -> Endpoint:
        key = self.job.api_key
        return Endpoint(self.record()["url"], api_key=key.read_text().strip() if key.exists() else None, timeout=60)

    def engine(self) -> int:
        """The engine's process id."""
        (child,) = children(self.process.pid)
        return child

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def written(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> DirectServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return []


def engines_of(root: Path) -> Iterator[int]:
    """All processes anywhere that serve a tree, also orphans."""
    wanted = f"TRIMTAB_ROOT={root}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def wait_until(so: Any, seconds: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline, what or "it did not come about in time"
        time.sleep(0.02)
