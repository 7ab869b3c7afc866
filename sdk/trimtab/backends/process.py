"""Runs on this machine: a detached process in a folder of its own, which outlives the client that started it.

Beside what every run's folder holds (run_folder.py):

    process.json  the process' id, and where its events begin (a resumed run's events go on in the same file)
    alive.lock    locked for as long as the process lives: it inherits the lock, and the kernel takes it back however it dies.
                  So no process id is ever mistaken for another's, and two processes never work in one folder
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.backends import run_folder
from trimtab.backends.base import RunHandle, RunState, RunStatus
from trimtab.backends.run_folder import LocalRuns, read_json, refuse_absent, write_json
from trimtab.cache import nf4_cache
from trimtab.command import INHERITED, inherited, refuse_missing_runtime, runtime_command, runtime_environment
from trimtab.errors import BackendError, BackendUnavailable
from trimtab.layout import NF4_CACHE_VARIABLE, ROOT_VARIABLE, JobDir
from trimtab.spec import JobSpec

GRACE = run_folder.GRACE
_MOMENT = 0.2  # seconds for which someone who only looks may hold the lock


class _Detached(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """Outliving this process is the point; Popen's own would warn of it."""


_children: list[_Detached] = []  # started here and not yet known to have ended


class ProcessBackend(LocalRuns):
    """Jobs as processes of this machine. A run lives in `home/runs/<id>`; `home` is `$TRIMTAB_HOME`, else `~/.trimtab`."""

    name = "process"

    def __init__(self, home: str | Path | None = None, python: str = sys.executable) -> None:
        super().__init__(home)
        self.python = python

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable for a job that cannot run as a process of this machine, before anything is fetched."""
        run_folder.refuse_remote(spec)
        refuse_missing_runtime(self.python)
        if spec.device != "xeon":
            raise BackendUnavailable("the process backend computes on the CPU, not on a GPU: choose device='xeon' (--device xeon)")
        if spec.nodes > 1:
            raise BackendUnavailable(f"the process backend is one machine, not {spec.nodes}: choose backend='docker' (--backend docker)")

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The command, what it gets to see, and the folder it works in."""
        folder = self.home / "runs" / run_id
        return {
            "handle": str(RunHandle(self.name, run_id)),
            "folder": str(folder),
            "command": runtime_command(self.python, "train"),
            "environment": {**runtime_environment(folder, device=spec.device), NF4_CACHE_VARIABLE: str(nf4_cache() or "")},
            "inherits": list(INHERITED),
            "channels": {name: str(path) for name, path in channels.items()},
            "hyperparameters": spec.train.to_hyperparameters(),
        }

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        run_id = run_id or f"trim-{uuid.uuid4().hex[:8]}"
        request = self.render(spec, channels, run_id)
        refuse_absent(request["channels"])
        folder = Path(request["folder"])
        try:
            with run_folder.new_folder(folder, request) as job:
                for name, path in request["channels"].items():
                    job.channel(name).symlink_to(path, target_is_directory=True)
                with self._idle(folder) as lock:
                    run_folder.write_record(folder, spec, request)
                    _start(folder, request, lock)
        except OSError as exc:
            raise BackendError(f"the run cannot be started in {folder} ({exc}): set TRIMTAB_HOME to a folder that can be written") from exc
        return RunHandle(self.name, run_id)

    def resume(self, handle: RunHandle) -> None:
        folder = self._folder(handle)
        request = read_json(folder / "run.json")["request"]
        refuse_absent(request["channels"])
        status = self.status(handle)
        if status.state is RunState.SUCCEEDED:
            raise BackendError(f"{handle} has succeeded, there is nothing to go on with. Ask it something:  trimtab chat {handle}")
        try:
            with self._idle(folder) as lock:
                _start(folder, request, lock)
        except BlockingIOError as exc:
            raise BackendError(f"{handle} is still running. Watch it:  trimtab logs -f {handle}") from exc
        except OSError as exc:
            raise BackendError(f"{handle} cannot be started again in {folder} ({exc}): mend that and repeat the command") from exc

    def status(self, handle: RunHandle) -> RunStatus:
        folder = self._folder(handle)
        _children[:] = [child for child in _children if child.poll() is None]  # else they stay as zombies as long as this process
        alive = _alive(folder)  # asked first: what a dead process wrote can no longer change
        process, job = _process(folder), JobDir(folder)
        told = run_folder.said(job, process["events_from"] if process else 0)

        def silence() -> tuple[RunState, str]:
            if (folder / "stop").exists():
                return RunState.STOPPED, f"stopped before it could write a checkpoint; {run_folder.again(handle)}"
            if not told.spoke and not (process and process["pid"]):
                return RunState.FAILED, run_folder.never_started(handle)
            return RunState.FAILED, run_folder.ended_silently(handle, folder, run_folder.short_of_memory(told))

        return run_folder.going(told) if alive else run_folder.over(handle, told, job.cause(), silence)

    def logs(self, handle: RunHandle, *, follow: bool = False) -> Iterator[str]:
        folder = self._folder(handle)
        return run_folder.lines(folder / "log.txt", (lambda: _alive(folder)) if follow else (lambda: False))

    def stop(self, handle: RunHandle) -> None:
        folder = self._folder(handle)
        if not _alive(folder):
            return
        (folder / "stop").touch()
        pid = run_folder.until(lambda: _group(folder), 5.0)
        if pid is None:
            raise BackendError(f"{handle} has a process but no record of its id: end it by hand with  fuser -k -TERM {folder}/alive.lock")
        # while the lock is held the group has members, so its number cannot belong to anyone else
        for ask, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 20.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, ask)
            if run_folder.until(lambda: not _alive(folder), patience):
                return
        raise BackendError(f"{handle} does not end, not even when killed (process {pid}): look at it with:  ps -fp {pid}")

    def _idle(self, folder: Path) -> contextlib.AbstractContextManager[int]:
        return run_folder.lock(folder / "alive.lock", _MOMENT)


