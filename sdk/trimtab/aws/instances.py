"""Which machine SageMaker should train on, what it costs, and how money becomes minutes. Pure: facts from instances.toml, no network.

Whether a type is offered in a region is not known here; AWS says it when it is asked (`trimtab plan` shows the quota).
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from trimtab.errors import SpecError
from trimtab.plan import Price
from trimtab.spec import JobSpec

HEADROOM = 1.15  # an estimate of memory is that far from what is measured
SYSTEM_GIB = 1.5  # of a machine's memory: the system, SageMaker's agents, Docker
CUDA_GIB = 0.7  # of a GPU's memory: what CUDA itself takes
ESTIMATED = 0.15  # an estimated price may be that far from the listed one
SPOT_FROM = 0.3  # spot costs at least this share of the on-demand price; no rule holds it, AWS sets it by the hour
DEARER = 1.1  # a faster machine may make the whole job this much dearer than the cheapest
START_MINUTES = 6.0  # from the first billed second to the first step: image, channels, loading
SAVE_MINUTES = 4.0  # from the last step to the last billed second: checkpoint, artifact, upload
GRACE_MINUTES = 4.0  # from the hard stop to the last billed second: 120 s between SIGTERM and SIGKILL, then the upload
LONGEST_SECONDS = 2_419_200  # 28 days: what CreateTrainingJob takes for MaxRuntimeInSeconds
USUAL_SECONDS = 86_400  # 1 day: SageMaker's own default (StoppingCondition, API reference)


@dataclass(frozen=True)
class Instance:
    """A training instance type. Memory in GiB (`gpu_memory_gib` of one GPU), price in USD an hour for one instance on demand.

    `estimated` tells that the price was computed by a rule and not found in a list; `dearer` is how many times the price it may cost in
    a region of which no list was found. `usd` is the range that all that stands for.
    Stated, not measured: `flops` (operations a second) of a large matrix product, `bandwidth` (bytes a second) of memory, on one GPU where
    it has some, and `network` between two such machines.
    """

    name: str
    vcpus: int
    memory_gib: float
    usd_per_hour: float
    flops: float
    bandwidth: float
    network: float
    estimated: bool = False
    dearer: float = 1.0
    amx: bool = False
    gpus: int = 0
    gpu: str = ""
    gpu_memory_gib: float = 0.0

    @property
    def usd(self) -> tuple[float, float]:
        """The lowest and the highest price an hour that the table stands for."""
        slack = ESTIMATED if self.estimated else 0.0
        return self.usd_per_hour * (1 - slack), self.usd_per_hour * (1 + slack) * self.dearer

    @property
    def price(self) -> str:
        """`$0.97/h`; `about $72.79/h ($61.87 to $83.71)` when it is estimated, or not listed for the region."""
        if self.usd[0] == self.usd[1]:
            return f"${self.usd_per_hour:,.2f}/h"
        return f"about ${self.usd_per_hour:,.2f}/h (${self.usd[0]:,.2f} to ${self.usd[1]:,.2f})"

    @property
    def room_mb(self) -> int:
        """What a job's estimated memory (2^20 bytes) may be: of the machine's, or of one GPU's, less headroom."""
        gib = self.gpu_memory_gib - CUDA_GIB if self.gpus else self.memory_gib - SYSTEM_GIB
        return max(0, math.floor(gib * 1024 / HEADROOM))


@dataclass(frozen=True)
class Chosen:
    """The type to ask for and why, in a sentence that names it. `warning` is what a user should read twice, or empty."""

    instance: Instance
    reason: str
    warning: str = ""

    @property
    def name(self) -> str:
        return self.instance.name


@dataclass(frozen=True)
class Limits:
    """`max_runtime_seconds` is the hard stop for SageMaker; `max_minutes` what the run itself keeps to, so that it ends before with
    checkpoint and artifact (None: it is not limited); `max_usd` the most that this training job can then cost on demand; each with its
    reason."""

    max_runtime_seconds: int
    max_minutes: float | None
    max_usd: float
    reasons: tuple[str, ...]


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((files(__package__) / "instances.toml").read_text(encoding="utf-8"))


def listed() -> tuple[str, str]:
    """The date and the region of the table's prices."""
    return _table()["listed"], _table()["region"]


