"""The images, built in a real engine: what is in them, who they run as, how they end, and what goes wrong while one is built or pushed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.containers import SOMEONE, container, ended, own, small_image
from support.job_tree import make_job
from support.job_tree import run as run_here
from trimtab import images
from trimtab.cli import main
from trimtab.errors import BackendError, BackendUnavailable
from trimtab.images import Plan
from trimtab.layout import JobDir
from trimtab_runtime.entrypoint import USER

if TYPE_CHECKING:
    from docker import DockerClient


def owners(job: JobDir) -> set[int]:
    return {path.stat().st_uid for folder in (job.model, job.checkpoints, job.root / "output") for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> JobDir:
    """A job of three steps whose model lies in its own tree."""
    made = make_job(tmp_path / "job", tiny_model, max_steps=3)
    made.channel("model").unlink()
    shutil.copytree(tiny_model, made.channel("model"))
    run_here(made, "prepare")
    return made


def test_the_xeon_image_is_small_and_holds_what_it_says(client: DockerClient, xeon_image: str) -> None:
    found = images.inspect(xeon_image, client)
    assert found.size <= 1.5e9
    assert found.current
    assert {"version", "spec_version", "source", "context", "device", "target", "base"} == set(found.labels)
    assert found.labels["source"] == Plan.of("xeon").source
    assert not client.api.inspect_image(xeon_image)["Config"].get("ExposedPorts")
    assert images.find("xeon", client=client).labels["source"] == found.labels["source"]
    look = (
        "import importlib.util as u, json, os, shutil, torch; lib = os.path.dirname(u.find_spec('bitsandbytes').origin)\n"
        "print(json.dumps({'compilers': [c for c in ('cc', 'gcc', 'g++', 'clang', 'make') if shutil.which(c)],\n"
        " 'not for a job': [m for m in ('pandas', 'docker', 'boto3', 'pip', 'triton', 'nvidia') if u.find_spec(m)],\n"
        " 'gpu libraries': [f for f in os.listdir(lib) if 'cuda' in f and f.endswith('.so')], 'cuda': torch.version.cuda}))"
    )
    with container(client, xeon_image, entrypoint=["python", "-P", "-c", look], user=str(SOMEONE)) as started:
        said = json.loads(ended(started, 0).splitlines()[-1])
    assert said == {"compilers": [], "not for a job": [], "gpu libraries": [], "cuda": None}


def test_the_xeon_image_computes_with_the_kernels_that_are_here(client: DockerClient, xeon_image: str) -> None:
    look = "from trimtab_runtime.xeon import kernels; print(kernels.path().value)"
    with container(client, xeon_image, entrypoint=["python", "-P", "-c", look], user=str(SOMEONE)) as started:
        said = ended(started, 0).splitlines()[-1]
    try:
        expected = import_module("trimtab_xeon").best()
    except (ImportError, AttributeError):  # the second: the folder of its sources, where it is not installed
        expected = "off"
    assert said == expected


def test_nothing_is_built_when_nothing_changed(client: DockerClient, xeon_image: str, base_image: str) -> None:
    said: list[str] = []
    assert images.build("xeon", base=base_image, client=client, say=said.append) == xeon_image
    assert said == [f"image: {xeon_image} is there"]


def test_any_user_runs_a_job_and_owns_what_it_leaves(client: DockerClient, xeon_image: str, job: JobDir) -> None:
    if os.getuid() == 0:
        own(job.root, SOMEONE)
    with container(client, xeon_image, job, user=f"{SOMEONE}:{SOMEONE}", cap_drop=["ALL"]) as started:
        said = ended(started, 0)
    assert "step=3/3" in said
    assert "entrypoint:" not in said
    assert owners(job) == {SOMEONE}


@pytest.mark.skipif(os.getuid() != 0, reason="only root may read what the container's user wrote")
def test_root_gives_the_folders_to_a_user_without_powers(client: DockerClient, xeon_image: str, job: JobDir) -> None:
    with container(client, xeon_image, job) as started:
        said = ended(started, 0)
    assert "step=3/3" in said
    assert owners(job) == {USER}


@pytest.mark.skipif(os.getuid() != 0, reason="a user's folders are closed to a root without powers")
def test_a_root_that_cannot_become_another_says_so_and_goes_on(client: DockerClient, xeon_image: str, job: JobDir) -> None:
    with container(client, xeon_image, job, cap_drop=["ALL"]) as started:
        said = ended(started, 0)
    assert "stays root" in said
    assert owners(job) == {0}


def test_a_stop_leaves_a_checkpoint_and_an_orphan_leaves_nothing(client: DockerClient, xeon_image: str, job: JobDir) -> None:
    given = json.loads(job.hyperparameters.read_text())
    job.hyperparameters.write_text(json.dumps({**given, "max_steps": "null", "epochs": "10000"}))
    if os.getuid() == 0:
        own(job.root, SOMEONE)
    with container(client, xeon_image, job, user=f"{SOMEONE}:{SOMEONE}") as started:
        until = time.monotonic() + 300
        while b"step=" not in started.logs():
            assert time.monotonic() < until, started.logs()
            time.sleep(0.2)
        started.exec_run(["sh", "-c", "(sleep 0.3; :) & exit"])
        time.sleep(1)
        states = started.exec_run(["sh", "-c", "cat /proc/[0-9]*/stat"]).output.decode()
        assert not [line for line in states.splitlines() if " Z " in line]
        began = time.monotonic()
        started.stop(timeout=120)
        assert time.monotonic() - began < 60
        ended(started, 128 + signal.SIGTERM)
    assert list(job.checkpoints.glob("*/manifest.json"))


def test_a_tag_that_moved_is_refused(client: DockerClient, xeon_image: str) -> None:
    name, _, tag = xeon_image.rpartition(":")
    moved = f"{name}:{tag.rpartition('-')[0]}-{'0' * 12}"
    client.api.tag(xeon_image, name, moved.rpartition(":")[2])
    try:
        with pytest.raises(BackendUnavailable, match=r"was moved.*trimtab image build xeon --force$"):
            images.check(images.inspect(moved, client), client)
    finally:
        client.images.remove(moved, noprune=True)


def test_a_base_without_the_right_python_is_named(client: DockerClient, base_image: str) -> None:
    for line in ("RUN rm -f $(command -v python)", "RUN printf '#!/bin/sh\\nexit 86\\n' >/usr/local/bin/python"):
        with (
            small_image(client, base_image, line) as bad,
            pytest.raises(BackendError, match=rf"base image {bad} has no Python 3.11 or 3.12: .* --base python:3.11"),
        ):
            images.build("xeon", base=bad, client=client, say=lambda line: None)


def test_a_base_out_of_reach_is_named(client: DockerClient) -> None:
    with pytest.raises(BackendError, match=r"is the base image registry\.invalid/none:1 here, or within reach\?.* --base IMAGE$"):
        images.build("xeon", base="registry.invalid/none:1", client=client, say=lambda line: None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a disk to fill and start an engine on it")
def test_a_full_disk_is_named(base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of its own on a file system of 24 MB, which the build's context fills."""
    disk, where = tmp_path / "disk", Path("/run") / f"trimtab-full-{os.getpid()}"
    disk.mkdir()
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    # in a network of its own: with --bridge=none it would remove the bridge of the engine that the others use
    command = ["unshare", "--net", "dockerd", "--data-root", str(disk), "--exec-root", str(where / "exec"), "--pidfile", str(where / "pid")]
    command += ["--host", f"unix://{where}/socket", "--bridge=none", "--iptables=false"]
    with (where / "log").open("w") as log:
        second = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{where}/socket")
        until = time.monotonic() + 60
        while "API listen" not in (where / "log").read_text():
            assert second.poll() is None, (where / "log").read_text()
            assert time.monotonic() < until, (where / "log").read_text()
            time.sleep(0.1)
        left = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * (left - 200_000))
        with (
            contextlib.closing(images.engine()) as tiny,
            pytest.raises(BackendError, match=r"the disk of the Docker engine is full: .*docker system prune.*trimtab image build xeon$"),
        ):
            images.build("xeon", base=base_image, client=tiny, say=lambda line: None)
    finally:
        second.terminate()
        second.wait(60)
        subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(where, ignore_errors=True)


