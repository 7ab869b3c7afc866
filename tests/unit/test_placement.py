"""From what a machine is to where a run computes on it, and why; what is set is really set, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.topologies import RECORDED, facts
from trimtab_runtime.xeon.allocator import keep_large_blocks
from trimtab_runtime.xeon.binding import mask
from trimtab_runtime.xeon.pages import MODE, tunables
from trimtab_runtime.xeon.placement import Memory, Plan, lines, place
from trimtab_runtime.xeon.topology import Topology, as_list


def reason(plan: Plan, name: str) -> str:
    return dict(plan.choices)[name].reason


def value(plan: Plan, name: str) -> str:
    return dict(plan.choices)[name].value


def shares(plan: Plan) -> list[tuple[int | None, str, Memory | None]]:
    return [(share.threads, as_list(share.processors), share.memory) for share in plan.shares]


ALONE = [
    # threads, processors bound to, memory
    ("one socket", 32, "0-31", None),
    ("two sockets", 112, "0-111", Memory("interleave", (0, 1))),
    ("two sockets, SNC4", 112, "0-111", Memory("interleave", tuple(range(8)))),
    ("Xeon Max, HBM only", 112, "0-111", Memory("interleave", (0, 1))),
    ("Xeon Max, flat", 112, "0-111", Memory("interleave", (2, 3))),
    ("Xeon Max, cache", 112, "0-111", Memory("interleave", (0, 1))),
    ("CXL memory", 86, "0-85", Memory("prefer", (0,))),
    ("one hyperthread", 1, "", None),
    ("a cpuset over two nodes", 16, "", Memory("interleave", (0, 1))),
    ("memory of the other node", 16, "", None),
    ("a fractional quota", 1, "", None),
    ("half a processor", 1, "", None),
    ("one processor", 1, "", None),
    ("offline processors", 12, "", None),
    ("2.5 of 96", 2, "", None),
    ("two cores without hyperthreads", 2, "", None),
    ("QEMU, a socket each", 16, "", None),
    ("four cores with hyperthreads", 4, "0-3", None),
    ("seven cores and one", 8, "", Memory("interleave", (0, 1))),
    ("no sysfs", 4, "", None),
    ("no sysfs, cores named", 2, "0,2", None),
    ("no files at all", 6, "", None),
    ("Arm", None, "", None),
    ("macOS", None, "", None),
]


@pytest.mark.parametrize(("name", "threads", "processors", "memory"), ALONE, ids=[name for name, *_ in ALONE])
def test_one_rank(tmp_path: Path, name: str, threads: int | None, processors: str, memory: Memory | None) -> None:
    plan = place(facts(name, tmp_path), {})
    assert shares(plan) == [(threads, processors, memory)]
    assert plan.shares[0].environment.get("OMP_NUM_THREADS") == (str(threads) if threads else None)
    assert all(choice.value and choice.reason for _, choice in plan.choices)
    assert lines(plan) == []


def test_every_recorded_machine_is_placed() -> None:
    assert set(RECORDED) == {name for name, *_ in ALONE}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one socket", [(32, "0-31", None)]),
        ("two sockets", [(56, "0-55", Memory("prefer", (0,))), (56, "56-111", Memory("prefer", (1,)))]),
        ("two sockets, SNC4", [(14, f"{14 * n}-{14 * n + 13}", Memory("prefer", (n,))) for n in range(8)]),
        ("Xeon Max, HBM only", [(56, "0-55", Memory("prefer", (0,))), (56, "56-111", Memory("prefer", (1,)))]),
        ("Xeon Max, flat", [(56, "0-55", Memory("prefer", (2,))), (56, "56-111", Memory("prefer", (3,)))]),
        ("Xeon Max, cache", [(56, "0-55", Memory("prefer", (0,))), (56, "56-111", Memory("prefer", (1,)))]),
        ("a cpuset over two nodes", [(8, "48-55", Memory("prefer", (0,))), (8, "56-63", Memory("prefer", (1,)))]),
        ("2.5 of 96", [(2, "", None)]),
        ("one processor", [(1, "", None)]),
        ("QEMU, a socket each", [(16, "", None)]),
        ("no sysfs", [(4, "", None)]),
    ],
)
def test_a_rank_for_each_cluster(tmp_path: Path, name: str, expected: list[tuple[int, str, Memory | None]]) -> None:
    plan = place(facts(name, tmp_path), {}, ranks="auto")
    assert shares(plan) == expected
    assert value(plan, "ranks") == str(len(expected))


@pytest.mark.parametrize(
    ("name", "ranks", "processors"),
    [
        ("two sockets, SNC4", 2, ["0-55", "56-111"]),  # four neighbours each: a socket
        ("two sockets, SNC4", 4, ["0-27", "28-55", "56-83", "84-111"]),
        ("two sockets, SNC4", 3, ["0-27", "28-69", "70-111"]),
        ("two sockets", 4, ["0-27", "28-55", "56-83", "84-111"]),
        ("two sockets", 3, ["0-27", "28-55", "56-111"]),
        ("one socket", 3, ["0-9", "10-20", "21-31"]),
        ("seven cores and one", 2, ["1-7", "8"]),
        ("seven cores and one", 4, ["1-2", "3-4", "5-7", "8"]),
        ("seven cores and one", 8, [str(number) for number in range(1, 9)]),
        ("two cores without hyperthreads", 2, ["0", "1"]),
        ("two cores without hyperthreads", 3, ["", "", ""]),  # fewer cores than ranks: nobody is bound
        ("one processor", 2, ["", ""]),
    ],
)
def test_any_number_of_ranks(tmp_path: Path, name: str, ranks: int, processors: list[str]) -> None:
    plan = place(facts(name, tmp_path), {}, ranks=ranks)
    assert [bound for _, bound, _ in shares(plan)] == processors
    assert [line.partition(":")[0] for line in lines(plan)] == [f"rank {number}" for number in range(ranks)]
    assert bool(plan.warnings) == (processors[0] == "")
    uneven = "are not shared out evenly" in reason(plan, "ranks")
    assert uneven == (len({share.threads for share in plan.shares}) > 1)


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [
        ("two sockets, SNC4", 3, "112 cores are not shared out evenly, ranks have 28 to 42 threads, {}: --ranks 8 would be even"),
        ("one socket", 3, "32 cores are not shared out evenly, ranks have 10 to 11 threads, {}: --ranks 2 would be even"),
        (
            "seven cores and one",
            3,
            "8 cores are not shared out evenly, ranks have 1 to 4 threads, {}",
        ),  # one for each cluster is uneven, too
    ],
)
def test_ranks_that_have_different_numbers_of_cores_hear_how_many_would_not(tmp_path: Path, name: str, ranks: int, said: str) -> None:
    assert reason(place(facts(name, tmp_path), {}, ranks=ranks), "ranks").endswith(
        said.format("and each step waits for the smallest share")
    )


def test_ranks_whose_number_of_threads_is_set_have_the_same(tmp_path: Path) -> None:
    assert "evenly" not in reason(place(facts("two sockets, SNC4", tmp_path), {"OMP_NUM_THREADS": "8"}, ranks=3), "ranks")


def test_with_several_clusters_one_rank_says_what_more_would_do(tmp_path: Path) -> None:
    plan = place(facts("two sockets, SNC4", tmp_path), {})
    assert "this job may use 8 clusters of cores with memory of their own: --ranks 8 would bind a rank to each" in reason(plan, "ranks")
    assert "8 times as many rows" in reason(plan, "ranks")
    assert "ranks" not in dict(place(facts("one socket", tmp_path / "one"), {}).choices)


def test_why_there_are_so_many_threads(tmp_path: Path) -> None:
    def why(name: str, **environ: str) -> str:
        return reason(place(facts(name, tmp_path / name.replace(" ", "-")), environ), "threads")

    assert why("one socket") == "one for each of 32 cores, not for each of 64 hyperthreads, which share a core's multipliers"
    assert why("one hyperthread") == "one for each of 1 core that this job may use (processors 5 of 8)"
    assert why("2.5 of 96") == "the control group gives 2.5 processors' worth of time, of 48 cores: more threads would wait for it"
    assert why("no sysfs") == "one for each of 4 cores (no sysfs: hyperthreads may be among them)"
    assert why("one socket", OMP_NUM_THREADS="8,2") == "OMP_NUM_THREADS is set"


def test_what_the_user_set_is_left(tmp_path: Path) -> None:
    found = facts("two sockets", tmp_path)
    plan = place(found, {"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "ACTIVE", "GOMP_CPU_AFFINITY": "0-7", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    (share,) = plan.shares
    assert (share.threads, share.processors, dict(share.environment)) == (8, (), {})
    assert [value(plan, name) for name in ("threads", "binding", "waiting_threads", "instructions")] == [
        "8", "left as it is", "active", "up to AVX2",
    ]  # fmt: skip
    assert plan.warnings == ()
    (tmp_path / "proc/self/numa_maps").write_text("00400000 interleave:0-1 file=/usr/bin/python3.11\n")
    from trimtab_runtime.xeon.topology import read

    started = place(read(tmp_path, system="Linux", machine="x86_64"), {})
    assert started.shares[0].memory is None
    assert reason(started, "memory_nodes") == "this process was started with the memory policy interleave:0-1"


def test_more_threads_than_cores_have_all_hyperthreads(tmp_path: Path) -> None:
    four, uneven = facts("four cores with hyperthreads", tmp_path / "four"), facts("seven cores and one", tmp_path / "uneven")

    def placed(threads: int, ranks: int = 1, found: Topology = four) -> tuple[list[str], int]:
        plan = place(found, {"OMP_NUM_THREADS": str(threads)}, ranks=ranks)
        return [bound for _, bound, _ in shares(plan)], len(plan.warnings)

    assert placed(4) == (["0-3"], 0)
    assert placed(5) == placed(8) == ([""], 0)
    assert placed(9) == ([""], 1)
    assert placed(2, 2) == (["0-1", "2-3"], 0)
    assert placed(4, 2) == (["0-1,4-5", "2-3,6-7"], 0)
    assert placed(5, 2) == (["0-1,4-5", "2-3,6-7"], 1)
    assert placed(1, 2, uneven) == (["1-7", "8"], 0)
    assert placed(4, 2, uneven) == (["", ""], 0)  # bound, one rank would have four threads on a processor
    assert "rank 1 would have 4 threads on 1 processor" in reason(place(uneven, {"OMP_NUM_THREADS": "4"}, ranks=2), "binding")
    assert "more threads than cores" in reason(place(four, {"OMP_NUM_THREADS": "8"}), "binding")


@pytest.mark.parametrize("said", ["abc", "0", "-2", "4x", ","])
def test_a_number_of_threads_that_is_none_is_said_and_replaced(tmp_path: Path, said: str) -> None:
    plan = place(facts("four cores with hyperthreads", tmp_path), {"OMP_NUM_THREADS": said})
    assert plan.shares[0].environment["OMP_NUM_THREADS"] == value(plan, "threads") == "4"
    (warning,) = plan.warnings
    assert warning.startswith(f"OMP_NUM_THREADS is '{said}', which is no number of threads")
    two = place(facts("macOS", tmp_path / "mac"), {"OMP_NUM_THREADS": said}, ranks=2)
    assert [dict(share.environment) for share in two.shares] == [{"OMP_NUM_THREADS": "3"}] * 2


def test_threads_sleep_where_spinning_takes_time_from_others(tmp_path: Path) -> None:
    for name, ranks, expected in [("a fractional quota", 1, "passive"), ("one socket", 1, None), ("one processor", 2, "passive")]:
        plan = place(facts(name, tmp_path / name.replace(" ", "-")), {}, ranks=ranks)  # type: ignore[arg-type]
        assert plan.shares[0].environment.get("OMP_WAIT_POLICY") == expected


def test_memory_nodes_and_their_reasons(tmp_path: Path) -> None:
    def why(name: str) -> str:
        return reason(place(facts(name, tmp_path / name.replace(" ", "-")), {}), "memory_nodes")

    assert why("Xeon Max, flat") == "HBM, which is a node of its own here (flat mode), and other memory when it is full"
    assert why("Xeon Max, cache").endswith("; 131,072 MB of faster memory cache them (HBM in cache mode)")
    assert why("CXL memory").endswith("; node 1 has no processors and is not known to be faster, so it is taken last")
    assert "memory_nodes" not in dict(place(facts("one socket", tmp_path / "one"), {}).choices)  # there is nothing to choose


@pytest.mark.parametrize(
    ("name", "dtype", "environ", "emulated"),
    [
        ("one socket", "bfloat16", {}, False),
        ("two cores without hyperthreads", "bfloat16", {}, False),
        ("Arm", "bfloat16", {}, False),
        ("a fractional quota", "bfloat16", {}, True),
        ("a fractional quota", "auto", {}, False),
        ("a fractional quota", "float32", {}, False),
        ("one socket", "bfloat16", {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, True),
        ("one socket", "bfloat16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
        ("no files at all", "bfloat16", {}, False),  # nobody knows
    ],
)
def test_emulated_bf16_is_said_loudly(tmp_path: Path, name: str, dtype: str, environ: dict[str, str], emulated: bool) -> None:
    warnings = place(facts(name, tmp_path), environ, dtype=dtype).warnings
    assert [warning for warning in warnings if "EMULATED" in warning] == list(warnings)
    assert bool(warnings) == emulated


def test_more_threads_than_time_and_remote_memory_are_warned_of(tmp_path: Path) -> None:
    (quota,) = place(facts("2.5 of 96", tmp_path / "a"), {"OMP_NUM_THREADS": "96"}).warnings
    assert quota.startswith("96 threads, and the control group gives 2.5 processors' worth of time")
    (half,) = place(facts("half a processor", tmp_path / "b"), {}).warnings
    assert half.startswith("1 thread, and the control group gives 0.5 processors' worth of time")
    assert half.endswith("when it is used up. Raise the limit")
    (ranks,) = place(facts("a fractional quota", tmp_path / "f"), {}, ranks=2).warnings
    assert ranks.endswith("when it is used up. Take fewer --ranks, or raise the limit")
    (many,) = place(facts("two cores without hyperthreads", tmp_path / "c"), {"OMP_NUM_THREADS": "8"}).warnings
    assert many == "8 threads on 2 processors: they wait for each other. Set OMP_NUM_THREADS lower"
    (remote,) = place(facts("memory of the other node", tmp_path / "d"), {}).warnings
    assert remote.startswith("processors of node 1 get their memory from node 0, which is further away and slower")
    assert place(facts("Xeon Max, flat", tmp_path / "e"), {}, ranks=2).warnings == ()


def test_a_machine_that_is_left_alone_says_so_and_still_has_ranks(tmp_path: Path) -> None:
    mac = facts("macOS", tmp_path)
    assert reason(place(mac, {}), "placement") == "threads and memory are Darwin's own business"
    two = place(mac, {}, ranks=2)
    assert [dict(share.environment) for share in two.shares] == [{"OMP_NUM_THREADS": "3"}] * 2
    assert [dict(share.environment) for share in place(mac, {"OMP_NUM_THREADS": "1"}, ranks=2).shares] == [{}, {}]


TAKE = """
import ctypes, json, os, sys, threading
from trimtab_runtime.xeon.binding import bind
from trimtab_runtime.xeon.pages import MODE, tunables
from trimtab_runtime.xeon.placement import Memory, Share
refused = bind(Share(1, (%d,), Memory("prefer", (0,)), {"OMP_NUM_THREADS": "1"}))
found = {}
def look():
    mode, nodes = ctypes.c_int(), (ctypes.c_ulong * 16)()
    asked = ctypes.CDLL(None, use_errno=True).syscall(239, ctypes.byref(mode), nodes, ctypes.c_ulong(1024), None, ctypes.c_ulong(0))
    found.update(processors=sorted(os.sched_getaffinity(0)), policy=[asked, mode.value, nodes[0]])
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(json.dumps({"refused": refused, "threads": os.environ["OMP_NUM_THREADS"], **found}))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="asks Linux on x86-64 by its system call's number")
def test_a_share_is_taken_and_threads_started_later_have_it_too() -> None:
    last = max(os.sched_getaffinity(0))
    said = subprocess.run([sys.executable, "-c", TAKE % last], capture_output=True, text=True, check=True).stdout
    found = json.loads(said)
    assert found["processors"] == [last]
    assert found["threads"] == "1"
    if found["refused"]:  # a container's profile may forbid it
        assert "--cap-add SYS_NICE" in found["refused"][0]
    else:
        assert found["policy"] == [0, 1, 1]  # asked; MPOL_PREFERRED; node 0


