"""Where a run computes on this machine: facts in, ranks, processors, threads and memory of each out, every choice with its reason. Pure.

Nothing here looks at the machine or changes it: topology.py looks, binding.py changes. README.md says what was measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

from trimtab.counting import counted
from trimtab_runtime.choices import Choice
from trimtab_runtime.xeon.topology import Node, Processor, Topology, as_list

X86 = ("x86_64", "AMD64", "amd64")
THREADS, WAITING, CAPABILITY = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ONEDNN_MAX_CPU_ISA"
PINNING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES")  # by which a user may have said where threads run

_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # the last is what Arm calls it
_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # values of ONEDNN_MAX_CPU_ISA
_FAST_MEMORY = "CPU Max"  # in the model's name: Xeon Max, which has HBM


@dataclass(frozen=True)
class Memory:
    """Which nodes memory comes from: the first of all nodes (`prefer`), or page by page from each in turn (`interleave`).

    Both go on with other nodes when these are full (set_mempolicy(2)).
    """

    policy: Literal["prefer", "interleave"]
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """What one rank has. `processors`: what it is bound to; none: not bound. `threads` None: what the user or the library says."""

    threads: int | None
    processors: tuple[int, ...] = ()
    memory: Memory | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A share for each rank; the choices that led there, by name; and what the user must hear of."""

    shares: tuple[Share, ...]
    choices: tuple[tuple[str, Choice], ...]
    warnings: tuple[str, ...] = ()


