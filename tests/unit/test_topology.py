"""What a machine is, read from its files: recorded ones, broken ones, and this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.topologies import RECORDED, facts
from trimtab_runtime.xeon.topology import Processor, as_list, numbers, read


@pytest.mark.parametrize(
    ("name", "processors", "cores", "sockets", "nodes", "clusters"),
    [
        ("one socket", 64, 32, 1, 1, 1),
        ("two sockets", 224, 112, 2, 2, 2),
        ("two sockets, SNC4", 224, 112, 2, 8, 8),
        ("Xeon Max, HBM only", 224, 112, 2, 2, 2),
        ("Xeon Max, flat", 224, 112, 2, 4, 2),
        ("Xeon Max, cache", 224, 112, 2, 2, 2),
        ("a cpuset over two nodes", 16, 16, 2, 2, 2),
        ("one hyperthread", 1, 1, 1, 1, 1),
        ("one processor", 1, 1, 1, 1, 1),
        ("offline processors", 12, 12, 1, 1, 1),
        ("two cores without hyperthreads", 2, 2, 1, 1, 1),
        ("QEMU, a socket each", 16, 16, 16, 1, 1),
        ("four cores with hyperthreads", 8, 4, 1, 1, 1),
        ("seven cores and one", 8, 8, 2, 2, 2),
        ("no sysfs", 4, 4, 1, 0, 1),
        ("no sysfs, cores named", 4, 2, 1, 0, 1),
        ("no files at all", 6, 6, 1, 0, 1),
    ],
)
def test_recorded_machines(tmp_path: Path, name: str, processors: int, cores: int, sockets: int, nodes: int, clusters: int) -> None:
    found = facts(name, tmp_path)
    assert len(found.usable) == processors
    assert len({(one.socket, one.core) for one in found.usable}) == cores
    assert len({one.socket for one in found.usable}) == sockets
    assert len(found.nodes) == nodes
    assert len(found.clusters) == clusters
    assert sorted(one.number for cluster in found.clusters for one in cluster) == sorted(one.number for one in found.usable)


def test_a_cluster_is_a_socket_or_a_part_of_one(tmp_path: Path) -> None:
    found = facts("two sockets, SNC4", tmp_path)
    assert [as_list(one.number for one in cluster) for cluster in found.clusters][:2] == ["0-13,112-125", "14-27,126-139"]
    assert found.clusters[5][0] == Processor(number=70, core=70, socket=1, node=5)
    assert [found.nodes[0].distance(number) for number in (0, 1, 4, 99)] == [10, 12, 21, 255]


def test_memory_nodes_and_what_is_before_them(tmp_path: Path) -> None:
    flat = facts("Xeon Max, flat", tmp_path / "flat")
    assert [(node.number, node.memory_mb) for node in flat.nodes] == [(0, 257_000), (1, 258_000), (2, 65_500), (3, 65_500)]
    assert {one.node for one in flat.processors} == {0, 1}
    assert [node.cache_mb for node in facts("Xeon Max, cache", tmp_path / "cache").nodes] == [65_536, 65_536]
    assert [node.bandwidth for node in facts("CXL memory", tmp_path / "cxl").nodes] == [400_000, 60_000]
    assert facts("memory of the other node", tmp_path / "other").memory_allowed == {0}
    assert flat.policy == "default"


@pytest.mark.parametrize(
    ("name", "quota", "limit"),
    [
        ("a fractional quota", 1.5, 8192),
        ("half a processor", 0.5, None),
        ("2.5 of 96", 2.5, None),
        ("two cores without hyperthreads", None, None),
        ("no files at all", None, None),
    ],
)
def test_what_control_groups_leave(tmp_path: Path, name: str, quota: float | None, limit: int | None) -> None:
    found = facts(name, tmp_path)
    assert (found.quota, found.memory_limit_mb) == (quota, limit)


def test_where_it_stands(tmp_path: Path) -> None:
    assert {name: facts(name, tmp_path / str(number)).told_by for number, name in enumerate(RECORDED) if "nodes" not in RECORDED[name]} == {
        "no sysfs": "cpuinfo", "no sysfs, cores named": "cpuinfo", "no files at all": "count", "macOS": "count",
    }  # fmt: skip
    assert "amx_bf16" in facts("one socket", tmp_path / "x").flags
    assert "bf16" in facts("Arm", tmp_path / "arm").flags


def test_damaged_files_tell_nothing(tmp_path: Path) -> None:
    for path, text in {
        "sys/devices/system/cpu/online": "0-1\n",
        "sys/devices/system/cpu/cpu0/topology/core_cpus_list": "zero",
        "sys/devices/system/cpu/cpu0/topology/physical_package_id": "-1\n",
        "sys/devices/system/node/online": "0",
        "sys/devices/system/node/node0/distance": "",
        "proc/self/status": "Cpus_allowed_list:\t8-9\n",
        "proc/self/cgroup": "0::/\n\nnonsense\n",
        "sys/fs/cgroup/cpu.max": "100000 0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = read(tmp_path)
    assert found.usable == (Processor(0, 0), Processor(1, 1))  # none that is allowed is online: the list is not believed
    assert (found.quota, found.nodes[0].memory_mb, found.nodes[0].distance(0)) == (None, 0, 10)


def test_lists_of_processors() -> None:
    assert numbers("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert numbers("") == numbers("\n") == numbers("x-3") == []
    assert as_list([11, 0, 1, 2, 8, 10]) == "0-2,8,10-11"
    assert as_list([]) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
def test_this_machine() -> None:
    found = read()
    assert {one.number for one in found.usable} == os.sched_getaffinity(0)
    assert found.flags
