"""The doctor's decisions, from facts that were recorded; its looking, on made-up trees and on this machine; and what it says of a GPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.doctor import gpu as gpu_test
from trimtab.doctor import judge, look, page
from trimtab.doctor.facts import PLACES, Absent, Built, Cpu, Disk, Engine, Facts, Gpu, Memory
from trimtab.doctor.judge import Finding
from trimtab.errors import BackendUnavailable
from trimtab_runtime import selftest

ROOT = Path(__file__).parents[2]

# a processor of each kind, in the words of /proc/cpuinfo
SAPPHIRE_RAPIDS = Cpu("Intel(R) Xeon(R) Processor", frozenset("avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8".split()), 2, 2, 1, 1, 2)
EPYC = Cpu("AMD EPYC", frozenset("avx2 avx512f avx512_bf16 avx512_vnni".split()), 2, 2, 1, 1, 2)
SKYLAKE = Cpu("Intel(R) Xeon(R) Gold 6148", frozenset("avx2 avx512f".split()), 80, 40, 2, 2, 80)

EPYC_CPUINFO = """\
processor\t: {number}
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
physical id\t: {socket}
core id\t\t: {core}
flags\t\t: fpu avx2 avx512f avx512_bf16
"""

# answers of a Docker engine 20.10.24 (Debian), shortened
INFO = {
    "Driver": "overlay2", "CgroupVersion": "1", "MemoryLimit": True, "CpuCfsQuota": True, "CPUSet": True, "PidsLimit": True, "NCPU": 2,
    "MemTotal": 25276129280, "DockerRootDir": "/var/lib/docker", "Runtimes": {"runc": {"path": "runc"}, "io.containerd.runc.v2": {}},
}  # fmt: skip
VERSION = {"Version": "20.10.24+dfsg1", "ApiVersion": "1.41", "Arch": "amd64"}

ENGINE = look.engine_of(INFO, VERSION, "unix:///var/run/docker.sock")
HEALTHY = Facts(
    python="3.11.7",
    trimtab="0.1.0",
    packages={name: "1.0" for names in look.EXTRAS.values() for name in names} | {"trimtab_runtime": "", look.KERNELS: "1.0"},
    cpu=EPYC,
    memory=Memory(24_105, 17_487),
    disks=(Disk("cache", "/home/ann/.cache/trimtab", 59.0, True, "set TRIMTAB_CACHE to a folder on a larger disk"),),
    engine=ENGINE,
    images={"xeon": Built("trimtab-xeon-train:0.1.0-3f2a9c81d0aa", 1_190), "gpu": Built("trimtab-gpu-train:0.1.0-1f2a9c81d0aa", 5_090)},
    gpu=Gpu("580.95.05", ("NVIDIA H100 80GB HBM3 (81559 MiB)",)),
    hub="https://huggingface.co",
    token="HF_TOKEN",
    aws="shared-credentials-file",
    aws_region="eu-west-1",
)


def of(name: str, findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_a_healthy_machine_can_run_jobs_in_every_place():
    findings = judge.judge(replace(HEALTHY, engine=replace(ENGINE, gpu_runtime=True)))
    assert {finding.state for finding in findings} == {"ok"}
    assert not any(finding.stops(place) for finding in findings for place in PLACES)
    assert [finding.remedy for finding in findings] == [""] * len(findings)


@pytest.mark.parametrize("flags", ["fp asimd sve bf16", ""], ids=["Arm", "macOS"])
def test_kernels_that_no_command_could_build_are_not_asked_for(flags):
    changed = replace(HEALTHY, cpu=Cpu("another", frozenset(flags.split())), packages={**HEALTHY.packages, look.KERNELS: None})
    found = of("kernels", judge.judge(changed))
    assert (found.state, found.remedy) == ("ok", "")
    assert "plain torch computes here" in found.found


MISSING = {
    "docker": {"engine": Absent("no Docker engine answers at unix:///var/run/docker.sock", "systemctl start docker"), "images": {}},
    "image xeon": {"images": {"xeon": Absent("there is no xeon image here", "trimtab image build xeon")}},
    "packages docker": {"packages": {**HEALTHY.packages, "docker": None}},
    "packages train": {"packages": {**HEALTHY.packages, "torch": None}},
    "packages aws": {"packages": {**HEALTHY.packages, "boto3": None}},
    "python": {"python": "3.14.0"},
    "disk cache": {"disks": (replace(HEALTHY.disks[0], free_gb=0.4),)},
    "aws": {"aws": ""},
}
STOPPED = {
    "docker": {"docker"},
    "image xeon": {"docker"},
    "packages docker": {"docker"},
    "packages aws": {"sagemaker"},
    "aws": {"sagemaker"},
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_stops_the_places_that_need_it_and_has_a_remedy(name):
    findings = judge.judge(replace(HEALTHY, **MISSING[name]))
    found = of(name, findings)
    assert found.state == "missing"
    assert found.remedy
    stopped = {place for place in PLACES if any(finding.stops(place) for finding in findings)}
    assert stopped == STOPPED.get(name, set(PLACES))
    for place in PLACES:
        assert (name in page.verdict(findings, place)) is (place in stopped)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("cpu", {"cpu": SKYLAKE}, "no bf16 instructions, so training computes in float32"),
        ("cpu", {"cpu": replace(SKYLAKE, flags=frozenset({"avx2"}))}, "avx2 and nothing newer"),
        ("cpu", {"cpu": Cpu()}, "not even avx2"),
        ("kernels", {"packages": {**HEALTHY.packages, look.KERNELS: None}}, "plain torch computes in its place"),
        ("cores", {"cpu": SKYLAKE}, "40 cores, 80 processors, 2 sockets, 2 NUMA nodes"),
        ("cores", {"cpu": replace(SKYLAKE, quota=3.5)}, "allows 3.5 processors' worth of time"),
        ("memory", {"memory": Memory(64_000, 60_000, limit=2_000)}, "the control group allows 2,000 MB"),
        ("memory", {"memory": Memory(4_000, 900)}, "900 of 4,000 MB available"),
        ("disk cache", {"disks": (replace(HEALTHY.disks[0], free_gb=4.0),)}, "4.0 GB free"),
        ("docker", {"engine": replace(ENGINE, lacking=("memory",))}, "it cannot limit memory"),
        ("docker", {"engine": replace(ENGINE, storage="vfs")}, "vfs copies every layer"),
        ("gpu", {}, "the Docker engine has no runtime for it"),
        ("model hub", {"hub_silence": "Name or service not known"}, "does not answer: Name or service not known"),
        ("model hub", {"hub_forbidden": True}, "forbids asking it"),
        ("aws", {"aws_region": ""}, "no region"),
        ("proxies", {"proxies": {"HTTPS_PROXY": "proxy:3128"}}, "asked for 127.0.0.1 too"),
    ],
)
def test_what_could_be_better_is_a_warning_with_a_remedy_and_stops_nothing(name, changes, said):
    findings = judge.judge(replace(HEALTHY, **changes))
    found = of(name, findings)
    assert (found.state, said in found.found, bool(found.remedy)) == ("warning", True, True)
    assert not any(finding.stops(place) for finding in findings for place in PLACES)


@pytest.mark.parametrize(("name", "changes"), [("hub token", {"token": ""}), ("gpu", {"gpu": Gpu()}), ("image gpu", {})])
def test_what_only_some_jobs_need_may_be_missing(name, changes):
    images = {**HEALTHY.images, "gpu": Absent("there is no gpu image here", "trimtab image build gpu")}
    findings = judge.judge(replace(HEALTHY, **{"images": images, **changes}))
    assert of(name, findings).state == "missing"
    assert not any(finding.stops(place) for finding in findings for place in PLACES)


def test_the_processors_instructions_are_told_by_what_they_are_good_for():
    assert "amx_bf16, so bf16 is multiplied in tiles" in judge.cpu(SAPPHIRE_RAPIDS).found
    assert "avx512_bf16 but no AMX" in judge.cpu(EPYC).found
    assert {judge.cpu(one).state for one in (SAPPHIRE_RAPIDS, EPYC)} == {"ok"}


def test_a_proxy_that_leaves_this_machine_alone_is_fine():
    found = judge.proxy({"HTTP_PROXY": "proxy:3128", "NO_PROXY": "localhost, 127.0.0.1"})
    assert (found.state, "proxy:3128" in found.found) == ("ok", True)


def test_cpuinfo_is_read_as_linux_writes_it():
    places = [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 0)]
    text = "\n".join(EPYC_CPUINFO.format(number=number, socket=socket, core=core) for number, socket, core in places)
    found = look.cpu_of(text, nodes=2, usable=3, quota=1.5)
    assert found == Cpu("AMD EPYC", frozenset(["fpu", "avx2", "avx512f", "avx512_bf16"]), 4, 3, 2, 2, 3, 1.5)
    assert look.cpu_of("", usable=2) == Cpu(usable=2)
    assert look.cpu_of("processor\t: 0\nFeatures\t: fp asimd bf16\n\nprocessor\t: 1\n").cores == 2  # a processor that is no x86


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "membership", "limits"),
    [
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/memory.max": "1073741824"}, "0::/a/b\n", (1.5, 1024)),
        ({"cpu.max": "50000 100000\n", "memory.max": "max\n"}, "0::/\n", (0.5, None)),
        ({}, "0::/\n", (None, None)),
        (
            {"memory/x/memory.limit_in_bytes": "2147483648", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            "4:memory:/x\n3:cpu,cpuacct:/\n1:name=systemd:/\n",
            (None, 2048),
        ),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            "3:cpu,cpuacct:/x/y\n",
            (2.0, None),
        ),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, "4:memory:/gone/elsewhere\n", (None, None)),
    ],
)
def test_limits_of_both_kinds_of_control_groups_are_found(files, membership, limits, tmp_path):
    assert look.cgroup_limits(tree(tmp_path, files), membership) == limits


def test_a_token_and_credentials_are_found_without_being_read(tmp_path):
    secret = "hf_abcdefghijklmnopqrstuvwx"
    assert look.token_source({}, tmp_path) == look.aws_source({}, tmp_path) == ""
    assert look.token_source({"HF_TOKEN": secret}, tmp_path) == "HF_TOKEN"
    file = tree(tmp_path, {".cache/huggingface/token": secret, ".aws/credentials": "[default]"}) / ".cache/huggingface/token"
    file.chmod(0)
    assert look.token_source({}, tmp_path) == str(file)
    assert look.aws_source({}, tmp_path) == str(tmp_path / ".aws" / "credentials")
    assert look.aws_source({"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, tmp_path) == "AWS_ACCESS_KEY_ID"


def test_proxies_are_told_without_passwords():
    found = look.proxies({"HTTPS_PROXY": "http://ann:secret@proxy:3128", "no_proxy": "localhost"})
    assert found == {"HTTPS_PROXY": "proxy:3128", "NO_PROXY": "localhost"}


def test_an_engines_answers_are_read():
    assert (
        Engine("unix:///var/run/docker.sock", "20.10.24+dfsg1", "1.41", "overlay2", "v1", "amd64", 2, 24_105, "/var/lib/docker", (), False)
        == ENGINE
    )
    with_gpu = look.engine_of({**INFO, "Runtimes": {"nvidia": {}}, "CPUSet": False}, VERSION, "tcp://there:2375")
    assert (with_gpu.gpu_runtime, with_gpu.lacking) == (True, ("processors",))


def test_cards_are_read_from_the_drivers_answer():
    text = "580.95.05, NVIDIA H100 80GB HBM3, 81559 MiB\n580.95.05, NVIDIA H100 80GB HBM3, 81559 MiB\n"
    assert look.gpu_of(text) == Gpu("580.95.05", ("NVIDIA H100 80GB HBM3 (81559 MiB)",) * 2)
    assert look.gpu_of("No devices were found\n") == Gpu()


def test_extras_are_those_of_the_distribution():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {wanted.partition(">")[0].partition("=")[0].partition("[")[0] for wanted in names} for extra, names in extras.items()}
    for extra, names in look.EXTRAS.items():
        assert set(names) == named[extra] - {"trimtab"}, extra


def test_what_does_not_answer_costs_three_seconds_and_no_more(monkeypatch, tmp_path):
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{address}")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        look.look()  # imports what there is to import
        began = time.monotonic()
        facts = look.look({**os.environ, "HF_ENDPOINT": f"http://{address}"})
        taken = time.monotonic() - began
    assert isinstance(facts.engine, Absent)
    assert "no Docker engine answers" in facts.engine.why
    assert "timed out" in facts.hub_silence or "no answer within 3 s" in facts.hub_silence
    assert taken < 10


def test_the_command_prints_a_line_or_a_json_object_for_each_finding(capsys, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    states = [line.split()[0] for line in captured.out.splitlines()]
    assert set(states) <= {"ok", "warning", "missing"}
    assert captured.err == "process can run jobs here\n"
    assert "hf_abc" not in captured.out + captured.err
    assert "there is one, from HF_TOKEN" in captured.out

    assert main(["doctor", "--backend", "docker", "--json"]) == 1
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert len(facts) >= len(states) - 2
    (engine,) = [fact for fact in facts if fact["name"] == "docker"]
    assert (engine["state"], "127.0.0.1:9" in engine["found"], engine["needed_by"]) == ("missing", True, ["docker"])
    assert captured.err.startswith("docker cannot run jobs here yet: docker")


def test_looking_loads_nothing_that_trains():
    code = "import sys; from trimtab.doctor.look import look; look(); print(*sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DOCKER_HOST": "tcp://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("message", "why", "remedy"),
    [
        ("no Docker engine answers at tcp://a:1: start it (Linux: x)", "no Docker engine answers at tcp://a:1", "start it (Linux: x)"),
        ("there is no gpu image here; build it:  trimtab image build gpu", "there is no gpu image here", "trimtab image build gpu"),
        ("no GPU (with capabilities: [[gpu]]):  install it", "no GPU (with capabilities: [[gpu]])", "install it"),
    ],
)
def test_a_message_is_parted_into_what_is_wrong_and_what_to_type(message, why, remedy):
    assert look.told(BackendUnavailable(message)) == (why, remedy)


def check(name: str, ok: bool, device: str = "cuda", found: str = "fine") -> str:
    return json.dumps({"check": name, "ok": ok, "found": found, "device": device, "seconds": 0.1})


def test_a_self_test_that_ran_on_a_gpu_is_believed():
    lines = ["a warning of torch's", check("gpu", True, "cuda"), check("product", True), check("nf4", True), check("training", True)]
    findings = gpu_test.read(0, lines)
    assert {finding.state for finding in findings} == {"ok"}
    assert page.verdict(findings, "docker", gpu=True) == "the GPU image works on this GPU"


@pytest.mark.parametrize(
    ("code", "lines", "said"),
    [
        (1, [check("gpu", False, "none", "no GPU ran: torch.cuda.is_available() is False")], "nothing ran on a GPU: no GPU ran"),
        (0, [check("product", True, "cpu"), check("training", True, "cpu")], "nothing ran on a GPU"),
        (125, ["exec: python: not found"], "nothing ran on a GPU: its last lines were: exec: python"),
        (1, [check("gpu", True), check("product", False, found="off by 3 %")], "off by 3 %"),
        (139, [check("gpu", True), check("product", True), "Segmentation fault"], "exit code 139"),
    ],
)
def test_a_self_test_that_did_not_prove_it_stops_the_docker_backend(code, lines, said):
    findings = gpu_test.read(code, lines)
    stopping = [finding for finding in findings if finding.stops("docker")]
    assert said in " ".join(finding.found for finding in stopping)
    assert all(finding.remedy for finding in stopping)
    assert "not proven" in page.verdict(findings, "docker", gpu=True)


def test_the_self_test_passes_on_this_cpu_and_refuses_a_gpu_that_is_not_there(capfd):
    assert selftest.main([]) == 0
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(fact["check"], fact["ok"], fact["device"]) for fact in said] == [
        (name, True, "cpu") for name in ("product", "nf4", "training")
    ]
    assert selftest.main(["--cuda"]) == 2


def test_an_engine_without_a_gpu_runs_nothing_and_leaves_nothing(client, base_image):
    if client.info()["Runtimes"].get("nvidia"):
        pytest.skip("this engine has a GPU runtime: the GPU test proves it")
    with pytest.raises(BackendUnavailable, match=r"the engine gives containers no GPU .*NVIDIA Container Toolkit"):
        gpu_test.run(client, base_image)
    assert client.containers.list(all=True, filters={"label": gpu_test.LABEL}) == []


@pytest.mark.gpu
def test_the_gpu_image_works_on_a_gpu(capsys):
    code = main(["doctor", "--gpu"])
    captured = capsys.readouterr()
    if gpu_test.NOTHING_RAN in captured.out:
        assert code == 1
        assert captured.err == "the GPU image is not proven here: gpu test\n"
        pytest.skip(captured.out.strip())
    assert code == 0, captured.out
