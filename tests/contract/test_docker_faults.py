"""What goes wrong around a Docker run, each told with what to type next: memory, GPUs, images, engines; and that nothing is left."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from contract.backend_contract import finish, until
from support.own_engine import OwnEngine
from support.script_runs import ANY_JOB, MINE, SCRIPT_IMAGE, derived, no_engine_there, printed
from trimtab.backends import load_backend
from trimtab.backends.base import RunState
from trimtab.backends.docker import DockerBackend
from trimtab.backends.engine import Engine
from trimtab.errors import BackendError, BackendUnavailable

pytestmark = pytest.mark.usefixtures("volumes_before")


def test_out_of_memory_is_told_with_the_limit(run_script):
    backend, handle = run_script("word=aaaaaaaa; while :; do word=$word$word; done", memory="16m")
    reason = finish(backend, handle).reason
    assert "out of memory, killed at its container's limit of 16m, before its first step" in reason
    assert reason.endswith(f"trimtab resume {handle} --backend-option memory=1g")


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        ({"network": "nowhere"}, "xeon", "docker network ls"),
        ({"cpus": "512"}, "xeon", "choose others with  --backend-option cpus="),
        ({}, "gpu", "no GPU runtime: install the NVIDIA Container Toolkit"),
    ],
)
def test_what_the_engine_refuses_is_told_with_a_remedy_and_leaves_nothing(
    channels, tmp_path, client, script_image, settings, device, said, request
):
    if device == "gpu":
        request.getfixturevalue("no_gpu")
    image = script_image if device == "xeon" else derived(client, f"{MINE}gpu:latest", f"FROM {script_image}", "LABEL trimtab.device=gpu")
    backend = DockerBackend(tmp_path / "home", image=image, client=client, **settings)
    with pytest.raises(BackendError, match=said):
        backend.submit(ANY_JOB.model_copy(update={"device": device}), channels)
    assert list((tmp_path / "home" / "runs").iterdir()) == []
    assert not [container for container in Engine(client).containers() if tmp_path in container.folder.parents]
    if device == "gpu":
        client.images.remove(image)


def test_a_gpu_that_is_not_there_is_refused_before_staging(client, no_gpu):
    with pytest.raises(BackendUnavailable, match="--device xeon"):
        DockerBackend(client=client).check(ANY_JOB.model_copy(update={"device": "gpu"}))


def test_cpus_that_are_not_there_are_refused_before_staging(client, script_image):
    with pytest.raises(BackendUnavailable, match="has the CPUs 0-"):
        DockerBackend(image=script_image, cpus="0-4096", client=client).check(ANY_JOB)


def test_no_engine_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with no_engine_there(), pytest.raises(BackendUnavailable, match=r"unix:///nowhere/docker\.sock: start it"):
        load_backend("docker").check(ANY_JOB)


@pytest.mark.parametrize(
    ("tag", "lines", "said"),
    [
        (f"{MINE}absent:1", [], "trimtab image list"),
        (f"{MINE}version:1", ["LABEL trimtab.spec_version=99"], "spec_version 99.*trimtab image build"),
        (f"{MINE}foreign:1", ["LABEL trimtab.device=gpu"], "--device gpu"),
        ("trimtab-xeon-train:0.0.0-0123456789ab", ["LABEL trimtab.context=beef"], "was moved.*trimtab image build"),
    ],
    ids=["absent", "version", "device", "moved"],  # the names hold a process id, and two lanes must collect the same
)
def test_an_image_that_does_not_fit_is_refused_before_staging(client, script_image, tag, lines, said):
    if lines:
        derived(client, tag, f"FROM {script_image}", *lines)
    with pytest.raises(BackendUnavailable, match=said):
        DockerBackend(image=tag, client=client).check(ANY_JOB)
    if lines:
        client.images.remove(tag)


def test_a_resume_without_the_image_says_how_to_name_another(run_script, client, script_image):
    backend, handle = run_script("exit 0")
    finish(backend, handle)
    gone = DockerBackend(backend.home, client=client)
    record = json.loads((backend.home / "runs" / handle.id / "run.json").read_text())
    record["request"]["container"]["Image"] = "sha256:" + "0" * 64
    (backend.home / "runs" / handle.id / "run.json").write_text(json.dumps(record))
    with pytest.raises(BackendError, match="--backend-option image="):
        gone.resume(handle)
    assert gone.status(handle).state is RunState.FAILED
    backend.resume(handle)  # it names its image
    assert "without a word" in finish(backend, handle).reason


def test_a_killed_engine_is_told_while_a_run_is_watched_and_the_run_can_go_on_when_it_is_back(client, script_image, channels, tmp_path):
    assert os.getuid() == 0, "an engine of its own needs root: run these tests as root, as .ci/run does"
    engine = OwnEngine(Path(tempfile.mkdtemp(prefix="tt-")))
    try:
        with no_engine_there():
            engine.start()
        engine.client.images.load(client.images.get(script_image).save(named=script_image))
        (channels["train"] / "script").write_text("echo going; while :; do sleep 0.2; done")
        backend = DockerBackend(tmp_path / "home", image=script_image, client=engine.client)
        handle = backend.submit(ANY_JOB, channels)
        following = backend.logs(handle, follow=True)
        until(lambda: next(following) == "going", "its word")
        engine.kill()
        for look in (lambda: list(following), lambda: backend.status(handle), lambda: backend.stop(handle), backend.runs):
            with no_engine_there(), pytest.raises(BackendUnavailable, match="start it"):
                look()
        with no_engine_there():
            engine.start()
        status = finish(backend, handle)
        assert status.state is RunState.FAILED
        assert f"trimtab resume {handle}" in status.reason
        assert printed(backend, handle) == ["going"]
        backend.resume(handle)
        until(lambda: list(backend.logs(handle)).count("going") == 2, "its word again")
        backend.engine.client.api.kill(handle.id)
        finish(backend, handle)
        assert engine.client.containers.list(all=True) == []
    finally:
        engine.remove()


def test_nothing_is_left_behind(left_behind, client):
    assert left_behind(f"/tmp/{MINE}") == []
    tags = {tag for image in client.images.list() for tag in image.tags if tag.startswith(MINE)}
    assert tags <= {SCRIPT_IMAGE}  # that one is the session's