@pytest.fixture(scope="module")
def registry(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's docker-registry on a loopback port, unpacked and not installed."""
    home = tmp_path_factory.mktemp("registry")
    got = subprocess.run(["apt-get", "download", "docker-registry"], cwd=home, capture_output=True, text=True, check=False)
    assert got.returncode == 0, f"docker-registry could not be had: run apt-get update, or see the message: {got.stderr}"
    subprocess.run(["dpkg", "-x", str(next(home.glob("*.deb"))), str(home / "root")], check=True)
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(home / "data")}}, "http": {"addr": f"127.0.0.1:{port}"}}
    (home / "config.yml").write_text(json.dumps(settings))
    with (home / "log").open("w") as log:
        server = subprocess.Popen([home / "root/usr/bin/docker-registry", "serve", home / "config.yml"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5):
                break
            assert time.monotonic() < until, (home / "log").read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def test_an_image_is_pushed_under_its_own_tag(client: DockerClient, registry: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A small image with our labels: a push does the same with a large one. It is asked for by tag, and as the newest of its kind."""
    labels = {f"{images.LABEL}{name}": value for name, value in Plan.of("xeon", "serve").labels().items()}
    with small_image(client, "scratch", "COPY Dockerfile /", "LABEL trimtab-test=images", labels=labels) as tag:
        try:
            assert main(["image", "push", "xeon", f"{registry}/team/trimtab", "--target", "serve"]) == 0
            captured = capsys.readouterr()
            assert captured.out.startswith(f"{registry}/team/trimtab:{tag.rpartition(':')[2]}@sha256:")
            assert "Pushed" in captured.err
            assert main(["image", "push", tag, f"{registry}/team/trimtab", "--json"]) == 0
            captured = capsys.readouterr()
            pushed = json.loads(captured.out)
            assert pushed["name"] == f"{registry}/team/trimtab:{tag.rpartition(':')[2]}"
            assert "Layer already exists" in captured.err
            with urllib.request.urlopen(f"http://{registry}/v2/team/trimtab/tags/list", timeout=10) as answer:
                assert json.load(answer)["tags"] == [tag.rpartition(":")[2]]
            pulled = client.images.pull(f"{registry}/team/trimtab@{pushed['digest']}")
            assert pulled.labels["trimtab-test"] == "images"
        finally:
            client.images.remove(f"{registry}/team/trimtab:{tag.rpartition(':')[2]}", force=True)


def test_a_registry_that_is_not_there_is_named(client: DockerClient) -> None:
    labels = {f"{images.LABEL}{name}": value for name, value in Plan.of("xeon").labels().items()}
    with small_image(client, "scratch", "COPY Dockerfile /", labels=labels) as tag:
        try:
            with pytest.raises(BackendError, match=r"could not be pushed to 127\.0\.0\.1:1 .*connection refused"):
                images.push(tag, "127.0.0.1:1/team/trimtab", client=client, say=lambda line: None)
        finally:
            client.images.remove(f"127.0.0.1:1/team/trimtab:{tag.rpartition(':')[2]}", noprune=True)


def test_the_commands(xeon_image: str, base_image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "build", "xeon", "--base", base_image]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{xeon_image}\n"
    assert f"{xeon_image} is there" in captured.err
    assert main(["image", "list", "--json"]) == 0
    listed = {found["tag"]: found for found in json.loads(capsys.readouterr().out)}
    assert listed[xeon_image]["current"]
    assert main(["image", "list"]) == 0
    assert f"{xeon_image} " in capsys.readouterr().out
    assert main(["image", "inspect", "xeon", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # of images on several bases the newest
    assert found["labels"]["source"] == listed[xeon_image]["labels"]["source"]
    assert main(["image", "inspect", xeon_image]) == 0
    assert "spec_version" in capsys.readouterr().out
    for absent in ("trimtab-xeon-train:none", "No Such Name"):
        assert main(["image", "inspect", absent]) == 1
        assert capsys.readouterr().err.rstrip().endswith("trimtab image list")


def test_the_gpu_image_builds_and_runs_its_self_test_and_a_job_on_the_cpu(client: DockerClient, base_image: str, job: JobDir) -> None:
    """It holds CUDA builds; that a GPU does the work is for `trimtab doctor --gpu` to show, where there is one: nothing here ran on one."""
    tag = images.tag_of("gpu", base=base_image)
    there = any(found.tag == tag for found in images.installed(client))
    try:
        assert images.build("gpu", base=base_image, client=client, say=lambda line: None) == tag
        assert images.inspect(tag, client).size <= 6e9
        look = "import torch, bitsandbytes, peft; assert torch.version.cuda and not torch.cuda.is_available(); print(torch.version.cuda)"
        with container(client, tag, entrypoint=["python", "-P", "-c", look], user=str(SOMEONE)) as started:
            assert ended(started, 0).splitlines()[-1].startswith("13.")
        self_test = ["python", "-P", "-m", "trimtab_runtime.selftest"]  # what `trimtab doctor --gpu` runs with --gpu
        with container(client, tag, entrypoint=self_test, user=str(SOMEONE), cap_drop=["ALL"]) as started:
            checks = [json.loads(line) for line in ended(started, 0).splitlines() if line.startswith("{")]
        assert [(one["check"], one["ok"], one["device"]) for one in checks] == [
            (name, True, "cpu") for name in ("product", "nf4", "training")
        ]
        if os.getuid() == 0:
            own(job.root, SOMEONE)
        with container(client, tag, job, user=f"{SOMEONE}:{SOMEONE}") as started:
            assert "this run was asked to compute on a GPU and torch sees none" in ended(started, 1)
        on_the_cpu = {"OMP_NUM_THREADS": "1", "TRIMTAB_DEVICE": "xeon"}
        with container(client, tag, job, user=f"{SOMEONE}:{SOMEONE}", environment=on_the_cpu) as started:
            assert "step=3/3" in ended(started, 0)
    finally:
        if not there:
            with contextlib.suppress(BackendUnavailable):
                client.images.remove(images.inspect(tag, client).id, force=True)
