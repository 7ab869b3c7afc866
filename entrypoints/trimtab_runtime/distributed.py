"""Several machines train as one: each takes its share of a step's rows, and their gradients are added up.

Who takes part stands in resourceconfig.json, as Amazon SageMaker writes it for training containers (developer guide, "How Amazon
SageMaker AI provides training information"). The first host by name has rank 0: there the others meet, and it alone writes what stays.
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
LAST_WORD = "last word"  # of the host that failed first


class HostLost(TrimtabError):
    """Another host did not come, went away, or failed."""


@dataclass(frozen=True)
class Place:
    """Which of `hosts` this machine is; they stand in the order of their ranks. `interface` leads to the others ("": any)."""

    host: str = "localhost"
    hosts: tuple[str, ...] = ("localhost",)
    interface: str = ""
    port: int = PORT

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host)

    @property
    def world(self) -> int:
        return len(self.hosts)


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
    """The machines of a run, seen from one of them. Alone it exchanges nothing, and every method gives back what it got.

    As a context it parts from the others at the end; when this machine fails, they are told why. Every method that exchanges something
    is called by all at the same point, and raises HostLost when one of them is gone.
    """

    def __init__(self, place: Place = Place(), store: dist.Store | None = None, addresses: Mapping[str, str] | None = None) -> None:
        self.place, self.rank, self.world = place, place.rank, place.world
        self.is_first = place.rank == 0  # it alone writes checkpoints, the artifact and the steps' events
        self._store, self._addresses = store, addresses or {}
        self._lost = ""

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
        others = [host for host in self.place.hosts if host != self.place.host]
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
                word = str(exc) if isinstance(exc, HostLost) else f"{self.place.host} failed: {exc or type(exc).__name__}"
                self._store.compare_set(LAST_WORD, "", word)
        dist.destroy_process_group()  # those that wait for this machine notice
        with contextlib.suppress(RuntimeError):
            self._store.set(f"gone/{self.rank}", "")
            if self.is_first:
                others = [f"gone/{rank}" for rank, host in enumerate(self.place.hosts) if host != self._lost]
                self._store.wait(others, timedelta(seconds=PARTING))


ALONE = Team()


def join(place: Place, say: Callable[[str], None], *, meeting: float = MEETING) -> Team:
    """Meet the other hosts within `meeting` seconds; alone, nothing is started. Raises HostLost naming who did not come."""
    if place.world == 1:
        return Team(place)
    say(f"nodes: this is {place.host}, one of {', '.join(place.hosts)}; meeting at {place.hosts[0]}:{place.port}")
    patience = timedelta(seconds=meeting)
    remedy = f"did not come within {meeting:g} s: see its own log. Every host must reach {place.hosts[0]}:{place.port}"
    try:
        store = dist.TCPStore(place.hosts[0], place.port, place.world, place.rank == 0, timeout=patience, wait_for_workers=False)
        store.set(f"here/{place.rank}", "")
    except RuntimeError as exc:
        if place.rank == 0:
            raise HostLost(f"port {place.port} cannot be opened ({exc}): set MASTER_PORT to another one, the same on all hosts") from exc
        raise HostLost(f"{place.hosts[0]} {remedy}") from exc
    try:
        store.wait([f"here/{rank}" for rank in range(place.world)], patience)
        if place.interface in {name for _, name in socket.if_nameindex()}:
            os.environ["GLOO_SOCKET_IFNAME"] = place.interface
        silence = timedelta(seconds=SILENCE)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world, timeout=silence)
    except RuntimeError as exc:
        absent = [host for rank, host in enumerate(place.hosts) if not _came(store, rank)]
        raise HostLost(f"{', '.join(absent) or 'a host'} {remedy}") from exc
    return Team(place, store, _addresses(place.hosts))


def lost_host(others: Sequence[str], addresses: Mapping[str, str], problem: str) -> str:
    """The host of which gloo complains: with one other it is that one, else the one whose address it names."""
    named = [addresses[found] for found in re.findall(r"\[([0-9a-fA-F.:]+)\]:\d", problem) if addresses.get(found) in others]
    return others[0] if len(others) == 1 else named[0] if named else "one of " + ", ".join(others)


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