def place(facts: Topology, environ: Mapping[str, str], *, ranks: int | Literal["auto"] = 1, dtype: str = "auto") -> Plan:
    """`ranks` and `dtype` are the spec's, `environ` what the user set, which is respected."""
    cores = [[min(group, key=lambda one: one.number) for group in _by_core(cluster)] for cluster in facts.clusters]
    count, chosen = _ranks(facts, environ, cores, ranks)
    warnings = _bf16(facts, environ, dtype) + _unreadable(environ)
    choices = [("ranks", chosen)] if count > 1 or len(cores) > 1 or ranks != 1 else []
    if left := _left_alone(facts):
        each = max(1, len(facts.usable) // count)
        environment = {THREADS: str(each)} if count > 1 and _said(environ) is None else {}
        said = f"{left}; each of {count} ranks has {each} threads" if environment else left
        return Plan(
            (Share(None, environment=environment),) * count, (*choices, ("placement", Choice("left as it is", said))), tuple(warnings)
        )

    parts = _parts(cores, count)
    threads, why = _threads(facts, environ, parts)
    choices.append(("threads", why))
    needed, there = sum(threads), len(facts.usable)
    if needed > there:
        warnings.append(f"{counted(needed, 'thread')} on {counted(there, 'processor')}: they wait for each other. {_fewer(threads)}")
    elif facts.quota is not None and facts.quota < needed and (_said(environ) or facts.quota < count):
        warnings.append(
            f"{counted(needed, 'thread')}, and the control group gives {facts.quota:g} processors' worth of time: all stand still together "
            f"when it is used up. {_fewer(threads, 'raise the limit')}"
        )

    bound, bound_why = _binding(facts, environ, parts, threads)
    choices.append(("binding", bound_why))
    memory = [_memory(facts, part) for part in parts]
    if len(facts.nodes) > 1 or any(node.cache_mb for node in facts.nodes):
        choices.append(("memory_nodes", _memory_choice(facts, parts, memory)))
        warnings += [
            warning for number, part in enumerate(parts) if (warning := _remote(facts, part, f"rank {number}: " if count > 1 else ""))
        ]
    waiting, waiting_why = _waiting(facts, environ, needed, there)
    choices += [("waiting_threads", waiting_why), ("instructions", _capability(environ))]
    shares = []
    for number in range(count):
        environment = dict(waiting)
        if _said(environ) is None:
            environment[THREADS] = str(threads[number])
        policy = memory[number] if facts.policy in ("", "default") else None
        shares.append(Share(threads[number], bound[number], policy, environment))
    return Plan(tuple(shares), tuple(choices), tuple(warnings))


def lines(plan: Plan) -> list[str]:
    """What each of several ranks has, in words."""
    found = []
    for number, share in enumerate(plan.shares if len(plan.shares) > 1 else ()):
        where = f"processors {as_list(share.processors)}" if share.processors else "not bound"
        memory = f", memory {share.memory.policy} {as_list(share.memory.nodes)}" if share.memory else ""
        found.append(f"rank {number}: {counted(share.threads, 'thread') if share.threads else 'threads by the library'}, {where}{memory}")
    return found


def _by_core(processors: Sequence[Processor]) -> list[list[Processor]]:
    """Processors that are hyperthreads of one core together, cores in order."""
    cores: dict[tuple[int, int], list[Processor]] = {}
    for one in processors:
        cores.setdefault((one.socket, one.core), []).append(one)
    return list(cores.values())


def _left_alone(facts: Topology) -> str:
    """Why nothing is set on this machine; empty where it is."""
    if facts.system != "Linux":
        return f"threads and memory are {facts.system}'s own business"
    if facts.machine not in X86:
        return f"a machine of type {facts.machine}: torch's own choice of threads, nothing was measured there"
    return ""


def _ranks(
    facts: Topology, environ: Mapping[str, str], cores: Sequence[Sequence[Processor]], asked: int | Literal["auto"]
) -> tuple[int, Choice]:
    clusters = len(cores)
    here = f"{counted(clusters, 'cluster')} of cores with memory of {'its' if clusters == 1 else 'their'} own"
    if asked == "auto":
        within = clusters if facts.quota is None else max(1, min(clusters, int(facts.quota)))
        why = f"one for each of {here}" if clusters > 1 else f"this job may use {here}"
        if within < clusters:
            why = f"{here}, and the control group gives {facts.quota:g} processors' worth of time"
        return within, Choice(str(within), why)
    said = "asked for" if asked > 1 else "the default"
    if clusters > 1 and asked == 1:
        said += (
            f"; this job may use {here}: --ranks {clusters} would bind a rank to each and keep its memory near, and a step would then take "
            f"{clusters} times as many rows, so there would be fewer steps"
        )
    elif asked > 1:
        said += f"; this job may use {here}" + _uneven(facts, environ, cores, asked)
    return asked, Choice(str(asked), said)


def _uneven(facts: Topology, environ: Mapping[str, str], cores: Sequence[Sequence[Processor]], asked: int) -> str:
    """What to say where ranks get different numbers of threads, and which number of ranks would not; empty where they get the same."""

    def threads(ranks: int) -> set[int]:
        return set(_threads(facts, environ, _parts(cores, ranks))[0])

    found = threads(asked)
    if len(found) == 1 or _left_alone(facts):
        return ""
    even = next((ranks for ranks in (len(cores), *range(asked - 1, 1, -1)) if ranks > 1 and len(threads(ranks)) == 1), None)
    said = f"; {counted(sum(map(len, cores)), 'core')} are not shared out evenly, ranks have {min(found)} to {max(found)} threads"
    return f"{said}, and each step waits for the smallest share" + (f": --ranks {even} would be even" if even else "")


def _parts(cores: Sequence[Sequence[Processor]], count: int) -> list[list[Processor]]:
    """The cores of each rank: neighbouring clusters together, or a cluster shared out; where there are too few, a core has several.

    In proportion to the clusters' cores, of which a cpuset may leave few in one.
    """
    sizes = [len(cluster) for cluster in cores]
    if count <= len(cores):
        before = [0, *accumulate(sizes)]  # cores before each cluster
        ends = [0]
        for number in range(1, count):
            low, high = ends[-1] + 1, len(cores) - (count - number)  # every rank has a cluster
            ends.append(min(max(low, bisect_right(before, before[-1] * number // count) - 1), high))
        return [[one for cluster in cores[low:high] for one in cluster] for low, high in pairwise([*ends, len(cores)])]
    ranks = [1] * len(cores)
    for _ in range(count - len(cores)):  # the next one where there are most cores for each
        ranks[max(range(len(cores)), key=lambda at: sizes[at] / ranks[at])] += 1
    parts: list[list[Processor]] = []
    for cluster, here in zip(cores, ranks, strict=True):
        ends = [part * len(cluster) // here for part in range(here + 1)]
        parts += [list(cluster[low : max(high, low + 1)]) for low, high in pairwise(ends)]
    return parts


def _said(environ: Mapping[str, str]) -> int | None:
    """How many threads the user set; None: nothing that OpenMP would take."""
    said = environ.get(THREADS, "").partition(",")[0].strip()
    return int(said) if said.isdigit() and int(said) else None


def _unreadable(environ: Mapping[str, str]) -> list[str]:
    """A warning for a number of threads that is none."""
    if not environ.get(THREADS) or _said(environ) is not None:
        return []
    return [
        f"{THREADS} is {environ[THREADS]!r}, which is no number of threads, so it does not count. Set it to a whole number, or unset it"
    ]


def _threads(facts: Topology, environ: Mapping[str, str], parts: Sequence[Sequence[Processor]]) -> tuple[list[int], Choice]:
    """How many of each rank."""
    if said := _said(environ):
        return [said] * len(parts), Choice(str(said), f"{THREADS} is set{' for each rank' if len(parts) > 1 else ''}")
    found = [len(part) for part in parts]
    cores = sum(found)
    why = f"one for each of {counted(cores, 'core')}"
    if facts.told_by != "sysfs":
        why += " (no sysfs: hyperthreads may be among them)" if len(facts.usable) == cores else ""
    if len(facts.usable) > cores:
        why += f", not for each of {len(facts.usable)} hyperthreads, which share a core's multipliers"
    if len(facts.allowed) < len(facts.processors):
        why += f" that this job may use (processors {as_list(facts.allowed)} of {len(facts.processors)})"
    if facts.quota is not None and facts.quota < cores:
        each = max(1, int(facts.quota / len(parts)))
        found = [min(one, each) for one in found]
        of = counted(cores, "core")
        why = f"the control group gives {facts.quota:g} processors' worth of time, of {of}: more threads would wait for it"
    value = str(found[0]) if len(set(found)) == 1 else as_list(set(found))
    return found, Choice(value, why + (", shared out to the ranks" if len(parts) > 1 else ""))


def _binding(
    facts: Topology, environ: Mapping[str, str], parts: Sequence[Sequence[Processor]], threads: Sequence[int]
) -> tuple[list[tuple[int, ...]], Choice]:
    """The processors that each rank is bound to, none where it is not; within a rank threads are not pinned one by one.

    The first hyperthread of each core, and all of a rank's cores where it has more threads than cores.
    """
    free: list[tuple[int, ...]] = [()] * len(parts)
    if found := [name for name in PINNING if environ.get(name)]:
        return free, Choice("left as it is", f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set")
    bound = [_first_or_all(facts, part, wanted) for part, wanted in zip(parts, threads, strict=True)]
    doubled = "; there are more threads than cores, so hyperthreads of a core have one each" if _doubled(parts, bound) else ""
    if len(parts) > 1:
        taken = [one.number for part in parts for one in part]
        if len(taken) != len(set(taken)):
            return free, Choice("none", f"{counted(len(parts), 'rank')} and {counted(len(set(taken)), 'core')}")
        tight = next((number for number, here in enumerate(bound) if threads[number] > len(here)), None)
        if tight is not None and sum(threads) <= len(facts.usable):
            said = f"rank {tight} would have {counted(threads[tight], 'thread')} on {counted(len(bound[tight]), 'processor')}"
            return free, Choice("none", f"{said}, and there are enough for all")
        return bound, Choice("each rank to its cores", f"then its memory stays near, and no rank takes another's cores{doubled}")
    (part,), (here,) = parts, bound
    if len(here) == len(facts.usable):
        said = "there is nothing to choose among: a thread for each processor" if threads[0] == len(here) else "all of them are used"
        return free, Choice("none", said + doubled)
    if facts.quota is not None and facts.quota < len(part):
        return free, Choice("none", "with a share of time others compute on the same processors, and the kernel finds those that are free")
    return bound, Choice(f"processors {as_list(here)}", "the first hyperthread of each core, so that no two threads share one")


def _first_or_all(facts: Topology, part: Sequence[Processor], threads: int) -> tuple[int, ...]:
    """The processors of these cores for so many threads."""
    if threads <= len(part):
        return tuple(sorted(one.number for one in part))
    cores = {(one.socket, one.core) for one in part}
    return tuple(one.number for one in sorted(facts.usable, key=lambda one: one.number) if (one.socket, one.core) in cores)


def _doubled(parts: Sequence[Sequence[Processor]], bound: Sequence[tuple[int, ...]]) -> bool:
    return any(len(here) > len(part) for part, here in zip(parts, bound, strict=True))


def _homes(facts: Topology, part: Sequence[Processor]) -> list[int]:
    """The nodes that a rank's processors are on."""
    return sorted({one.node for one in part})


def _fast(facts: Topology) -> dict[int, int]:
    """Nodes of faster memory and without processors (HBM in flat mode), and the node of processors that each is nearest to."""
    inhabited = {one.node for one in facts.processors}
    found = {}
    for node in facts.nodes:
        near = min(
            (other for other in facts.nodes if other.number in inhabited), key=lambda other: node.distance(other.number), default=None
        )
        if node.number in inhabited or not node.memory_mb or near is None:
            continue
        known = node.bandwidth is not None and near.bandwidth is not None
        if node.bandwidth > near.bandwidth if known else _FAST_MEMORY in facts.model:  # type: ignore[operator]
            found[node.number] = near.number
    return found


def _memory(facts: Topology, part: Sequence[Processor]) -> Memory | None:
    """Where the memory of a rank on these processors comes from; None: as the kernel does it."""
    homes = _homes(facts, part)
    fast = [node for node, near in _fast(facts).items() if near in homes and node in facts.memory_allowed]
    if fast:
        return Memory("prefer" if len(fast) == 1 else "interleave", tuple(fast))
    if len(facts.memory_allowed) < 2:
        return None
    near = [number for number in homes if _has_memory(facts, number)]
    if not near:
        nearest = _nearest(facts, homes)
        return Memory("prefer", (nearest.number,)) if nearest else None
    return Memory("prefer" if len(near) == 1 else "interleave", tuple(near))


def _has_memory(facts: Topology, number: int) -> bool:
    node = facts.node(number)
    return node is not None and number in facts.memory_allowed and node.memory_mb > 0


def _nearest(facts: Topology, homes: Sequence[int]) -> Node | None:
    there = [node for node in facts.nodes if _has_memory(facts, node.number)]
    return min(there, key=lambda node: min(node.distance(home) for home in homes), default=None)


def _remote(facts: Topology, part: Sequence[Processor], who: str) -> str:
    """A warning for a rank with processors whose own node gives it no memory."""
    without = [number for number in _homes(facts, part) if not _has_memory(facts, number)]
    nearest = _nearest(facts, without) if without else None
    if nearest is None or any(near in without and node in facts.memory_allowed for node, near in _fast(facts).items()):
        return ""
    return (
        f"{who}processors of node {as_list(without)} get their memory from node {nearest.number}, which is further away and slower: allow "
        f"this job memory of node {as_list(without)} (cpuset.mems), or processors of node {nearest.number}"
    )


def _memory_choice(facts: Topology, parts: Sequence[Sequence[Processor]], memory: Sequence[Memory | None]) -> Choice:
    if facts.policy not in ("", "default"):
        return Choice("left as it is", f"this process was started with the memory policy {facts.policy}")
    cached = sum(node.cache_mb for node in facts.nodes)
    beside = f"; {cached:,} MB of faster memory cache them (HBM in cache mode)" if cached else ""
    if not any(memory):
        return Choice(
            "as the kernel does it",
            f"there is one node of memory to choose{beside}" if len(facts.memory_allowed) == 1 else f"no choice{beside}",
        )
    fast = _fast(facts)
    used = [found for found in memory if found is not None]
    value = "; ".join(sorted({f"{found.policy} {as_list(found.nodes)}" for found in used}))
    if any(node in fast for found in used for node in found.nodes):
        return Choice(value, "HBM, which is a node of its own here (flat mode), and other memory when it is full")
    aside = [node.number for node in facts.nodes if node.number not in fast and node.number not in {one.node for one in facts.processors}]
    beside += f"; node {as_list(aside)} has no processors and is not known to be faster, so it is taken last" if aside else ""
    if all(found.policy == "prefer" for found in used):
        return Choice(value, f"the node of the {'rank' if len(parts) > 1 else 'run'}'s own cores, and others when it is full{beside}")
    return Choice(value, f"cores of all these nodes read the same weights, so pages are spread over them{beside}")


def _waiting(facts: Topology, environ: Mapping[str, str], threads: int, there: int) -> tuple[dict[str, str], Choice]:
    """What threads do while they have nothing to do."""
    if environ.get(WAITING):
        return {}, Choice(environ[WAITING].lower(), f"{WAITING} is set")
    if facts.quota is not None and facts.quota < there:
        return {WAITING: "passive"}, Choice("sleep", "a thread that spins would use up the control group's share of time")
    if threads > there:
        return {WAITING: "passive"}, Choice("sleep", "there are more threads than processors")
    return {}, Choice("spin a moment", "the processors are this job's; OpenMP's own choice")


def _capability(environ: Mapping[str, str]) -> Choice:
    if environ.get(CAPABILITY):
        return Choice(f"up to {environ[CAPABILITY]}", f"{CAPABILITY} is set")
    return Choice("the newest there are", f"oneDNN finds them by itself; {CAPABILITY} could only take some away")


def _bf16(facts: Topology, environ: Mapping[str, str], dtype: str) -> list[str]:
    """A warning where bf16 was asked for and would be emulated."""
    if dtype != "bfloat16":
        return []
    limit = environ.get(CAPABILITY, "").upper()
    if limit in _WITHOUT_BF16:
        return [f"bfloat16 will be EMULATED, many times slower: {CAPABILITY}={limit} leaves out the instructions for it. Unset it"]
    if facts.flags and not any(flag in facts.flags for flag in _BF16):
        return [
            f"bfloat16 will be EMULATED, slower than float32: {facts.model or 'this processor'} has neither amx_bf16 nor avx512_bf16. "
            "Take --dtype auto or float32, or a machine that has them"
        ]
    return []


def _fewer(threads: Sequence[int], *more: str) -> str:
    """What to do about too many threads, as a sentence."""
    ways = ([f"set {THREADS} lower"] if max(threads) > 1 else []) + (["take fewer --ranks"] if len(threads) > 1 else []) + list(more)
    said = ", or ".join(ways)
    return said[:1].upper() + said[1:]
