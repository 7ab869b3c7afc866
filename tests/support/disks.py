"""Small disks that tests fill, and folders that nobody can write to, root neither."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system in memory, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder as it is, but that nothing in it can be changed."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Write a file `ballast` that takes all room of a disk but about `leave` bytes, rounded down to whole pages."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        file.write(b"x" * max(0, shutil.disk_usage(disk).free - leave))
    free = shutil.disk_usage(disk).free
    assert free <= leave, f"{free} bytes are left"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB, for tests that fill it."""
    need_root()
    with mounted(tmp_path / "disk", "size=32m") as disk:
        yield disk


def need_root() -> None:
    """Skip the test where this user cannot mount: root in a container may be denied it, too."""
    if why := _refused():
        pytest.skip(f"a disk to fill, or one to which nobody can write, cannot be mounted here: {why}")


@cache
def _refused() -> str:
    if os.getuid() != 0:
        return "only root can"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)
    return done.stderr.strip() if done.returncode else ""