def test_what_is_not_there_is_refused_in_words() -> None:
    said = subprocess.run([sys.executable, "-c", TAKE % 8191], capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["refused"][0] == "processors 8191 could not be bound to (Invalid argument): the kernel chooses"


def test_node_masks() -> None:
    assert mask([0, 3])[0] == 0b1001
    assert mask([65])[:2] == [0, 2]
    assert len(mask([])) * 64 == 1024


def test_large_blocks_are_kept_unless_the_user_chose_otherwise(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f10 r-xp 00000000 08:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n")
    if sys.platform == "linux":
        said = [
            keep_large_blocks(maps, environ)
            for environ in (
                {"MALLOC_MMAP_MAX_": "9"},
                {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"},
                {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
            )
        ]
        assert said[:2] == ["left as it is: MALLOC_MMAP_MAX_ is set", "left as it is: GLIBC_TUNABLES is set"]
        assert said[2].startswith("large blocks stay on the heap")
        maps.write_text(maps.read_text() + "7f20-7f30 r-xp 00000000 08:01 2 /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4\n")
        assert keep_large_blocks(maps, {}) == "left as it is: tcmalloc is in glibc's place"


@pytest.mark.parametrize(
    ("mode", "environ", "wanted"),
    [
        ("always [madvise] never", {}, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, "glibc.pthread.rseq=0:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, None),  # a user's word, or said before
        ("always [madvise] never", {"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}, None),
        ("[always] madvise never", {}, None),
        ("always madvise [never]", {}, None),
    ],
)
def test_large_pages_are_asked_for_where_asking_helps(mode: str, environ: dict[str, str], wanted: str | None) -> None:
    assert tunables(mode, environ) == wanted


AGAIN = """
import os
from trimtab_runtime.xeon.pages import begin_again
begin_again([%r])
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(not MODE.exists(), reason="the kernel says nothing of large pages")
def test_a_program_that_computes_begins_once_again_as_the_same_process() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    for verb, wanted in (("train", tunables(MODE.read_text(), {})), ("serve", None)):
        process = subprocess.Popen([sys.executable, "-c", AGAIN % verb], env=environ, stdout=subprocess.PIPE, text=True)
        said, _ = process.communicate(timeout=60)
        assert said == f"{process.pid} {wanted}\n"


@pytest.mark.skipif(not MODE.exists(), reason="the kernel says nothing of large pages")
@pytest.mark.parametrize("before", [None, "glibc.pthread.rseq=0"])
def test_a_program_that_cannot_begin_again_does_not_claim_large_pages(before: str | None) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    environ |= {"GLIBC_TUNABLES": before} if before else {}
    program = "import sys; sys.executable = '/nonexistent/python'" + AGAIN % "train"
    said = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split()[1] == str(before)
