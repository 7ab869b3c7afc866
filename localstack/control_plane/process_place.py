"""Instances as processes of this machine, for where there is no engine: a command in a folder tree that is named by a variable.

The command is what an image's ENTRYPOINT would be; `train` or `serve` is put after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from control_plane.instance import Ended, StartFailed

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "USER")


class Process:
    """A started process with a group of its own: an Instance."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Raises StartFailed where there is no such command."""
        self._ended: Ended | None = None
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as exc:
            raise StartFailed(f"AlgorithmError: {exc}, exit code: 127") from exc

    def output(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            while piece := os.read(self._process.stdout.fileno(), 65_536):
                yield piece

    def poll(self) -> Ended | None:
        """It is not reaped before it is removed: until then its group's number can be nobody else's."""
        if self._ended is None and (found := os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            self._ended = Ended(found.si_status if found.si_code == os.CLD_EXITED else 128 + found.si_status)
        return self._ended

    def terminate(self) -> None:
        """To the first process alone, as in a container."""
        self._signal(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """What it started ends with it."""
        self._signal(os.killpg, signal.SIGKILL)

    def pull(self, folder: Path) -> None:
        """It works in the folder itself."""

    def remove(self) -> None:
        self.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                send(self._process.pid, number)
