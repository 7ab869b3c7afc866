"""Checkpoints that exist whole or not at all, and resume exactly. safetensors and JSON only: nothing is unpickled.

One folder a checkpoint, named by its step: adapter and optimiser tensors, state.json, and the manifest last.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import SpecError
from trimtab_runtime import manifest

_PATTERN = "step-*"


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


def save(folder: Path, position: Position, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Write a checkpoint for `position`, then remove all but the newest `keep` complete ones up to it.

    Later ones go too: they were passed over as damaged, and must not push out what is whole.
    """
    target = folder / name(position.step)
    if target.exists():  # a half-written one of an earlier life, or this very step again
        _remove(target)
    target.mkdir(parents=True)
    save_file({key: parameter.detach().contiguous() for key, parameter in parameters.items()}, target / "adapter.safetensors")
    moments = {}
    for key, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}|{moment}"] = (value if isinstance(value, Tensor) else torch.tensor(value)).contiguous()
    save_file(moments, target / "optimizer.safetensors")
    random = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    manifest.write_json(target / "state.json", asdict(position) | {"random": random})
    manifest.write(target, {"step": position.step})
    kept = [path for path in _complete(folder) if path.name <= target.name][:keep]
    for old in folder.glob(_PATTERN):
        if old not in kept:
            _remove(old)
    return target


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are named and passed over."""
    for candidate in sorted(folder.glob(_PATTERN), reverse=True):
        found = manifest.problem(candidate)
        if found is None:
            return candidate
        say(f"checkpoint {candidate.name} is passed over: {found}")
    return None


def read(checkpoint: Path) -> dict[str, bytes]:
    """The contents of a checkpoint's files by name, for `load`: here, or on a machine that has no such folder."""
    return {file: (checkpoint / file).read_bytes() for file in ("state.json", "adapter.safetensors", "optimizer.safetensors")}


def load(
    files: Mapping[str, bytes], facts: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Position:
    """Put a checkpoint back and return where it stood. Raises SpecError when it belongs to another job."""
    state = json.loads(files["state.json"])
    changed = [fact for fact in {**state["facts"], **facts} if state["facts"].get(fact) != facts.get(fact)]
    if changed:
        raise SpecError(
            f"{name(state['step'])} was written by another job ({', '.join(changed)} differs): start a new run, or repeat the old options"
        )
    saved, moments = (load_tensors(files[file]) for file in ("adapter.safetensors", "optimizer.safetensors"))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(saved[key])
    for key, parameter in parameters.items():
        of_it = {moment: value for moment, value in moments.items() if moment.startswith(f"{key}|")}
        optimizer.state[parameter] = {moment.removeprefix(f"{key}|"): value.to(parameter.device) for moment, value in of_it.items()}
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["random"])), dtype=torch.uint8))
    return Position(state["step"], state["facts"], tuple(state["losses"]), state.get("seconds", 0.0))


def _complete(folder: Path) -> list[Path]:
    """Newest first. A manifest is enough here: its files were checked when it was written."""
    return sorted((path for path in folder.glob(_PATTERN) if (path / manifest.NAME).is_file()), reverse=True)


def _remove(checkpoint: Path) -> None:
    """The manifest first: a removal cut short leaves nothing that looks complete."""
    (checkpoint / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
