"""Runs on this machine: a detached process in a folder of its own, which outlives the client that started it.

A run's folder is its job tree, and beside it:

    run.json      what was asked for and the exact request
    process.json  the process' id, and where its events begin (a resumed run's events go on in the same file)
    alive.lock    locked for as long as the process lives: it inherits the lock, and the kernel takes it back however it dies.
                  So no process id is ever mistaken for another's, and two processes never work in one folder
    stop          somebody asked it to stop
    log.txt       what it printed
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from trimtab.backends.base import RunHandle, RunRecord, RunState, RunStatus
from trimtab.command import INHERITED, inherited, refuse_missing_runtime, runtime_command, runtime_environment
from trimtab.data.sources import public_source
from trimtab.errors import BackendError, BackendUnavailable, RunNotFound, StagingError
from trimtab.events import Event, Finished, Step, read_from
from trimtab.layout import JobDir
from trimtab.ledger import Ledger
from trimtab.spec import JobSpec

GRACE = 120.0  # seconds from SIGTERM to SIGKILL, as SageMaker gives
_TAIL = 65_536  # bytes of events that hold the last step and the last word
_POLL = 0.1

_T = TypeVar("_T")


class _Detached(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """Outliving this process is the point; Popen's own would warn of it."""


_children: list[_Detached] = []  # started here and not yet known to have ended


class ProcessBackend:
    """Jobs as processes of this machine. A run lives in `home/runs/<id>`; `home` is `$TRIMTAB_HOME`, else `~/.trimtab`."""

    name = "process"

    def __init__(self, home: Path | None = None, python: str = sys.executable) -> None:
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()
        self.python = python

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable for a job that cannot run as a process of this machine, before anything is fetched."""
        refuse_missing_runtime(self.python)
        if spec.device != "xeon":
            raise BackendUnavailable("the process backend computes on the CPU, not on a GPU: choose device='xeon' (--device xeon)")

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The command, what it gets to see, and the folder it works in."""
        folder = self.home / "runs" / run_id
        return {
            "handle": str(RunHandle(self.name, run_id)),
            "folder": str(folder),
            "command": runtime_command(self.python, "train"),
            "environment": runtime_environment(folder, device=spec.device),
            "inherits": list(INHERITED),
            "channels": {name: str(path) for name, path in channels.items()},
            "hyperparameters": spec.train.to_hyperparameters(),
        }

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        run_id = run_id or f"trim-{uuid.uuid4().hex[:8]}"
        request = self.render(spec, channels, run_id)
        _refuse_absent(request["channels"])
        folder = Path(request["folder"])
        public = spec.model_copy(update={"data": tuple(map(public_source, spec.data))})
        record = {"job": public.model_dump(mode="json"), "created": datetime.now(UTC).isoformat(), "request": request}
        try:
            folder.mkdir(parents=True, mode=0o700)
            job = JobDir(folder).make()
            for name, path in request["channels"].items():
                job.channel(name).symlink_to(path, target_is_directory=True)
            job.hyperparameters.write_text(json.dumps(request["hyperparameters"], indent=1), encoding="utf-8")
            with _lock(folder) as lock:
                _write_json(folder / "run.json", record)
                _start(folder, request, lock)
        except OSError as exc:
            raise BackendError(f"the run cannot be started in {folder} ({exc}): set TRIMTAB_HOME to a folder that can be written") from exc
        return RunHandle(self.name, run_id)

    def resume(self, handle: RunHandle) -> None:
        folder = self._folder(handle)
        request = _read_json(folder / "run.json")["request"]
        _refuse_absent(request["channels"])
        status = self.status(handle)
        if status.state is RunState.SUCCEEDED:
            raise BackendError(f"{handle} has succeeded, there is nothing to go on with. Ask it something:  trimtab chat {handle}")
        try:
            with _lock(folder) as lock:
                _start(folder, request, lock)
        except BlockingIOError as exc:
            raise BackendError(f"{handle} is still running. Watch it:  trimtab logs -f {handle}") from exc
        except OSError as exc:
            raise BackendError(f"{handle} cannot be started again in {folder} ({exc}): mend that and repeat the command") from exc

    def status(self, handle: RunHandle) -> RunStatus:
        folder = self._folder(handle)
        _children[:] = [child for child in _children if child.poll() is None]  # else they stay as zombies as long as this process
        alive = _alive(folder)  # asked first: what a dead process wrote can no longer change
        process = _process(folder)
        step, last_word, spoke = _last_events(JobDir(folder).events, process["events_from"] if process else 0)
        progress = step.step / step.of if step else 0.0
        eta = step.seconds_left if step else None
        if alive:
            return RunStatus(state=RunState.RUNNING if spoke else RunState.PENDING, progress=progress, eta=eta, step=step)
        if last_word is not None and last_word.state == "succeeded":
            return RunStatus(state=RunState.SUCCEEDED, reason=last_word.reason, progress=1.0, eta=0.0, step=step)
        if last_word is not None and last_word.state == "stopped":
            return RunStatus(state=RunState.STOPPED, reason=last_word.reason, progress=progress, step=step)
        again = f"continue from its newest checkpoint with:  trimtab resume {handle}"
        if cause := JobDir(folder).cause() or (last_word.reason if last_word else ""):
            return RunStatus(state=RunState.FAILED, reason=cause, progress=progress, step=step)
        if (folder / "stop").exists():
            return RunStatus(
                state=RunState.STOPPED, reason=f"stopped before it could write a checkpoint; {again}", progress=progress, step=step
            )
        if process is None:
            reason = f"the client that asked for it died before it could start it; start it with:  trimtab resume {handle}"
        else:
            last_lines = "".join(f"\n  {line}" for line in _tail_lines(folder / "log.txt", 5))
            reason = f"ended without a word (killed? out of memory?); {again}" + (
                f"\nits last lines were:{last_lines}" if last_lines else ""
            )
        return RunStatus(state=RunState.FAILED, reason=reason, progress=progress, step=step)

    def logs(self, handle: RunHandle, *, follow: bool = False) -> Iterator[str]:
        folder = self._folder(handle)
        return _lines(folder / "log.txt", (lambda: _alive(folder)) if follow else (lambda: False))

    def stop(self, handle: RunHandle) -> None:
        folder = self._folder(handle)
        if not _alive(folder):
            return
        (folder / "stop").touch()
        process = _until(lambda: _process(folder), 5.0)
        if not process:
            raise BackendError(f"{handle} has a process but no record of its id: end the process that works in {folder} by hand")
        # while the lock is held the group has members, so its number cannot belong to anyone else
        for ask, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 20.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process["pid"], ask)
            if _until(lambda: not _alive(folder), patience):
                return
        raise BackendError(
            f"{handle} does not end, not even when killed (process {process['pid']}): look at it with:  ps -fp {process['pid']}"
        )

    def artifact(self, handle: RunHandle) -> Path:
        model = JobDir(self._folder(handle)).model
        if not (model / "trimtab.json").is_file():
            state = self.status(handle).state
            remedy = f"trimtab resume {handle}" if state in (RunState.FAILED, RunState.STOPPED) else f"trimtab logs -f {handle}"
            raise BackendError(f"{handle} has left no artifact, it is {state}:  {remedy}")
        return model

    def events(self, handle: RunHandle, start: int = 0) -> tuple[list[Event], int]:
        return read_from(JobDir(self._folder(handle)).events, start)

    def ledger(self, handle: RunHandle) -> Ledger:
        file = JobDir(self._folder(handle)).channel("train") / "ledger.json"
        try:
            return Ledger.model_validate_json(file.read_bytes())
        except (OSError, ValueError) as exc:
            raise BackendError(
                f"the ledger of {handle} cannot be read ({exc}): its data was removed; the artifact's manifest has a copy"
            ) from exc

    def runs(self) -> list[RunRecord]:
        found = []
        for file in (self.home / "runs").glob("*/run.json"):
            handle, record = RunHandle(self.name, file.parent.name), _read_json(file)
            model = record["job"]["train"]["model"]
            found.append(RunRecord(handle, datetime.fromisoformat(record["created"]), model, self.status(handle)))
        return sorted(found, key=lambda run: run.created, reverse=True)

    def _folder(self, handle: RunHandle) -> Path:
        folder = self.home / "runs" / handle.id
        if handle.backend != self.name or not (folder / "run.json").is_file():
            raise RunNotFound(f"there is no run {handle} under {self.home}; see which there are:  trimtab list")
        return folder


