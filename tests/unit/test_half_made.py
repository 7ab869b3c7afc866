"""Whoever makes a folder keeps it, whatever the clock says; what a dead maker left goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from trimtab import half_made

DAY = 86_400.0


def aged(folder: Path, seconds: float) -> Path:
    """As after the clock jumped forward by so much."""
    folder.mkdir(exist_ok=True)
    then = folder.stat().st_mtime - seconds
    os.utime(folder, (then, then))
    return folder


def test_what_is_being_made_is_never_swept_however_old_the_clock_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "making"
    folder.mkdir()
    with half_made.held(folder):
        aged(folder, 400 * DAY)
        half_made.sweep([folder], stale=DAY)
        assert folder.exists()
    assert list(folder.iterdir()) == []
    half_made.sweep([folder])
    assert folder.exists()  # it was made


def test_what_a_killed_maker_left_is_swept_at_once(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from trimtab import half_made\n"
    code += f"with half_made.held(Path(sys.argv[1])): os.kill(os.getpid(), {int(signal.SIGKILL)})"
    for name in ("half", "whole"):
        folder = tmp_path / name
        folder.mkdir()
        assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == -signal.SIGKILL
    (tmp_path / "whole" / "record").touch()
    half_made.sweep([*tmp_path.iterdir(), tmp_path / "gone"], made="record")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_without_a_lock_goes_when_it_is_stale(tmp_path: Path) -> None:
    old, young = aged(tmp_path / "old", 2 * DAY), aged(tmp_path / "young", DAY / 2)
    half_made.sweep([old, young])
    assert old.exists()
    half_made.sweep([old, young], stale=DAY)
    assert [path.name for path in tmp_path.iterdir()] == [young.name]
