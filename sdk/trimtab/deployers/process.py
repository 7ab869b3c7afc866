"""Endpoints as processes of this machine.

Beside what every endpoint's folder holds (endpoint_folder.py):

    alive.lock   locked for as long as the server lives: it inherits the lock, and the kernel takes it back however it dies.
                 So no process id is ever mistaken for another's
    pid          the server's process id, which it writes before it becomes the server: its client may die before it can

A server that is not detached holds the reading end of a pipe, and ends when the pipe does: with its client, however that dies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.backends.run_folder import lock, until
from trimtab.command import INHERITED, inherited, runtime_command, runtime_environment
from trimtab.deployers import endpoint_folder
from trimtab.deployers.base import EndpointHandle, EndpointRecord, EndpointState
from trimtab.deployers.endpoint_folder import LOG, Record
from trimtab.deployers.local import GRACE, LocalEndpoints, is_loopback
from trimtab.errors import BackendUnavailable, EndpointError
from trimtab.events import Event
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.serving import Serving

_NEEDED = ("trimtab_runtime", "tokenizers", "jinja2", "h11")
_ALIVE, _PID = "alive.lock", "pid"
_LAUNCH = ["/bin/sh", "-c", f'echo $$ >{_PID} && exec "$@"', "sh"]
_LAUNCHED = 2.0  # seconds that it may take to write its process id
_MOMENT = 0.2  # seconds for which someone who only looks may hold the lock


class _Server(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """A detached one outlives this process, and the others are ended; Popen's own would warn of it."""


_servers: dict[Path, _Server] = {}  # started here, by folder: each with its end of the pipe


class ProcessDeployer(LocalEndpoints):
    """Servers as processes of this machine, in `home/endpoints/<id>`; `home` is `$TRIMTAB_HOME`, else `~/.trimtab`."""

    name = "process"

    def __init__(self, home: str | Path | None = None, python: str = sys.executable) -> None:
        super().__init__(home)
        self.python = python

    def check(self, device: str) -> None:
        """Raises BackendUnavailable for a device that it has not, and without the packages that a server needs."""
        if device != "xeon":
            raise BackendUnavailable("a process of this machine computes on the CPU, not on a GPU: choose device='xeon' (--device xeon)")
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing and self.python == sys.executable:
            raise BackendUnavailable(f"answering on this machine needs {', '.join(missing)}:  pip install 'trimtab[serve]'")

    def render(
        self, serving: Serving, id: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, detach: bool = False
    ) -> dict[str, Any]:
        """The command, what it gets to see, and the folder it works in."""
        folder = self.home / "endpoints" / id
        own = {"TRIMTAB_HOST": host, "TRIMTAB_PORT": str(port), SERVE_VARIABLE: serving.spec.to_text()}
        return {
            "handle": str(EndpointHandle(self.name, id)),
            "folder": str(folder),
            "command": runtime_command(self.python, "serve"),
            "environment": runtime_environment(folder, device=serving.device)
            | own
            | ({} if detach else {"TRIMTAB_UNTIL_STDIN_CLOSES": "1"}),
            "inherits": list(INHERITED),
            "files": {name: str(path) for name, path in serving.files.items()},
        }

    def _needs_key(self, host: str) -> bool:
        return not is_loopback(host)

    def endpoints(self) -> list[EndpointRecord]:
        """Also folders whose record is damaged; of which backend they were cannot be told, so they are listed here alone."""
        return super().endpoints() + [
            EndpointRecord(
                EndpointHandle(self.name, folder.name),
                "",
                EndpointState.FAILED,
                datetime.fromtimestamp(folder.stat().st_mtime, UTC),
                orphan=why,
            )
            for folder, why in endpoint_folder.damaged(self.home)
        ]

    def _launch(self, folder: Path, record: Record, show: Callable[[Event], None]) -> Record:
        with lock(folder / _ALIVE, _MOMENT) as alive, (folder / LOG).open("ab") as log:
            server = _Server(
                [*_LAUNCH, *record.request["command"]],
                cwd=folder,
                env={**inherited(os.environ), **record.request["environment"]},
                stdin=subprocess.DEVNULL if record.detach else subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the client, which then closes
                pass_fds=(alive,),
            )
        _servers[folder] = server
        return record.model_copy(update={"pid": server.pid})

    def _lives(self, folder: Path, record: Record) -> bool:
        if server := _servers.get(folder):
            server.poll()  # else it stays as a zombie as long as this process
        return endpoint_folder.locked(folder / _ALIVE)

    def _url(self, folder: Path, record: Record) -> str:
        return str(endpoint_folder.said(JobDir(folder)).get("url", ""))

    def _silence(self, folder: Path, record: Record) -> tuple[EndpointState, str]:
        server = _servers.get(folder)
        code = server.poll() if server else None
        if code is not None and code > 0:
            return EndpointState.FAILED, f"exit code {code}"
        if endpoint_folder.said(JobDir(folder)) or (code is not None and code < 0):  # who ends in order takes it away
            return EndpointState.FAILED, "it was killed without a word (out of memory?)"
        if record.answered:
            return EndpointState.ENDED, "it was told to end"
        return EndpointState.FAILED, "it was ended from outside"

    def _kill(self, folder: Path, record: Record) -> None:
        # while the lock is held the group has members, so its number cannot belong to anyone else
        for ask, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGKILL)):
            if not self._lives(folder, record):
                return
            if pid := record.pid or until(lambda: _pid(folder), _LAUNCHED):
                with contextlib.suppress(ProcessLookupError):
                    ask(pid, number)
            if until(lambda: not self._lives(folder, record), GRACE):
                return
        raise EndpointError(f"{record.handle} does not end, not even when killed: look at it with  fuser -v {folder / _ALIVE}")

    def _forget(self, folder: Path) -> None:
        if server := _servers.pop(folder, None):
            if server.stdin is not None:
                server.stdin.close()
            server.wait()


def _pid(folder: Path) -> int:
    """What the server wrote; 0 before it did."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((folder / _PID).read_text(encoding="ascii"))
    return 0
