"""AWS's documented requests and answers, and refusals that its users quoted: what the control plane is held to besides our own ideas.

Each file under examples/ names where it is from and what was changed. `syntax`: request and answer syntaxes of AWS's API reference (their
members, types, limits). `accepted`: whole requests, with their answers where there are any. `refused`: errors as the service worded them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from control_plane import ControlPlane, validation
from control_plane.operations import OPERATIONS, carry_out
from control_plane.refusal import Refused
from support.plane import add_endpoint_config, client, job_request

EXAMPLES = Path(__file__).parent / "examples"
_TYPES = {"string": str, "number": (int, float), "boolean": bool}
_VALUES = {"string": "string", "number": 1, "boolean": True, "SearchExpression": {"Operator": "And"}}
_OF_JOBS = {
    "AlgorithmSpecification.AlgorithmName",  # in place of TrainingImage; it is not emulated
    "InputDataConfig.DataSource.S3DataSource.AttributeNames",  # of AugmentedManifestFile, which is not emulated
    "LabelingJobArn",  # of Ground Truth's jobs
    "TuningJobArn",  # of a tuning job's, which are not emulated
}
ABSENT = {  # documented, and not answered
    "DescribeTrainingJob": _OF_JOBS,
    "Search": {f"Results.TrainingJob.{each}" for each in _OF_JOBS},
    "DescribeModel": {"Containers", "PrimaryContainer.ModelPackageName"},  # in place of PrimaryContainer, of Image
    "DescribeEndpoint": {"FailureReason", "ProductionVariants.DeployedImages.ResolutionTime"},  # it did not fail; no digest is looked up
    "ListTags": {"NextToken"},  # a page has at least 50 tags, and nothing has more
}
SINCE = {  # what AWS has changed since those pages
    "CreateModel.Containers": {"most": 15},
    "CreateModel.ExecutionRoleArn": {"required": False},
    "CreateTrainingJob.AlgorithmSpecification": {"required": False},
    "CreateTrainingJob.ResourceConfig": {"required": False},
    "CreateTrainingJob.StoppingCondition": {"required": False},
}


def _examples(folder: str, having: str = "source") -> list[Any]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((EXAMPLES / folder).glob("*.json"))}
    return [pytest.param(example, id=name) for name, example in found.items() if having in example]


def test_every_example_names_its_source() -> None:
    paths = sorted(EXAMPLES.glob("*/*.json"))
    assert len(paths) >= 50
    for path in paths:
        assert json.loads(path.read_text())["source"].startswith("https://"), path


@pytest.mark.parametrize("example", _examples("syntax"))
def test_a_request_with_every_documented_member_is_read(example: dict[str, Any]) -> None:
    """Where the model that is in use lacks a member, or has it of another type, it is refused as unreadable."""
    name, request = example["operation"], _filled(example["request"])
    assert name in OPERATIONS["sagemaker"]
    assert validation.write(validation.read(validation.operation("sagemaker", name).input_shape, request)) == request


def _filled(syntax: Any) -> Any:
    """A request of this syntax, with a value for each type."""
    if isinstance(syntax, dict):
        return {name: _filled(each) for name, each in syntax.items()}
    return [_filled(each) for each in syntax] if isinstance(syntax, list) else _VALUES.get(syntax, syntax)


@pytest.mark.parametrize("example", _examples("syntax"))
def test_documented_limits_are_kept_and_allowed(plane: ControlPlane, example: dict[str, Any]) -> None:
    """By the control plane itself: what is within a documented limit is not refused for it, what is beyond it is."""
    name, checked = example["operation"], 0
    for member, documented in example["members"].items():
        limits = documented | SINCE.get(f"{name}.{member}", {})
        for value, said, beyond in _at_the_limits(limits, example["request"][member]):
            told = _refusal(plane, name, {member: value})
            assert (f"at '{member[0].lower() + member[1:]}' failed to satisfy constraint: {said}" in told) is beyond, (member, value, told)
            checked += 1
        missed = f"Value null at '{member[0].lower() + member[1:]}' failed to satisfy constraint: Member must not be null"
        assert (missed in _refusal(plane, name, {})) is limits["required"], member
        checked += limits["required"]
    assert checked


def _at_the_limits(limits: dict[str, Any], syntax: Any) -> Iterator[tuple[Any, str, bool]]:
    """Values, what a refusal of them says, and whether they are to be refused with it."""
    for size, beyond in ((0, False), (1, True)):
        if "most" in limits:
            yield [_filled(syntax[0])] * (limits["most"] + size), f"Member must have length less than or equal to {limits['most']}", beyond
        if "highest" in limits:
            yield limits["highest"] + size, f"Member must have value less than or equal to {limits['highest']}", beyond
        if "longest" in limits:
            text, longest = "x" * (limits["longest"] + size), f"Member must have length less than or equal to {limits['longest']}"
            if isinstance(syntax, dict):
                yield {text: ""}, f"Map keys must satisfy constraint: [{longest}", beyond
            elif isinstance(syntax, list):
                yield [text], f"Member must satisfy constraint: [{longest}", beyond
            else:
                yield text, longest, beyond
    for value in limits.get("values", []):
        yield value, "Member must satisfy enum value set: [", False
    if "values" in limits:
        yield "AnyOther", "Member must satisfy enum value set: [", True


def _refusal(plane: ControlPlane, operation: str, request: dict[str, Any]) -> str:
    """The text of it, or nothing; of a request as it is, which botocore would not send."""
    try:
        carry_out("sagemaker", operation, request, plane.place(plane.account, plane.region))
    except Refused as refused:
        return refused.message
    return ""


@pytest.mark.parametrize("example", _examples("syntax", having="answer"))
def test_an_answer_has_the_documented_members_with_the_documented_types(plane: ControlPlane, example: dict[str, Any]) -> None:
    """All of them, but for those that are named here with their reason."""
    with client(plane) as sagemaker:
        answer = _answers(plane, sagemaker, example["operation"])
    assert _absent(answer, example["answer"], "") == ABSENT.get(example["operation"], set())


def _answers(plane: ControlPlane, sagemaker: Any, operation: str) -> Any:
    """The JSON that an operation answers with when there is two of everything, the first finished, measured and tagged."""
    tags = [{"Key": "team", "Value": "seeds"}, {"Key": "kind", "Value": "dry"}]
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/data"}}
    channel = {"ChannelName": "train", "DataSource": source, "ContentType": "text/plain", "InputMode": "File", "ShuffleConfig": {"Seed": 1}}
    vpc = {"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]}
    metrics = [{"Name": "loss", "Regex": "loss=([0-9.]+)"}]
    request = job_request(
        AlgorithmSpecification=job_request()["AlgorithmSpecification"] | {"MetricDefinitions": metrics},
        ResourceConfig=job_request()["ResourceConfig"] | {"VolumeKmsKeyId": "key"},
        HyperParameters={"epochs": "3"},
        InputDataConfig=[channel],
        VpcConfig=vpc,
        Tags=tags,
    )
    for name in ("job", "job-2"):
        sagemaker.create_training_job(**request | {"TrainingJobName": name})
    for job in (plane.store.jobs["job-2"], plane.store.jobs["job"]):
        job.move("Downloading")
        job.observe("step=1 loss=0.5")
        job.finish("Failed", failure_reason="AlgorithmError: no")
    container = {"Image": "image", "ModelDataUrl": "s3://bucket/model.tar.gz", "ContainerHostname": "one", "Environment": {"A": "1"}}
    role = job_request()["RoleArn"]
    variant = {"VariantName": "AllTraffic", "ModelName": "model", "InstanceType": "ml.m7i.large", "InitialInstanceCount": 1}
    variant["AcceleratorType"] = "ml.eia1.medium"
    for at in ("", "-2"):
        sagemaker.create_model(ModelName=f"model{at}", PrimaryContainer=container, ExecutionRoleArn=role, VpcConfig=vpc)
        sagemaker.create_endpoint_config(EndpointConfigName=f"config{at}", ProductionVariants=[variant], KmsKeyId="key")
        sagemaker.create_endpoint(EndpointName=f"endpoint{at}", EndpointConfigName="config")
        plane.store.endpoints[f"endpoint{at}"].move("InService")
    one = {"MaxResults": 1}
    requests: dict[str, dict[str, Any]] = {
        "CreateTrainingJob": job_request("job-3"),
        "DescribeTrainingJob": {"TrainingJobName": "job"},
        "ListTrainingJobs": one,
        "Search": {"Resource": "TrainingJob", **one},
        "AddTags": {"ResourceArn": job.arn, "Tags": tags},
        "ListTags": {"ResourceArn": job.arn, "MaxResults": 50},
        "CreateModel": {"ModelName": "model-3", "PrimaryContainer": container, "ExecutionRoleArn": role},
        "DescribeModel": {"ModelName": "model"},
        "ListModels": one,
        "CreateEndpointConfig": {"EndpointConfigName": "config-3", "ProductionVariants": [variant]},
        "DescribeEndpointConfig": {"EndpointConfigName": "config"},
        "ListEndpointConfigs": one,
        "CreateEndpoint": {"EndpointName": "endpoint-3", "EndpointConfigName": "config"},
        "DescribeEndpoint": {"EndpointName": "endpoint"},
        "UpdateEndpoint": {"EndpointName": "endpoint", "EndpointConfigName": "config-2"},
        "ListEndpoints": one,
    }
    return _raw(sagemaker, operation, requests[operation])


def _raw(made: Any, operation: str, request: dict[str, Any]) -> Any:
    """An answer's body, as it was on the wire."""
    bodies: list[Any] = []

    def keep(http_response: Any, **_: Any) -> None:
        bodies.append(json.loads(http_response.content or b"{}"))

    made.meta.events.register("after-call", keep)
    getattr(made, _method(operation))(**request)
    made.meta.events.unregister("after-call", keep)
    return bodies[0]


