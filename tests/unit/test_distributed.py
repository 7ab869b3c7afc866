"""Who takes part is read from the platform's file, and who does not come or goes away is named."""

from __future__ import annotations

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from support.two_nodes import free_port
from trimtab.errors import SpecError
from trimtab.estimate import epoch_steps, optimiser_steps
from trimtab.ledger import Account, Ledger
from trimtab.plan import plan
from trimtab.spec import TrainSpec
from trimtab_runtime.distributed import ALONE, HostLost, Place, join, lost_host, read_place
from trimtab_runtime.recipe import rows_of_step

# as SageMaker writes it for two machines
WRITTEN = {
    "current_group_name": "homogeneousCluster",
    "current_host": "algo-2",
    "current_instance_type": "ml.m7i.8xlarge",
    "hosts": ["algo-1", "algo-2"],
    "instance_groups": [
        {"hosts": ["algo-1", "algo-2"], "instance_group_name": "homogeneousCluster", "instance_type": "ml.m7i.8xlarge"},
    ],
    "network_interface_name": "eth0",
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "resourceconfig.json"
    path.write_text(json.dumps({**WRITTEN, **changes}))
    return path


def test_the_platforms_file_says_which_machine_this_is(tmp_path: Path) -> None:
    place = read_place(written(tmp_path), {})
    assert place == Place("algo-2", ("algo-1", "algo-2"), "eth0", 7777)
    assert (place.rank, place.world) == (1, 2)
    assert read_place(written(tmp_path), {"MASTER_PORT": "29500"}).port == 29500
    shuffled = read_place(written(tmp_path, hosts=["algo-3", "algo-2", "algo-10", "algo-1"]), {})
    assert shuffled.hosts == ("algo-1", "algo-10", "algo-2", "algo-3")  # every machine must count alike


def test_without_the_file_or_with_one_host_a_machine_is_alone(tmp_path: Path) -> None:
    assert read_place(tmp_path / "resourceconfig.json").world == 1
    place = read_place(written(tmp_path, current_host="algo-1", hosts=["algo-1"]), {})
    said: list[str] = []
    with join(place, said.append) as team:
        assert (team.rank, team.world, team.is_first) == (0, 1, True)
    assert said == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"current_host": "algo-3"}, "names this machine algo-3, which is not among its hosts algo-1, algo-2"),
        ({"hosts": 2}, "does not say who trains"),
        ({"hosts": []}, "not among its hosts"),
    ],
)
def test_a_file_that_does_not_say_who_trains_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        read_place(written(tmp_path, **changes), {})


def test_a_damaged_file_or_port_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(SpecError, match="MASTER_PORT is a number"):
        read_place(path, {"MASTER_PORT": "http"})
    path.write_text("{")
    with pytest.raises(SpecError, match=r"resourceconfig\.json does not say who trains"):
        read_place(path, {})


def test_alone_everything_is_given_back_as_it_came() -> None:
    parameter = nn.Parameter(torch.ones(2))
    ALONE.begin_alike([parameter])
    ALONE.add_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.add_up(3, 0.5) == (3, 0.5)
    assert ALONE.any(True, False) == (True, False)
    assert ALONE.files_of_first({"a": b"1"}) == {"a": b"1"}
    assert ALONE.first_word("why") == "why"


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """torch writes pages about a host that does not come."""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("host", "absent"), [("127.0.0.1", "127.0.0.2, 127.0.0.3"), ("127.0.0.2", "127.0.0.1")])
def test_a_host_that_does_not_come_is_named(host: str, absent: str) -> None:
    place = Place(host, ("127.0.0.1", "127.0.0.2", "127.0.0.3"), "lo", free_port())
    with pytest.raises(HostLost, match=rf"^{absent} did not come within 0\.5 s: see its own log\. Every host must reach 127\.0\.0\.1:"):
        join(place, lambda line: None, meeting=0.5)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.usefixtures("quiet")
def test_hosts_with_different_numbers_of_ranks_are_told_at_once() -> None:
    hosts, port = ("127.0.0.1", "127.0.0.2"), free_port()
    places = [Place("127.0.0.1", hosts, "lo", port, 2, number) for number in range(2)] + [Place("127.0.0.2", hosts, "lo", port, 1)]

    def reason(place: Place) -> str:
        with pytest.raises(HostLost) as refused:
            join(place, lambda line: None, meeting=30)
        return str(refused.value)

    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        said = set(pool.map(reason, places))
    assert said == {
        "the hosts have different numbers of ranks: 127.0.0.1 2, 127.0.0.2 1. Each must have as many: take --ranks 1, for --ranks auto "
        "counts each machine's own clusters of cores"
    }
    assert time.monotonic() - began < 15
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("quiet")
def test_a_port_in_use_names_the_variable_to_set() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place("127.0.0.1", ("127.0.0.1", "127.0.0.2"), "lo", taken.getsockname()[1])
        with pytest.raises(HostLost, match="set MASTER_PORT to another one"):
            join(place, lambda line: None, meeting=0.5)


def test_the_lost_host_is_the_only_other_or_the_one_that_gloo_names() -> None:
    problem = "[pair.cc:553] Connection closed by peer [10.0.0.3]:34690. This is typically caused by a remote worker crashing."
    addresses = {"10.0.0.1": "algo-1", "10.0.0.2": "algo-2", "10.0.0.3": "algo-3"}
    assert lost_host(["algo-2"], addresses, problem) == "algo-2"
    assert lost_host(["algo-2", "algo-3"], addresses, problem) == "algo-3"
    assert lost_host(["algo-2", "algo-3"], addresses, "Timed out waiting 900000ms for recv operation") == "one of algo-2, algo-3"


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_machines_take_each_row_of_an_epoch_once(nodes: int) -> None:
    spec, rounds = TrainSpec(model="m", batch_rows=2, epochs=3), (7, 9)
    steps, whole = optimiser_steps(spec, rounds, nodes)
    assert steps == whole == sum(epoch_steps(spec, rounds, epoch, nodes) for epoch in range(3))
    taken = [rows_of_step(step, rounds, spec, nodes) for step in range(steps)]
    assert max(map(len, taken)) == 2 * nodes
    assert sorted(row for rows in taken for row in rows) == sorted([*range(7), *range(7), *range(7, 16)])
    wide = spec.model_copy(update={"batch_rows": 2 * nodes})
    assert taken == [rows_of_step(step, rounds, wide) for step in range(steps)]


def test_the_plan_counts_the_machines() -> None:
    ledger = Ledger(accounts={"document": Account(samples=9, tokens=90, trained=90)}, rounds=(9,), row_tokens=16)
    spec = TrainSpec(model="m", epochs=2)
    assert plan(spec, ledger).steps == 18
    found = plan(spec, ledger, 2)
    assert found.steps == 10
    assert found.tokens == 180
    assert [reason for reason in found.reasons if reason.startswith("steps")] == ["steps 10: 2 epochs of 5, 2 rows in each"]
