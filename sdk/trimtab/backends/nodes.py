"""Several containers that train together (`nodes` > 1): algo-1, algo-2 and so on, as SageMaker names the machines of a job.

The first one is the run's container, with the run's folder. Each further one has a folder under it, `nodes/algo-2`, with the same tree
and the same files: what it was asked, its events, its log, its end. They meet on a network of their own, which leads nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trimtab.backends.base import RunHandle
from trimtab.backends.life import Ended
from trimtab.layout import JobDir

FIRST = "algo-1"
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
            "Labels": plain["Labels"] | {NODE_LABEL: host},
            "NetworkingConfig": {"EndpointsConfig": {handle.id: {"Aliases": [host]}}},
        }
    labels = {name: value for name, value in bodies[FIRST]["Labels"].items() if name != NODE_LABEL}
    network = {"Name": handle.id, "CheckDuplicate": True, "Driver": "bridge", "Internal": True, "Labels": labels}
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


def to_blame(ends: Mapping[str, tuple[Ended, str]]) -> str | None:
    """Which machine the run failed by, from how each ended and what its failure file says: of those that do not speak of another one
    the first to end. None where none failed.
    """
    bad = [host for host, (ended, _) in ends.items() if failed(ended)]
    own = [host for host in bad if not any(ends[host][1].startswith((f"lost {other}:", f"{other} failed:")) for other in ends)]
    return min(own or bad, key=lambda host: datetime.fromisoformat(ends[host][0].at), default=None)


def prefixed(host: str, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a machine that is not the first, with its name before each."""
    return (f"[{host}] {line}" for line in lines)


def interleaved(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """The lines of all as they come. An error of one is raised here."""
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
