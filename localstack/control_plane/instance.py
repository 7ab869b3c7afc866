"""What runs one machine's command, a container or a process, as training and hosting see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class StartFailed(Exception):
    """An instance could not be started; the text is the reason of the job or endpoint."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, 128 + n for signal n, and whether the kernel killed it for memory."""

    exit_code: int
    out_of_memory: bool = False


class Instance(Protocol):
    """One machine: started when made. What it works on lies here under `pull`'s folder once that is asked for."""

    def output(self) -> Iterator[bytes]:
        """What it prints, in pieces, until it has ended."""
        ...

    def poll(self) -> Ended | None:
        """None while it runs."""
        ...

    def terminate(self) -> None:
        """SIGTERM to its first process; quiet for one that has ended."""
        ...

    def kill(self) -> None:
        """SIGKILL; quiet for one that has ended."""
        ...

    def pull(self, folder: Path) -> None:
        """Brings a folder of its tree up to date here, where that is a copy."""
        ...

    def remove(self) -> None:
        """Nothing of it stays."""
        ...
