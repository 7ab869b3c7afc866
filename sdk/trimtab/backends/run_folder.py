"""A run's folder on this machine, the same wherever the run's process is: the job tree, and beside it

    run.json   what was asked for and the exact request
    stop       somebody asked it to stop
    log.txt    what it printed

A backend adds what it needs to find its process again, and a file to lock. How a run stands is read from what it said; only
whether it lives, and why it ended without a word, is the backend's to know.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from trimtab import half_made
from trimtab.backends.base import RunHandle, RunRecord, RunState, RunStatus
from trimtab.catalog import in_s3
from trimtab.data.sources import public_source
from trimtab.errors import BackendError, RunNotFound, SpecError, StagingError
from trimtab.events import Choice, Event, Finished, Phase, Step, read_from
from trimtab.layout import JobDir
from trimtab.ledger import Ledger
from trimtab.spec import JobSpec

GRACE = 120.0  # seconds from SIGTERM to SIGKILL, as SageMaker gives
POLL = 0.1
NEEDS_LESS = "a new run with a smaller --batch-rows or --max-seq-len, or with --method qlora, needs less"
_TAIL = 65_536  # bytes of events that hold the last step and the last word

_T = TypeVar("_T")


class LocalRuns(ABC):
    """The half of a backend that is the same for all whose runs have a folder here, `home/runs/<id>`.

    `home` is `$TRIMTAB_HOME`, else `~/.trimtab`.
    """

    name: str
    poll_seconds = 0.25

    def __init__(self, home: str | Path | None) -> None:
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()

    @abstractmethod
    def status(self, handle: RunHandle) -> RunStatus: ...

    @abstractmethod
    def _idle(self, folder: Path) -> contextlib.AbstractContextManager[object]:
        """Holds the folder of a run, so that nobody starts it. Raises BlockingIOError when it is running."""

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
        request = read_json(self._folder(handle) / "run.json")["request"]
        try:
            return Ledger.model_validate_json((Path(request["channels"]["train"]) / "ledger.json").read_bytes())
        except (OSError, ValueError, KeyError) as exc:
            raise BackendError(
                f"the ledger of {handle} cannot be read ({exc}): its data was removed; the artifact's manifest has a copy"
            ) from exc

    def runs(self) -> list[RunRecord]:
        """Newest first."""
        found = []
        for handle, folder in self._folders().items():
            with contextlib.suppress(FileNotFoundError, RunNotFound):  # removed meanwhile
                found.append(self._listed(handle, folder))
        return sorted(found, key=lambda run: run.created, reverse=True)

    def remove(self, handle: RunHandle) -> None:
        """Delete a done run: its folder with log, checkpoints and artifact. Raises BackendError for one that is still running."""
        folder = self._folder(handle)
        running = f"{handle} is still running. End it first:  trimtab stop {handle}"
        if not self.status(handle).done:
            raise BackendError(running)
        try:
            with self._idle(folder):
                for entry in folder.iterdir():
                    if entry.name == "run.json":
                        continue  # last, so that what an interruption leaves is still listed and can be removed again
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                shutil.rmtree(folder)
        except BlockingIOError as exc:
            raise BackendError(running) from exc
        except OSError as exc:
            raise BackendError(f"{folder} cannot be removed ({exc}): mend that and repeat  trimtab remove {handle}") from exc

    def _folders(self) -> dict[RunHandle, Path]:
        """The folders of this backend's runs under `home`."""
        folders = {RunHandle(self.name, file.parent.name): file.parent for file in (self.home / "runs").glob("*/run.json")}
        return {handle: folder for handle, folder in folders.items() if belongs(folder, handle)}

    def _folder(self, handle: RunHandle) -> Path:
        folder = self.home / "runs" / handle.id
        if handle.backend != self.name or not belongs(folder, handle):
            raise RunNotFound(f"there is no run {handle} under {self.home}; see which there are:  trimtab list --backend {self.name}")
        return folder

    def _listed(self, handle: RunHandle, folder: Path) -> RunRecord:
        record = read_json(folder / "run.json")
        return RunRecord(handle, datetime.fromisoformat(record["created"]), record["job"]["train"]["model"], self.status(handle))


@dataclass(frozen=True)
class Said:
    """What a run said: its last step of all; since it was last started its last phase, its last word, and whether it spoke at all."""

    step: Step | None = None
    phase: str = ""
    last_word: Finished | None = None
    spoke: bool = False
    expected_memory: str = ""


def said(job: JobDir, since: int) -> Said:
    """What the events say; the run was last started at byte `since` of them."""
    if not job.events.exists():
        return Said()
    size = job.events.stat().st_size
    recent, _ = read_from(job.events, max(since, size - _TAIL))
    latest, _ = read_from(job.events, max(0, size - _TAIL))
    return Said(
        step=next((event for event in reversed(latest) if isinstance(event, Step)), None),
        phase=next((event.name for event in reversed(recent) if isinstance(event, Phase)), ""),
        last_word=next((event for event in reversed(recent) if isinstance(event, Finished)), None),
        spoke=bool(recent),
        expected_memory=next((event.value for event in reversed(latest) if isinstance(event, Choice) and event.name == "peak_memory"), ""),
    )


def going(told: Said) -> RunStatus:
    """How a run stands whose process lives."""
    step = told.step
    progress, eta = (step.step / step.of, step.seconds_left) if step else (0.0, None)
    return RunStatus(state=RunState.RUNNING if told.spoke else RunState.PENDING, progress=progress, eta=eta, step=step)


