"""How the benchmarks of training measure: variants in turns, medians of paired ratios, facts of the machine, bars.

Variants run one after another, round by round, in an order that rotates. A ratio is taken within its round, so that what others do on the
machine meets both sides of it; the median over the rounds counts, and the quartiles tell how far the rounds agree. With one thread the
seconds are those of the process' processor, of which others take nothing but caches; with more they are the clock's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

Seconds = dict[str, list[float]]  # what each variant took, round by round


@dataclass(frozen=True)
class Ratio:
    """Quartiles of paired ratios."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Figure:
    """A figure with its bar, which is kept where the value is at least (`least`) or at most the bar."""

    name: str
    value: float
    bar: float
    least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.bar if self.least else self.value <= self.bar

    def __str__(self) -> str:
        value = f"{self.value:.3f}" if abs(self.value) >= 0.1 else f"{self.value:.2g}"
        return f"{self.name} {value}  bar {'>=' if self.least else '<='} {self.bar:g}  {'kept' if self.kept else 'MISSED'}"


@dataclass
class Machine:
    """Facts without which no figure tells anything. Memory in GB; `load` at the begin and at the end (minutes' averages)."""

    processor: str
    flags: list[str]
    cores: int
    threads: int
    clock: str
    memory: float
    versions: dict[str, str]
    allocator: str
    kernels: str
    dtype: str
    load: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        load = " to ".join(f"{value:.1f}" for value in self.load)
        return (
            f"{self.processor}, {self.cores} cores, {', '.join(self.flags) or 'neither AMX nor AVX512-BF16'}, {self.memory:.0f} GB; "
            f"{self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}, seconds of the {self.clock}, load {load}\n"
            f"{versions}; allocator: {self.allocator}; kernels: {self.kernels}"
        )


def machine(allocator: str, dtype: str) -> Machine:
    """This machine and process; `allocator` says how it was set, `dtype` what is computed in. torch's threads are as they are set now."""
    import torch

    from trimtab_runtime.xeon import kernels

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in facts.get("flags", "").split() if flag.startswith("amx") or flag in ("avx512_bf16", "avx512_fp16")]
    versions = {}
    for name in ("torch", "bitsandbytes", "transformers", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return Machine(
        processor=facts.get("model name", "unknown"),
        flags=flags,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        clock="processor" if torch.get_num_threads() == 1 else "clock",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        versions=versions,
        allocator=allocator,
        kernels=kernels.path().value,
        dtype=dtype,
        load=[round(os.getloadavg()[0], 2)],
    )


def alternate(variants: Mapping[str, Callable[[], object]], *, rounds: int, threads: int, warm_up: int = 1) -> Seconds:
    """Run the variants in turns and return what each took in each round. A variant that returns a float timed itself: it is that.

    The first `warm_up` rounds do not count: in them oneDNN makes kernels for new shapes, and memory is touched first.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: Seconds = {name: [] for name in variants}
    names = list(variants)
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            told = variants[name]()
            seconds = told if isinstance(told, float) else clock() - began
            if turn >= 0:
                taken[name].append(seconds)
    return taken


def ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Quartiles of one/other, round by round."""
    pairs = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(round(low, 4), round(middle, 4), round(high, 4))


def peak_bytes(call: Callable[[], object]) -> int:
    """How far a call lifts this process' resident memory at its highest above what there was before (proc_pid_clear_refs(5), Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be taken again and count as nothing
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    call()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}: this needs Linux")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *rest in (head, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def parser(doc: str | None, figures: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all have: --check, --json, --rounds, --dtype, --threads."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--check", action="store_true", help=f"end with 1 where a bar is missed: {figures}")
    made.add_argument("--json", action="store_true", help="print one JSON value instead of a table")
    made.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count  [default: {rounds}]")
    made.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as a run chooses, bf16 where it is not emulated"
    )
    made.add_argument("--threads", type=int, default=1, help="1 is timed in seconds of the processor, more by the clock  [default: 1]")
    return made


def dtype_of(asked: argparse.Namespace) -> str:
    """What to compute in: as asked for, else what a run on this processor chooses. Bars are those of bf16, whichever it is."""
    from trimtab_runtime.choices import cpu_flags, pick_dtype

    return pick_dtype(asked.dtype, cpu_flags()).value


def report(
    asked: argparse.Namespace, on: Machine, head: Sequence[str], rows: Sequence[Sequence[str]], figures: Sequence[Figure], found: object
) -> int:
    """Print the table and, last, each figure with its bar (on stderr beside JSON of all that was `found`); returns the exit status."""
    on.load.append(round(os.getloadavg()[0], 2))
    if asked.json:
        judged = [{**asdict(figure), "kept": figure.kept} for figure in figures]
        print(json.dumps({"machine": asdict(on), "found": found, "figures": judged}, indent=1))
    else:
        print(f"{on}\n{table(head, rows)}")
    for figure in figures:
        print(figure, file=sys.stderr if asked.json else sys.stdout)
    if asked.check and not figures:
        print("nothing was measured that has a bar", file=sys.stderr)
    return int(asked.check and not (figures and all(figure.kept for figure in figures)))