def elsewhere(region: str | None) -> float:
    """How many times the table's prices a region may cost: 1 for the table's own, and where no region is named."""
    return 1.0 if region in (None, _table()["region"]) else float(_table()["elsewhere"])


@cache
def instances(region: str | None = None) -> Mapping[str, Instance]:
    """The table, by name, with the prices of a region as far as they are known."""
    table = _table()
    stated, found = table["stated"], {}
    for name, row in table["types"].items():
        row = row | {"dearer": elsewhere(region)}
        if "gpu" in row:
            gpu, share = table["gpus"][row["gpu"]], stated["gpu"]
            flops, bandwidth = gpu["tflops"] * share["share_of_tflops"], gpu["gb_per_second"] * share["share_of_bandwidth"]
            row |= {"gpu_memory_gib": gpu["memory_gib"]}
        else:
            cores, memory = stated["amx" if row["amx"] else "avx512"], stated["memory"]
            flops, bandwidth = cores["tflops"] * row["vcpus"] ** cores["power"], memory["gb_per_second"] * row["vcpus"] ** memory["power"]
        rates = {"flops": flops * 1e12, "bandwidth": bandwidth * 1e9, "network": stated["network"]["gb_per_second"] * 1e9}
        found[name] = Instance(name, **row, **rates)
    return found


def find(name: str, region: str | None = None) -> Instance:
    """The type of that name. Raises SpecError with the nearest right one."""
    known = instances(region)
    if name in known:
        return known[name]
    for sure in (f"ml.{name}", name.lower().replace("_", "."), f"ml.{name.lower().removeprefix('ml')}"):
        if sure in known:
            raise SpecError(f"there is no instance type {name!r}: did you mean {sure}?")
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "there are, for example, ml.m7i.4xlarge (Xeon with AMX) and ml.g6e.xlarge (one GPU)"
    raise SpecError(f"trimtab's table of training instances has no {name!r}: {hint}")


def instead_of(name: str) -> Instance | None:
    """The cheapest other type that runs what the named one runs: the same device, no less memory, and no slower where there is one.

    None where the table has no such type. A Xeon without AMX is replaced by one with it.
    """
    if name not in instances():
        return None
    one = find(name)
    like = [two for two in instances().values() if (two.gpus if one.gpus else two.amx) and two.name != name and two.room_mb >= one.room_mb]
    no_slower = [two for two in like if two.flops >= one.flops]
    return min(no_slower or like, key=lambda two: (two.usd_per_hour, -two.vcpus), default=None)


def choose(
    spec: JobSpec,
    memory_mb: int | None,
    *,
    ask: str | None = None,
    seconds: Callable[[Instance], float] | None = None,
    region: str | None = None,
) -> Chosen:
    """The instance type for a job: the one asked for, checked, or one that holds it and makes it cheap.

    `memory_mb` (2^20 bytes) is what training takes on one machine, of a GPU's memory when the device is gpu; None: not known.
    `seconds` says how long the job's steps would take on a type; with it the choice is the fastest whose whole job costs at most a
    tenth more than the cheapest's, without it the lowest price a step by the stated rates. A run uses one GPU, so types with several
    are only taken by name.

    Raises SpecError for a type that cannot run the job, with the smallest that can.
    """
    gpu = spec.device == "gpu"
    fitting = sorted(
        (one for one in instances(region).values() if (one.gpus == 1 if gpu else one.amx) and one.room_mb >= (memory_mb or 0)),
        key=lambda one: (one.usd_per_hour, -one.vcpus),
    )
    if ask is not None:
        return _check(find(ask, region), gpu, memory_mb, fitting)
    if memory_mb is None:
        unknown = find("ml.g6e.2xlarge" if gpu else "ml.m7i.4xlarge", region)
        why = "its model does not name its sizes, so a middle one; name another with  --backend-option instance_type=TYPE"
        return Chosen(unknown, f"instance {unknown.name}, {unknown.price}: {_holds(unknown)}; {why}")
    if not fitting:
        raise SpecError(_too_much(memory_mb, gpu))
    if seconds is None:
        best = min(fitting, key=lambda one: one.usd_per_hour / one.flops)
        why = f"the lowest price a step of {len(fitting)} that fit"
    else:
        whole = {one.name: one.usd_per_hour * (seconds(one) / 3600 + (START_MINUTES + SAVE_MINUTES) / 60) for one in fitting}
        best = min(
            (one for one in fitting if whole[one.name] <= DEARER * min(whole.values())), key=lambda one: (seconds(one), whole[one.name])
        )
        why = f"the cheapest whole job of {len(fitting)} that fit"
        if whole[best.name] > min(whole.values()):
            why = f"the fastest whose whole job costs at most {DEARER - 1:.0%} more than the cheapest of {len(fitting)} that fit"
    return Chosen(best, f"instance {best.name}, {best.price}: {_gb(memory_mb)} needed, {_holds(best)}; {why}")