def _last_events(path: Path, since: int) -> tuple[Step | None, Finished | None, bool]:
    """The last step of all, the last word since byte `since`, and whether anything was said since then."""
    if not path.exists():
        return None, None, False
    size = path.stat().st_size
    recent, _ = read_from(path, max(since, size - _TAIL))
    latest, _ = read_from(path, max(0, size - _TAIL))
    step = next((event for event in reversed(latest) if isinstance(event, Step)), None)
    last_word = next((event for event in reversed(recent) if isinstance(event, Finished)), None)
    return step, last_word, bool(recent)


def _start(folder: Path, request: Mapping[str, Any], lock: int) -> None:
    """Start the request's command in the run's folder, detached; it inherits `lock`."""
    job = JobDir(folder)
    job.failure.unlink(missing_ok=True)
    (folder / "stop").unlink(missing_ok=True)
    (folder / "process.json").unlink(missing_ok=True)
    events_from = job.events.stat().st_size if job.events.exists() else 0
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
    _write_json(folder / "process.json", {"pid": child.pid, "events_from": events_from, "started": datetime.now(UTC).isoformat()})


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """Hold the run's lock, which the process started meanwhile inherits. Raises BlockingIOError when a process has it."""
    with (folder / "alive.lock").open("ab") as file:
        for attempt in range(20):  # someone who only looks holds it for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 19:
                    raise
                time.sleep(0.01)
        yield file.fileno()


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


def _lines(path: Path, more: Callable[[], bool]) -> Iterator[str]:
    """A file's lines as they come, while there is `more` to come and then the rest. An unfinished last line comes last."""
    part = b""
    position = 0
    while True:
        going_on = more()  # asked before reading: what was written until the end is read
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            *lines, part = (part + data).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
        if not going_on:
            break
        time.sleep(_POLL)
    if part:
        yield part.decode(errors="replace")


def _tail_lines(path: Path, count: int) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[-count:]


def _until(look: Callable[[], _T], patience: float) -> _T:
    """What `look` returns as soon as that is true, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return found


def _refuse_absent(channels: Mapping[str, str]) -> None:
    for name, path in channels.items():
        if not Path(path).is_dir():
            raise StagingError(f"the channel {name} is gone ({path} is no folder): prepare the data again by repeating  trimtab fit")


def _process(folder: Path) -> Any:
    """The record of the process that was started last; None while there is none, as in the moment of a resume."""
    with contextlib.suppress(FileNotFoundError):
        return _read_json(folder / "process.json")
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise BackendError(f"{path} is damaged ({exc}): remove the folder {path.parent} and run the job again") from exc


def _write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
