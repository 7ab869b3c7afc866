"""`python -m trimtab_runtime generate|prepare|preview|measure|train|evaluate|merge|losses|serve`.

Read the spec, call, write the result or the failure, exit.

Exit codes: 0 done; 1 failed, the cause first in output/failure; 2 usage; 128 and the signal's number (143: SIGTERM) when training was
asked to stop, by SIGTERM, Ctrl-C or a terminal that was closed, and left a checkpoint and an artifact.
"""

from __future__ import annotations

import sys

from trimtab_runtime.xeon import pages

if __name__ == "__main__":  # here: what is imported before is imported twice
    pages.begin_again(sys.argv[1:])

import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

from trimtab.errors import SpecError, TrimtabError
from trimtab.events import Choice, EventLog, Finished, Phase, Progress
from trimtab.layout import DEVICE_VARIABLE, EVENTS_VARIABLE, PIPE_VARIABLE, JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import disk, memory, ranks
from trimtab_runtime.channels import staged, unfold
from trimtab_runtime.xeon import placement, topology
from trimtab_runtime.xeon.binding import bind

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # each asks training for a checkpoint and an artifact, however often it comes


def main(arguments: list[str]) -> int:
    commands: dict[str, Callable[[JobDir, EventLog], int]] = {
        "generate": _generate,
        "prepare": _prepare,
        "preview": _preview,
        "measure": _measure,
        "train": _train,
        "evaluate": _evaluate,
        "merge": _merge,
        "losses": _losses,
    }
    job = JobDir.from_environment()
    if arguments == ["serve"]:
        from trimtab_runtime.serve import serve

        return serve(job)
    if len(arguments) != 1 or arguments[0] not in commands:
        print(
            f"usage: python -m trimtab_runtime {'|'.join([*commands, 'serve'])}   (TRIMTAB_ROOT: the job's folder, default /opt/ml)",
            file=sys.stderr,
        )
        return 2
    if os.environ.get(PIPE_VARIABLE):
        threading.Thread(target=_end_with_client, daemon=True).start()
    if seat := os.environ.pop(ranks.VARIABLE, ""):
        return _as_rank(job, ranks.Seat.from_text(seat))
    began = time.monotonic()
    reserve: disk.Reserve | None = None
    cause = ""
    try:
        _make(job)
        with _only_one(job.root):
            reserve = disk.Reserve(job.failure.with_name(".reserve"))
            job.failure.unlink(missing_ok=True)
            events = EventLog(job.events, _say if os.environ.get(EVENTS_VARIABLE) == "log" else None)
            try:
                for channel in staged(job):
                    unfold(channel)
                code = commands[arguments[0]](job, events)
            except BaseException as exc:
                cause = _cause(job, exc)
                reserve.free()
                with contextlib.suppress(OSError):  # the failure file will say it
                    events.write(Finished(state="failed", reason=cause, seconds=time.monotonic() - began))
                raise
            reserve.free()
            if arguments[0] == "train":
                reason = f"stopped by {signal.Signals(code - 128).name}, after a checkpoint" if code else ""
                events.write(Finished(state="stopped" if code else "succeeded", reason=reason, seconds=time.monotonic() - began))
            return code
    except _InUse as exc:  # the failure file belongs to the process that works there
        print(exc, file=sys.stderr)
        return 1
    except BaseException as exc:  # noqa: BLE001  the border: whatever it is, the platform gets the reason and the log the traceback
        if reserve is not None:
            reserve.free()
        return _failed(job, exc, cause or _cause(job, exc))


def _generate(job: JobDir, events: EventLog) -> int:
    _take(_placed(events).shares[0])
    _before_torch()
    with _importing():
        from trimtab_runtime.generate import generate

    events.write(Phase(name="generate", at=time.time()))
    generate(job, _spec(job), _say, lambda done, of: events.write(Progress(name="generate", done=done, of=of)))
    return 0


def _prepare(job: JobDir, events: EventLog) -> int:
    from trimtab_runtime.prepare import prepare

    events.write(Phase(name="prepare", at=time.time()))
    prepare(job, _spec(job), _say)
    return 0


def _preview(job: JobDir, events: EventLog) -> int:
    from trimtab_runtime.preview import preview

    preview(job)
    return 0


def _measure(job: JobDir, events: EventLog) -> int:
    _take(_placed(events).shares[0])
    _before_torch()
    with _importing():
        from trimtab_runtime.rates import measure

    events.write(Phase(name="measure", at=time.time()))
    measure(job, _spec(job), _say)
    return 0


