"""Endpoints of SageMaker, from the first request to the last thing that is deleted, on a SageMaker that really starts what serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from support.hosting import ROLE, guardians, handle, until
from trimtab.aws import endpoint_life, guardian
from trimtab.deployers.base import EndpointState
from trimtab.endpoint import Endpoint, new_id
from trimtab.errors import EndpointError, SpecError
from trimtab.events import Phase, Progress
from trimtab.serving import serving
from trimtab.spec import ServeSpec

CLIENT = """
import sys, time
from trimtab.deployers.sagemaker import SageMakerDeployer
from trimtab.serving import serving
from trimtab.spec import ServeSpec
deployer = SageMakerDeployer(role="SageMakerExecutionRole", home=sys.argv[3], poll_seconds=0.1)
spec = ServeSpec(ttl_minutes=float(sys.argv[5])) if len(sys.argv) > 5 else None
print("begin", flush=True)
deployer.start(serving(base_model=sys.argv[2], spec=spec), sys.argv[1], detach=sys.argv[4] == "detach")
print("ready", flush=True)
if sys.argv[4] != "detach":
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """What guardians and rollbacks wait for takes minutes at AWS."""
    monkeypatch.setattr(endpoint_life, "APPEARING", 1.0)


@pytest.fixture
def slow_model(lively_model, tmp_path):
    """It comes up after four seconds."""
    return _with(lively_model, tmp_path / "slow-model", "slow")


def _with(model, folder, name):
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / name).write_text("{}")
    return folder


def _marked(model, name):
    """What serves `model` with a further file that the program looks for."""
    found = serving(base_model=model)
    return type(found)(**{**vars(found), "files": {**found.files, f"model/{name}": (model / name).resolve()}})


def test_an_endpoint_is_deployed_asked_from_elsewhere_and_closed(account, deployer_of, base_alone, hosting_plane):
    deployer, events, id = deployer_of(), [], new_id()
    rendered = deployer.render(base_alone, id)["requests"]
    before = len(hosting_plane.requests)
    found = deployer.start(base_alone, id, show=events.append)
    sent = dict(hosting_plane.requests[before:])
    for operation, body in rendered.items():
        assert {**sent[operation], "Tags": [tag for tag in sent[operation]["Tags"] if tag["Key"] != "trimtab-submission"]} == body
    assert [event for event in events if isinstance(event, Progress)][-1].name == "upload, MB"
    assert any(isinstance(event, Phase) and "Creating" in event.detail for event in events)
    assert found == handle(id)
    assert account.left(id)[:3] == [f"Endpoints {id}", f"EndpointConfigs {id}", f"Models {id}"]

    elsewhere = Endpoint.attach(str(found), role=ROLE)
    assert elsewhere.generate("The keeper") == "the lamp is lit"
    assert elsewhere.chat("Who keeps the light?") == "the lamp is lit"
    assert list(elsewhere.stream("Who?")) == list(elsewhere.stream("Who", chat=False)) == ["the", " lamp", " is", " lit"]
    assert elsewhere.models() == ["base"]
    assert elsewhere.ready()
    assert elsewhere.url.endswith(f"/endpoints/{id}/invocations")
    (record,) = deployer.endpoints()
    assert (record.handle, record.state, record.orphan) == (found, EndpointState.SERVING, "")
    assert record.usd_per_hour == pytest.approx(0.107)
    assert any(line.startswith("serving") for line in deployer.logs(found))

    elsewhere.close()
    deployer.end(found)  # quiet when it is gone
    with pytest.raises(EndpointError, match="there is no endpoint"):
        deployer.look(found)


