"""What the doctor finds on a machine, as values: nothing here looks at anything."""

from __future__ import annotations

from dataclasses import dataclass, field

PLACES = ("process", "docker", "sagemaker")
"""Where a job can run, each with needs of its own."""


@dataclass(frozen=True)
class Cpu:
    """`cores` physical, `processors` as the kernel counts them, `usable` by this process, `quota` processors' worth of time or None."""

    model: str = ""
    flags: frozenset[str] = frozenset()
    processors: int = 1
    cores: int = 1
    sockets: int = 1
    numa_nodes: int = 1
    usable: int = 1
    quota: float | None = None


@dataclass(frozen=True)
class Memory:
    """In MB (2^20 bytes). `limit` is the control group's, None where it has none."""

    total: int
    available: int
    limit: int | None = None


@dataclass(frozen=True)
class Disk:
    """A folder that is written to: free GB (10^9 bytes) where it is or will be, and what moves it elsewhere."""

    name: str
    path: str
    free_gb: float
    writable: bool
    move: str


@dataclass(frozen=True)
class Engine:
    """What a Docker engine says of itself. `lacking` are the limits that it cannot put on a container."""

    where: str
    version: str
    api: str
    storage: str
    cgroup: str
    architecture: str
    cpus: int
    memory: int
    root: str = ""
    lacking: tuple[str, ...] = ()
    gpu_runtime: bool = False


@dataclass(frozen=True)
class Absent:
    """Something that is not there, why, and what to type."""

    why: str
    remedy: str


@dataclass(frozen=True)
class Built:
    """An image of ours by its tag; megabytes of 10^6 bytes."""

    tag: str
    megabytes: int


@dataclass(frozen=True)
class Gpu:
    """NVIDIA's driver and the cards it shows; empty where there is none."""

    driver: str = ""
    cards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All of it. Secrets never stand here: of a token and of credentials only where they come from; proxies without passwords."""

    python: str
    trimtab: str
    packages: dict[str, str | None]
    """Version of each distribution that some extra asks for; None where it is not installed."""
    cpu: Cpu
    memory: Memory
    disks: tuple[Disk, ...]
    engine: Engine | Absent
    images: dict[str, Built | Absent] = field(default_factory=dict)
    """The train image for each device; empty without an engine."""
    gpu: Gpu = Gpu()
    hub: str = ""
    """The hub's address."""
    hub_silence: str = ""
    """Why the hub does not answer; empty when it does."""
    hub_forbidden: bool = False
    token: str = ""
    """Where the Hugging Face token comes from."""
    aws: str = ""
    """Where AWS credentials come from."""
    aws_region: str = ""
    proxies: dict[str, str] = field(default_factory=dict)