def _train(job: JobDir, events: EventLog) -> int:
    asked_to_stop = _note_stops()
    spec = _spec(job)
    disk.refuse_unwritable((job.checkpoints, job.model))  # now, and not at the first checkpoint
    events.write(Phase(name="start", at=time.time()))
    plan = _placed(events, ranks=spec.ranks, dtype=spec.dtype)
    if len(plan.shares) > 1:
        return ranks.lead(plan.shares, _say, asked_to_stop, STOPS)
    _take(plan.shares[0])
    return _train_here(job, spec, events, asked_to_stop)


def _as_rank(job: JobDir, seat: ranks.Seat) -> int:
    """One of several ranks: who started it holds the job's folder, and says how the run ended."""
    asked_to_stop = _note_stops()
    ranks.take_signals(STOPS)
    try:
        _take(seat.share)
        also = _say if os.environ.get(EVENTS_VARIABLE) == "log" else None
        events = EventLog(Path(os.devnull)) if seat.number else EventLog(job.events, also)
        return _train_here(job, _spec(job), events, asked_to_stop, seat)
    except BaseException as exc:  # noqa: BLE001  the border: whatever it is, it is said by the process that started this one
        from trimtab_runtime.distributed import HostLost

        seat.tell(_cause(job, exc), "".join(traceback.format_exception(exc)), echo=isinstance(exc, HostLost))
        return 1


def _train_here(job: JobDir, spec: TrainSpec, events: EventLog, asked_to_stop: list[int], seat: ranks.Seat | None = None) -> int:
    """Train in this process, as the only one of its machine or as one of several ranks."""
    first = seat is None or seat.number == 0
    _before_torch(aloud=first)
    if spec.method != "qlora":
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # PEFT would import it, which takes a second, for nothing
    with _importing():
        from trimtab_runtime.distributed import join, read_place
        from trimtab_runtime.recipe import train

    place = read_place(job.resources)
    if seat is not None:
        place = replace(place, ranks=seat.of, number=seat.number, meet=seat.meet)
    say = _say if first else lambda line: None  # all ranks would say the same
    with join(place, say) as team:
        ending = train(job, spec, events, say, lambda: bool(asked_to_stop), team)
    return 0 if ending != "stopped" else 128 + (asked_to_stop or [signal.SIGTERM])[0]  # it may be another machine that was asked


def _note_stops() -> list[int]:
    """The signals that asked for a stop so far; the list grows when one comes."""
    asked: list[int] = []
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # who started it with nohup, or in the background, wants that one ignored
            signal.signal(number, lambda number, _: asked.append(number))
    return asked


def _evaluate(job: JobDir, events: EventLog) -> int:
    _take(_placed(events).shares[0])
    _before_torch()
    with _importing():
        from trimtab_runtime.evaluate import evaluate

    events.write(Phase(name="evaluate", at=time.time()))
    evaluate(job, _say, lambda done, of: events.write(Progress(name="evaluate", done=done, of=of)))
    return 0


def _merge(job: JobDir, events: EventLog) -> int:
    _before_torch()
    with _importing():
        from trimtab_runtime.merge import merge

    events.write(Phase(name="merge", at=time.time()))
    merge(job, _say, lambda done, of: events.write(Progress(name="merge", done=done, of=of)))
    return 0


def _losses(job: JobDir, events: EventLog) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the processor from those that compute
    _take(_placed(events).shares[0])
    _before_torch()
    with _importing():
        from trimtab_runtime.losses import losses

    events.write(Phase(name="losses", at=time.time()))
    losses(job, _say, lambda done, of: events.write(Progress(name="losses", done=done, of=of)))
    return 0


def _placed(events: EventLog, *, ranks: int | Literal["auto"] = 1, dtype: str = "auto") -> placement.Plan:
    """Where this run computes on this machine, said with its reasons. Nothing is done yet. Raises SpecError for ranks on a GPU."""
    if os.environ.get(DEVICE_VARIABLE) == "gpu":
        if ranks != 1:
            raise SpecError(f"ranks are for CPUs, and this run was asked to compute on a GPU (ranks is {ranks}): leave out --ranks")
        return placement.Plan((placement.Share(None),), ())
    plan = placement.place(topology.read(), os.environ, ranks=ranks, dtype=dtype)
    for name, choice in plan.choices:
        _say(f"{name} {choice.value}: {choice.reason}")
        events.write(Choice(name=name, value=choice.value, reason=choice.reason))
    for line in placement.lines(plan):
        _say(line)
    for warning in plan.warnings:
        _say(f"WARNING: {warning}")
        events.write(Choice(name="warning", value="placement", reason=warning))
    return plan


