"""A run on two machines is one run: two containers on a network of their own, with one status, one log, one end, and nothing left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from contract.backend_contract import PATIENCE, finish, until
from support.job_tree import losses, train_here
from trimtab.backends.base import RunHandle, RunState
from trimtab.backends.docker import DockerBackend
from trimtab.backends.life import Ended
from trimtab.backends.nodes import first_failed
from trimtab.backends.process import ProcessBackend
from trimtab.errors import BackendError, BackendUnavailable, SpecError
from trimtab.events import Checkpoint, Step
from trimtab.layout import JobDir
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged

pytestmark = pytest.mark.usefixtures("volumes_before")


@pytest.fixture
def two(small_job: JobSpec, staged: Staged) -> JobSpec:
    return small_job.model_copy(update={"train": staged.train, "nodes": 2})


@pytest.fixture
def endless(two: JobSpec) -> JobSpec:
    train = two.train.model_copy(update={"max_steps": None, "epochs": 10_000, "save_every_steps": 5})
    return two.model_copy(update={"train": train})


@pytest.fixture
def backend(tmp_path: Path, xeon_image: str, client: docker.DockerClient) -> Iterator[DockerBackend]:
    found = DockerBackend(tmp_path / "home", image=xeon_image, client=client)
    yield found
    for record in (tmp_path / "home" / "runs").glob("*/run.json"):
        handle = RunHandle("docker", record.parent.name)
        for container in found.engine.containers(handle):
            found.engine.remove(container.id)
        found.engine.remove_networks(handle)


def names(client: docker.DockerClient, handle: RunHandle) -> tuple[list[str], list[str]]:
    """The run's containers and networks."""
    containers = client.containers.list(all=True, filters={"label": f"trimtab.run={handle.id}"})
    return sorted(found.name for found in containers), [found.name for found in client.networks.list() if found.name == handle.id]


def until_step(backend: DockerBackend, handle: RunHandle, number: int) -> None:
    def there() -> bool:
        status = backend.status(handle)
        assert not status.done, status.reason
        return status.step is not None and status.step.step >= number

    until(there, f"step {number} of {handle}")


def test_two_containers_learn_what_one_learns_with_twice_the_rows(backend, two, staged, client, tmp_path):
    backend.check(two)
    handle = backend.submit(two, staged.channels)
    assert names(client, handle) == ([handle.id, f"{handle.id}-algo-2"], [handle.id])
    network = client.networks.get(handle.id)
    assert network.attrs["Internal"]
    followed = list(backend.logs(handle, follow=True))
    assert names(client, handle) == ([], [])  # whoever saw the end has put everything away
    assert backend.status(handle).state is RunState.SUCCEEDED

    lines = list(backend.logs(handle))
    assert sorted(lines) == sorted(followed)
    assert any(line.startswith("[algo-2] nodes: this is algo-2, one of algo-1, algo-2") for line in lines)
    assert any(line.startswith(f"network {handle.id}: of this run alone") for line in lines)
    assert not any(line.startswith("[algo-2] step=") for line in lines)

    # the same rows in one machine's steps
    alone = JobDir(tmp_path / "alone").make()
    wide = two.train.model_copy(update={"batch_rows": 2 * two.train.batch_rows})
    alone.hyperparameters.write_text(json.dumps(wide.to_hyperparameters()))
    for name, channel in staged.channels.items():
        alone.channel(name).symlink_to(channel)
    train_here(alone)
    steps = [event.loss for event in Run(handle, backend).events() if isinstance(event, Step)]
    assert len(steps) == 6
    assert steps == pytest.approx(list(losses(alone).values()), abs=1e-5)
    assert Run(handle, backend).artifact().spec == two.train
    backend.remove(handle)
    assert not (backend.home / "runs" / handle.id).exists()


def test_a_stop_reaches_both_and_a_resume_goes_on_from_the_checkpoint_of_the_first(backend, endless, staged, client):
    handle = backend.submit(endless, staged.channels)
    until_step(backend, handle, 3)
    backend.stop(handle)
    status = backend.status(handle)
    assert (status.state, status.reason) == (RunState.STOPPED, "stopped by SIGTERM, after a checkpoint")
    saved = [event.step for event in Run(handle, backend).events() if isinstance(event, Checkpoint)][-1]
    assert saved == status.step.step
    assert names(client, handle) == ([], [])

    with pytest.raises(SpecError, match="leave network=bridge out"):
        DockerBackend(backend.home, client=client, network="bridge").resume(handle)
    backend.resume(handle)
    until_step(backend, handle, saved + 2)
    lines = list(backend.logs(handle))
    assert [line for line in lines if f"going on after step {saved} from" in line and line.startswith("[algo-2] ")]
    numbers = [event.step for event in Run(handle, backend).events() if isinstance(event, Step)]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("killed", ["algo-1", "algo-2"])
