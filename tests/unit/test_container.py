"""What a container is asked to be: sizes and CPUs as people write them, mounts that show no more than is meant, no secret."""

from __future__ import annotations

import json
import os
from pathlib import Path

import docker
import pytest

from trimtab.backends import load_backend
from trimtab.backends.base import RunHandle
from trimtab.backends.container import (
    Limits,
    caller,
    container_body,
    expected_memory,
    has_gpu_runtime,
    make_nf4,
    mounts,
    needed_memory,
    on_another_machine,
    out_of_memory,
    parse_cpus,
    parse_size,
    show_size,
)
from trimtab.backends.engine import asking
from trimtab.backends.run_folder import Said
from trimtab.errors import BackendError, SpecError, StagingError
from trimtab.estimate import ModelFacts, peak_memory
from trimtab.events import Step
from trimtab.spec import TrainSpec

HANDLE = RunHandle("docker", "trim-12345678")


@pytest.mark.parametrize(
    ("given", "size"),
    [("8g", 8 << 30), ("512m", 512 << 20), ("1.5 GB", 3 << 29), ("64KiB", 64 << 10), ("1073741824", 1 << 30), (7, 7), ("2T", 2 << 40)],
)
def test_sizes_are_read_as_docker_reads_them(given, size):
    assert parse_size("memory", given) == size
    assert parse_size("memory", show_size(size)) == size


@pytest.mark.parametrize("given", ["8 gigs", "", "g", "-1g", "1e9", "8g8", "many", "٣g8"])
def test_what_is_no_size_is_refused_with_one_that_is(given):
    with pytest.raises(SpecError, match=r"memory .* is no size: .*memory=8g"):
        parse_size("memory", given)


def test_a_limit_below_the_engines_own_is_refused():
    with pytest.raises(SpecError, match="the least is 6m"):
        Limits.parse(cpus=None, memory="1m", shm_size="1g", network="none")


@pytest.mark.parametrize(("given", "cpus"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("2, 4-5", {2, 4, 5})])
def test_lists_of_cpus(given, cpus):
    assert parse_cpus(given) == cpus


@pytest.mark.parametrize("given", ["", "3-1", "a", "0,", "-1", "1.5", "0;1"])
def test_what_is_no_list_of_cpus_is_refused(given):
    with pytest.raises(SpecError, match="cpus=0-3"):
        parse_cpus(given)


@pytest.mark.parametrize("network", ["", "--privileged", "container:another one", "a b"])
def test_what_is_no_networks_name_is_refused(network):
    with pytest.raises(SpecError, match="docker network ls"):
        Limits.parse(cpus=None, memory=None, shm_size="1g", network=network)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("docker", {"memry": "8g"}, "did you mean memory?"),
        ("docker", {"memory": "8 gigs"}, "is no size"),
        ("process", {"memory": "8g"}, "no option 'memory'"),
    ],
)
def test_a_wrong_setting_of_a_backend_is_refused(name, options, said):
    with pytest.raises(SpecError, match=said.replace("?", r"\?")):
        load_backend(name, options)


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    """Links to two files of a folder with a third one in it, one of them in a folder below."""
    theirs, model = tmp_path / "theirs", tmp_path / "model"
    theirs.mkdir()
    (model / "sub").mkdir(parents=True)
    for name in ("a", "b", "diary"):
        (theirs / name).touch()
    (model / "a.bin").symlink_to(theirs / "a")
    (model / "sub" / "b.bin").symlink_to(theirs / "b")
    return model


def seen(folder: Path, channels: dict[str, str]) -> dict[str, tuple[str, bool]]:
    return {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in mounts(folder, channels)}


def test_links_are_mounted_one_by_one_and_plain_folders_whole(channel, tmp_path):
    (tmp_path / "train").mkdir()
    places = seen(tmp_path / "run", {"train": str(tmp_path / "train"), "model": str(channel)})
    assert {place: source for place, source in places.items() if "/input/data/" in place} == {
        "/opt/ml/input/data/train": (str(tmp_path / "train"), True),
        "/opt/ml/input/data/model/a.bin": (str(tmp_path / "theirs" / "a"), True),
        "/opt/ml/input/data/model/sub/b.bin": (str(tmp_path / "theirs" / "b"), True),
    }
    assert [place for place, (_, read_only) in places.items() if not read_only] == [
        "/opt/ml/model",
        "/opt/ml/checkpoints",
        "/opt/ml/output",
    ]
    assert str(tmp_path / "run") not in {source for source, _ in places.values()}


