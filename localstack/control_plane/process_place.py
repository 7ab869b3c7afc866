"""Instances as processes of this machine, for where there is no engine: a command in a folder tree that is named by a variable.

The command is what an image's ENTRYPOINT would be; `train` or `serve` is put after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from control_plane.instance import Ended, StartFailed

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "USER")


class Process:
    """A started process with a group of its own: an Instance."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """Raises StartFailed where there is no such command."""
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
        code = self._process.poll()
        if code is None:
            return None
        return Ended(code if code >= 0 else 128 - code)

    def terminate(self) -> None:
        """To the first process alone, as in a container."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def pull(self, folder: Path) -> None:
        """It works in the folder itself."""

    def remove(self) -> None:
        """What it started ends with it."""
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
