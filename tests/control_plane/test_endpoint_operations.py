"""Models, configs, endpoints and invocations by boto3; what hosts them here answers out of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from botocore.exceptions import EventStreamError

from control_plane import ControlPlane
from control_plane.store import Endpoint, EndpointConfig, Model
from support.plane import ACCOUNT, IMAGE, ROLE, add_endpoint_config, client, refused

ARN = f"arn:aws:sagemaker:us-east-1:{ACCOUNT}"


class Echo:
    """Serves at once: the body comes back in two chunks, the headers as they were given; some bodies ask for trouble."""

    def __init__(self) -> None:
        self.serving: dict[str, tuple[str, str]] = {}
        self.release = threading.Event()
        self.headers: dict[str, str] = {}

    def start(self, endpoint: Endpoint, model: Model, config: EndpointConfig) -> None:
        if "broken" in config.name:
            endpoint.fail("The primary container for production variant AllTraffic did not pass the ping health check.")
            return
        self.serving[endpoint.name] = (model.name, config.name)
        endpoint.move("InService")

    def stop(self, endpoint: Endpoint, gone: Callable[[], None]) -> None:
        def end() -> None:
            self.release.wait()
            del self.serving[endpoint.name]
            gone()

        self.ending = threading.Thread(target=end)
        self.ending.start()

    def invoke(self, endpoint_name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], Iterator[bytes]]:
        self.headers = dict(headers)
        if body == b"late":
            raise TimeoutError
        if body == b"gone":
            raise ConnectionRefusedError("refused")
        status = int(body[6:]) if body.startswith(b"status") else 200
        return status, {"content-type": "text/plain", "X-Amzn-SageMaker-Custom-Attributes": "seen"}, self._chunks(body)

    def _chunks(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        if body == b"breaks off":
            raise ConnectionResetError("reset")
        yield body[len(body) // 2 :]

    def close(self) -> None:
        self.release.set()


@pytest.fixture
def echo(plane: ControlPlane) -> Echo:
    made = Echo()
    plane.place(ACCOUNT, "us-east-1").hosting = made
    return made


@pytest.fixture
def runtime(plane: ControlPlane) -> Iterator[Any]:
    with client(plane, "sagemaker-runtime") as made:
        yield made


def _serve(sagemaker: Any) -> None:
    add_endpoint_config(sagemaker)
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")


def test_an_endpoint_is_created_described_updated_and_deleted(plane: ControlPlane, sagemaker: Any, echo: Echo) -> None:
    _serve(sagemaker)
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName="endpoint")
    told = sagemaker.describe_endpoint(EndpointName="endpoint")
    assert told["EndpointArn"] == f"{ARN}:endpoint/endpoint"
    variant = told["ProductionVariants"][0]
    assert (variant["VariantName"], variant["CurrentInstanceCount"], variant["CurrentWeight"]) == ("AllTraffic", 1, 1.0)
    assert variant["DeployedImages"][0]["SpecifiedImage"] == IMAGE

    add_endpoint_config(sagemaker, "config-2")
    sagemaker.update_endpoint(EndpointName="endpoint", EndpointConfigName="config-2")
    assert sagemaker.describe_endpoint(EndpointName="endpoint")["EndpointConfigName"] == "config-2"
    add_endpoint_config(sagemaker, "broken")
    sagemaker.update_endpoint(EndpointName="endpoint", EndpointConfigName="broken")
    told = sagemaker.describe_endpoint(EndpointName="endpoint")  # rolled back
    assert (told["EndpointStatus"], told["EndpointConfigName"]) == ("InService", "config-2")
    assert "ping health check" in told["FailureReason"]

    sagemaker.delete_endpoint(EndpointName="endpoint")
    assert sagemaker.describe_endpoint(EndpointName="endpoint")["EndpointStatus"] == "Deleting"
    with refused("ValidationException", f'Cannot update in-progress endpoint "{ARN}:endpoint/endpoint".'):
        sagemaker.delete_endpoint(EndpointName="endpoint")
    echo.release.set()
    sagemaker.get_waiter("endpoint_deleted").wait(EndpointName="endpoint", WaiterConfig={"Delay": 1, "MaxAttempts": 180})
    assert sagemaker.describe_endpoint_config(EndpointConfigName="config")["ProductionVariants"][0]["ModelName"] == "model"
    assert sagemaker.describe_model(ModelName="model")["PrimaryContainer"]["Mode"] == "SingleModel"
    assert sagemaker.list_endpoints()["Endpoints"] == []


def test_an_endpoint_that_cannot_start_has_failed_and_can_be_deleted(sagemaker: Any, echo: Echo) -> None:
    add_endpoint_config(sagemaker, "broken")
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="broken")
    told = sagemaker.describe_endpoint(EndpointName="endpoint")
    assert told["EndpointStatus"] == "Failed"
    assert "ping health check" in told["FailureReason"]
    echo.serving["endpoint"] = ("model", "broken")
    echo.release.set()
    sagemaker.delete_endpoint(EndpointName="endpoint")


def test_what_is_being_created_is_neither_updated_nor_deleted(plane: ControlPlane, sagemaker: Any) -> None:
    _serve(sagemaker)
    for call in (sagemaker.delete_endpoint, lambda **name: sagemaker.update_endpoint(EndpointConfigName="config", **name)):
        with refused("ValidationException", "Cannot update in-progress endpoint"):
            call(EndpointName="endpoint")
    plane.store.endpoints["endpoint"].move("InService")
    sagemaker.delete_endpoint(EndpointName="endpoint")
    with refused("ValidationException", f'Could not find endpoint "{ARN}:endpoint/endpoint".'):
        sagemaker.describe_endpoint(EndpointName="endpoint")


def test_a_config_in_use_can_be_deleted_but_its_endpoint_not_updated(plane: ControlPlane, sagemaker: Any, echo: Echo) -> None:
    _serve(sagemaker)
    add_endpoint_config(sagemaker, "config-2")
    sagemaker.delete_endpoint_config(EndpointConfigName="config")
    assert sagemaker.describe_endpoint(EndpointName="endpoint")["EndpointStatus"] == "InService"
    with refused("ValidationException", f'Could not find endpoint configuration "{ARN}:endpoint-config/config".'):
        sagemaker.update_endpoint(EndpointName="endpoint", EndpointConfigName="config-2")


def test_what_is_absent_or_there_already_is_named(sagemaker: Any) -> None:
    add_endpoint_config(sagemaker)
    container = {"PrimaryContainer": {"Image": IMAGE}, "ExecutionRoleArn": ROLE}
    with refused("ValidationException", f'Cannot create already existing model "{ARN}:model/model".'):
        sagemaker.create_model(ModelName="model", **container)
    with refused("ValidationException", f'Could not find model "{ARN}:model/none".'):
        sagemaker.delete_model(ModelName="none")
    variant = {"VariantName": "v", "ModelName": "none", "InstanceType": "ml.m7i.large", "InitialInstanceCount": 1}
    with refused("ValidationException", f'Could not find model "{ARN}:model/none".'):
        sagemaker.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant])
    with refused("ValidationException", f'Could not find endpoint configuration "{ARN}:endpoint-config/none".'):
        sagemaker.create_endpoint(EndpointName="e", EndpointConfigName="none")
    sagemaker.delete_model(ModelName="model")
    with refused("ValidationException", f'Could not find model "{ARN}:model/model".'):  # gone since the config was made
        sagemaker.create_endpoint(EndpointName="e", EndpointConfigName="config")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PrimaryContainer": {}}, "Image is required"),
        ({"PrimaryContainer": {"Image": "i"}, "Containers": [{"Image": "i"}]}, "either PrimaryContainer or Containers"),
        ({"ExecutionRoleArn": "arn:aws:iam::999999999999:role/r"}, "Cross-account pass role is not allowed."),
        ({"PrimaryContainer": {"ModelPackageName": "package"}}, "ModelPackageName is not emulated"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(sagemaker: Any, changes: dict[str, Any], message: str) -> None:
    with refused("ValidationException", message):
        sagemaker.create_model(**({"ModelName": "m", "PrimaryContainer": {"Image": "i"}, "ExecutionRoleArn": ROLE} | changes))


def test_instances_of_endpoints_have_their_own_quota(plane: ControlPlane, sagemaker: Any) -> None:
    plane.set_quota("ml.m7i.large for endpoint usage", 1)
    _serve(sagemaker)
    with refused("ResourceLimitExceeded", "'ml.m7i.large for endpoint usage' is 1 Instances, with current utilization of 1 Instances"):
        sagemaker.create_endpoint(EndpointName="endpoint-2", EndpointConfigName="config")


def test_lists_are_paged(sagemaker: Any) -> None:
    for at in range(5):
        add_endpoint_config(sagemaker, f"config-{at}", f"model-{at}")
    pages = sagemaker.get_paginator("list_models").paginate(MaxResults=2, SortBy="Name", SortOrder="Ascending")
    assert [each["ModelName"] for page in pages for each in page["Models"]] == [f"model-{at}" for at in range(5)]
    pages = sagemaker.get_paginator("list_endpoint_configs").paginate(MaxResults=2)
    assert [each["EndpointConfigName"] for page in pages for each in page["EndpointConfigs"]] == [
        f"config-{at}" for at in reversed(range(5))
    ]


def test_an_invocation_reaches_the_container_and_comes_back(sagemaker: Any, runtime: Any, echo: Echo) -> None:
    _serve(sagemaker)
    answer = runtime.invoke_endpoint(
        EndpointName="endpoint", Body=b"\x00body", ContentType="application/x-bytes", Accept="text/plain", CustomAttributes="mine"
    )
    assert answer["Body"].read() == b"\x00body"
    assert (answer["ContentType"], answer["InvokedProductionVariant"], answer["CustomAttributes"]) == ("text/plain", "AllTraffic", "seen")
    asked = {name.lower(): value for name, value in echo.headers.items()}
    assert asked == {"content-type": "application/x-bytes", "accept": "text/plain", "x-amzn-sagemaker-custom-attributes": "mine"}


def test_a_streamed_invocation_comes_in_parts(sagemaker: Any, runtime: Any, echo: Echo) -> None:
    _serve(sagemaker)
    answer = runtime.invoke_endpoint_with_response_stream(EndpointName="endpoint", Body=b"first second", Accept="text/event-stream")
    assert answer["ContentType"] == "text/plain"
    assert [each["PayloadPart"]["Bytes"] for each in answer["Body"]] == [b"first ", b"second"]
    assert echo.headers["Accept"] == "text/event-stream"
    large = b"x" * 300_000
    answer = runtime.invoke_endpoint_with_response_stream(EndpointName="endpoint", Body=large)
    assert b"".join(each["PayloadPart"]["Bytes"] for each in answer["Body"]) == large
    broken = runtime.invoke_endpoint_with_response_stream(EndpointName="endpoint", Body=b"breaks off")["Body"]
    with contextlib.closing(broken), pytest.raises(EventStreamError, match="ModelStreamError"):
        list(broken)


def test_a_containers_error_is_a_model_error(sagemaker: Any, runtime: Any, echo: Echo) -> None:
    _serve(sagemaker)
    with pytest.raises(
        runtime.exceptions.ModelError, match=r"Received server error \(500\) from primary with message \"status500\""
    ) as caught:
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"status500")
    response = caught.value.response
    assert (response["OriginalStatusCode"], response["OriginalMessage"]) == (500, "status500")
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["LogStreamArn"].endswith("/aws/sagemaker/Endpoints/endpoint")
    with refused("ModelError", "Received client error (400)"):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"status400")
    with refused("ModelError", "Received server error (0)", "Your invocation timed out"):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"late")
    with refused("ModelError", "could not be reached"):
        runtime.invoke_endpoint_with_response_stream(EndpointName="endpoint", Body=b"gone")


def test_invocations_are_validated_and_need_an_endpoint_in_service(plane: ControlPlane, sagemaker: Any, runtime: Any) -> None:
    _serve(sagemaker)
    with refused("ValidationError", f"Endpoint endpoint of account {ACCOUNT} not found."):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"x")  # still being created
    plane.store.endpoints["endpoint"].move("InService")
    with refused("ValidationError", "at 'body' failed to satisfy constraint: Member must have length less than or equal to 6291456"):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"x" * 6_291_457)
    with refused("ValidationError", "at 'customAttributes' failed to satisfy constraint"):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"x", CustomAttributes="a" * 1025)
    with refused("ServiceUnavailable", "runs no containers"):
        runtime.invoke_endpoint(EndpointName="endpoint", Body=b"x")
