"""Endpoints of SageMaker, from the first request to the last thing that is deleted, on a SageMaker that really starts what serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from support.hosting import ROLE, handle, until
from trimtab.aws import endpoint_life, guardian
from trimtab.aws.session import Aws
from trimtab.deployers.base import EndpointHandle, EndpointState
from trimtab.endpoint import Endpoint, new_id
from trimtab.errors import BackendUnavailable, EndpointError, SpecError
from trimtab.events import Phase, Progress
from trimtab.serving import serving
from trimtab.spec import ServeSpec

LIMIT = "The account-level service limit 'ml.c7i.large for endpoint usage' is 0 Instances"
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
    return _with(lively_model, tmp_path / "slow-model", "slow.json")


def _with(model, folder, name):
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    (folder / name).write_text("{}")
    return folder


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
    broken = serving(base_model=_with(lively_model, tmp_path / "broken", "breaks.json"))
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
        ({"code": "ResourceLimitExceeded", "message": LIMIT}, "quota 'ml.c7i.large for endpoint usage'"),
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
    client.create_model(ModelName=id, PrimaryContainer={"Image": "image"}, ExecutionRoleArn=f"arn:aws:iam::000000000000:role/{ROLE}")
    with pytest.raises(EndpointError, match=f"there is a model {id} already, and it is another one's"):
        deployer_of().start(base_alone, id)
    assert account.left(id) == [f"Models {id}"]
    client.delete_model(ModelName=id)
    client.close()


def test_a_shortage_of_machines_names_the_remedy(account, deployer_of, base_alone, hosting_plane):
    hosting_plane.fault(kind="capacity")
    with pytest.raises(EndpointError, match=r"Unable to provision requested ML compute capacity.*instance_type=TYPE"):
        deployer_of().start(base_alone, new_id())


def test_one_that_is_too_slow_is_taken_back_by_its_guardian(account, deployer_of, slow_model, tmp_path, monkeypatch):
    """SageMaker deletes nothing that is being created; the client does not wait for it."""
    monkeypatch.setattr("trimtab.deployers.sagemaker.SOON", 0.2)
    id, began = new_id(), time.monotonic()
    with pytest.raises(EndpointError, match="still Creating when its time was over, and is taken back"):
        deployer_of().start(serving(base_model=slow_model), id, ready_timeout=0.5)
    assert time.monotonic() - began < 4
    assert account.guardians(id)
    assert f"Endpoints {id}" in account.left(id)
    _let_it_look_once(account, tmp_path, id)


def _let_it_look_once(account, tmp_path, id):
    """A guardian looks a second time later, for what may appear late; the test does not wait for that."""
    log = tmp_path / "home" / "sagemaker" / f"{id}.log"
    until(lambda: log.exists() and f"{id} is deleted" in log.read_text())
    account.end_guardians(id)


def _client(hosting_amazon, model, tmp_path, *arguments):
    """A client in a process of its own, once it has begun."""
    id = new_id()
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, id, str(model), str(tmp_path / "home"), *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **hosting_amazon},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process, id


def _kill(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_endpoint_ends_with_its_client_however_it_dies(account, deployer_of, hosting_amazon, lively_model, tmp_path, number):
    process, id = _client(hosting_amazon, lively_model, tmp_path, "attached")
    assert process.stdout.readline() == "ready\n"
    assert Endpoint.attach(f"sagemaker://{id}", role=ROLE).generate("a") == "the lamp is lit"
    _kill(process, number)
    _let_it_look_once(account, tmp_path, id)


def test_a_client_killed_while_it_deploys_leaves_nothing(account, deployer_of, hosting_amazon, slow_model, tmp_path):
    process, id = _client(hosting_amazon, slow_model, tmp_path, "attached")
    until(lambda: f"Endpoints {id}" in account.left(id))
    _kill(process)
    _let_it_look_once(account, tmp_path, id)


def test_ctrl_c_while_it_deploys_leaves_nothing(account, deployer_of, hosting_amazon, slow_model, tmp_path):
    process, id = _client(hosting_amazon, slow_model, tmp_path, "attached")
    until(lambda: f"Endpoints {id}" in account.left(id))
    _kill(process, signal.SIGINT)
    assert account.left(id) == []


def test_a_detached_endpoint_outlives_its_client_until_its_time_is_over(account, deployer_of, hosting_amazon, lively_model, tmp_path):
    process, id = _client(hosting_amazon, lively_model, tmp_path, "detach", "0.2")
    assert process.wait(60) == 0
    process.stdout.close()
    (record,) = [record for record in deployer_of().endpoints() if record.handle.id == id]
    assert record.state is EndpointState.SERVING
    assert 11 < (record.expires - record.created).total_seconds() < 13
    assert account.guardians(id)
    until(lambda: f"Endpoints {id}" not in account.left(id))
    _let_it_look_once(account, tmp_path, id)


def test_a_detached_endpoint_without_a_limit_needs_no_guardian(account, deployer_of, base_alone):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id, detach=True)
    until(lambda: not account.guardians(id))
    assert f"Endpoints {id}" in account.left(id)
    deployer.end(handle(id))


def test_a_guardian_goes_on_while_aws_is_away(account, hosting_plane, tmp_path, monkeypatch):
    client, id = account.client("sagemaker"), new_id()
    client.create_model(ModelName=id, PrimaryContainer={"Image": "image"}, ExecutionRoleArn=f"arn:aws:iam::000000000000:role/{ROLE}")
    client.close()
    monkeypatch.setattr(guardian, "SHORTEST", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    hosting_plane.fault(operation="DeleteModel", code="ServiceUnavailable", times=2)
    said = []
    with Aws("us-east-1") as aws:
        guardian.delete(aws, guardian.Charge(id, "us-east-1", None, None, ""), said.append, again=0.1)
    assert ["not deleted yet" in line for line in said] == [True, True, False, False]


def test_who_closes_the_expired_ends_those_of_others_too(account, deployer_of, base_alone, tmp_path):
    spec = ServeSpec(ttl_minutes=0.05)
    theirs, mine, id = deployer_of(home=tmp_path / "other"), deployer_of(), new_id()
    theirs.start(type(base_alone)(**{**vars(base_alone), "spec": spec}), id, detach=True)
    account.end_guardians(id)  # their machine is switched off
    until(lambda: mine.look(handle(id)).expires < datetime.now(UTC))
    kept = new_id()
    mine.start(base_alone, kept)
    assert [record.handle.id for record in mine.close_expired()] == [id]
    assert account.left(id) == []
    mine.end(handle(kept))


def test_what_is_left_of_an_endpoint_is_found_and_removed(account, deployer_of, base_alone, monkeypatch):
    deployer, id = deployer_of(), new_id()
    deployer.start(base_alone, id, detach=True)
    client = account.client("sagemaker")
    client.delete_endpoint(EndpointName=id)  # as in the console
    client.close()
    until(lambda: f"Endpoints {id}" not in account.left(id))
    (record,) = deployer.endpoints()
    assert (record.state, record.orphan) == (EndpointState.ENDED, "a configuration without an endpoint")
    assert deployer.close_expired() == []  # another client may be making it just now
    monkeypatch.setattr("trimtab.deployers.sagemaker.YOUNG", timedelta(0))
    assert [found.handle.id for found in deployer.close_expired()] == [id]


def test_the_number_of_instances_follows_the_load(account, deployer_of, base_alone):
    deployer, id = deployer_of(instances="2", max_instances="4", target_requests="50"), new_id()
    deployer.start(base_alone, id)
    client = account.client("application-autoscaling")
    (target,) = client.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[f"endpoint/{id}/variant/AllTraffic"])[
        "ScalableTargets"
    ]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 4)
    (policy,) = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    client.close()
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 50
    assert tracking["PredefinedMetricSpecification"] == {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"}
    assert deployer.look(handle(id)).usd_per_hour == pytest.approx(2 * 0.107)
    deployer.end(handle(id))


def test_an_endpoint_goes_to_zero_and_wakes_when_it_is_asked(account, deployer_of, base_alone):
    deployer, id = deployer_of(min_instances="0", max_instances="2"), new_id()
    deployer.start(base_alone, id)
    endpoint = Endpoint.attach(f"sagemaker://{id}", role=ROLE, timeout=3)
    assert endpoint.generate("The keeper") == "the lamp is lit"
    assert any(line.startswith("serving") for line in deployer.logs(handle(id)))
    alarm = account.client("cloudwatch")
    (found,) = alarm.describe_alarms(AlarmNames=[f"{id}-from-zero"])["MetricAlarms"]
    alarm.close()
    assert (found["MetricName"], found["Dimensions"]) == ("NoCapacityInvocationFailures", [{"Name": "InferenceComponentName", "Value": id}])
    assert f"policyName/{id}-from-zero" in found["AlarmActions"][0]

    client = account.client("sagemaker")
    client.update_inference_component_runtime_config(
        InferenceComponentName=id, DesiredRuntimeConfig={"CopyCount": 0}
    )  # as the scaling does
    with pytest.raises(EndpointError, match="had no instance and was not woken in time"):
        endpoint.generate("The keeper")
    until(lambda: client.describe_inference_component(InferenceComponentName=id)["InferenceComponentStatus"] == "InService")
    client.update_inference_component_runtime_config(InferenceComponentName=id, DesiredRuntimeConfig={"CopyCount": 1})
    client.close()
    endpoint.timeout = 60
    assert endpoint.generate("The keeper") == "the lamp is lit"
    endpoint.close()


def test_scaling_that_is_refused_takes_the_endpoint_back(account, deployer_of, base_alone, hosting_plane):
    hosting_plane.fault(operation="PutScalingPolicy", code="AccessDeniedException")
    with pytest.raises(EndpointError, match="lacks the permission application-autoscaling:PutScalingPolicy"):
        deployer_of(max_instances=2).start(base_alone, new_id())
    assert account.left() == []


def test_a_model_that_lies_in_s3_is_served_from_there(account, deployer_of, lively_model):
    deployer, id = deployer_of(prefix="first"), new_id()
    deployer.start(serving(base_model=lively_model), id)
    uri = deployer.render(serving(base_model=lively_model), id)["upload"]["to"]
    deployer.end(handle(id))
    other, id, before = deployer_of(prefix="second", model_uri=uri), new_id(), _puts(account, "second")
    found = other.elsewhere(ServeSpec(), "xeon")
    assert other.render(found, id)["upload"] is None
    other.start(found, id)
    assert _puts(account, "second") == before
    assert Endpoint.attach(f"sagemaker://{id}", role=ROLE).generate("a") == "the lamp is lit"
    other.end(handle(id))


def test_a_model_of_jumpstart_is_served_when_its_licence_is_accepted(account, deployer_of, hosting_plane):
    client, bucket = account.client("s3"), "jumpstart-private-cache-prod-us-east-1"
    client.create_bucket(Bucket=bucket)
    key = "meta-textgeneration/meta-textgeneration-llama-2-13b/artifacts/inference-prepack/v1.0.0/config.json"
    client.put_object(Bucket=bucket, Key=key, Body=b"{}")
    name, id = "meta-textgeneration-llama-2-13b", new_id()
    refused = deployer_of(jumpstart=name)
    with pytest.raises(
        SpecError, match=r"licence of its own: read it with  aws s3 cp s3://jumpstart-cache.*llamaEula.txt -.*accept_eula=yes"
    ):
        refused.start(refused.elsewhere(ServeSpec(), "gpu"), id)
    deployer = deployer_of(jumpstart=name, accept_eula="yes")
    deployer.start(deployer.elsewhere(ServeSpec(), "gpu"), id)
    (model,) = [request for operation, request in hosting_plane.requests if operation == "CreateModel" and request["ModelName"] == id]
    source = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source["ModelAccessConfig"] == {"AcceptEula": True}
    assert model["PrimaryContainer"]["Environment"]["OPTION_TENSOR_PARALLEL_DEGREE"] == "4"
    assert Endpoint.attach(f"sagemaker://{id}", role=ROLE).generate("a") == "the lamp is lit"
    assert Endpoint.attach(f"sagemaker://{id}", role=ROLE).models() == [name]
    assert deployer.look(handle(id)).usd_per_hour == pytest.approx(7.09)
    deployer.end(handle(id))
    client.delete_object(Bucket=bucket, Key=key)
    client.delete_bucket(Bucket=bucket)
    client.close()
    with pytest.raises(EndpointError, match="JumpStart has no model 'llama-9'"):
        deployer_of(jumpstart="llama-9").check("gpu")


def test_what_cannot_be_served_there_says_why(deployer_of, base_alone):
    beside = type(base_alone)(**{**vars(base_alone), "base": base_alone.model, "adapters": {"tuned": base_alone.model}})
    with pytest.raises(SpecError, match="one folder, and adapters beside their base are two"):
        deployer_of().render(beside, "trim-ep-00000000")
    with pytest.raises(EndpointError, match="leave api_key out"):
        deployer_of().start(base_alone, "trim-ep-00000000", api_key="secret")
    with pytest.raises(SpecError, match="needs GPUs"):
        deployer_of(container="vllm").check("xeon")
    with pytest.raises(BackendUnavailable, match="SageMaker needs a role"):
        deployer_of(role="").check("xeon")
    with pytest.raises(EndpointError, match="not an endpoint of SageMaker"):
        deployer_of().look(EndpointHandle.parse("docker://trim-ep-00000000"))
