"""How much memory this process has needed so far, and what to say when there was not enough."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import re
import resource
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.events import Choice, Phase, read
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime.xeon import topology

# what torch, mmap, OpenMP and the system say, each in its own class of error
_NO_MEMORY = re.compile(
    r"can't allocate memory|Cannot allocate memory|out of memory|std::bad_alloc|can't start new thread|failed to map segment"
    r"|\(os error 12\)",
    re.I,
)


def peak_memory_mb(device: str = "cpu", status: Path = Path("/proc/self/status")) -> int:
    """The process' peak resident set in MB (2^20 bytes), pages of mapped files included; on a GPU what torch allocated there at most.

    Linux's VmHWM, and where there is none getrusage's: that one begins at what the process that started this one held,
    because it survives exec (proc(5), getrusage(2)).
    """
    if device != "cpu":
        import torch

        return int(torch.cuda.max_memory_allocated()) >> 20
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def memory_there(ranks: int = 1, root: Path = Path("/")) -> int | None:
    """MB (2^20 bytes) that this process may hold at most, what it holds now included; None where nothing tells.

    The least of what the system has to give (MemAvailable of proc_meminfo(5)), shared by the `ranks` of this machine, what its control
    groups allow all of them, and what `ulimit -v` leaves of this process' address space. `root`: where the machine's files lie.
    """
    held, mapped = _kilobytes(root / "proc/self/status", "VmRSS:"), _kilobytes(root / "proc/self/status", "VmSize:")
    available = _kilobytes(root / "proc/meminfo", "MemAvailable:")
    allowed = topology.read(root).memory_limit_mb
    bound = resource.getrlimit(resource.RLIMIT_AS)[0]
    found = [allowed // ranks] if allowed is not None else []
    if available is not None:
        found.append((available // ranks + (held or 0)) >> 10)
    if bound != resource.RLIM_INFINITY and mapped is not None:
        found.append(((bound >> 10) - mapped + (held or 0)) >> 10)
    return max(0, min(found)) if found else None


def give_back() -> None:
    """Let the system have the pages of the heap that nothing is on any more; with glibc (malloc_trim(3)), elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def ran_out(exc: BaseException) -> bool:
    """Whether there was not enough memory, here or on a GPU, at the bottom of an error."""
    chain = [exc]
    for error in chain:  # grows while it is walked
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        chain += [inner] if inner is not None and inner not in chain else []
    return any(_is_of_memory(error) for error in chain)


def _is_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno == errno.ENOMEM):
        return True
    return not isinstance(exc, TrimtabError) and _NO_MEMORY.search(str(exc)) is not None


def explain(job: JobDir, exc: BaseException) -> str:
    """In words: where memory ran out, what was expected, and what to change. The first line of what was said stands in brackets."""
    phase, expected = "", ""
    for event in read(job.events):
        if isinstance(event, Phase):
            phase = event.name
        elif isinstance(event, Choice) and event.name == "peak_memory":
            expected = event.value
    bound = resource.getrlimit(resource.RLIMIT_AS)[0]
    facts = [f"the process held {peak_memory_mb():,} MB at most"]
    facts += [f"it was expected to take {expected}"] if expected else []
    facts += [f"its address space is limited to {bound >> 20:,} MB (ulimit -v)"] if bound != resource.RLIM_INFINITY else []
    said = (str(exc).strip().splitlines() or [type(exc).__name__])[0][:120]
    return (
        f"out of memory{f' in the phase {phase}' if phase else ''}: {', '.join(facts)} ({said}). End other work on the machine or raise "
        f"the limit, then  trimtab resume RUN ; or start a new run that needs less: {_smaller(job)}"
    )


def _smaller(job: JobDir) -> str:
    """Options of a new run that takes less memory."""
    try:
        spec = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "--max-seq-len, --batch-rows, --method qlora"
    return ", ".join(smaller(spec))


def smaller(spec: TrainSpec) -> list[str]:
    """What to type for a run that takes less memory, the least change of the course first."""
    found = []
    if spec.batch_rows > 1:
        found.append(f"--batch-rows 1 --accumulation {spec.batch_rows * spec.accumulation} (the same steps)")
    if spec.max_seq_len > 256:
        found.append(f"--max-seq-len {spec.max_seq_len // 2}")
    if spec.method != "qlora":
        found.append("--method qlora")
    return found or ["a smaller --model"]