def test_the_second_deployment_of_a_model_sends_nothing(account, deployer_of, base_alone):
    deployer, first, second = deployer_of(prefix="twice"), new_id(), new_id()
    counts = []
    for id in (first, second):
        events = []
        before = _puts(account, "twice")
        deployer.start(base_alone, id, show=events.append)
        counts.append(_puts(account, "twice") - before)
    assert counts[0] > 3
    assert counts[1] == 0
    files = {name.removeprefix("model/") for name in base_alone.files}
    uri = deployer.render(base_alone, "trim-ep-00000000")["upload"]["to"]
    client = account.client("s3")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    keys = [row["Key"] for row in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    client.close()
    assert {key.removeprefix(prefix) for key in keys} == files
    for id in (first, second):
        deployer.end(handle(id))


def _puts(account, prefix):
    client = account.client("s3")
    try:
        found = client.list_objects_v2(Bucket="trimtab-sagemaker-us-east-1-000000000000", Prefix=prefix)
        return found["KeyCount"]
    except client.exceptions.NoSuchBucket:
        return 0
    finally:
        client.close()


@pytest.mark.parametrize("container", ["vllm", "lmi", "tgi"])
def test_each_container_is_asked_in_its_own_words(account, deployer_of, base_alone, container):
    deployer, id = deployer_of(container=container, instance_type="ml.g5.xlarge"), new_id()
    gpu = type(base_alone)(**{**vars(base_alone), "device": "gpu"})
    deployer.start(gpu, id)
    with Endpoint.attach(f"sagemaker://{id}", role=ROLE) as endpoint:
        for settings in ({}, {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "stop": ["\n"], "seed": 1}):
            assert endpoint.generate("The keeper", **settings) == "the lamp is lit"
            assert "".join(endpoint.stream("The keeper", chat=False, **settings)) == "the lamp is lit"
        assert endpoint.chat("Who?", model="base") == "".join(endpoint.stream("Who?")) == "the lamp is lit"
        transport = deployer.transport(handle(id))
        body = {"inputs": "The keeper", "parameters": {"max_new_tokens": 5}}
        answer = transport.ask("/invocations", body, timeout=10)
        assert (answer[0] if isinstance(answer, list) else answer)["generated_text"] == "the lamp is lit"
        tokens = [event["token"]["text"] for event in transport.stream("/invocations", body, timeout=10)]
        assert "".join(tokens) == "the lamp is lit"
        with pytest.raises(EndpointError, match="there is no model 'gpt-9' here; ask for one of: base"):
            endpoint.chat("Who?", model="gpt-9")
    deployer.end(handle(id))


def test_a_containers_refusal_is_told_in_its_own_words_and_its_death_as_one(account, deployer_of, base_alone):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    with Endpoint.attach(f"sagemaker://{id}", role=ROLE, timeout=1.5) as endpoint:
        with pytest.raises(EndpointError, match=rf"{id} answered 400: temperature is out of range; give 0 to 2"):
            endpoint.generate("refuse")
        with pytest.raises(EndpointError, match="6 MB: shorten it"):
            endpoint.generate("a" * 6_291_456)
        with pytest.raises(EndpointError, match="CloudWatch"):
            deployer.transport(handle(id)).ask("/metrics", timeout=1)
        with pytest.raises(EndpointError, match=rf"{id} did not answer"):
            endpoint.generate("die")
        deployer.end(handle(id))
        with pytest.raises(EndpointError, match="nothing answers as sagemaker://"):
            endpoint.generate("a")
        assert not endpoint.ready()


def test_what_does_not_come_up_is_told_with_its_last_lines_and_leaves_nothing(account, deployer_of, lively_model, tmp_path):
    deployer = deployer_of()
    broken = _marked(_with(lively_model, tmp_path / "broken", "breaks"), "breaks")
    with pytest.raises(
        EndpointError, match=r"did not pass the ping health check(.|\n)*start_seconds=3600\nIts last lines:\n.*the weights do not fit"
    ):
        deployer.start(broken, new_id())
    assert account.left() == []


@pytest.mark.parametrize("operation", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"code": "AccessDeniedException"}, "lacks the permission sagemaker:{operation}"),
        ({"code": "ResourceLimitExceeded", "message": "The account-level service limit 'ml.c7i.large for endpoint usage' is 0 Instances"}, "quota 'ml.c7i.large for endpoint usage'"),
        ({"code": "InternalFailure", "times": 8}, "wait a minute"),
    ],
    ids=["permission", "quota", "trouble"],
)  # fmt: skip
def test_nothing_stays_when_one_request_is_refused(account, deployer_of, base_alone, hosting_plane, monkeypatch, operation, fault, said):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    hosting_plane.fault(operation=operation, **fault)
    with pytest.raises(EndpointError, match=said.format(operation=operation)):
        deployer_of().start(base_alone, new_id())
    hosting_plane.faults.clear()
    assert account.left() == []


@pytest.mark.parametrize("operation", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
def test_an_answer_lost_on_its_way_makes_nothing_twice(account, deployer_of, base_alone, hosting_plane, operation):
    hosting_plane.fault(operation=operation, drop=True, after=True)
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id)
    deployer.end(handle(id))


def test_a_name_that_another_has_is_not_taken_from_him(account, deployer_of, base_alone):
    client, id = account.client("sagemaker"), new_id()
    client.create_model(
        ModelName=id, PrimaryContainer={"Image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/a:1"}, ExecutionRoleArn=f"arn:aws:iam::000000000000:role/{ROLE}"
    )  # fmt: skip
    with pytest.raises(EndpointError, match=f"there is a model {id} already, and it is another one's"):
        deployer_of().start(base_alone, id)
    assert account.left(id) == [f"Models {id}"]
    client.delete_model(ModelName=id)
    client.close()


def test_a_shortage_of_machines_names_the_remedy(account, deployer_of, base_alone, hosting_plane):
    hosting_plane.fault(kind="capacity")
    with pytest.raises(EndpointError, match=r"Unable to provision requested ML compute capacity.*instance_type=TYPE"):
        deployer_of().start(base_alone, new_id())


def test_one_that_is_too_slow_is_taken_back_by_its_guardian(account, deployer_of, slow_model, hosting_plane, monkeypatch):
    """SageMaker deletes nothing that is being created; the client does not wait for it."""
    monkeypatch.setattr("trimtab.deployers.sagemaker.SOON", 0.2)
    id, began = new_id(), time.monotonic()
    with pytest.raises(EndpointError, match="still Creating when its time was over, and is taken back"):
        deployer_of().start(_marked(slow_model, "slow"), id, ready_timeout=0.5)
    assert time.monotonic() - began < 4
    assert guardians(id)
    assert f"Endpoints {id}" in account.left(id)
    _let_it_look_once(id)


def _let_it_look_once(id):
    """A guardian looks a second time later, for what may appear late; the test does not wait for that."""
    until(lambda: "is deleted" in _log(id))
    for pid in guardians(id):
        os.kill(pid, signal.SIGKILL)


_logs = {}


def _log(id):
    return _logs[id].read_text() if id in _logs and _logs[id].exists() else ""


@pytest.fixture(autouse=True)
def _find_logs(tmp_path, monkeypatch):
    was = guardian.Guardian.__init__

    def noting(self, charge):
        from pathlib import Path

        _logs[charge.id] = Path(charge.log)
        was(self, charge)

    monkeypatch.setattr(guardian.Guardian, "__init__", noting)