def test_a_machine_that_dies_fails_the_run_with_its_reason(backend, endless, staged, client, killed):
    handle = backend.submit(endless, staged.channels)
    until_step(backend, handle, 3)
    client.api.kill(handle.id if killed == "algo-1" else f"{handle.id}-algo-2")
    began = time.monotonic()
    status = finish(backend, handle)
    assert time.monotonic() - began < 60  # without an end of its own it would wait for minutes
    assert status.state is RunState.FAILED
    assert status.reason.startswith("algo-2: " * (killed == "algo-2") + "ended without a word (killed by SIGKILL from outside)")
    assert f"trimtab resume {handle}" in status.reason
    assert names(client, handle) == ([], [])
    left = JobDir(backend.home / "runs" / handle.id / ("nodes/algo-2" if killed == "algo-1" else ""))
    assert left.cause().startswith(f"lost {killed}: its connection was closed")


def test_a_machine_that_is_not_met_ends_with_the_one_that_failed(backend, two, staged, client, tmp_path):
    """The second one cannot read its configuration; the first one would wait for it for minutes."""
    handle = backend.submit(two, staged.channels)
    backend.stop(handle)
    (backend.home / "runs" / handle.id / "nodes" / "algo-2" / "input" / "config" / "resourceconfig.json").write_text("{")
    backend.resume(handle)
    began = time.monotonic()
    status = finish(backend, handle)
    assert time.monotonic() - began < PATIENCE / 2
    assert status.state is RunState.FAILED
    assert status.reason.startswith("algo-2: ")
    assert "does not say who trains" in status.reason
    assert names(client, handle) == ([], [])


def test_what_cannot_start_leaves_neither_container_nor_network(backend, two, staged, client):
    nowhere = DockerBackend(backend.home, image=backend.image, client=client, cpus="512")
    with pytest.raises(BackendError, match="cpus"):
        nowhere.submit(two, staged.channels, "trim-0000dead")
    assert names(client, RunHandle("docker", "trim-0000dead")) == ([], [])


def test_a_network_whose_run_was_deleted_goes_with_the_next_list(backend, two, staged, client, tmp_path):
    handle = backend.submit(two, staged.channels)
    for container in backend.engine.containers(handle):
        backend.engine.remove(container.id)
    (backend.home / "runs").rename(tmp_path / "elsewhere")
    assert names(client, handle) == ([], [handle.id])
    backend.runs()
    assert names(client, handle) == ([], [])


def test_what_is_rendered_for_two_is_plain_and_repeatable(backend, two, staged):
    request = backend.render(two, staged.channels, "trim-12345678")
    assert json.loads(json.dumps(request)) == request == backend.render(two, staged.channels, "trim-12345678")
    assert list(request["others"]) == ["algo-2"]
    assert request["network"]["Internal"] is True
    for host, body in {"algo-1": request["container"], **request["others"]}.items():
        assert body["Hostname"] == host
        assert body["HostConfig"]["NetworkMode"] == "trim-12345678"
        assert body["NetworkingConfig"] == {"EndpointsConfig": {"trim-12345678": {"Aliases": [host]}}}
        channels = [mount for mount in body["HostConfig"]["Mounts"] if mount["Target"].startswith("/opt/ml/input/")]
        assert all(mount["ReadOnly"] for mount in channels)
    assert "others" not in backend.render(two.model_copy(update={"nodes": 1}), staged.channels, "trim-12345678")


def test_several_machines_are_refused_where_they_cannot_be(two, xeon_image, client, tmp_path):
    with pytest.raises(BackendUnavailable, match="--backend docker"):
        ProcessBackend(tmp_path).check(two)
    with pytest.raises(SpecError, match="leave network=bridge out"):
        DockerBackend(tmp_path, image=xeon_image, client=client, network="bridge").check(two)


def test_the_machine_to_blame_is_the_one_that_failed_by_itself():
    def ended(code: int | None, second: int) -> Ended:
        return Ended(exit_code=code, at=f"2026-01-01T00:00:{second:02d}.123456789Z")

    fine = {"algo-1": ended(0, 9), "algo-2": ended(0, 8)}
    assert first_failed(fine, {"algo-1": "", "algo-2": ""}) is None
    assert first_failed({"algo-1": ended(143, 9), "algo-2": ended(143, 8)}, {"algo-1": "", "algo-2": ""}) is None
    first_noticed = {"algo-1": ended(1, 1), "algo-2": ended(137, 2)}
    assert first_failed(first_noticed, {"algo-1": "lost algo-2: its connection was closed", "algo-2": ""}) == "algo-2"
    assert first_failed(first_noticed, {"algo-1": "algo-2 failed: no rows", "algo-2": "no rows"}) == "algo-2"
    ended_by_us = {"algo-1": ended(137, 5), "algo-2": ended(1, 2)}
    assert first_failed(ended_by_us, {"algo-1": "", "algo-2": "no rows"}) == "algo-2"
    both = {"algo-1": "lost algo-2: it was silent", "algo-2": "lost algo-1: it was silent"}
    assert first_failed({"algo-1": ended(1, 3), "algo-2": ended(1, 4)}, both) == "algo-1"


def test_nothing_is_left_behind(left_behind):
    assert left_behind() == []
