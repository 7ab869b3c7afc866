"""Looks at the machine and writes down what is there. Whatever may hang has three seconds; nothing heavy is imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import queue
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trimtab.backends.container import has_gpu_runtime
from trimtab.cache import cache_dir
from trimtab.doctor.facts import Absent, Built, Cpu, Disk, Engine, Facts, Gpu, Memory
from trimtab.errors import BackendUnavailable

PATIENCE = 3.0  # seconds that any answer from outside this process may take

EXTRAS = {
    "weights": ("huggingface-hub", "gguf", "numpy", "safetensors", "tokenizers"),
    "data": ("langchain-community", "beautifulsoup4", "lxml", "lxml-html-clean", "trafilatura", "requests"),
    "train": ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "safetensors", "jinja2"),
    "serve": ("h11", "openvino-genai"),
    "docker": ("docker",),
    "aws": ("boto3",),
}
"""The distributions behind each extra of the installation."""

KERNELS = "trimtab-xeon"  # a distribution of its own, optional everywhere

_HUB = "https://huggingface.co"
_UNLIMITED = 1 << 60  # bytes; the first control groups write a number above it for no limit
_T = TypeVar("_T")


def look(environ: Mapping[str, str] = os.environ) -> Facts:
    """Everything the doctor judges, in a few seconds at most: what has to be waited for is waited for together."""
    hub = environ.get("HF_ENDPOINT") or _HUB
    forbidden = any(environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    for module in ("docker", "boto3"):  # imported before the clocks start: on a busy disk that alone takes seconds
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    silent: tuple[Engine | Absent, dict[str, Built | Absent]] = (Absent("the engine is too slow to answer", "trimtab doctor   again"), {})
    asked_engine = _in_background(_engine, silent, patience=5 * PATIENCE)  # five answers, each bounded by itself
    asked_hub = _in_background(lambda: "" if forbidden else _silence(hub), f"no answer within {PATIENCE:g} s")
    asked_aws = _in_background(lambda: _aws(environ), "")
    asked_gpu = _in_background(_gpu, Gpu())
    names = sorted({KERNELS, *(name for extra in EXTRAS.values() for name in extra)})
    engine, images = asked_engine()
    return Facts(
        python=platform.python_version(),
        trimtab=_version("trimtab") or "a checkout",
        packages={name: _version(name) for name in names} | {"trimtab_runtime": _runtime()},
        cpu=cpu(),
        memory=_memory(),
        disks=_disks(environ, engine),
        engine=engine,
        images=images,
        gpu=asked_gpu(),
        hub=hub,
        hub_silence=asked_hub(),
        hub_forbidden=forbidden,
        token=token_source(environ, Path.home()),
        aws=asked_aws(),
        aws_region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "",
        proxies=proxies(environ),
    )


def cpu_of(cpuinfo: str, *, nodes: int = 1, usable: int | None = None, quota: float | None = None) -> Cpu:
    """What Linux's /proc/cpuinfo says. Virtual machines may leave out sockets and cores; each processor is one then."""
    processors = [
        {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        for block in cpuinfo.strip().split("\n\n")
        if block.startswith("processor")
    ]
    if not processors:
        return Cpu(usable=usable or 1, quota=quota)
    sockets = {one.get("physical id", "0") for one in processors}
    cores = {(one.get("physical id", "0"), one.get("core id", one["processor"])) for one in processors}
    first = processors[0]
    return Cpu(
        model=first.get("model name", ""),
        flags=frozenset(first.get("flags", first.get("Features", "")).split()),
        processors=len(processors),
        cores=len(cores),
        sockets=len(sockets),
        numa_nodes=max(1, nodes),
        usable=usable or len(processors),
        quota=quota,
    )


def cgroup_limits(root: Path, membership: str) -> tuple[float | None, int | None]:
    """(processors' worth of time, memory in MB) that the control groups allow, the least of each on the way to the root.

    `membership` is the text of /proc/self/cgroup, `root` the mount /sys/fs/cgroup. Reads version 2 (cpu.max, memory.max) and
    version 1 (cpu.cfs_quota_us, memory.limit_in_bytes). A container sees its own group as the root: it is asked, too.
    """
    quotas: list[float] = []
    limits: list[int] = []
    for line in membership.splitlines():
        _, controllers, inside = line.split(":", 2)
        for mount in [root / controllers, *(root / name for name in controllers.split(","))] if controllers else [root]:
            here = mount / inside.lstrip("/")
            for folder in [here, *(parent for parent in here.parents if parent == mount or mount in parent.parents)]:
                quota, period = (_read(folder / "cpu.max").split() or ["max", ""])[:2] if not controllers else (
                    _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
                )  # fmt: skip
                if quota.isdigit() and period.isdigit():
                    quotas.append(int(quota) / int(period))
                limit = _read(folder / ("memory.limit_in_bytes" if controllers else "memory.max")).strip()
                if limit.isdigit() and int(limit) < _UNLIMITED:
                    limits.append(int(limit) >> 20)
    return min(quotas, default=None), min(limits, default=None)


def token_source(environ: Mapping[str, str], home: Path) -> str:
    """Where a Hugging Face token comes from; empty where there is none. The token itself is not read."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(name):
            return name
    folder = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
    file = Path(environ.get("HF_TOKEN_PATH") or folder / "token").expanduser()
    return str(file) if _size(file) else ""


def proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The proxies that programs will use, by their variables, without user names and passwords."""
    found = {}
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        value = environ.get(name) or environ.get(name.upper()) or ""
        if value:
            found[name.upper()] = value.rpartition("@")[2] if name != "no_proxy" else value
    return found


def _in_background(call: Callable[[], _T], otherwise: _T, patience: float = PATIENCE) -> Callable[[], _T]:
    """Start `call` and return what waits for it: its result, or `otherwise` so many seconds after the start. It is left behind then.

    Names are looked up without a time limit by the system, so a limit on the connection alone is none.
    """
    results: queue.SimpleQueue[_T] = queue.SimpleQueue()
    deadline = time.monotonic() + patience
    threading.Thread(target=lambda: results.put(call()), daemon=True).start()

    def wait() -> _T:
        try:
            return results.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return otherwise

    return wait


def _engine() -> tuple[Engine | Absent, dict[str, Built | Absent]]:
    from trimtab import images

    try:
        with contextlib.closing(images.engine(timeout=PATIENCE)) as client:
            info, version = client.info(), client.version()
            built = {device: _image(device, client) for device in ("xeon", "gpu")}
    except BackendUnavailable as exc:
        return Absent(*told(exc)), {}
    except (OSError, ValueError) as exc:  # the errors of the SDK and of its HTTP client are OSErrors
        return Absent(f"what answers is no engine ({type(exc).__name__})", "name a Docker engine with DOCKER_HOST"), {}
    return engine_of(info, version, os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"), built


def told(problem: BackendUnavailable) -> tuple[str, str]:
    """(what is wrong, what to type) of a message that ends with its remedy, after a colon."""
    text = str(problem)
    why, _, remedy = text.partition(":  ") if ":  " in text else text.partition(": ")
    return re.sub(r"; build (it|it here|one)$", "", why), remedy


def engine_of(info: Mapping[str, Any], version: Mapping[str, Any], where: str) -> Engine:
    """What the answers to GET /info and GET /version say (Docker Engine API 1.41)."""
    limits = {"MemoryLimit": "memory", "CpuCfsQuota": "processor time", "CPUSet": "processors", "PidsLimit": "processes"}
    return Engine(
        where=where,
        version=str(version.get("Version", "")),
        api=str(version.get("ApiVersion", "")),
        storage=str(info.get("Driver", "")),
        cgroup=f"v{info.get('CgroupVersion') or '1'}",
        architecture=str(version.get("Arch", "")),
        cpus=int(info.get("NCPU") or 0),
        memory=int(info.get("MemTotal") or 0) >> 20,
        root=str(info.get("DockerRootDir", "")),
        lacking=tuple(word for name, word in limits.items() if info.get(name) is False),
        gpu_runtime=has_gpu_runtime(info, shutil.which("nvidia-container-runtime-hook")),
    )


def _image(device: str, client: Any) -> Built | Absent:
    from trimtab import images

    try:
        found = images.find(device, client=client)
    except BackendUnavailable as exc:
        return Absent(*told(exc))
    return Built(found.tag, found.size // 10**6)


def _gpu() -> Gpu:
    """By nvidia-smi, which comes with the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpu()
    asked = [program, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Gpu()
    return gpu_of(done.stdout) if done.returncode == 0 else Gpu()


def gpu_of(answer: str) -> Gpu:
    """From `nvidia-smi --query-gpu=driver_version,name,memory.total --format=csv,noheader`: a line for each card."""
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    return Gpu(rows[0][0], tuple(f"{name} ({memory})" for _, name, memory in rows)) if rows else Gpu()


def _silence(hub: str) -> str:
    """Why the hub does not answer; empty when it does, whatever it answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError as exc:
        exc.close()
        return ""
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "reason", exc)
        return str(getattr(reason, "strerror", None) or reason) or type(exc).__name__


def _aws(environ: Mapping[str, str]) -> str:
    """Where credentials come from: by boto3 where it is installed, which knows roles, too; else by variables and files."""
    try:
        boto3, errors = importlib.import_module("boto3"), importlib.import_module("botocore.exceptions")
    except ImportError:
        return aws_source(environ, Path.home())
    try:
        found = boto3.Session().get_credentials()
    except errors.BotoCoreError:  # a profile that is not there, a program that gives none
        return ""
    return str(found.method) if found is not None else ""


def aws_source(environ: Mapping[str, str], home: Path) -> str:
    """The first of AWS' usual places that holds credentials; empty where none does. They are not read."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        if environ.get(name):
            return name
    file = Path(environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials").expanduser()
    return str(file) if _size(file) else ""


def cpu() -> Cpu:
    """This machine's processors, as far as Linux tells."""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _ = cgroup_limits(Path("/sys/fs/cgroup"), _read(Path("/proc/self/cgroup")))
    return cpu_of(_read(Path("/proc/cpuinfo")), nodes=nodes, usable=usable, quota=quota)


def _memory() -> Memory:
    lines = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    total, available = (int((lines.get(name) or "0 kB").split()[0]) >> 10 for name in ("MemTotal", "MemAvailable"))
    _, limit = cgroup_limits(Path("/sys/fs/cgroup"), _read(Path("/proc/self/cgroup")))
    return Memory(total, available, limit if limit is not None and limit < total else None)


def _disks(environ: Mapping[str, str], engine: Engine | Absent) -> tuple[Disk, ...]:
    home = Path(environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()
    places = [("cache", cache_dir(), "TRIMTAB_CACHE"), ("runs", home, "TRIMTAB_HOME")]
    found = [_disk(name, path, f"set {variable} to a folder on a larger disk") for name, path, variable in places]
    local = (environ.get("DOCKER_HOST") or "unix://").startswith("unix://")
    if isinstance(engine, Engine) and local and engine.root and Path(engine.root).is_dir():
        found.append(replace(_disk("images", Path(engine.root), "docker system prune"), writable=True))  # the engine writes, not we
    return tuple(found)


def _disk(name: str, path: Path, move: str) -> Disk:
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return Disk(name, str(path), round(shutil.disk_usage(there).free / 1e9, 1), os.access(there, os.W_OK | os.X_OK), move)


def _runtime() -> str | None:
    return "" if importlib.util.find_spec("trimtab_runtime") else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
