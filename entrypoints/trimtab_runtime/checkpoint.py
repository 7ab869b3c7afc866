"""Checkpoints that exist whole or not at all, and resume exactly. safetensors and JSON only: nothing is unpickled.

One folder a checkpoint, named by its step: what is trained, adapters or all (parameters.safetensors), the optimiser's moments, state.json,
and the manifest last.

A checkpoint without a manifest was never finished, and is passed over. One that was finished and is damaged now is passed over, too,
and named; but where no other is left the run does not begin again by itself, because that could throw days of work away unseen.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import SpecError, StagingError
from trimtab.spec import TrainSpec
from trimtab_runtime import disk, manifest
from trimtab_runtime.shards import tensors_in

_PATTERN = "step-*"
_STATE, _PARAMETERS, _MOMENTS = "state.json", "parameters.safetensors", "optimizer.safetensors"
_FILES = (_STATE, _PARAMETERS, _MOMENTS)
_COUNTS = {"nodes": "--nodes", "ranks": "--ranks"}  # facts that count who takes part, one where they are absent, and their options


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` optimiser steps are done; `facts` is what must not have changed since.

    `losses` are the first step's and the last's; `seconds` is the time that all lives of the run spent in the loop.
    """

    step: int
    facts: Mapping[str, Any]
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


def name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def size(parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes that a checkpoint takes with AdamW: each parameter and its two moments."""
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def to_come(spec: TrainSpec, done: int, steps: int) -> int:
    """How many checkpoints are sure to be written after step `done` of `steps`: by the steps alone, and one to be stopped with.

    A run with a time limit may end at any step.
    """
    if done >= steps:
        return 0
    return max(1, (steps - 1) // spec.save_every_steps - done // spec.save_every_steps if spec.max_minutes is None else 1)


def at_once(there: int, to_come: int, keep: int) -> tuple[int, int]:
    """By how many checkpoints more than the `there` that there are the disk is fuller at its fullest, and at the run's end."""
    return max(min(1, to_come), min(keep + 1, there + to_come) - there), max(0, min(keep, there + to_come) - there)


def refuse_too_small(folder: Path, each: int, to_come: int, keep: int, *, model: Path, artifact: int) -> None:
    """Raise StagingError where checkpoints of `each` bytes, or beside those that stay an artifact in `model`, have no room even now."""
    disk.refuse_too_small(folder, each * min(1, to_come), "a checkpoint")
    disk.refuse_too_small(model, artifact, "the artifact")
    complete = _complete(folder)
    fullest, at_end = at_once(len(complete), to_come, keep)
    half = [path for path in folder.glob(_PATTERN) if path not in complete]  # they go once one is written
    freed = sum(file.stat().st_size for path in half for file in path.iterdir() if file.is_file())
    beside = artifact if folder.stat().st_dev == model.stat().st_dev else 0
    needed = max(fullest * each, at_end * each + beside) - freed
    sizes = f"{max(fullest, at_end)} more of {disk.megabytes(each)}" + (f", the artifact {disk.megabytes(beside)}" if beside else "")
    disk.refuse_too_small(folder, needed, f"what is kept at once (checkpoints, {sizes})")


def save(folder: Path, position: Position, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Write a checkpoint for `position`, then remove all but the newest `keep` complete ones up to it.

    Later ones go too: they were passed over as damaged, and must not push out what is whole. Raises StagingError where it cannot be
    written; then nothing of it stays, and the ones before are as they were.
    """
    target = folder / name(position.step)
    with disk.whole_or_nothing(folder, f"the checkpoint of step {position.step}", size(parameters), lambda: _remove(target)):
        if target.exists():  # a half-written one of an earlier life, or this very step again
            _remove(target)
        target.mkdir(parents=True)
        save_file({key: parameter.detach().contiguous() for key, parameter in parameters.items()}, target / _PARAMETERS)
        moments = {}
        for key, parameter in parameters.items():
            for moment, value in optimizer.state.get(parameter, {}).items():
                moments[f"{key}|{moment}"] = (value if isinstance(value, Tensor) else torch.tensor(value)).contiguous()
        save_file(moments, target / _MOMENTS)
        random = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
        manifest.write_json(target / _STATE, asdict(position) | {"random": random})
        manifest.write(target, {"step": position.step})
        manifest.flush_names(folder)
    kept = [path for path in _complete(folder) if path.name <= target.name][:keep]
    for old in folder.glob(_PATTERN):
        if old not in kept:
            with contextlib.suppress(OSError):  # it may go another time
                _remove(old)
    return target


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are named and passed over.

    Raises StagingError where none is whole and some once were.
    """
    damaged = []
    for candidate in sorted(folder.glob(_PATTERN), reverse=True):
        found = _problem(candidate)
        if found is None:
            return candidate
        say(f"checkpoint {candidate.name} is passed over: {found}")
        if (candidate / manifest.NAME).exists():
            damaged.append(found)
    if damaged:
        raise StagingError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Put a copy of one there if you have it, then  trimtab resume RUN ; "
            f"or begin again from the first step:  rm -r {folder}/{_PATTERN}  and then  trimtab resume RUN"
        )
    return None


def read(checkpoint: Path) -> dict[str, bytes | mmap.mmap]:
    """The contents of a checkpoint's files by name, for `load`: here, or on a machine that has no such folder.

    Mapped, not read: of a model that is trained whole they are as large as all that training keeps.
    """
    found: dict[str, bytes | mmap.mmap] = {}
    for file in _FILES:
        with (checkpoint / file).open("rb") as opened:
            found[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return found


def load(
    files: Mapping[str, bytes | mmap.mmap],
    facts: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Position:
    """Put a checkpoint back and return where it stood. Raises SpecError when it belongs to another job."""
    state = json.loads(bytes(files[_STATE]))
    changed = [fact for fact in {**state["facts"], **facts} if state["facts"].get(fact) != facts.get(fact)]
    if changed and set(changed) <= set(_COUNTS):
        raise SpecError(_another_count(state["step"], {count: (state["facts"].get(count, 1), facts.get(count, 1)) for count in changed}))
    if changed:
        raise SpecError(
            f"{name(state['step'])} was written by another job ({', '.join(changed)} differs): start a new run, or repeat the old options"
        )
    saved = dict(tensors_in(files[_PARAMETERS]))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(saved[key])
    for parameter in parameters.values():
        optimizer.state[parameter] = {}
    for path, value in tensors_in(files[_MOMENTS]):
        key, _, moment = path.rpartition("|")
        parameter = parameters[key]
        optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["random"])), dtype=torch.uint8))
    return Position(state["step"], state["facts"], tuple(state["losses"]), state.get("seconds", 0.0))