def _take(share: placement.Share) -> None:
    for refused in bind(share):
        _say(refused)


def _before_torch(*, aloud: bool = True) -> None:
    """What must be set before torch loads: no library may look for a hub, and malloc keeps large blocks."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints pages about a host that is lost; our own error names it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for a kernel from a hub, and does without
    from trimtab_runtime.xeon.allocator import keep_large_blocks

    done = keep_large_blocks()
    if aloud:
        _say(f"allocator: {done}" + ("; the heap has large pages" if pages.asked(os.environ) else ""))


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without the garbage collector, which would look through what is imported again and again in vain: a sixth of the time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _end_with_client() -> None:
    """Wait until the client has gone, and end with all that was started for it: nobody will want what this makes."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _spec(job: JobDir) -> TrainSpec:
    try:
        pairs = json.loads(job.hyperparameters.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SpecError(f"{job.hyperparameters} cannot be read ({exc.strerror}): set TRIMTAB_ROOT to the job's folder") from exc
    except json.JSONDecodeError as exc:
        raise SpecError(f"{job.hyperparameters} is not JSON ({exc}): write it with TrainSpec.to_hyperparameters()") from exc
    if not isinstance(pairs, dict):
        raise SpecError(f"{job.hyperparameters} is not an object of strings: write it with TrainSpec.to_hyperparameters()")
    return TrainSpec.from_hyperparameters(pairs)


def _make(job: JobDir) -> None:
    """The job's folders. Raises StagingError where they cannot be made, or where what is said of the job cannot be written."""
    try:
        job.make()
    except OSError as exc:
        raise disk.unwritable(Path(exc.filename or job.root), exc) from exc
    disk.refuse_unwritable((job.events.parent,))


class _InUse(TrimtabError):
    """Another process works in this folder."""


class _only_one:
    """Holds the job's folder while a command runs in it; a second one is refused, and told who holds it. A dead process holds nothing."""

    def __init__(self, root: Path) -> None:
        self._path = root / ".lock"

    def __enter__(self) -> None:
        try:
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as exc:
            raise disk.unwritable(self._path.parent, exc) from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            with self._file:
                self._file.seek(0)
                pid, namespace, since = (*self._file.read(200).strip().split(" ", 2), "", "")[:3]
            who = f"process {pid}, since {since}" if since else "it has only just begun"
            end = f"kill {pid}" if namespace == _namespace() else "trimtab stop RUN" if since else f"fuser {self._path}"
            raise _InUse(
                f"another trimtab process works in {self._path.parent} ({who}): wait for it, or end it, with a checkpoint, by  {end}"
            ) from exc
        os.set_inheritable(self._file.fileno(), True)  # by ranks, which hold it, too, while they live
        with contextlib.suppress(OSError):  # a full disk; it holds all the same
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} {_namespace()} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _namespace() -> str:
    """In which process ids mean what they mean here: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "?"


def _cause(job: JobDir, exc: BaseException) -> str:
    """What happened and what to type next."""
    if memory.ran_out(exc):
        return memory.explain(job, exc)
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted; nothing half-made counts. Do it again, or go on with a run by  trimtab resume RUN"
    if isinstance(exc, OSError) and exc.errno in disk.FULL:
        return str(disk.full(job.root))
    return str(exc) if isinstance(exc, TrimtabError) else f"{type(exc).__name__}: {exc}"


def _failed(job: JobDir, exc: BaseException, cause: str) -> int:
    """The cause first, the traceback after; on the log the same."""
    trace = exc.trace if isinstance(exc, ranks.RankFailed) else ""
    text = f"{cause}\n\n" + (trace or "".join(traceback.format_exception(exc)))
    try:
        job.failure.parent.mkdir(parents=True, exist_ok=True)
        job.failure.write_text(text, encoding="utf-8")
    except OSError as problem:
        _print(f"the failure file cannot be written: {problem}", sys.stderr)
    _print(cause if isinstance(exc, TrimtabError) else text, sys.stderr)
    return 1


def _say(line: str) -> None:
    _print(line, sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    """A log that cannot be written, such as on a full disk, ends no run: what matters is in its events and its failure file."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # else the interpreter would make another exit code of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
