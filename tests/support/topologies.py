"""Machines as files: the parts of /proc and /sys that tell what a machine is, laid out in a folder from topologies.json.

Layouts are those of lscpu and numactl --hardware on such machines, as their vendors' guides print them, and what containers see of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab_runtime.xeon.topology import Topology, numbers, read

RECORDED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def facts(name: str, root: Path) -> Topology:
    """What is read of a recorded machine, laid out below `root`."""
    one = RECORDED[name]
    for path, text in files(one).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for number, node in enumerate(one.get("nodes", ())):
        for processor in numbers(node["processors"]):
            (root / f"sys/devices/system/cpu/cpu{processor}/node{number}").mkdir(exist_ok=True)
    return read(root, count=6, system=one.get("system", "Linux"), machine=one.get("machine", "x86_64"))


def files(one: dict[str, Any]) -> dict[str, str]:
    """Paths and contents."""
    found: dict[str, str] = {}
    if "online" in one:
        online, apart = numbers(one["online"]), one["siblings"]
        called = "Features" if one.get("machine") == "aarch64" else "flags"
        found["proc/cpuinfo"] = "\n".join(
            f"processor\t: {number}\nmodel name\t: {one.get('model', '')}\n{called}\t\t: {one['flags']}\n" for number in online
        )
        allowed, memory = one.get("allowed", one["online"]), one.get("memory_allowed", f"0-{len(one['nodes']) - 1}")
        found["proc/self/status"] = f"Name:\tpython\nCpus_allowed_list:\t{allowed}\nMems_allowed_list:\t{memory}\n"
        found["proc/self/numa_maps"] = "00400000 default file=/usr/bin/python3.11 mapped=1\n"
        found["sys/devices/system/cpu/online"] = one["online"] + "\n"
        for number in online:
            core = number % apart if apart else number
            folder = f"sys/devices/system/cpu/cpu{number}/topology/"
            found[folder + "core_cpus_list"] = f"{core},{core + apart}\n" if apart else f"{core}\n"
            socket = next(place for place, here in enumerate(one["sockets"]) if number in numbers(here))
            found[folder + "physical_package_id"] = f"{socket}\n"
        found["sys/devices/system/node/online"] = f"0-{len(one['nodes']) - 1}\n"
        for number, node in enumerate(one["nodes"]):
            folder = f"sys/devices/system/node/node{number}/"
            found[folder + "meminfo"] = f"Node {number} MemTotal:       {node['memory_mb'] << 10} kB\n"
            found[folder + "distance"] = " ".join(map(str, node["distances"])) + "\n"
            if "cache_mb" in node:
                found[folder + "memory_side_cache/index1/size"] = f"{node['cache_mb'] << 20}\n"
            if "bandwidth" in node:
                found[folder + "access0/initiators/read_bandwidth"] = f"{node['bandwidth']}\n"
    return found | one.get("files", {})
