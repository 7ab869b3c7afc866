"""What one container is asked to be, as the Docker Engine takes it (Docker Engine API 1.41, POST /containers/create).

Nothing here asks the engine; folders are read, to mount what they hold.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trimtab.backends.base import RunHandle
from trimtab.backends.run_folder import NEEDS_LESS, Said, again
from trimtab.command import TUNING, inherited, runtime_environment
from trimtab.errors import BackendError, SpecError, StagingError
from trimtab.estimate import ModelFacts, dtype_of, peak_memory
from trimtab.events import Choice
from trimtab.layout import NF4_CACHE_VARIABLE, JobDir
from trimtab.spec import TrainSpec

ROOT = Path("/opt/ml")
RUN_LABEL, FOLDER_LABEL, USER_LABEL, VERSION_LABEL = "trimtab.run", "trimtab.folder", "trimtab.user", "trimtab.client"
GPU_REMEDY = (
    "install the NVIDIA Container Toolkit, run  sudo nvidia-ctk runtime configure --runtime=docker  and restart the engine, "
    "or compute on the CPU with  --device xeon"
)

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LEAST_MEMORY = 6 << 20  # the engine's own lower bound


@dataclass(frozen=True)
class Limits:
    """What a container gets of the machine, as far as it was asked for. Sizes are in bytes.

    Unasked, CPUs and memory have no bound of their own, shared memory is 1 GiB, and there is no network.
    """

    cpus: str | None = None
    memory: int | None = None
    shm_size: int | None = None
    network: str | None = None

    @classmethod
    def parse(cls, *, cpus: str | None, memory: str | int | None, shm_size: str | int | None, network: str | None) -> Limits:
        """From what a user wrote. Raises SpecError for what is no size, no list of CPUs, no network's name."""
        if cpus is not None:
            parse_cpus(cpus)
        if network is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", network):
            raise SpecError(f"network {network!r} is no network's name: leave it out (none), or name one of  docker network ls")
        return cls(
            cpus,
            None if memory is None else parse_size("memory", memory, _LEAST_MEMORY),
            None if shm_size is None else parse_size("shm_size", shm_size),
            network,
        )

    def refuse_network(self, nodes: int) -> None:
        """Raise SpecError for a network asked for by a run on several machines."""
        if nodes > 1 and self.network not in (None, "none"):
            raise SpecError(f"{nodes} nodes meet on a network of their own: leave network={self.network} out")

    def host(self) -> dict[str, Any]:
        """What was asked for, as the part of a HostConfig that it is."""
        found = {"CpusetCpus": self.cpus, "ShmSize": self.shm_size, "NetworkMode": self.network}
        # swap would only hide that memory is short
        found |= {"Memory": self.memory, "MemorySwap": self.memory}
        return {name: value for name, value in found.items() if value is not None}


