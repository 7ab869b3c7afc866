"""Requests against botocore's model, in the service's words: lengths, ranges, patterns and enums that botocore itself lets pass."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.model import Shape
from hypothesis import given
from hypothesis import strategies as st

from control_plane import validation
from control_plane.operations import OPERATIONS
from control_plane.refusal import Refused
from support.plane import job_request

CREATE = validation.operation("sagemaker", "CreateTrainingJob").input_shape

FAILED = " failed to satisfy constraint: "
LONGER = "Member must have length less than or equal to"
TRAIN = {"ChannelName": "a", "DataSource": {}}


def _resources(**members: Any) -> dict[str, Any]:
    return {"ResourceConfig": members}


def _vpc(subnet: str) -> dict[str, Any]:
    return {"VpcConfig": {"Subnets": [subnet], "SecurityGroupIds": ["sg"]}}


def _found(**changes: Any) -> list[str]:
    return list(validation.violations(CREATE, job_request("job", **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TrainingJobName": "x" * 64}, f"Value '{'x' * 64}' at 'trainingJobName'{FAILED}{LONGER} 63"),
        ({"RoleArn": None}, f"Value null at 'roleArn'{FAILED}Member must not be null"),
        (_resources(InstanceType="ml.none"), f"'ml.none' at 'resourceConfig.instanceType'{FAILED}Member must satisfy enum value set: ["),
        (_resources(InstanceCount=-1), f"'resourceConfig.instanceCount'{FAILED}Member must have value greater than or equal to 0"),
        (_resources(KeepAlivePeriodInSeconds=21601), f"'resourceConfig.keepAlivePeriodInSeconds'{FAILED}Member must have value less than"),
        ({"InputDataConfig": []}, f"Value '[]' at 'inputDataConfig'{FAILED}Member must have length greater than or equal to 1"),
        ({"InputDataConfig": [TRAIN, {"ChannelName": "b"}]}, f"null at 'inputDataConfig.2.member.dataSource'{FAILED}Member must not be"),
        ({"Environment": {"1": "a"}}, f"Value '{{1=a}}' at 'environment'{FAILED}Map keys must satisfy constraint: [{LONGER} 512, "),
        (_vpc("a b"), f"Value '[a b]' at 'vpcConfig.subnets'{FAILED}Member must satisfy constraint: [{LONGER} 32, "),
        ({"HyperParameters": {"text": "two\nlines"}}, f"'hyperParameters'{FAILED}Map value must satisfy constraint: [{LONGER} 2500, "),
        ({"Tags": [{"Key": "k", "Value": "<v>"}]}, f"Value '<v>' at 'tags.1.member.value'{FAILED}Member must satisfy regular expression"),
    ],
)  # fmt: skip
def test_each_constraint_is_refused_in_the_services_words(changes: dict[str, Any], message: str) -> None:
    assert any(message in each for each in _found(**changes)), _found(**changes)


def test_a_request_that_is_right_has_nothing_wrong() -> None:
    assert _found(Tags=[{"Key": "Проект", "Value": "家 1/2"}], HyperParameters={"dotted.name": '"text"'}) == []


def test_everything_wrong_is_counted_and_joined() -> None:
    with pytest.raises(Refused) as caught:
        validation.refuse(CREATE, job_request("a_b" + "x" * 70, RoleArn=None))
    assert caught.value.code == "ValidationException"
    assert caught.value.message.startswith("3 validation errors detected: Value null at 'roleArn'")
    assert caught.value.message.count("; Value '") == 2
    with pytest.raises(Refused, match=re.escape("1 validation error detected: Value 'a_b' at 'trainingJobName'")):
        validation.refuse(CREATE, job_request("a_b"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "START_ARRAY can not be converted to a Structure"),
        ({"TrainingJobName": 1}, "NUMBER_VALUE can not be converted to a String"),
        ({"EnableManagedSpotTraining": "yes"}, "STRING_VALUE can not be converted to a Boolean"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": True}}, "TRUE_VALUE can not be converted to an Integer"),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 1.5}}, "NUMBER_VALUE can not be converted to an Integer"),
        ({"ResourceConfig": {"InstanceTyp": "ml.m5.large"}}, "has no member 'InstanceTyp'"),
    ],
)
def test_a_value_of_another_type_cannot_be_read(document: Any, message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        validation.read(CREATE, document)
    assert caught.value.code == "SerializationException"


def test_times_and_bytes_survive_the_way_through_json() -> None:
    times = validation.operation("sagemaker", "ListTrainingJobs").input_shape
    moment = datetime(2026, 11, 22, 10, 0, 0, 123000, tzinfo=UTC)
    assert validation.read(times, validation.write({"CreationTimeAfter": moment, "NextToken": None})) == {"CreationTimeAfter": moment}
    assert validation.write({"blob": b"\x00\xff"}) == {"blob": "AP8="}


def test_every_pattern_of_every_operation_here_compiles() -> None:
    """Java's expressions are not Python's: \\p{L}, \\z, a dot that stops at every line end."""
    seen: set[str] = set()

    def walk(shape: Shape, above: tuple[str, ...]) -> None:
        if shape.name in above:
            return
        if pattern := shape.metadata.get("pattern"):
            validation.expression(pattern)
            seen.add(pattern)
        parts = [*getattr(shape, "members", {}).values()] if shape.type_name == "structure" else []
        parts += [shape.member] if shape.type_name == "list" else []  # type: ignore[attr-defined]
        parts += [shape.key, shape.value] if shape.type_name == "map" else []  # type: ignore[attr-defined]
        for each in parts:
            walk(each, (*above, shape.name))

    for service, operations in OPERATIONS.items():
        for name in operations:
            if name != "Search":  # its answer is every resource that SageMaker has; only training jobs are answered
                model = validation.operation(service, name)
                walk(model.input_shape, ())
                if model.output_shape is not None:
                    walk(model.output_shape, ())
    assert len(seen) > 40


@pytest.mark.parametrize(
    ("pattern", "value", "fits"),
    [
        (".*", "a\u2028b", False),
        (".*", "one line", True),
        (r"[\S\s]*", "two\nlines", True),
        (r"\A\S[\p{Print}]*\z", "id 1", True),
        (r"\A\S[\p{Print}]*\z", "id\n", False),
        (r"\p{ASCII}*", "é", False),
        (r"\d{12}", "٠١٢٣٤٥٦٧٨٩٠١", False),
        (r"[\p{L}\p{N}]+", "ß八Ⅷ", True),
        (r"([a-z]+)(?<!-)", "a", True),
        (r"[a-z[&~|]+", "a[&~|", True),
        (r"[\u0020-\uD7FF\uD800\uDC00-\uDBFF\uDFFF\r]*", "a\U0001f600", True),
        (r"[\u0020-\uD7FF\uD800\uDC00-\uDBFF\uDFFF\r]*", "\n", False),
    ],
)
def test_javas_expressions_mean_in_python_what_they_mean_in_java(pattern: str, value: str, fits: bool) -> None:
    assert (validation.expression(pattern).fullmatch(value) is not None) is fits


@given(st.from_regex(r"\A[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}\Z") | st.text(max_size=70))
def test_a_job_name_is_refused_exactly_when_it_is_none(name: str) -> None:
    is_name = re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name) is not None and 1 <= len(name) <= 63
    assert (list(validation.violations(CREATE, job_request(name))) == []) is is_name
