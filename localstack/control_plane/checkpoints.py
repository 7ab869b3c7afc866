"""Checkpoints between an instance and S3: fetched before the container starts, sent while it runs and once more when it has ended.

What SageMaker documents is that it copies `LocalPath` to S3Uri continuously, and restores it into each instance of a job that starts with
that S3Uri. It says nothing of the order, of files that are being written, or that a deletion is passed on. So here a file is sent as it is
found, again whenever it has changed, in the order of names, and what is deleted stays in S3: a reader must stand half a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from control_plane.objects import Objects, TransferFailed, place_in, split_uri

_Stamp = tuple[int, int | str]


class Budget:
    """How many more files a job's instances may send; None: any number. A fault on demand: the sync breaks off within a checkpoint."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: int | None = None

    def set(self, left: int | None) -> None:
        with self._lock:
            self._left = left

    def take(self) -> bool:
        """Whether one more may go."""
        with self._lock:
            if self._left is None:
                return True
            self._left = max(-1, self._left - 1)
            return self._left >= 0


class CheckpointSync:
    """One instance's checkpoints. `folder` is theirs here; where it is only a `copy`, `start` is told how to bring it up to date."""

    def __init__(
        self,
        objects: Objects,
        uri: str,
        folder: Path,
        budget: Budget,
        *,
        every: float = 1.0,
        copy: bool = False,
    ) -> None:
        self.bucket, prefix = split_uri(uri)
        self.prefix = prefix.rstrip("/") + "/" if prefix else ""
        self.folder = folder
        self._objects, self._budget, self._every, self._copy = objects, budget, every, copy
        self._refresh: Callable[[], object] = lambda: None
        self._sent: dict[str, _Stamp] = {}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self) -> int:
        """What S3 has, before the container starts; the number of files. Only what changes after that is sent."""
        found = {each.key: place_in(self.folder, each.key[len(self.prefix) :]) for each in self._objects.find(self.bucket, self.prefix)}
        self._objects.fetch(self.bucket, found)
        for path in found.values():
            path.chmod(0o644)
        self._sent = {name: self._stamp(path) for name, path in self._files().items()}
        return len(found)

    def start(self, refresh: Callable[[], object] = lambda: None) -> None:
        """Send what changes, until `close`."""
        self._refresh = refresh
        self._thread = threading.Thread(target=self._go_on, name=f"checkpoints {self.folder}", daemon=True)
        self._thread.start()

    def close(self, *, send: bool = True) -> None:
        """End, and send what is left."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if send:
            self.send()

    def send(self) -> int:
        """Sends every file that changed since it was last sent; the number of these."""
        self._refresh()
        sent = 0
        for name, path in self._files().items():
            try:
                stamp = self._stamp(path)  # before it is read: what changes while it is sent is sent again
                if self._sent.get(name) == stamp or not self._budget.take():
                    continue
                self._objects.send(self.bucket, {self.prefix + name: path})
            except FileNotFoundError:  # replaced or deleted meanwhile
                continue
            self._sent[name] = stamp
            sent += 1
        return sent

    def _go_on(self) -> None:
        while not self._ending.wait(self._every):
            try:
                self.send()
            except (TransferFailed, OSError) as exc:
                print(f"checkpoints of {self.folder}: {exc}", file=sys.stderr)

    def _files(self) -> dict[str, Path]:
        """By relative path, in order; of a link in the folder's place none."""
        if self.folder.is_symlink():
            return {}
        found = [Path(top) / name for top, _, names in os.walk(self.folder) for name in names]
        return {path.relative_to(self.folder).as_posix(): path for path in sorted(found) if path.is_file() and not path.is_symlink()}

    def _stamp(self, path: Path) -> _Stamp:
        found = path.stat()
        if not self._copy:
            return found.st_size, found.st_mtime_ns
        return found.st_size, hashlib.sha256(path.read_bytes()).hexdigest()  # a copy's times say nothing
