"""Several machines train as one, or several ranks on a machine: each takes its share of a step's rows, and gradients are added up.

Who takes part stands in resourceconfig.json, as Amazon SageMaker writes it for training containers (developer guide, "How Amazon
SageMaker AI provides training information"). The first host by name has rank 0: there the others meet, and it alone writes what stays.
On each machine there may be several ranks (ranks.py); those of one machine alone meet in a file and talk over the loopback interface.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from trimtab.errors import SpecError, TrimtabError

PORT = 7777
MEETING = 300.0  # seconds in which all hosts must have come
SILENCE = 900.0  # seconds that a host may be silent: the others load their model, or the first one writes
PARTING = 5.0  # seconds in which the others hear why the first one ends
LOOPBACK = ("lo", "lo0")  # what Linux and macOS call it
LAST_WORD = "last word"  # of the host that failed first


class HostLost(TrimtabError):
    """Another host, or another rank of this one, did not come, went away, or failed."""


@dataclass(frozen=True)
class Place:
    """Which of `hosts` this machine is; they stand in the order of their ranks. `interface` leads to the others ("": any).

    Each machine has as many `ranks`, of which this is `number` (from 0); those of a machine that is alone meet in the file `meet`.
    """

    host: str = "localhost"
    hosts: tuple[str, ...] = ("localhost",)
    interface: str = ""
    port: int = PORT
    ranks: int = 1
    number: int = 0
    meet: str = ""

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host) * self.ranks + self.number

    @property
    def world(self) -> int:
        return len(self.hosts) * self.ranks

    @property
    def members(self) -> tuple[str, ...]:
        """What each is called, in the order of their ranks."""
        if self.ranks == 1:
            return self.hosts
        numbers = [f"rank {number}" for number in range(self.ranks)]
        return tuple(numbers if len(self.hosts) == 1 else (f"{host} {number}" for host in self.hosts for number in numbers))

    @property
    def name(self) -> str:
        return self.members[self.rank]


def read_place(resources: Path, environ: Mapping[str, str] = os.environ) -> Place:
    """The place that resourceconfig.json gives this machine; without the file it is alone. MASTER_PORT overrides the port.

    Raises SpecError for a file that does not say who takes part.
    """
    try:
        found = json.loads(resources.read_text(encoding="utf-8"))
        hosts = tuple(sorted({str(host) for host in found["hosts"]}))
        interface, port = str(found.get("network_interface_name") or ""), int(environ.get("MASTER_PORT", PORT))
        place = Place(str(found["current_host"]), hosts, interface, port)
    except FileNotFoundError:
        return Place()
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SpecError(
            f"{resources} does not say who trains ({type(exc).__name__}: {exc}): it has current_host, hosts and network_interface_name, "
            "as SageMaker writes it, and MASTER_PORT is a number"
        ) from exc
    if place.host not in place.hosts:
        raise SpecError(f"{resources} names this machine {place.host}, which is not among its hosts {', '.join(place.hosts)}: correct it")
    return place


class Team:
    """The ranks of a run, one or several on each machine, seen from one of them. Alone it exchanges nothing, and every method gives back
    what it got.

    As a context it parts from the others at the end; when this machine fails, they are told why. Every method that exchanges something
    is called by all at the same point, and raises HostLost when one of them is gone.
    """

    def __init__(self, place: Place = Place(), store: dist.Store | None = None, addresses: Mapping[str, str] | None = None) -> None:
        self.place, self.rank, self.world = place, place.rank, place.world
        self.is_first = place.rank == 0  # it alone writes checkpoints, the artifact and the steps' events
        self._store, self._addresses = store, addresses or {}
        self._lost = ""

    def counted(self) -> dict[str, int]:
        """How many take part, as far as there are several: a step's rows depend on it."""
        counts = {"nodes": len(self.place.hosts), "ranks": self.place.ranks}
        return {name: count for name, count in counts.items() if count > 1}

    def add_up(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all machines."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        self._exchange(lambda: dist.all_reduce(total))
        return tuple(total.tolist())

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag: whether it is set on one of the machines."""
        return tuple(count > 0 for count in self.add_up(*flags))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every machine's gradients become the sum over all; one without rows adds nothing."""
        if self.world == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in parameters])
        self._exchange(lambda: dist.all_reduce(flat))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def begin_alike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every machine's parameters become the first one's."""
        if self.world > 1:
            for parameter in parameters:
                value = parameter.detach()
                self._exchange(lambda value=value: dist.broadcast(value, src=0))

    def files_of_first(self, files: Mapping[str, bytes | mmap.mmap]) -> Mapping[str, bytes | mmap.mmap]:
        """The files that the first machine has in hand, whatever this one has."""
        if self.world == 1:
            return files
        names = json.loads(self._said_by(0, json.dumps(list(files)).encode()))
        return {name: self._said_by(0, files.get(name, b"")) for name in names}

    def first_word(self, word: str) -> str:
        """What the first machine that says anything says; the same on all."""
        if self.world == 1:
            return word
        return next(filter(None, [self._said_by(rank, word.encode()).decode() for rank in range(self.world)]), "")

    def _said_by(self, rank: int, content: bytes | mmap.mmap) -> bytes:
        size = torch.tensor(len(content))
        self._exchange(lambda: dist.broadcast(size, src=rank))
        data = torch.frombuffer(bytearray(content if rank == self.rank else int(size)) or bytearray(1), dtype=torch.uint8)[: int(size)]
        self._exchange(lambda: dist.broadcast(data, src=rank))
        return data.numpy().tobytes()

    def _exchange(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as exc:  # gloo has no class of its own
            raise HostLost(self._why(str(exc))) from exc

    def _why(self, problem: str) -> str:
        """The last word of the host that failed, else who is gone."""
        assert self._store is not None
        others = [member for member in self.place.members if member != self.place.name]
        with contextlib.suppress(RuntimeError):  # the store went with the first host
            if self._store.check([LAST_WORD]):
                return self._store.get(LAST_WORD).decode()
        self._lost = lost_host(others, self._addresses, problem)
        how = f"it was silent for {SILENCE / 60:g} minutes" if "imed out" in problem else "its connection was closed"
        return f"lost {self._lost}: {how}. Its own log says more, where there is one; then resume the run from its newest checkpoint"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        """Part from the others, who hear what went wrong; the first one ends after them, because the words are kept with it."""
        if self.world == 1:
            return
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the store went with the first host
            if exc is not None:
                word = str(exc) if isinstance(exc, HostLost) else f"{self.place.name} failed: {exc or type(exc).__name__}"
                self._store.compare_set(LAST_WORD, "", word)
        dist.destroy_process_group()  # those that wait for this machine notice
        with contextlib.suppress(RuntimeError):
            self._store.set(f"gone/{self.rank}", "")
            if self.is_first:
                others = [f"gone/{rank}" for rank, member in enumerate(self.place.members) if member != self._lost]
                self._store.wait(others, timedelta(seconds=PARTING))


ALONE = Team()


def join(place: Place, say: Callable[[str], None], *, meeting: float = MEETING) -> Team:
    """Meet the others within `meeting` seconds; alone, nothing is started. Raises HostLost naming who did not come."""
    if place.world == 1:
        return Team(place)
    together = len(place.hosts) == 1
    at = "this machine" if together else f"{place.hosts[0]}:{place.port}"
    kind = "ranks" if place.ranks > 1 else "nodes"
    say(f"{kind}: this is {place.name}, one of {', '.join(place.members)}; meeting at {at}")
    patience = timedelta(seconds=meeting)
    remedy = f"did not come within {meeting:g} s: see its own log" + ("" if together else f". Every host must reach {at}")
    try:
        store: dist.Store
        if together:
            store = dist.FileStore(place.meet, place.world)
            store.set_timeout(patience)
        else:
            store = dist.TCPStore(place.hosts[0], place.port, place.world, place.rank == 0, timeout=patience, wait_for_workers=False)
        if not together:
            store.set(f"ranks/{place.host}", str(place.ranks))
        store.set(f"here/{place.rank}", "")
    except RuntimeError as exc:
        if together:
            raise HostLost(f"the ranks cannot meet in {place.meet} ({exc}): set TMPDIR to a folder that can be written") from exc
        if place.rank == 0:
            raise HostLost(f"port {place.port} cannot be opened ({exc}): set MASTER_PORT to another one, the same on all hosts") from exc
        raise HostLost(f"{place.hosts[0]} {remedy}") from exc
    try:
        if not together:
            _refuse_uneven(place, store, patience)
        store.wait([f"here/{rank}" for rank in range(place.world)], patience)
        wanted = LOOPBACK if together else (place.interface,)
        if found := [name for _, name in socket.if_nameindex() if name in wanted]:
            os.environ["GLOO_SOCKET_IFNAME"] = found[0]
        silence = timedelta(seconds=SILENCE)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world, timeout=silence)
    except RuntimeError as exc:
        absent = [member for rank, member in enumerate(place.members) if not _came(store, rank)]
        raise HostLost(f"{', '.join(absent) or 'a host'} {remedy}") from exc
    return Team(place, store, {} if together else _addresses(place.hosts))


def _refuse_uneven(place: Place, store: dist.Store, patience: timedelta) -> None:
    """Raise HostLost on all where hosts have different numbers of ranks: their ranks' numbers would collide."""
    store.wait([f"ranks/{host}" for host in place.hosts], patience)
    counts = {host: int(store.get(f"ranks/{host}")) for host in place.hosts}
    if len(set(counts.values())) == 1:
        return
    with contextlib.suppress(RuntimeError):  # the first one, with which the store goes, ends after the others
        store.set(f"heard/{place.host}/{place.number}", "")
        if place.rank == 0:
            store.wait([f"heard/{host}/{number}" for host, count in counts.items() for number in range(count)], timedelta(seconds=PARTING))
    said = ", ".join(f"{host} {count}" for host, count in counts.items())
    raise HostLost(
        f"the hosts have different numbers of ranks: {said}. Each must have as many: take --ranks {min(counts.values())}, for --ranks auto "
        "counts each machine's own clusters of cores"
    )


def lost_host(others: Sequence[str], addresses: Mapping[str, str], problem: str) -> str:
    """The member of which gloo complains: the only other one, else the one of the host whose address it names, where that has one rank."""
    named = [addresses[found] for found in re.findall(r"\[([0-9a-fA-F.:]+)\]:\d", problem) if found in addresses]
    of_host = [member for member in others if named and member.partition(" ")[0] == named[0]] or others
    return of_host[0] if len(of_host) == 1 else "one of " + ", ".join(of_host)


def _came(store: dist.Store, rank: int) -> bool:
    with contextlib.suppress(RuntimeError):
        return bool(store.check([f"here/{rank}"]))
    return rank != 0  # the store is kept by the first


def _addresses(hosts: Sequence[str]) -> dict[str, str]:
    found = {}
    for host in hosts:
        with contextlib.suppress(OSError):
            found[socket.gethostbyname(host)] = host
    return found