def over(handle: RunHandle, told: Said, cause: str, silence: Callable[[], tuple[RunState, str]]) -> RunStatus:
    """How a run stands whose process has ended; `cause` is of its failure file, `silence` explains an end without a word."""
    word, step = told.last_word, told.step
    if word is not None and word.state == "succeeded":
        return RunStatus(state=RunState.SUCCEEDED, reason=word.reason, progress=1.0, eta=0.0, step=step)
    progress = step.step / step.of if step else 0.0
    if word is not None and word.state == "stopped":
        return RunStatus(state=RunState.STOPPED, reason=word.reason, progress=progress, step=step)
    if reason := cause or (word.reason if word else ""):
        reason = reason.replace("trimtab resume RUN", f"trimtab resume {handle}")  # a run does not know its own handle
        return RunStatus(state=RunState.FAILED, reason=reason, progress=progress, step=step)
    state, reason = silence()
    return RunStatus(state=state, reason=reason, progress=progress, step=step)


def again(handle: RunHandle) -> str:
    return f"continue from its newest checkpoint with:  trimtab resume {handle}"


def never_started(handle: RunHandle) -> str:
    return f"the client that asked for it died before it could start it; start it with:  trimtab resume {handle}"


def short_of_memory(told: Said) -> str:
    """What is known of its memory, of a run that may have been killed for it."""
    facts = [f"it held {told.step.memory_mb:,} MB at step {told.step.step}"] if told.step else []
    facts += [f"it was expected to take {told.expected_memory}"] if told.expected_memory else []
    return f"killed? out of memory? {', '.join(facts)}{'; ' if facts else ''}if so, end other work on the machine; {NEEDS_LESS}"


def ended_silently(handle: RunHandle, folder: Path, how: str) -> str:
    last_lines = "".join(f"\n  {line}" for line in tail_lines(folder / "log.txt", 5))
    return f"ended without a word ({how}); {again(handle)}" + (f"\nits last lines were:{last_lines}" if last_lines else "")


@contextlib.contextmanager
def new_folder(folder: Path, request: Mapping[str, Any]) -> Iterator[JobDir]:
    """The folder of a new run: its tree and its hyperparameters. What is cut short before there is a record of the run leaves none.

    Raises FileExistsError when it is there already.
    """
    half_made.sweep(folder.parent.glob("*"), made="run.json")
    folder.mkdir(parents=True, mode=0o700)
    try:
        with half_made.held(folder):
            job = JobDir(folder).make()
            job.hyperparameters.write_text(json.dumps(request["hyperparameters"], indent=1), encoding="utf-8")
            yield job
    except BaseException:  # Ctrl-C too
        if not (folder / "run.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def write_record(folder: Path, spec: JobSpec, request: Mapping[str, Any]) -> None:
    """The record of the run, `run.json`. From then on the run exists."""
    public = spec.model_copy(update={"data": tuple(map(public_source, spec.data))})
    write_json(
        folder / "run.json", {"job": public.model_dump(mode="json"), "created": datetime.now(UTC).isoformat(), "request": dict(request)}
    )


def begin(job: JobDir) -> int:
    """Forget how the run ended last time; the byte of its events from which the new life's are."""
    job.failure.unlink(missing_ok=True)
    (job.root / "stop").unlink(missing_ok=True)
    return job.events.stat().st_size if job.events.exists() else 0


def belongs(folder: Path, handle: RunHandle) -> bool:
    """Whether the folder is that run's, and not one of another backend, or of a user whose folders are closed to this one."""
    file = folder / "run.json"
    return os.access(file, os.R_OK) and read_json(file)["request"]["handle"] == str(handle)


def refuse_remote(spec: JobSpec) -> None:
    """Raise SpecError for a model that is not on this machine."""
    if in_s3(spec.train.model):
        raise SpecError(
            f"the weights of {spec.train.model} stay in S3, and only SageMaker reads them there: add  --backend sagemaker , "
            "or fetch them with  aws s3 sync  and give the folder"
        )


def refuse_absent(channels: Mapping[str, str]) -> None:
    """Raise StagingError where a channel's folder is not there."""
    for name, path in channels.items():
        if not Path(path).is_dir():
            raise StagingError(f"the channel {name} is gone ({path} is no folder): prepare the data again by repeating  trimtab fit")


@contextlib.contextmanager
def lock(path: Path, patience: float) -> Iterator[int]:
    """Hold a lock that a process started meanwhile may inherit: its descriptor. Raises BlockingIOError after `patience` seconds."""
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        yield file.fileno()


def lines(path: Path, more: Callable[[], bool], start: int = 0) -> Iterator[str]:
    """A file's lines from byte `start` on as they come, while there is `more` to come and then the rest.

    An unfinished last line comes last.
    """
    part, position = b"", start
    while True:
        going_on = more()  # asked before reading: what was written until the end is read
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            *whole, part = (part + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
        if not going_on:
            break
        time.sleep(POLL)
    if part:
        yield part.decode(errors="replace")


def split(parts: Iterator[bytes]) -> Iterator[str]:
    """Lines of pieces that end anywhere."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def tail_lines(path: Path, count: int) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[-count:]


def until(look: Callable[[], _T], patience: float) -> _T:
    """What `look` returns as soon as that is true, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(POLL)
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise BackendError(f"{path} is damaged ({exc}): remove the folder {path.parent} and run the job again") from exc


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
