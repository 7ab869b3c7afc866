"""AWS's documented requests and answers, and refusals that its users quoted: what the control plane is held to besides our own ideas.

Each file under examples/ names where it is from and what was changed. `syntax`: request and answer syntaxes of AWS's API reference (their
members, types, limits). `accepted`: whole requests, with their answers where there are any. `refused`: errors as the service worded them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.model import ListShape, MapShape, Shape, StructureShape

from control_plane import ControlPlane, validation
from control_plane.operations import OPERATIONS
from support.plane import add_endpoint_config, client, job_request

EXAMPLES = Path(__file__).parent / "examples"
_TYPES = {"string": str, "number": (int, float), "boolean": bool}
_SHAPES = {"string": {"string"}, "number": {"integer", "long", "float", "double", "timestamp"}, "boolean": {"boolean"}}


def _examples(folder: str, having: str = "source") -> list[Any]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((EXAMPLES / folder).glob("*.json"))}
    return [pytest.param(example, id=name) for name, example in found.items() if having in example]


def test_every_example_names_its_source() -> None:
    paths = sorted(EXAMPLES.glob("*/*.json"))
    assert len(paths) >= 50
    for path in paths:
        assert json.loads(path.read_text())["source"].startswith("https://"), path


@pytest.mark.parametrize("example", _examples("syntax"))
def test_documented_members_and_limits_are_those_of_the_model_in_use(example: dict[str, Any]) -> None:
    name = example["operation"]
    assert name in OPERATIONS["sagemaker"]
    model = validation.operation("sagemaker", name)
    _same_members(example["request"], model.input_shape, name)
    if "answer" in example:
        _same_members(example["answer"], model.output_shape, name)
    for member, limits in example["members"].items():
        shape = model.input_shape.members[member]
        documented = {limits[key] for key in ("longest", "most", "highest") if key in limits}
        held = {limit for each in _all_limits(shape) for limit in each}
        assert all(any(limit <= each for each in held) for limit in documented), f"{name}.{member}: {documented}, {held}"
        assert set(limits.get("values", [])) <= set(shape.metadata.get("enum", limits.get("values", [])))


def _all_limits(shape: Shape) -> list[list[int]]:
    own = [shape.metadata["max"]] if "max" in shape.metadata else []
    below = [shape.key, shape.value] if isinstance(shape, MapShape) else [shape.member] if isinstance(shape, ListShape) else []
    return [own, *[limits for each in below for limits in _all_limits(each)]]


def _same_members(syntax: Any, shape: Shape, path: str) -> None:
    """Every member that the documentation has is in the shape, with its type."""
    if isinstance(syntax, list):
        assert isinstance(shape, ListShape), path
        for each in syntax:
            _same_members(each, shape.member, path)
    elif isinstance(syntax, dict) and isinstance(shape, MapShape):
        assert list(syntax) == ["string"], path
        _same_members(syntax["string"], shape.value, path)
    elif isinstance(syntax, dict):
        assert isinstance(shape, StructureShape), path
        for name, each in syntax.items():
            assert name in shape.members, f"{path}.{name}"
            _same_members(each, shape.members[name], f"{path}.{name}")
    elif syntax in _SHAPES:
        assert shape.type_name in _SHAPES[syntax], f"{path}: {syntax}, {shape.type_name}"


@pytest.mark.parametrize("example", _examples("syntax", having="answer"))
def test_an_answer_has_the_documented_members_with_the_documented_types(plane: ControlPlane, example: dict[str, Any]) -> None:
    with client(plane) as sagemaker:
        answer = _answers(plane, sagemaker, example["operation"])
    assert _compare(answer, example["answer"], example["operation"]) > 0, "nothing of the documented answer was answered"


def _answers(plane: ControlPlane, sagemaker: Any, operation: str) -> Any:
    """The JSON that an operation answers with when there is one of everything, finished, measured and tagged."""
    tags = [{"Key": "team", "Value": "seeds"}]
    channel = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/data"}}
    metrics = [{"Name": "loss", "Regex": "loss=([0-9.]+)"}]
    sagemaker.create_training_job(
        **job_request(
            AlgorithmSpecification=job_request()["AlgorithmSpecification"] | {"MetricDefinitions": metrics},
            HyperParameters={"epochs": "3"},
            InputDataConfig=[{"ChannelName": "train", "DataSource": channel}],
            VpcConfig={"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1"]},
            Tags=tags,
        )
    )
    job = plane.store.jobs["job"]
    job.move("Downloading")
    job.observe("step=1 loss=0.5")
    job.finish("Failed", failure_reason="AlgorithmError: no")
    add_endpoint_config(sagemaker)
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    plane.store.endpoints["endpoint"].move("InService")
    requests: dict[str, dict[str, Any]] = {
        "CreateTrainingJob": job_request("job-2"),
        "DescribeTrainingJob": {"TrainingJobName": "job"},
        "ListTrainingJobs": {},
        "Search": {"Resource": "TrainingJob"},
        "AddTags": {"ResourceArn": job.arn, "Tags": tags},
        "ListTags": {"ResourceArn": job.arn},
        "CreateModel": {"ModelName": "model-2", "PrimaryContainer": {"Image": "image"}, "ExecutionRoleArn": job_request()["RoleArn"]},
        "DescribeModel": {"ModelName": "model"},
        "ListModels": {},
        "CreateEndpointConfig": {"EndpointConfigName": "config-2", "ProductionVariants": plane.store.configs["config"].variants},
        "DescribeEndpointConfig": {"EndpointConfigName": "config"},
        "ListEndpointConfigs": {},
        "CreateEndpoint": {"EndpointName": "endpoint-2", "EndpointConfigName": "config"},
        "DescribeEndpoint": {"EndpointName": "endpoint"},
        "UpdateEndpoint": {"EndpointName": "endpoint", "EndpointConfigName": "config"},
        "ListEndpoints": {},
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


def _compare(answer: Any, syntax: Any, path: str) -> int:
    """How many documented members were answered; a value of another type than the documented one fails."""
    if isinstance(syntax, list):
        assert isinstance(answer, list), path
        return sum(_compare(each, syntax[0], path) for each in answer)
    if isinstance(syntax, dict):
        assert isinstance(answer, dict), path
        if list(syntax) == ["string"]:
            return sum(_compare(each, syntax["string"], path) for each in answer.values())
        return sum(_compare(answer[name], each, f"{path}.{name}") for name, each in syntax.items() if name in answer)
    if syntax in _TYPES:
        assert isinstance(answer, _TYPES[syntax]), f"{path}: {answer!r} is no {syntax}"
    return 1


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
