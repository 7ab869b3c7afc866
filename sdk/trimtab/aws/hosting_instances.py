"""Which machine a model should be served on, what memory that takes, and how long its start may take. Pure.

The prices of instances.toml are those of training. Of real-time inference two were found, ml.g5.xlarge ($1.41) and ml.g5.2xlarge ($1.52,
us-east-1, 2025 and 2026), and they are the same; for the others that is an assumption, so a price is told as "about".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.aws.instances import CUDA_GIB, HEADROOM, SYSTEM_GIB, Instance, find, instances, listed
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts
from trimtab.spec import ServeSpec

CONTEXT = 4096  # tokens of a conversation, where neither the user nor the model says less
TALKS = 8  # conversations of that length that are kept at once
SERVER_GIB = 1.5  # the server itself, its libraries, what a step computes
READABLE = 8.0  # tokens a second that one reader needs: about 350 words a minute
DOWNLOAD = 100e6  # bytes a second from S3 to an instance's disk, stated
LOAD = 200e6  # bytes a second from its disk into memory, stated
COMPILE = 300.0  # seconds that an engine may take to be ready besides; vLLM was seen to compile for 160 s
SLACK = 2.0
SHORTEST, LONGEST = 600, 3600  # seconds; 3,600 is the most that the service takes


@dataclass(frozen=True)
class Demand:
    """What serving takes, in GiB: the weights, and keys and values of `TALKS` conversations of `context` tokens. None: not known.

    `facts` say on how many GPUs it can be split; where they are not known, on all of them.
    """

    weights: float
    cache: float | None
    context: int
    facts: ModelFacts | None = None

    def gpus(self, one: Instance) -> int:
        """How many of a type's GPUs a server uses, as ours does and as the others are told."""
        return self.facts.gpus_used(one.gpus) if self.facts and one.gpus else one.gpus

    @property
    def gib(self) -> float:
        return self.weights + (self.cache or 0.0) + SERVER_GIB

    @property
    def said(self) -> str:
        cache = (
            "its cache's size is not known"
            if self.cache is None
            else f"cache for {TALKS} talks of {self.context:,} tokens {self.cache:.1f}"
        )
        return f"{self.gib:.1f} GiB needed (weights {self.weights:.1f}, {cache}, server {SERVER_GIB:g})"


def demand(model_bytes: int, facts: ModelFacts | None, spec: ServeSpec, context: int | None = None) -> Demand:
    """What a model of so many bytes takes. `context` is the longest that it was made for."""
    tokens = min(spec.max_context or CONTEXT, context or CONTEXT)
    if spec.cache_gb is not None:
        cache: float | None = spec.cache_gb * 1e9 / 2**30
    elif facts is None:
        cache = None
    else:  # keys and values of each layer, two bytes each
        cache = TALKS * tokens * facts.layers * facts.kv_heads * facts.head_width * 4 / 2**30
    return Demand(model_bytes / 2**30, cache, tokens, facts)


@dataclass(frozen=True)
class Place:
    """The type to serve on and why. `about_usd` is one instance's price an hour."""

    instance: Instance
    reason: str

    @property
    def about_usd(self) -> float:
        return self.instance.usd_per_hour


def room_gib(one: Instance, need: Demand) -> float:
    """What a server may take of a type: of the machine's memory, or of the GPUs' together on which this model can be split."""
    if one.gpus:
        return need.gpus(one) * (one.gpu_memory_gib - CUDA_GIB) / HEADROOM
    return (one.memory_gib - SYSTEM_GIB) / HEADROOM


def tokens_per_second(one: Instance, need: Demand) -> float:
    """The most that one conversation gets by the stated rates: each token reads all weights once."""
    return one.bandwidth * max(need.gpus(one), 1) / max(need.weights * 2**30, 1)


def choose(device: str, need: Demand, *, ask: str | None = None, several_gpus: bool = False, region: str | None = None) -> Place:
    """The type asked for, checked, or the cheapest that holds the model and answers at a reader's pace.

    Types with several GPUs are taken only with `several_gpus`, where none with one holds the model. Raises SpecError for a type that
    cannot serve it, and for a model that no type holds.
    """
    gpu = device == "gpu"
    known = [one for one in instances(region).values() if (one.gpus > 0 if gpu else one.amx)]
    usable = [one for one in known if one.gpus <= 1 or several_gpus]
    fitting = sorted(
        (one for one in usable if room_gib(one, need) >= need.gib), key=lambda one: (one.gpus > 1, one.usd_per_hour, -one.vcpus)
    )
    date = f"about ${{:,.2f}}/h (the training price of {listed()[0]})"
    if ask is not None:
        one = find(ask, region)
        hint = f"the cheapest that does is {fitting[0].name}" if fitting else "no type of the table does"
        if gpu != bool(one.gpus):
            raise SpecError(f"{ask} has {'no GPU' if gpu else 'a GPU, which device xeon does not use'}: {hint}; or change --device")
        if room_gib(one, need) < need.gib:
            split = f" on the {need.gpus(one)} of {one.gpus} GPUs that it can be split on" if need.gpus(one) < one.gpus else ""
            raise SpecError(f"{ask} has too little memory: {need.said}, {room_gib(one, need):.1f} GiB of room there{split}; {hint}")
        return Place(one, f"instance {ask}, {date.format(one.usd_per_hour)}: asked for; {need.said}, {room_gib(one, need):.1f} there")
    if not fitting:
        largest = max(usable, key=lambda one: room_gib(one, need))
        raise SpecError(
            f"{need.said}; the largest type of the table is {largest.name} with {room_gib(largest, need):.1f} GiB of room: give a smaller "
            "max_context, serve another model, or name a type with  --backend-option instance_type=TYPE"
        )
    quick = [one for one in fitting if tokens_per_second(one, need) >= READABLE]
    best = quick[0] if quick else max(fitting, key=lambda one: tokens_per_second(one, need))
    rate = tokens_per_second(best, need)
    why = f"the cheapest of {len(fitting)} that hold it and answer at {READABLE:g} tokens/s" if quick else "the fastest that holds it"
    return Place(
        best,
        f"instance {best.name}, {date.format(best.usd_per_hour)}: {need.said}, {room_gib(best, need):.1f} there; {why} "
        f"(at most {rate:,.0f})",
    )


@dataclass(frozen=True)
class Patience:
    """Seconds that the download of a model and the start of its container may take, and why."""

    download: int
    health: int
    reason: str


def patience(model_bytes: int) -> Patience:
    """Sized to the model, within what the service takes (60 to 3,600 s), twice what is expected."""
    download = _within(SLACK * model_bytes / DOWNLOAD)
    health = _within(SLACK * (model_bytes / LOAD + COMPILE))
    reason = (
        f"download {download:,} s, start {health:,} s: {model_bytes / 1e9:,.1f} GB at {DOWNLOAD / 1e6:g} MB/s from S3, at "
        f"{LOAD / 1e6:g} MB/s from disk with {COMPILE:g} s for the engine, each twice over, {SHORTEST} s at least, {LONGEST:,} s at most"
    )
    return Patience(download, health, reason)


def _within(seconds: float) -> int:
    return math.ceil(min(max(seconds, SHORTEST), LONGEST))


def volume_gb(model_bytes: int) -> int:
    """GB of disk: the model twice and the image, in steps of 50, within the service's 512."""
    return min(512, 50 * math.ceil((2 * model_bytes / 1e9 + 30) / 50))
