"""boto3's clients of a control plane, and requests that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from control_plane import ControlPlane

ACCOUNT = "000000000000"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/trainer"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/train:1"


@contextmanager
def client(
    plane: ControlPlane, service: str = "sagemaker", *, account: str = ACCOUNT, region: str = "us-east-1", **config: Any
) -> Iterator[Any]:
    """An unmodified boto3 client; an access key id of twelve digits is the account. `config`: botocore's Config."""
    made = boto3.client(
        service,
        endpoint_url=plane.url,
        region_name=region,
        aws_access_key_id=account,
        aws_secret_access_key="any",
        config=Config(**({"retries": {"total_max_attempts": 1}} | config)),
    )
    try:
        yield made
    finally:
        made.close()


def job_request(name: str = "job", /, **changes: Any) -> dict[str, Any]:
    """A CreateTrainingJob request; `changes` replace its members, None takes one out."""
    request = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        "RoleArn": ROLE,
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/runs"},
        "ResourceConfig": {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    } | changes
    return {name: value for name, value in request.items() if value is not None}


def add_endpoint_config(
    sagemaker: Any, config: str = "config", model: str = "model", account: str = ACCOUNT, instance_type: str = "ml.m7i.large"
) -> None:
    """A config of one variant, AllTraffic, and its model, each unless it is there."""
    role = f"arn:aws:iam::{account}:role/server"
    if not sagemaker.list_models(NameContains=model)["Models"]:
        sagemaker.create_model(ModelName=model, PrimaryContainer={"Image": IMAGE}, ExecutionRoleArn=role)
    variant = {"VariantName": "AllTraffic", "ModelName": model, "InstanceType": instance_type, "InitialInstanceCount": 1}
    sagemaker.create_endpoint_config(EndpointConfigName=config, ProductionVariants=[variant])


@contextmanager
def refused(code: str, *parts: str) -> Iterator[None]:
    """What is done inside is refused with this code and a message that has these parts."""
    with pytest.raises(ClientError) as caught:
        yield
    error = caught.value.response["Error"]
    assert error["Code"] == code, error
    assert all(part in error["Message"] for part in parts), f"{parts} are not all in: {error['Message']}"