def _start(folder: Path, request: Mapping[str, Any], lock: int) -> None:
    """Start the request's command in the run's folder, detached; it inherits `lock`."""
    events_from = run_folder.begin(JobDir(folder))
    record = {"pid": None, "events_from": events_from, "started": datetime.now(UTC).isoformat()}
    write_json(folder / "process.json", record)  # whoever dies here leaves a run that has not spoken yet
    with (folder / "log.txt").open("ab") as log:
        child = _Detached(
            request["command"],
            cwd=folder,
            env={**inherited(os.environ), **request["environment"]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    _children.append(child)
    write_json(folder / "process.json", {**record, "pid": child.pid})


def _alive(folder: Path) -> bool:
    """Whether the run's process, or one that it started, lives."""
    try:
        with (folder / "alive.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _group(folder: Path) -> int | None:
    """The process group of a run that lives; found by its lock, where the client died before it could note that. Others have the lock open
    while they look whether it is held, but only the run's own processes got the run's folder as their root."""
    process = _process(folder)
    if process and process["pid"]:
        return int(process["pid"])
    lock = folder / "alive.lock"
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            pid = int(entry.parts[2])
            if entry.samefile(lock) and pid == os.getpgid(pid) and folder.samefile(_root(entry.parents[1])):
                return pid
    return None


def _root(process: Path) -> Path:
    """What a process of `/proc` was given as the root of its job tree. Raises FileNotFoundError for one that was given none."""
    for pair in (process / "environ").read_bytes().split(b"\0"):
        name, _, value = os.fsdecode(pair).partition("=")
        if name == ROOT_VARIABLE:
            return Path(value)
    raise FileNotFoundError(f"{process} works for no run")


def _process(folder: Path) -> Any:
    """The record of the process that was started last, or is just being started: without an id then. None where none ever was."""
    with contextlib.suppress(FileNotFoundError):
        return read_json(folder / "process.json")
    return None