def parse_size(name: str, given: str | int, least: int = 1) -> int:
    """Bytes of a size such as "8g", "512m" or 1073741824; units are powers of 1,024, as docker's. Raises SpecError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", str(given).strip().lower())
    if match is None:
        raise SpecError(f"{name} {given!r} is no size: write a number and a unit, such as {name}=8g or {name}=512m")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < least:
        raise SpecError(f"{name} {given!r} is too small, the least is {show_size(least)}: write such as {name}=8g or {name}=512m")
    return size


def show_size(size: int) -> str:
    """A size as `parse_size` reads it: in the largest unit that leaves a whole number."""
    unit = next(unit for unit, factor in reversed(_UNITS.items()) if size % factor == 0)
    return f"{size // _UNITS[unit]}{unit.strip('b')}"


def parse_cpus(given: str) -> set[int]:
    """The CPUs of a list such as "0-3,8". Raises SpecError for what is none."""
    found: set[int] = set()
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise SpecError(f"cpus {given!r} is no list of CPUs: write their numbers, such as cpus=0-3 or cpus=0,2")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def caller(info: Mapping[str, Any]) -> tuple[str, list[str]]:
    """User and further groups in the container, so that what it writes is the caller's and what the caller may read it may read.

    `info` is the engine's. In a rootless engine the caller is root within.
    """
    if any("name=rootless" in option for option in info.get("SecurityOptions") or []):
        return "0:0", []
    return f"{os.getuid()}:{os.getgid()}", [str(group) for group in os.getgroups() if group != os.getgid()]


def has_gpu_runtime(info: Mapping[str, Any], hook: str | None) -> bool:
    """Whether the engine can hand on a GPU: a runtime of its own, devices it found, or the `hook` program that dockerd looks for."""
    devices = [device.get("ID", "") for device in info.get("DiscoveredDevices") or []]
    return "nvidia" in (info.get("Runtimes") or {}) or any("nvidia" in device for device in devices) or hook is not None


def on_another_machine(address: str) -> bool:
    """Whether an engine's address is another machine's, which could not mount folders of this one."""
    place = urlsplit(address)
    return place.scheme in ("http", "https", "ssh", "tcp") and place.hostname not in ("localhost", "127.0.0.1", "::1")


def mounts(folder: Path, channels: Mapping[str, str], nf4: Path | None = None) -> list[dict[str, Any]]:
    """What of a run's folder is seen under /opt/ml, which itself is a small memory file system: its configuration and the channels
    read-only, what it writes writable, the folder `nf4` of quantised bases too. The client's own files, beside these, are not seen.

    A channel that holds links is mounted file by file, each the file that the link means, so that nothing lying beside that is seen.
    Raises StagingError for a link to nowhere.
    """
    here, inside = JobDir(folder), JobDir(ROOT)
    found = [_mount(here.hyperparameters.parent, inside.hyperparameters.parent, read_only=True)]
    for source, place in zip(_written(here), _written(inside), strict=True):
        found.append(_mount(source, place, read_only=False))
    if nf4 is not None:
        found.append(_mount(nf4, inside.nf4, read_only=False))
    for name, path in channels.items():
        found += [_mount(source, place, read_only=True) for source, place in _parts(Path(path), inside.channel(name))]
    return found


def container_body(
    handle: RunHandle,
    image_id: str,
    device: str,
    folder: Path,
    channels: Mapping[str, str],
    limits: Limits,
    info: Mapping[str, Any],
    nf4: Path | None = None,
) -> dict[str, Any]:
    """The body of the request. No powers, no network but the one asked for, nothing writable but what a job writes, and /tmp.

    `nf4` is the folder of quantised bases, for a run that has a use for it.
    """
    user, groups = caller(info)
    uid, gid = user.split(":")
    environment = {**inherited(os.environ, TUNING), **runtime_environment(ROOT, device=device)}
    if nf4 is not None:
        environment[NF4_CACHE_VARIABLE] = str(JobDir(ROOT).nf4)
    host: dict[str, Any] = {
        "Mounts": mounts(folder, channels, nf4),
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        # the owner is named, because runc before 1.2 gives a tmpfs the mode that the image's folder has
        "Tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777,size=1g", str(ROOT): f"rw,noexec,nosuid,nodev,uid={uid},gid={gid},size=1m"},
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "GroupAdd": groups,
        "Init": False,  # our own first process reaps and passes signals on
        "LogConfig": {"Type": "json-file", "Config": {}},  # whatever the engine's default is, the log can be read back
        "ShmSize": 1 << 30,
        **limits.host(),
    }
    if device == "gpu":
        host["DeviceRequests"] = [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    return {
        "Image": image_id,
        "Cmd": ["train"],
        "User": user,
        "Env": sorted(f"{name}={value}" for name, value in environment.items()),
        "Labels": {RUN_LABEL: handle.id, FOLDER_LABEL: str(folder), USER_LABEL: str(os.getuid()), VERSION_LABEL: "1"},
        "HostConfig": host,
    }


def make_nf4(container: Mapping[str, Any]) -> None:
    """Make the folder of quantised bases that a container is to have, which may be removed at any time. Raises BackendError."""
    for mount in container["HostConfig"]["Mounts"]:
        if mount["Target"] == str(JobDir(ROOT).nf4):
            try:
                Path(mount["Source"]).mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise BackendError(
                    f"the NF4 cache {mount['Source']} cannot be made ({exc.strerror or exc}): set {NF4_CACHE_VARIABLE} to a folder that "
                    "can be written, or to nothing, and none is kept"
                ) from exc


def choices(image: str, container: Mapping[str, Any]) -> list[Choice]:
    """What is said aloud when a run starts."""
    host = container["HostConfig"]
    network = host["NetworkMode"]
    why = "weights and rows are staged channels" if network == "none" else "asked for; the job itself needs none"
    if "NetworkingConfig" in container:
        why = "of this run alone: its machines meet there, and it leads nowhere else"
    found = [Choice(name="image", value=image, reason=container["Image"]), Choice(name="network", value=network, reason=why)]
    if "Memory" in host:
        found.append(Choice(name="memory", value=show_size(host["Memory"]), reason="asked for, swap included"))
    if "CpusetCpus" in host:
        found.append(Choice(name="cpus", value=host["CpusetCpus"], reason="asked for"))
    return found


def expected_memory(request: Mapping[str, Any]) -> int:
    """Bytes that training takes by its estimate, from a run's request and its model's sizes; 0 where these are not known, and on a GPU."""
    from trimtab.doctor.look import cpu  # which imports this module

    if "DeviceRequests" in request["container"]["HostConfig"]:
        return 0
    try:
        model = ModelFacts.from_config(json.loads((Path(request["channels"]["model"]) / "config.json").read_text(encoding="utf-8")))
        spec = TrainSpec.from_hyperparameters(request["hyperparameters"])
    except (OSError, ValueError, KeyError, SpecError):
        return 0
    return peak_memory(spec, model, dtype_of(spec.dtype, cpu().flags)).total << 20 if model is not None else 0


def needed_memory(limit: int, peak: int, expected: int) -> int:
    """What to give a run that was killed at `limit`, in whole GiB: the largest of what it is expected to take, took and was too little,
    and a quarter for room; half where nothing is expected. All in bytes, 0 for unknown. Pure.
    """
    needed = max(limit, peak, expected) * (1.25 if expected else 1.5)
    return max(1, math.ceil(needed / (1 << 30))) << 30


def out_of_memory(handle: RunHandle, cause: str, told: Said, limit: int, expected: int = 0) -> str:
    """The reason of a run that the kernel killed for memory; `cause` is what its first process saw of that, `limit` 0 for none.

    `expected` is `expected_memory`'s.
    """
    step = told.step
    when = f"after step {step.step} of {step.of}, with a peak of {step.memory_mb} MB" if step else "before its first step"
    seen = [] if told.phase == "" else [f"in the phase {told.phase}"]
    bound = f"at its container's limit of {show_size(limit)}" if limit else "at the limit of the machine"
    needed = needed_memory(limit, (step.memory_mb << 20) if step else 0, expected)
    more = f"give it more:  trimtab resume {handle} --backend-option memory={show_size(needed)}"
    remedy = more if limit else f"end other work on the machine, then {again(handle)}"
    facts = ", ".join([bound, *seen, when, *([f"expected to take {told.expected_memory}"] if told.expected_memory else [])])
    said = f" ({cause.splitlines()[0].rstrip('.')})" if cause else ""
    return f"out of memory, killed {facts}{said}; {NEEDS_LESS}; {remedy}"


def _written(job: JobDir) -> tuple[Path, Path, Path]:
    return job.model, job.checkpoints, job.failure.parent


def _parts(source: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """What to mount where, so that a channel is seen as it is here."""
    try:
        real = source.resolve(strict=True)
    except OSError as exc:
        raise StagingError(f"{source} is a link to what is gone ({exc}): prepare the data again by repeating  trimtab fit") from exc
    if not real.is_dir() or not any(entry.is_symlink() for entry in real.rglob("*")):
        yield real, place
        return
    for entry in sorted(real.iterdir()):
        if entry.is_symlink() and entry.is_dir():
            yield entry.resolve(), place / entry.name  # as it is: links within could lead round in circles
        else:
            yield from _parts(entry, place / entry.name)


def _mount(source: Path, place: Path, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source), "Target": str(place), "ReadOnly": read_only}