def test_a_link_to_a_folder_that_holds_it_ends(channel, tmp_path):
    (channel / "round").symlink_to(channel)
    assert seen(tmp_path, {"model": str(channel)})["/opt/ml/input/data/model/round"] == (str(channel), True)


def test_a_link_to_nowhere_is_refused(channel, tmp_path):
    (tmp_path / "theirs" / "a").unlink()
    with pytest.raises(StagingError, match="trimtab fit"):
        mounts(tmp_path, {"model": str(channel)})


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the network", "network prune"),
        ("network nowhere not found", "docker network ls"),
        ("something new", "mend that and repeat the command"),
    ],
)
def test_what_the_engine_refuses_is_told_with_its_remedy(said, remedy):
    with pytest.raises(BackendError, match=remedy), asking("to make a network"):
        raise docker.errors.APIError("500 Server Error", explanation=said)


def test_a_rootless_engine_takes_the_caller_for_root():
    assert caller({"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}) == ("0:0", [])
    user, groups = caller({"SecurityOptions": None})
    assert user == f"{os.getuid()}:{os.getgid()}"
    assert str(os.getgid()) not in groups


@pytest.mark.parametrize(
    ("info", "hook", "there"),
    [
        ({"Runtimes": {"runc": {}}}, None, False),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, None, True),
        ({"Runtimes": None, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}, None, True),
        ({"Runtimes": {"runc": {}}}, "/usr/bin/nvidia-container-runtime-hook", True),
        ({}, None, False),
    ],
)
def test_a_gpu_runtime_is_known_by_what_the_engine_says(info, hook, there):
    assert has_gpu_runtime(info, hook) is there


@pytest.mark.parametrize(
    ("address", "elsewhere"),
    [
        ("http+docker://localhost", False),
        ("http://127.0.0.1:2375", False),
        ("https://build.example.com:2376", True),
        ("ssh://me@build.example.com", True),
    ],
)
def test_an_engine_of_another_machine_is_known_by_its_address(address, elsewhere):
    assert on_another_machine(address) is elsewhere


def body(device: str, limits: Limits, folder: Path) -> dict[str, object]:
    return container_body(HANDLE, "sha256:1", device, folder, {}, limits, {})


def test_the_request_asks_for_nothing_that_was_not_asked_for(tmp_path):
    host = body("xeon", Limits(), tmp_path)["HostConfig"]
    assert not {"Privileged", "DeviceRequests", "CpusetCpus", "Memory", "Ulimits", "OomScoreAdj", "CapAdd", "IpcMode", "PidMode"} & set(
        host
    )
    assert (host["NetworkMode"], host["CapDrop"], host["ReadonlyRootfs"]) == ("none", ["ALL"], True)
    assert host["ShmSize"] == 1 << 30
    limited = body("xeon", Limits("0-1", 1 << 30, 1 << 20, "mine"), tmp_path)["HostConfig"]
    names = ("CpusetCpus", "Memory", "MemorySwap", "ShmSize", "NetworkMode")
    assert [limited[name] for name in names] == ["0-1", 1 << 30, 1 << 30, 1 << 20, "mine"]


def test_the_cache_of_quantised_bases_is_mounted_writable_and_made_when_it_is_not_there(tmp_path):
    nf4 = tmp_path / "cache" / "nf4"
    request = container_body(HANDLE, "sha256:1", "xeon", tmp_path / "run", {}, Limits(), {}, nf4)
    assert "TRIMTAB_NF4_CACHE=/opt/ml/nf4" in request["Env"]
    [mount] = [mount for mount in request["HostConfig"]["Mounts"] if mount["Source"] == str(nf4)]
    assert (mount["Target"], mount["ReadOnly"]) == ("/opt/ml/nf4", False)
    assert not nf4.exists()  # a request makes nothing
    make_nf4(request)
    assert list(tmp_path.rglob("*")) == [nf4.parent, nf4]
    nf4.rmdir()
    nf4.touch()
    with pytest.raises(BackendError, match=r"cannot be made \(File exists\): set TRIMTAB_NF4_CACHE to a folder"):
        make_nf4(request)


def test_without_a_cache_of_quantised_bases_nothing_more_is_mounted_and_none_is_named(tmp_path):
    request = body("xeon", Limits(), tmp_path)
    assert not [line for line in request["Env"] if "NF4" in line]
    assert len(request["HostConfig"]["Mounts"]) == 4  # configuration, model, checkpoints, output
    make_nf4(request)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_asked_for_by_its_device_alone(tmp_path):
    request = body("gpu", Limits(), tmp_path)
    assert request["HostConfig"]["DeviceRequests"] == [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    assert "CUDA_VISIBLE_DEVICES=" not in request["Env"]
    assert "CUDA_VISIBLE_DEVICES=" in body("xeon", Limits(), tmp_path)["Env"]


def test_only_names_of_a_list_pass_into_the_container(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PATH", "PYTHONPATH", "LD_PRELOAD", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "mine")
    assert [line for line in body("xeon", Limits(), tmp_path)["Env"] if line.endswith("=mine")] == ["MKL_NUM_THREADS=mine"]


@pytest.mark.parametrize(
    ("limit", "peak", "expected", "needed"),
    [
        (1 << 30, 900 << 20, 4 << 30, 5 << 30),  # what is expected, with a quarter
        (2 << 30, 3 << 30, 1 << 30, 4 << 30),  # the peak was more
        (8 << 30, 7 << 30, 4 << 30, 10 << 30),  # less is expected, but 8g were too little
        (3 << 30, 2 << 30, 0, 5 << 30),  # nothing is known of the model
        (16 << 20, 0, 0, 1 << 30),
    ],
)
def test_the_memory_to_give_is_what_is_expected_or_seen_and_more_than_was_too_little(limit, peak, expected, needed):
    assert needed_memory(limit, peak, expected) == needed


def test_the_memory_that_is_expected_is_the_plans_estimate(tiny_model, tmp_path):
    spec = TrainSpec(model="any", dtype="float32", method="lora", max_seq_len=2048)
    facts = ModelFacts.from_config(json.loads((tiny_model / "config.json").read_text()))
    request = {"container": {"HostConfig": {}}, "channels": {"model": str(tiny_model)}, "hyperparameters": spec.to_hyperparameters()}
    assert expected_memory(request) == peak_memory(spec, facts, "float32").total << 20
    assert expected_memory(request | {"channels": {"model": str(tmp_path)}}) == 0
    assert expected_memory(request | {"hyperparameters": {}}) == 0
    assert expected_memory(request | {"container": {"HostConfig": {"DeviceRequests": []}}}) == 0


def test_out_of_memory_names_phase_step_limit_and_what_to_type():
    step = Step(step=7, of=60, epoch=0.1, loss=1, lr=1, grad_norm=1, tokens_per_second=1, seconds_left=1, memory_mb=3000)
    assert out_of_memory(HANDLE, "", Said(step, "train", expected_memory="about 2,900 MB"), 3 << 30) == (
        "out of memory, killed at its container's limit of 3g, in the phase train, after step 7 of 60, with a peak of 3000 MB, "
        "expected to take about 2,900 MB; a new run with a smaller --batch-rows or --max-seq-len, or with --method qlora, needs less; "
        "give it more:  trimtab resume docker://trim-12345678 --backend-option memory=5g"
    )
    early = out_of_memory(HANDLE, "train was killed with 0.2 GB of memory in use.\nmore", Said(phase="load"), 256 << 20)
    assert "in the phase load, before its first step (train was killed with 0.2 GB of memory in use); a new run with" in early
    assert early.endswith("memory=1g")
    assert "end other work on the machine" in out_of_memory(HANDLE, "", Said(), 0)