def _method(operation: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()


def _absent(answer: Any, syntax: Any, path: str) -> set[str]:
    """The documented members that were not answered, of a list's entries by none; a value of another type than the documented one fails."""
    if isinstance(syntax, list):
        assert isinstance(answer, list), path
        return set.intersection(*(_absent(each, syntax[0], path) for each in answer)) if answer else {path}
    if isinstance(syntax, dict):
        assert isinstance(answer, dict), path
        if list(syntax) == ["string"]:
            return {path for each in answer.values() if not isinstance(each, _TYPES[syntax["string"]])} if answer else {path}
        below = {name: f"{path}.{name}".strip(".") for name in syntax}
        lacking = {below[name] for name in syntax if name not in answer}
        return lacking.union(*(_absent(answer[name], each, below[name]) for name, each in syntax.items() if name in answer))
    if syntax in _TYPES:
        assert isinstance(answer, _TYPES[syntax]), f"{path}: {answer!r} is no {syntax}"
    return set()


@pytest.mark.parametrize("example", _examples("accepted"))
def test_a_documented_request_is_accepted_and_answered_as_documented(plane: ControlPlane, example: dict[str, Any]) -> None:
    account, region = example["account"], example["region"]
    store = plane.place(account, region).store
    for name in ("ml.p3.8xlarge for training job usage", "ml.c4.8xlarge for training warm pool usage"):
        store.quotas.set(name, 4)
    with client(plane, account=account, region=region) as sagemaker:
        _prepare(plane, sagemaker, example)
        if example["operation"] == "GetServiceQuota":
            store.quotas.set("ml.m7i.4xlarge for training job usage", 3)
            example["request"]["QuotaCode"] = _code(plane, "ml.m7i.4xlarge for training job usage")
        with client(plane, example.get("service", "sagemaker"), account=account, region=region) as made:
            answer = _raw(made, example["operation"], example["request"])
    if "answer" in example:
        same_values = "service" not in example
        _as_documented(answer, example["answer"], example["operation"], same_values)


def _code(plane: ControlPlane, name: str) -> str:
    with client(plane, "service-quotas") as quotas:
        pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        return next(str(each["QuotaCode"]) for page in pages for each in page["Quotas"] if each["QuotaName"] == name)


def _prepare(plane: ControlPlane, sagemaker: Any, example: dict[str, Any]) -> None:
    """What an example takes for granted."""
    needs, account = example.get("needs", {}), example.get("account", "000000000000")
    store = plane.place(account, sagemaker.meta.region_name).store
    if "job" in needs:
        name = needs["job"].get("name", "my-training-job-1")
        store.quotas.set("ml.m7i.4xlarge for training warm pool usage", 1)
        request = job_request(name, RoleArn=f"arn:aws:iam::{account}:role/trainer")
        request["ResourceConfig"]["KeepAlivePeriodInSeconds"] = needs["job"].get("keep_alive", 0)
        sagemaker.create_training_job(**request)
        store.jobs[name].move("Training")
        store.jobs[name].finish(needs["job"].get("finished", "Completed"))
    if "model" in needs:
        sagemaker.create_model(
            ModelName=needs["model"], PrimaryContainer={"Image": "image"}, ExecutionRoleArn=f"arn:aws:iam::{account}:role/server"
        )
    for config in [needs[each] for each in ("config", "other_config") if each in needs]:
        add_endpoint_config(sagemaker, config, account=account, instance_type=example.get("instance_type", "ml.m7i.large"))
    if "endpoint" in needs:
        sagemaker.create_endpoint(EndpointName=needs["endpoint"], EndpointConfigName=needs["config"])
        if needs.get("in_service"):
            store.endpoints[needs["endpoint"]].move("InService")
    if "delete_config" in needs:
        sagemaker.delete_endpoint_config(EndpointConfigName=needs["delete_config"])


def _as_documented(answer: Any, documented: Any, path: str, same_values: bool) -> None:
    """The documented members, all of them, with the documented types, and values but for times."""
    if isinstance(documented, dict):
        assert set(documented) <= set(answer), f"{path}: {set(documented) - set(answer)} missing"
        for name, each in documented.items():
            _as_documented(answer[name], each, f"{path}.{name}", same_values)
    elif isinstance(documented, list):
        assert answer, path
        for each in answer:
            _as_documented(each, documented[0], path, same_values)
    else:
        assert type(answer) is type(documented), f"{path}: {answer!r}, {documented!r}"
        assert not same_values or isinstance(documented, float) or answer == documented, path


@pytest.mark.parametrize("example", _examples("refused"))
def test_a_documented_refusal_is_worded_as_documented(example: dict[str, Any], request: pytest.FixtureRequest) -> None:
    account, region = example.get("account", "000000000000"), example.get("region", "us-east-1")
    place = {"account": account, "region": region}
    looks = {"aws_url": request.getfixturevalue("localstack"), "check_inputs": True} if example.get("s3") else {}
    with (
        ControlPlane(runner=None, **looks) as plane,
        client(plane, **place) as sagemaker,
        client(plane, example.get("service", "sagemaker"), **place) as made,
    ):
        asked = _request(plane, sagemaker, example, account)
        _prepare(plane, sagemaker, example)
        call = getattr(made, _method(example["operation"]))
        if example.get("twice"):
            call(**asked)
        with pytest.raises(ClientError) as caught:
            call(**asked)
    assert caught.value.response["Error"]["Code"] == example["code"]
    assert example["message"] in caught.value.response["Error"]["Message"]


def _request(plane: ControlPlane, sagemaker: Any, example: dict[str, Any], account: str) -> dict[str, Any]:
    """A whole request with the example's change."""
    operation, change = example["operation"], example["change"]
    request: dict[str, Any] = {}
    if operation == "CreateTrainingJob":
        request = job_request(RoleArn=f"arn:aws:iam::{account}:role/trainer")
        if "HyperParameters" in change:
            change = {"HyperParameters": _hyperparameters(change["HyperParameters"])}
    elif operation == "CreateEndpoint":
        add_endpoint_config(sagemaker, "a-config", account=account, instance_type=example.get("instance_type", "ml.m7i.large"))
        request = {"EndpointConfigName": "a-config"}
    elif operation == "CreateEndpointConfig":
        add_endpoint_config(sagemaker, "a-config", account=account)
        request = {"ProductionVariants": plane.place(account, sagemaker.meta.region_name).store.configs["a-config"].variants}
    return request | change


def _hyperparameters(described: dict[str, Any]) -> dict[str, str]:
    if "count" in described:
        return {f"name-{at}": "1" for at in range(described["count"])}
    return {name: value["repeat"] * value["times"] for name, value in described.items()}
