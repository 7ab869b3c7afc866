"""What endpoints of SageMaker can be: where their model is, what serves it, how many instances there are, how it is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.hosting import ROLE, handle, until
from trimtab.aws.upload import Sent, upload
from trimtab.deployers.base import EndpointHandle, EndpointState
from trimtab.endpoint import Endpoint, deploy, deploy_findings, deploy_request, new_id
from trimtab.errors import BackendUnavailable, EndpointError, SpecError
from trimtab.events import Phase, Progress
from trimtab.serving import serving
from trimtab.spec import ServeSpec


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
    deployer, ids = deployer_of(prefix="twice"), [new_id(), new_id()]
    planned = deployer._planned(base_alone)
    deployer.start(base_alone, ids[0])
    s3 = deployer.aws.client("s3")
    assert upload([planned], s3, planned.place(deployer.place)) == Sent(0, 0)
    deployer.start(base_alone, ids[1])
    prefix = f"twice/models/{planned.digest}"
    keys = {row["Key"] for row in s3.list_objects_v2(Bucket=deployer.place.bucket, Prefix="twice/")["Contents"]}
    assert keys == {f"{prefix}.json", *(f"{prefix}/{name.removeprefix('model/')}" for name in base_alone.files)}
    for id in ids:
        deployer.end(handle(id))


@pytest.mark.parametrize("container", ["vllm", "lmi", "tgi"])
def test_each_container_is_asked_in_its_own_words(account, deployer_of, base_alone, container):
    deployer, id = deployer_of(container=container, instance_type="ml.g5.xlarge"), new_id()
    gpu = replace(base_alone, device="gpu")
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
    other, id = deployer_of(prefix="second", model_uri=uri), new_id()
    found = other.elsewhere(ServeSpec(), "xeon")
    assert other.render(found, id)["upload"] is None
    other.start(found, id)
    assert "Contents" not in other.aws.client("s3").list_objects_v2(Bucket=other.place.bucket, Prefix="second/")
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
    shown = {}
    for isolated, settings in ((True, {}), (False, {}), (False, {"network_isolation": "yes"})):
        asked = deployer_of(jumpstart=name, accept_eula="yes", **settings)
        asked._hub_model = replace(asked._hub_model, isolated=isolated)
        body = asked.render(asked.elsewhere(ServeSpec(), "gpu"), id)["requests"]["CreateModel"]
        shown[isolated, *settings] = body["EnableNetworkIsolation"]
    assert list(shown.values()) == [True, False, True]
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


def test_what_the_account_lacks_is_found_before_anything_is_sent(account, deployer_of, base_alone, lively_model, hosting_plane):
    hosting_plane.set_quota("ml.c7i.large for endpoint usage", 1)
    deployer, before = deployer_of(instances=2, prefix="lacking"), len(hosting_plane.requests)
    try:
        settings = {"backend": "sagemaker", "role": ROLE, "prefix": "lacking", "instances": 2, "detach": True}
        findings = {finding.name: finding for finding in deploy_findings(None, lively_model, **settings)}
        with pytest.raises(
            EndpointError, match=r"the account lacks:\n  quota ml.c7i.large for endpoint usage: 1, and the endpoint takes 2"
        ):
            deployer.start(base_alone, new_id())
    finally:
        hosting_plane.set_quota("ml.c7i.large for endpoint usage", 20)
    assert findings["identity"].ok
    quota = findings["quota ml.c7i.large for endpoint usage"]
    assert (quota.ok, quota.detail) == (False, "1, and the endpoint takes 2")
    assert "request-service-quota-increase" in quota.remedy
    assert not [name for name, _ in hosting_plane.requests[before:] if name.startswith("Create")]
    s3, bucket = deployer.aws.client("s3"), deployer.place.bucket
    if bucket in [each["Name"] for each in s3.list_buckets()["Buckets"]]:
        assert "Contents" not in s3.list_objects_v2(Bucket=bucket, Prefix="lacking/")


def test_a_model_elsewhere_needs_no_base_model_here(account, hosting_amazon, lively_model, tmp_path):
    settings = {"backend": "sagemaker", "role": ROLE, "home": tmp_path, "poll_seconds": 0.1}
    with deploy(None, lively_model, prefix="theirs", **settings) as endpoint:
        uri = deploy_request(None, lively_model, prefix="theirs", **settings)["upload"]["to"]
        assert endpoint.generate("a") == "the lamp is lit"
    with deploy(model_uri=uri, prefix="ours", **settings) as endpoint:
        assert endpoint.generate("a") == "the lamp is lit"
    with pytest.raises(SpecError, match="is served from where it lies"):
        deploy(None, lively_model, model_uri=uri, **settings)


def test_what_cannot_be_served_there_says_why(deployer_of, base_alone):
    beside = replace(base_alone, base=base_alone.model, adapters={"tuned": base_alone.model})
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
