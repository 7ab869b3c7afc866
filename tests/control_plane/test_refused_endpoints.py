"""Models and endpoints that are refused at the call, and what is kept of invocations."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from control_plane import ControlPlane
from control_plane.store import Endpoint, EndpointConfig, Model
from support.plane import ACCOUNT, IMAGE, ROLE, add_endpoint_config, client, refused

ARN = f"arn:aws:sagemaker:us-east-1:{ACCOUNT}"


def _source(uri: str, kind: str = "S3Prefix", compression: str = "None", **more: Any) -> dict[str, Any]:
    return {"ModelDataSource": {"S3DataSource": {"S3Uri": uri, "S3DataType": kind, "CompressionType": compression, **more}}}


def test_model_data_that_is_not_there_is_refused(localstack: str, aws: Callable[..., Any], bucket: str) -> None:
    for key in ("m/model.tar.gz", "p/weights"):
        aws("s3").put_object(Bucket=bucket, Key=key, Body=b"x")
    with ControlPlane(localstack, None, check_inputs=True) as plane, client(plane) as sagemaker:

        def create(**data: Any) -> None:
            sagemaker.create_model(ModelName=f"m-{uuid.uuid4().hex[:8]}", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": IMAGE, **data})

        create(ModelDataUrl=f"s3://{bucket}/m/model.tar.gz")
        create(**_source(f"s3://{bucket}/p/"))
        for uri in (f"s3://{bucket}/m/model.tar", f"s3://{bucket}-of-nobody/m/model.tar.gz"):
            with refused("ValidationException", f"Could not find model data at {uri}."):
                create(ModelDataUrl=uri)
            with refused("ValidationException", f"Could not find model data at {uri}."):
                create(**_source(uri, "S3Object"))
        with refused("ValidationException", f"Could not find model data at s3://{bucket}/q/."):
            create(**_source(f"s3://{bucket}/q/"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_source("s3://b/folder"), "a key name prefix (S3Prefix) must end with a forward slash"),
        (_source("s3://b/folder/", compression="Gzip"), "CompressionType Gzip needs S3DataType S3Object"),
        (_source("s3://b/folder/", ManifestS3Uri="s3://b/m"), "ManifestS3Uri is not emulated"),
    ],
)
def test_a_source_against_the_reference_is_refused(sagemaker: Any, data: dict[str, Any], message: str) -> None:
    with refused("ValidationException", message):
        sagemaker.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": IMAGE, **data})


def test_what_is_not_served_is_refused_when_it_would_be(plane: ControlPlane, sagemaker: Any) -> None:
    add_endpoint_config(sagemaker)
    sagemaker.create_endpoint(EndpointName="serving", EndpointConfigName="config")
    plane.store.endpoints["serving"].move("InService")
    models = {
        "pipeline": {"Containers": [{"Image": IMAGE}, {"Image": IMAGE}]},
        "many": {"PrimaryContainer": {"Image": IMAGE, "Mode": "MultiModel", "ModelDataUrl": "s3://b/m/"}},
    }
    for name, containers in models.items():
        sagemaker.create_model(ModelName=name, ExecutionRoleArn=ROLE, **containers)
    instance = {"InstanceType": "ml.m7i.large", "InitialInstanceCount": 1}
    configs: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("pipeline", instance, {}, "A model of several Containers"),
        ("many", instance, {}, "Mode MultiModel"),
        ("model", {"ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 1}}, {}, "ServerlessConfig"),
        ("model", instance, {"AsyncInferenceConfig": {"OutputConfig": {"S3OutputPath": "s3://b/o"}}}, "AsyncInferenceConfig"),
    ]
    for at, (model, variant, more, message) in enumerate(configs):
        sagemaker.create_endpoint_config(
            EndpointConfigName=f"c-{at}", ProductionVariants=[{"VariantName": "v", "ModelName": model, **variant}], **more
        )
        with refused("ValidationException", message, "is not served by this control plane"):
            sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName=f"c-{at}")
        with refused("ValidationException", message, "is not served by this control plane"):
            sagemaker.update_endpoint(EndpointName="serving", EndpointConfigName=f"c-{at}")
    assert list(plane.store.endpoints) == ["serving"]


def test_a_failed_endpoint_can_only_be_deleted(plane: ControlPlane, sagemaker: Any) -> None:
    add_endpoint_config(sagemaker)
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    plane.store.endpoints["endpoint"].fail("no")
    with refused("ValidationException", f'"{ARN}:endpoint/endpoint"', "DeleteEndpoint is the only operation that can be performed"):
        sagemaker.update_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    assert sagemaker.describe_endpoint(EndpointName="endpoint")["EndpointStatus"] == "Failed"
    sagemaker.delete_endpoint(EndpointName="endpoint")
    assert plane.store.endpoints == {}


class Breaking:
    """Its error breaks off in the middle."""

    def start(self, endpoint: Endpoint, model: Model, config: EndpointConfig) -> None:
        endpoint.move("InService")

    def stop(self, endpoint: Endpoint, gone: Callable[[], None]) -> None:
        gone()

    def invoke(self, endpoint_name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            yield b"half an"
            raise ConnectionResetError("reset")

        return 500, {}, pieces()

    def close(self) -> None:
        pass


def test_an_error_that_breaks_off_is_a_model_error_and_a_body_is_not_kept(plane: ControlPlane, sagemaker: Any) -> None:
    plane.place(ACCOUNT, "us-east-1").hosting = Breaking()
    add_endpoint_config(sagemaker)
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    with client(plane, "sagemaker-runtime") as runtime:
        for call in (runtime.invoke_endpoint, runtime.invoke_endpoint_with_response_stream):
            with refused("ModelError", "Received server error (0)", "the container broke its answer off"):
                call(EndpointName="endpoint", Body=b"x" * 1_000_000, ContentType="text/plain")
    name, request = plane.requests[-1]
    assert name == "InvokeEndpointWithResponseStream"
    assert request == {"EndpointName": "endpoint", "ContentType": "text/plain"}