def cost(seconds: float, instance: Instance, count: int = 1, *, spot: bool = False) -> Price:
    """What so many billed seconds on each of `count` instances cost in USD. Spot: from three tenths of the price to all of it.

    SageMaker bills an instance by the second (BillableTimeInSeconds times the number of instances); storage and traffic, which are
    cents, are not counted.
    """
    low, high = (rate * count * seconds / 3600 for rate in instance.usd)
    return Price(low * SPOT_FROM if spot else low, high)


def minutes_for(usd: float, instance: Instance, count: int = 1) -> float:
    """The minutes that `count` instances run on demand for so much money, by the highest price that the table stands for."""
    return usd / (instance.usd[1] * count) * 60


def spent_usd(described: Iterable[Mapping[str, Any]], region: str | None = None) -> float:
    """What training jobs cost at most so far, by DescribeTrainingJob's answers: their billed seconds, and those of their warm pools.

    A pool that still waits counts as if nobody used it until its end. Raises SpecError for a type that the table does not hold.
    """
    total = 0.0
    for job in described:
        resources, pool = job["ResourceConfig"], job.get("WarmPoolStatus", {})
        waits = resources.get("KeepAlivePeriodInSeconds", 0) if pool.get("Status") == "Available" else 0
        billed = job.get("BillableTimeInSeconds", job.get("TrainingTimeInSeconds", 0))
        billed += max(waits, pool.get("ResourceRetainedBillableTimeInSeconds", 0))
        total += cost(billed, find(resources["InstanceType"], region), resources["InstanceCount"]).high
    return total


def limits(
    max_usd: float | None,
    max_minutes: float | None,
    instance: Instance,
    nodes: int = 1,
    *,
    keep_alive_seconds: int = 0,
    model_mb: int = 0,
    pass_seconds: float = 0.0,
    spent_usd: float = 0.0,
) -> Limits:
    """When the job has to end: by the user's time and money, so that it is saved before and never costs more.

    Of the billed time that `max_usd` buys on demand, the end is kept free: the hard stop comes so early that the two minutes which
    SageMaker then gives and the upload are paid for, and the run itself stops earlier by what starting, saving and a pass that has just
    begun take. `model_mb` (2^20 bytes), the base model's files, lengthens the start by their download at 100 MB/s; `pass_seconds` is what
    a pass over `batch_rows` rows takes; `keep_alive_seconds`, a warm pool after the job, is paid from the same money, and so is
    `spent_usd`: what the run's earlier training jobs cost.

    Raises SpecError when the money buys less than starting and saving.
    """
    around = START_MINUTES + model_mb / 100 / 60 + SAVE_MINUTES + pass_seconds / 60
    machines = f"{instance.name if nodes == 1 else f'{nodes} x {instance.name}'} at {instance.price}"
    own, hard, reasons = max_minutes, USUAL_SECONDS / 60, []
    if own is not None:
        hard = own + around
        reasons.append(f"time {own:,.5g} min: max_minutes; the hard stop {around:,.1f} min later, which starting and saving may take")
    if max_usd is not None:
        money = f"${max_usd:,.2f}" + (f" less ${spent_usd:,.2f} that the run has cost" if spent_usd else "")
        bought = minutes_for(max_usd - spent_usd, instance, nodes) - keep_alive_seconds / 60
        kept = " after its warm pool" if keep_alive_seconds else ""
        if bought <= around + GRACE_MINUTES:
            least = spent_usd + (around + GRACE_MINUTES + 1 + keep_alive_seconds / 60) / minutes_for(1, instance, nodes)
            raise SpecError(
                f"{money} buys {max(0.0, bought):,.1f} minutes of {machines}{kept}; to start, to save and to end alone may take "
                f"{around + GRACE_MINUTES:,.1f}: raise max_usd to {math.ceil(least * 100) / 100:.2f} at least, or name a cheaper instance"
            )
        if bought - GRACE_MINUTES < hard:
            hard = bought - GRACE_MINUTES
            own = hard - around
            reasons.append(
                f"money {money}: {bought:,.1f} min of {machines} on demand{kept}; the run ends itself after {own:,.1f} min with "
                f"checkpoint and artifact, the hard stop comes at {hard:,.1f} min"
            )
        else:
            reasons.append(f"money {money}: more than the time limit lets {machines} cost")
    if hard * 60 > LONGEST_SECONDS:
        hard = LONGEST_SECONDS / 60
        own = hard - around
        reasons.append("time at most 28 days: SageMaker runs no job longer")
    elif own is None:
        day = USUAL_SECONDS / 86400
        reasons.append(
            f"time at most {day:g} day, SageMaker's own default, then it is stopped with a checkpoint: for longer set max_minutes, such as "
            f"--max-minutes {2 * USUAL_SECONDS // 60}"
        )
    most = cost(hard * 60 + GRACE_MINUTES * 60 + keep_alive_seconds, instance, nodes).high
    return Limits(math.floor(hard * 60), own, most, tuple(reasons))


