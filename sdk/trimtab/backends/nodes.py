"""Several containers that train together (`nodes` > 1): algo-1, algo-2 and so on, as SageMaker names the machines of a job.

The first one is the run's container, with the run's folder. Each further one has a folder under it, `nodes/algo-2`, with the same tree
and the same files: what it was asked, its events, its log, its end. They meet on a network of their own, which leads nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trimtab.backends import run_folder
from trimtab.backends.base import RunHandle
from trimtab.backends.engine import Engine
from trimtab.backends.life import Ended, Life, read_life, write_life
from trimtab.layout import JobDir

FIRST = "algo-1"
NETWORK = "network"  # a file beside the first one's container.json, there while the run may have a network
NODE_LABEL = "trimtab.node"
GRACE = 10  # seconds that a machine has to end when another has failed
_INTERFACE = "eth0"
_FINE = (0, 143)  # exit codes of the runtime: done; stopped, after a checkpoint


def others(folder: Path) -> dict[str, Path]:
    """The further machines of a run and their folders; none for a run on one."""
    found = {there.name: there for there in (folder / "nodes").glob("algo-*")}
    return {host: found[host] for host in sorted(found, key=_number)}


def name_of(handle: RunHandle, host: str) -> str:
    """The name of a machine's container."""
    return handle.id if host == FIRST else f"{handle.id}-{host}"


def together(handle: RunHandle, folder: Path, count: int, body: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What a request for `count` machines has beside or instead of that for one; `body` makes a container's, from its folder. Pure."""
    hosts = [f"algo-{number}" for number in range(1, count + 1)]
    bodies = {}
    for host in hosts:
        plain = body(folder if host == FIRST else folder / "nodes" / host)
        bodies[host] = plain | {
            "Hostname": host,
            "HostConfig": plain["HostConfig"] | {"NetworkMode": handle.id},
            "Labels": plain["Labels"] | {NODE_LABEL: host},
            "NetworkingConfig": {"EndpointsConfig": {handle.id: {"Aliases": [host]}}},
        }
    labels = {name: value for name, value in bodies[FIRST]["Labels"].items() if name != NODE_LABEL}
    network = {"Name": handle.id, "Driver": "bridge", "Internal": True, "Labels": labels}
    return {"container": bodies.pop(FIRST), "others": bodies, "network": network}


def make_folders(folder: Path, request: Mapping[str, Any]) -> None:
    """The trees of the further machines, and each machine's resourceconfig.json. Nothing for one machine."""
    hosts = [FIRST, *request.get("others", {})]
    if len(hosts) == 1:
        return
    for host in hosts:
        job = JobDir(folder if host == FIRST else folder / "nodes" / host).make()
        job.hyperparameters.write_text(json.dumps(request["hyperparameters"], indent=1), encoding="utf-8")
        facts = {"current_host": host, "hosts": hosts, "network_interface_name": _INTERFACE}
        job.resources.write_text(json.dumps(facts), encoding="utf-8")


def failed(ended: Ended | None) -> bool:
    """Whether a machine's end means that the others cannot go on."""
    return ended is not None and ended.exit_code not in _FINE


def begin(engine: Engine, folder: Path, request: Mapping[str, Any]) -> None:
    """Before a new life of the run, whose lock is held, starts its first container: the network, and the others' old ends forgotten."""
    for there in others(folder).values():
        log = there / "log.txt"
        log.touch()
        write_life(there, Life(events_from=run_folder.begin(JobDir(there)), log_from=log.stat().st_size))
    if "network" in request:
        (folder / NETWORK).touch()
        engine.create_network(request["network"])


def start_others(engine: Engine, handle: RunHandle, folder: Path, request: Mapping[str, Any]) -> None:
    """Start the machines beside the first."""
    for host, there in others(folder).items():
        life = read_life(there) or Life()
        life = life.model_copy(update={"container": engine.create(name_of(handle, host), request["others"][host])})
        write_life(there, life)
        engine.start(life.container)


def look(engine: Engine, handle: RunHandle, folder: Path, look_at: Callable[[str, Path], Life]) -> Life:
    """The life of the run, over when every machine's is: one that failed ends the others, and the last end removes the network.

    `look_at` looks after one container, by its name and folder.
    """
    further = others(folder)
    places = {handle.id: folder} | {name_of(handle, host): there for host, there in further.items()}
    lives = {name: look_at(name, there) for name, there in places.items()}
    if any(failed(life.ended) for life in lives.values()):
        if read_life(folder) != lives[handle.id]:  # started anew meanwhile
            return look(engine, handle, folder, look_at)
        for name, life in lives.items():
            if life.ended is None:
                engine.stop(life.container, GRACE)
                lives[name] = look_at(name, places[name])
    if any(life.ended is None for life in lives.values()):
        return lives[handle.id].model_copy(update={"ended": None})
    if (folder / NETWORK).exists():
        engine.remove_networks(handle)
        (folder / NETWORK).unlink(missing_ok=True)
    return lives[handle.id]


def end_others(engine: Engine, folder: Path) -> None:
    """End the machines beside the first that have not ended."""
    for there in others(folder).values():
        life = read_life(there)
        if life is not None and life.ended is None:
            engine.stop(life.container, GRACE)


def to_blame(folder: Path, ended: Ended) -> tuple[str, Path, Ended]:
    """The machine whose end says why the run ended, its folder and its end; `ended` is the first one's."""
    places = {FIRST: folder} | others(folder)
    lives = {host: read_life(there) for host, there in places.items()}
    ends = {FIRST: ended} | {host: life.ended for host, life in lives.items() if host != FIRST and life and life.ended}
    host = first_failed(ends, {host: JobDir(there).cause() for host, there in places.items()}) or FIRST
    return host, places[host], ends[host]


def first_failed(ends: Mapping[str, Ended], causes: Mapping[str, str]) -> str | None:
    """Which machine failed first, by its end and not by what it says of another one's; None where none failed. Pure."""
    bad = [host for host, ended in ends.items() if failed(ended)]
    of_others = tuple(words for host in ends for words in (f"lost {host}:", f"{host} failed:"))
    own = [host for host in bad if not causes[host].startswith(of_others)]
    return min(own or bad, key=lambda host: datetime.fromisoformat(ends[host].at), default=None)


def prefixed(host: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a machine that is not the first, with its name before each."""
    return (f"[{host}] {line}" for line in lines)


def lines(streams: Iterable[Iterator[str]], follow: bool, look: Callable[[], object]) -> Iterator[str]:
    """The lines of all machines: as they come, or one machine after the other. Then `look` puts away what the last one left."""
    yield from _as_they_come(streams) if follow else itertools.chain(*streams)
    look()


def _as_they_come(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """An error of one is raised here."""
    waiting: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    over = threading.Event()

    def read(stream: Iterator[str]) -> None:
        try:
            for line in stream:
                if over.is_set():
                    return
                waiting.put(line)
            waiting.put(None)
        except BaseException as exc:  # noqa: BLE001  it is raised where the lines are read
            waiting.put(exc)

    threads = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    left = len(threads)
    with contextlib.ExitStack() as ending:
        ending.callback(over.set)
        while left:
            found = waiting.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found


def _number(host: str) -> int:
    return int(host.rpartition("-")[2])
