"""What this machine is: processors, cores, memory nodes, limits. Read once from Linux's files, before torch loads.

Sources: the kernel's Documentation/ABI/stable/sysfs-devices-system-cpu and -node, admin-guide/cgroup-v2.rst, cgroup-v1, proc(5).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # bytes; cgroup version 1 says "no limit" by a number like this


@dataclass(frozen=True)
class Processor:
    """A logical processor. `core` is the lowest number among the processors of its core: hyperthreads of one core share it."""

    number: int
    core: int
    socket: int = 0
    node: int = 0


@dataclass(frozen=True)
class Node:
    """A memory node. `distances`: (node, distance) pairs, 10 is its own memory. `cache_mb`: memory that caches it, such as HBM.

    `bandwidth` is what the firmware's table says of reading from its nearest processors, in MB/s; None: it says nothing.
    """

    number: int
    memory_mb: int
    distances: tuple[tuple[int, int], ...] = ()
    cache_mb: int = 0
    bandwidth: int | None = None

    def distance(self, other: int) -> int:
        return dict(self.distances).get(other, 10 if other == self.number else 255)


@dataclass(frozen=True)
class Topology:
    """`processors` are those that are online, `allowed` the numbers of those that this process may run on (its cpuset and affinity).

    `memory_allowed` are the nodes that it may have memory of; `quota` is how many processors' worth of time its control groups give it,
    `memory_limit_mb` (2^20 bytes) how much memory; None: no limit. `policy` is the memory policy that it was started with. `told_by` is
    where the processors stand: sysfs, cpuinfo (no nodes are known then), or nothing but their count.
    """

    system: str
    machine: str
    model: str
    flags: frozenset[str]
    processors: tuple[Processor, ...]
    allowed: frozenset[int]
    nodes: tuple[Node, ...]
    memory_allowed: frozenset[int]
    quota: float | None
    memory_limit_mb: int | None
    policy: str
    told_by: str

    @property
    def usable(self) -> tuple[Processor, ...]:
        return tuple(one for one in self.processors if one.number in self.allowed)

    @property
    def clusters(self) -> tuple[tuple[Processor, ...], ...]:
        """The usable processors by memory node: sockets, or sub-NUMA clusters where the firmware makes several of one.

        By socket where no node is known. Where one is, sockets say nothing: a virtual machine may show each processor as one.
        """
        places = sorted({one.node if self.nodes else one.socket for one in self.usable})
        return tuple(tuple(one for one in self.usable if (one.node if self.nodes else one.socket) == place) for place in places)

    def node(self, number: int) -> Node | None:
        return next((node for node in self.nodes if node.number == number), None)


def read(
    root: Path = Path("/"), *, count: int | None = None, system: str = platform.system(), machine: str = platform.machine()
) -> Topology:
    """The facts below `root`, where the file system of the machine lies. `count`: processors, where no file tells (default: this one's)."""
    status = _fields(_text(root / "proc/self/status"))
    blocks = [_fields(block) for block in _text(root / "proc/cpuinfo").strip().split("\n\n")]
    first = next((block for block in blocks if "processor" in block), {})
    online, told_by = _online(root, blocks, count)
    processors = tuple(_processor(root, number, blocks) for number in online)
    allowed = frozenset(numbers(status.get("Cpus_allowed_list", ""))) & frozenset(online)
    nodes = tuple(_nodes(root))
    memory_allowed = frozenset(numbers(status.get("Mems_allowed_list", ""))) & {node.number for node in nodes}
    quota, limit = _limits(root / "sys/fs/cgroup", _text(root / "proc/self/cgroup"))
    return Topology(
        system=system,
        machine=machine,
        model=first.get("model name", ""),
        flags=frozenset(first.get("flags", first.get("Features", "")).split()),
        processors=processors,
        allowed=allowed or frozenset(online),
        nodes=nodes,
        memory_allowed=memory_allowed or frozenset(node.number for node in nodes),
        quota=quota,
        memory_limit_mb=limit,
        policy=(_text(root / "proc/self/numa_maps").split() or ["", ""])[1],
        told_by=told_by,
    )


def numbers(text: str) -> list[int]:
    """A list such as "0-3,8" as Linux writes it; an unreadable part has none."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low.isdigit() and (high or low).isdigit():
            found += range(int(low), int(high or low) + 1)
    return found


def as_list(found: Iterable[int]) -> str:
    """Numbers as Linux lists them: "0-3,8"."""
    ends: list[list[int]] = []
    for number in sorted(found):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ends)


def _online(root: Path, blocks: list[dict[str, str]], count: int | None) -> tuple[list[int], str]:
    if found := numbers(_text(root / "sys/devices/system/cpu/online")):
        return found, "sysfs"
    if listed := [int(block["processor"]) for block in blocks if block.get("processor", "").isdigit()]:
        return listed, "cpuinfo"
    return list(range(count or os.cpu_count() or 1)), "count"


def _processor(root: Path, number: int, blocks: list[dict[str, str]]) -> Processor:
    folder = root / f"sys/devices/system/cpu/cpu{number}"
    siblings = numbers(_text(folder / "topology/core_cpus_list") or _text(folder / "topology/thread_siblings_list"))
    socket = _text(folder / "topology/physical_package_id").strip()  # -1 where the firmware does not tell
    node = next((int(path.name.removeprefix("node")) for path in folder.glob("node[0-9]*")), 0)
    if not siblings:  # no sysfs: /proc/cpuinfo may name core and socket
        here = next((block for block in blocks if block.get("processor") == str(number)), {})
        key = (here.get("physical id"), here.get("core id"))
        siblings = [
            int(block["processor"]) for block in blocks if None not in key and (block.get("physical id"), block.get("core id")) == key
        ]
        socket = here.get("physical id", "")
    return Processor(number, min(siblings, default=number), int(socket) if socket.isdigit() else 0, node)


def _nodes(root: Path) -> Iterator[Node]:
    folder = root / "sys/devices/system/node"
    online = numbers(_text(folder / "online")) or sorted(int(path.name.removeprefix("node")) for path in folder.glob("node[0-9]*"))
    for number in online:
        here = folder / f"node{number}"
        memory = next((line.split()[3] for line in _text(here / "meminfo").splitlines() if "MemTotal:" in line), "0")
        away = [int(word) for word in _text(here / "distance").split() if word.isdigit()]
        cache = _text(here / "memory_side_cache/index1/size").strip()
        bandwidth = _text(here / "access0/initiators/read_bandwidth").strip()
        yield Node(
            number=number,
            memory_mb=int(memory) >> 10,
            distances=tuple(zip(online, away, strict=False)),
            cache_mb=int(cache) >> 20 if cache.isdigit() else 0,
            bandwidth=int(bandwidth) if bandwidth.isdigit() and int(bandwidth) else None,
        )


def _limits(mount: Path, membership: str) -> tuple[float | None, int | None]:
    """(processors' worth of time, memory in MB): the least of all groups up to the root. A container sees its own group as the root."""
    quotas: list[float] = []
    limits: list[int] = []
    for line in membership.splitlines():
        controllers, _, inside = line.partition(":")[2].partition(":")
        for top in {mount / controllers, *(mount / name for name in controllers.split(","))} if controllers else {mount}:
            here = top / inside.lstrip("/")
            for folder in [here, *(parent for parent in here.parents if parent == top or top in parent.parents)]:
                if controllers:
                    share = [_text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()]
                else:
                    share = _text(folder / "cpu.max").split()
                if len(share) == 2 and all(word.isdigit() and int(word) for word in share):
                    quotas.append(int(share[0]) / int(share[1]))
                limit = _text(folder / ("memory.limit_in_bytes" if controllers else "memory.max")).strip()
                if limit.isdigit() and int(limit) < _UNLIMITED:
                    limits.append(int(limit) >> 20)
    return min(quotas, default=None), min(limits, default=None)


def _fields(text: str) -> dict[str, str]:
    """Lines of "name: value"."""
    return {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines()) if colon}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""