def _check(asked: Instance, gpu: bool, memory_mb: int | None, fitting: list[Instance]) -> Chosen:
    smallest = f"the smallest that does is {fitting[0].name}" if fitting else "no type of the table does: lower max_seq_len or batch_rows"
    if gpu and not asked.gpus:
        raise SpecError(f"{asked.name} has no GPU: give an instance that has one ({smallest}), or set device to xeon (--device xeon)")
    if not gpu and asked.gpus:
        raise SpecError(
            f"{asked.name} is paid for its GPU, which device xeon does not use: set device to gpu (--device gpu), or give a type without"
        )
    if memory_mb is not None and asked.room_mb < memory_mb:
        raise SpecError(
            f"{asked.name} has too little memory: {_gb(memory_mb)} needed with {HEADROOM - 1:.0%} headroom, {_holds(asked)}; {smallest}"
            if fitting
            else _too_much(memory_mb, gpu)
        )
    said = f"instance {asked.name}, {asked.price}: asked for"
    said += f"; {_gb(memory_mb)} needed, {_holds(asked)}" if memory_mb is not None else f"; {_holds(asked)}"
    warning = ""
    if gpu and asked.gpus > 1:
        warning = f"{asked.name} has {asked.gpus} GPUs and the run uses one: {asked.gpus - 1} are paid for and idle"
    elif not gpu and not asked.amx:
        like = next((one.name for one in fitting if one.vcpus == asked.vcpus), "a type of m7i, c7i or r7i")
        warning = f"{asked.name} has NO AMX: a step takes several times as long as on {like}"
    return Chosen(asked, said + (f"; {warning}" if warning else ""), warning)


def _too_much(memory_mb: int, gpu: bool) -> str:
    candidates = [one for one in instances().values() if (one.gpus if gpu else one.amx)]
    largest = max((one for one in candidates if not gpu or one.gpus == 1), key=lambda one: one.room_mb)
    said = f"{_gb(memory_mb)} needed on one machine; the largest that is chosen by itself is {largest.name}, {_holds(largest)}"
    named = [one for one in candidates if one.gpus > 1 and one.room_mb >= memory_mb]
    if named:
        by_name = min(named, key=lambda one: one.usd_per_hour)
        said += f"; {by_name.name} would do, with {by_name.gpus} GPUs of which one is used: name it to take it, {by_name.price}"
    return f"{said}: lower max_seq_len or batch_rows, or take method qlora"


def _holds(one: Instance) -> str:
    if one.gpus:
        return f"{one.gpu_memory_gib:g} GiB on its {one.gpu}" if one.gpus == 1 else f"{one.gpu_memory_gib:g} GiB on each {one.gpu}"
    return f"{one.memory_gib:g} GiB there, {'AMX' if one.amx else 'no AMX'}"


def _gb(megabytes: int) -> str:
    return f"{megabytes / 1024:,.1f} GiB"
