"""From facts to findings: what is there, what is missing, for whom, and what to type. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trimtab.backends.container import GPU_REMEDY
from trimtab.counting import counted
from trimtab.doctor.facts import PLACES, Absent, Built, Cpu, Disk, Engine, Facts, Memory
from trimtab.doctor.look import EXTRAS, KERNELS

State = Literal["ok", "warning", "missing"]

_LITTLE_MEMORY = 4_000  # MB; the smallest model of the catalog trains in 3,000
_LITTLE_ROOM, _NO_ROOM = 10.0, 1.0  # GB; Llama 2 7B is 13.5, the images about 1 and 5


@dataclass(frozen=True)
class Finding:
    """`needed_by` are the places that cannot run a job while this is missing; `remedy` is what to type or do, empty where all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""
    needed_by: tuple[str, ...] = ()

    def stops(self, place: str) -> bool:
        return self.state == "missing" and place in self.needed_by


def judge(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which one would mend them."""
    return [
        python(facts.python, facts.trimtab),
        *packages(facts.packages),
        cpu(facts.cpu),
        kernels(facts.packages.get(KERNELS), facts.cpu),
        cores(facts.cpu),
        memory(facts.memory),
        *(disk(place) for place in facts.disks),
        engine(facts.engine),
        *(image(device, found) for device, found in facts.images.items()),
        gpu(facts),
        hub(facts),
        token(facts.token),
        aws(facts.aws, facts.aws_region),
        proxy(facts.proxies),
    ]


def python(version: str, trimtab: str) -> Finding:
    found = f"Python {version}, trimtab {trimtab}"
    if version.split(".")[:2] in (["3", "11"], ["3", "12"]):
        return Finding("python", "ok", found, needed_by=PLACES)
    return Finding("python", "missing", f"{found}; Python 3.11 or 3.12 is needed", "python3.11 -m venv .venv", PLACES)


def packages(versions: dict[str, str | None]) -> list[Finding]:
    """A finding for each extra. Whoever stages data needs the first three, wherever the run itself is."""
    found = []
    for extra, names in EXTRAS.items():
        wanted = ("trimtab_runtime", *names) if extra == "train" else names
        lacking = [name for name in wanted if versions.get(name) is None]
        places = {"docker": ("docker",), "aws": ("sagemaker",), "serve": ()}.get(extra, PLACES)
        if lacking:
            remedy = f"pip install 'trimtab[{extra}]'"
            found.append(Finding(f"packages {extra}", "missing", f"not installed: {', '.join(lacking)}", remedy, places))
        else:
            there = ", ".join(f"{name} {versions[name]}" for name in names)
            found.append(Finding(f"packages {extra}", "ok", there, needed_by=places))
    return found


def cpu(found: Cpu) -> Finding:
    """What the processor's instructions mean for speed; the run chooses bf16 by the same two flags."""
    name = found.model or "a processor that does not tell its name"
    remedy = "nothing to do; a Xeon Scalable from the fourth generation on has AMX, which multiplies bf16 fastest"
    if "amx_bf16" in found.flags:
        return Finding("cpu", "ok", f"{name}: amx_bf16, so bf16 is multiplied in tiles, the fastest way there is on a Xeon")
    if "avx512_bf16" in found.flags:
        return Finding("cpu", "ok", f"{name}: avx512_bf16 but no AMX, so bf16 is used at vector speed")
    if "avx512f" in found.flags:
        said = f"{name}: avx512f but no bf16 instructions, so training computes in float32, in twice the memory"
        return Finding("cpu", "warning", said, remedy)
    if "avx2" in found.flags:
        return Finding("cpu", "warning", f"{name}: avx2 and nothing newer, so training computes in float32, slowly", remedy)
    return Finding("cpu", "warning", f"{name}: not even avx2, so training will be very slow", "use a machine with AVX-512 or AMX")


def kernels(version: str | None, found: Cpu) -> Finding:
    """The compiled part of training on a Xeon; images for Xeons are built with what is installed here."""
    if version is not None:
        return Finding("kernels", "ok", f"{KERNELS} {version}: compiled kernels for training on the CPU, here and in the Xeon image")
    if not any(flag.startswith("avx") for flag in found.flags):  # Arm, macOS: nothing could build it
        return Finding(
            "kernels", "ok", f"{KERNELS} is for x86-64 with AVX under Linux; plain torch computes here, and in images built here"
        )
    said = f"{KERNELS} is not installed, so plain torch computes in its place on the CPU, slower, here and in the Xeon image"
    return Finding("kernels", "warning", said, "make setup   in a checkout builds it, where there is a C++ compiler")


def cores(found: Cpu) -> Finding:
    """How many there are, how many may be used, and whether memory has a far side."""
    said = (
        f"{counted(found.cores, 'core')}, {counted(found.processors, 'processor')}, {counted(found.sockets, 'socket')}, "
        f"{counted(found.numa_nodes, 'NUMA node')}"
    )
    if found.quota is not None and found.quota < found.usable:
        said += f"; the control group allows {found.quota:g} processors' worth of time"
        threads = max(1, int(found.quota))
        return Finding("cores", "warning", said, f"raise the limit; a run takes {threads} thread{'s' if threads > 1 else ''}")
    if found.usable < found.processors:
        said += f"; {found.usable} of them may be used here"
    if found.numa_nodes > 1:
        remedy = "trimtab fit --ranks auto ...   trains with a process on each side, its memory near; a step then takes more rows"
        return Finding("cores", "warning", f"{said}: reading from the other node's memory is slower", remedy)
    return Finding("cores", "ok", said)


def memory(found: Memory) -> Finding:
    limited = found.limit is not None
    usable = min(found.available, found.limit) if found.limit is not None else found.available
    said = f"{found.available:,} of {found.total:,} MB available" + (f", the control group allows {found.limit:,} MB" if limited else "")
    if usable < _LITTLE_MEMORY:
        remedy = "raise the container's limit" if limited and usable == found.limit else "end other programs"
        return Finding("memory", "warning", said, f"{remedy}, or lower max_seq_len; what a job needs says  trimtab plan")
    return Finding("memory", "ok", said)


def disk(found: Disk) -> Finding:
    said = f"{found.free_gb:,.1f} GB free for {found.path}"
    places: tuple[str, ...] = ("docker",) if found.name == "images" else PLACES
    if not found.writable:
        return Finding(f"disk {found.name}", "missing", f"{found.path} cannot be written", found.move, places)
    if found.free_gb < _NO_ROOM:
        return Finding(f"disk {found.name}", "missing", f"{said}: too little for anything", found.move, places)
    if found.free_gb < _LITTLE_ROOM:
        return Finding(f"disk {found.name}", "warning", f"{said}; a model of 7 billion parameters is 13.5 GB", found.move, places)
    return Finding(f"disk {found.name}", "ok", said, needed_by=places)


def engine(found: Engine | Absent) -> Finding:
    if isinstance(found, Absent):
        return Finding("docker", "missing", found.why, found.remedy, ("docker",))
    said = (
        f"engine {found.version} (API {found.api}) at {found.where}: {found.storage}, cgroup {found.cgroup}, {found.architecture}, "
        f"{counted(found.cpus, 'processor')}, {found.memory:,} MB"
    )
    if found.lacking:
        lacking = f"{said}; it cannot limit {', '.join(found.lacking)}"
        return Finding("docker", "warning", lacking, "switch these control groups on in the kernel (docker info names them)", ("docker",))
    if found.storage == "vfs":
        return Finding("docker", "warning", f"{said}; vfs copies every layer", "use the overlay2 storage driver", ("docker",))
    return Finding("docker", "ok", said, needed_by=("docker",))


def image(device: str, found: Built | Absent) -> Finding:
    """Only xeon's is needed: a job for a GPU is asked for by name."""
    places = ("docker",) if device == "xeon" else ()
    if isinstance(found, Absent):
        return Finding(f"image {device}", "missing", found.why, found.remedy, places)
    return Finding(f"image {device}", "ok", f"{found.tag}, {found.megabytes:,} MB", needed_by=places)


def gpu(facts: Facts) -> Finding:
    runtime = isinstance(facts.engine, Engine) and facts.engine.gpu_runtime
    if not facts.gpu.driver:
        said = "no NVIDIA driver answers" + ("; the engine has a GPU runtime" if runtime else "")
        return Finding("gpu", "missing", said, "nothing to do for --device xeon; for --device gpu install NVIDIA's driver")
    said = f"{', '.join(facts.gpu.cards)}, driver {facts.gpu.driver}"
    if not runtime:
        return Finding("gpu", "warning", f"{said}; the Docker engine has no runtime for it", GPU_REMEDY)
    return Finding("gpu", "ok", f"{said}; the engine has a runtime for it (prove it with  trimtab doctor --gpu)")


def hub(facts: Facts) -> Finding:
    if facts.hub_forbidden:
        return Finding("model hub", "warning", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids asking it", "unset it, or give a folder")
    if facts.hub_silence:
        remedy = "set HTTPS_PROXY or HF_ENDPOINT; without a hub:  --model FOLDER  or  --model smollm2-135m-instruct"
        return Finding("model hub", "warning", f"{facts.hub} does not answer: {facts.hub_silence}", remedy)
    return Finding("model hub", "ok", f"{facts.hub} answers")


def token(source: str) -> Finding:
    if source:
        return Finding("hub token", "ok", f"there is one, from {source}")
    return Finding("hub token", "missing", "none; only gated models such as Llama 2 need one", "hf auth login   (or set HF_TOKEN)")


def aws(source: str, region: str) -> Finding:
    places = ("sagemaker",)
    if not source:
        return Finding("aws", "missing", "no credentials", "aws configure   (or set AWS_PROFILE)", places)
    if not region:
        return Finding("aws", "warning", f"credentials from {source}, no region in the environment", "export AWS_REGION=eu-west-1", places)
    return Finding("aws", "ok", f"credentials from {source}, region {region}", needed_by=places)


def proxy(found: dict[str, str]) -> Finding:
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    proxied = set(found) - {"NO_PROXY"}
    own = [host.strip() for host in re.split(r"[,\s]+", found.get("NO_PROXY", ""))]
    if proxied and not {"127.0.0.1", "*"} & set(own):
        return Finding("proxies", "warning", f"{said}; asked for 127.0.0.1 too, where endpoints are", "export NO_PROXY=127.0.0.1,localhost")
    return Finding("proxies", "ok", said or "none")