def _another_count(step: int, counts: Mapping[str, tuple[int, int]]) -> str:
    """What to say where as many do not take part now (second) as when the checkpoint was written (first)."""
    were = ", ".join(f"{_COUNTS[count]} {was}" for count, (was, _) in counts.items())
    here = ", ".join(f"{_COUNTS[count]} {now}" for count, (_, now) in counts.items())
    auto = " (--ranks auto counts the clusters of cores of the machine that it runs on)" if "ranks" in counts else ""
    return (
        f"{name(step)} was written with {were}, and this run has {here}, on which a step's rows depend: go on with {were}{auto}, "
        "or start a new run"
    )


def _problem(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be gone on from, or None."""
    found = manifest.problem(checkpoint, contents=contents)
    if found is None:
        missing = [file for file in _FILES if file not in manifest.read(checkpoint)["files"]]
        found = f"{checkpoint.name}/{manifest.NAME} does not name {', '.join(missing)}: changed" if missing else None
    return found


def _complete(folder: Path) -> list[Path]:
    """Newest first. Sizes are enough here: what a file holds was checked when it was written, and is again when it is read."""
    return sorted((path for path in folder.glob(_PATTERN) if _problem(path, contents=False) is None), reverse=True)


def _remove(checkpoint: Path) -> None:
    """The manifest first: a removal cut short leaves nothing that looks complete."""
    (checkpoint / manifest.NAME).unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
