"""Inference components, scaling targets and the public hub by boto3; what runs the components here answers out of this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from control_plane import ControlPlane
from control_plane.store import Endpoint, EndpointConfig, Model
from support.plane import ACCOUNT, IMAGE, ROLE, add_endpoint_config, client, refused

TARGET = {"ServiceNamespace": "sagemaker", "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount"}
OF_VARIANT = {"ServiceNamespace": "sagemaker", "ScalableDimension": "sagemaker:variant:DesiredInstanceCount"}


class Hosts:
    """Serves at once, and ends when it is told."""

    def __init__(self) -> None:
        self.serving: dict[str, str] = {}

    def start(self, endpoint: Endpoint, model: Model, config: EndpointConfig) -> None:
        self.serving[endpoint.name] = endpoint.log_group
        endpoint.move("InService")

    def stop(self, endpoint: Endpoint, gone: Callable[[], None]) -> None:
        self.serving.pop(endpoint.name, None)
        gone()

    def invoke(self, endpoint_name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], Iterator[bytes]]:
        return 200, {"content-type": "text/plain"}, iter([endpoint_name.encode()])

    def close(self) -> None: ...


@pytest.fixture
def hosts(plane: ControlPlane) -> Hosts:
    made = Hosts()
    plane.place(ACCOUNT, "us-east-1").hosting = made
    return made


@pytest.fixture
def scaling(plane: ControlPlane) -> Iterator[Any]:
    with client(plane, "application-autoscaling") as made:
        yield made


@pytest.fixture
def empty(sagemaker: Any, hosts: Hosts) -> str:
    """An endpoint that begins without a model."""
    sagemaker.create_model(ModelName="model", PrimaryContainer={"Image": IMAGE}, ExecutionRoleArn=ROLE)
    scaled = {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": 2}
    variant = {"VariantName": "all", "InstanceType": "ml.m7i.large", "InitialInstanceCount": 1, "ManagedInstanceScaling": scaled}
    sagemaker.create_endpoint_config(EndpointConfigName="config", ProductionVariants=[variant], ExecutionRoleArn=ROLE)
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    return "endpoint"


def request(**changes: Any) -> dict[str, Any]:
    needs = {"MinMemoryRequiredInMb": 1024, "NumberOfCpuCoresRequired": 1}
    asked = {
        "InferenceComponentName": "component",
        "EndpointName": "endpoint",
        "VariantName": "all",
        "Specification": {"ModelName": "model", "ComputeResourceRequirements": needs},
        "RuntimeConfig": {"CopyCount": 1},
    }
    return asked | changes


def test_a_component_serves_on_an_endpoint_that_began_empty(plane: ControlPlane, sagemaker: Any, hosts: Hosts, empty: str) -> None:
    told = sagemaker.describe_endpoint(EndpointName=empty)
    assert told["EndpointStatus"] == "InService"
    assert told["ProductionVariants"][0]["ManagedInstanceScaling"]["MinInstanceCount"] == 0
    with client(plane, "sagemaker-runtime") as runtime:
        with refused("ValidationError", "Inference Component Name header is required"):
            runtime.invoke_endpoint(EndpointName=empty, Body=b"x")
        sagemaker.create_inference_component(**request(), Tags=[{"Key": "team", "Value": "seeds"}])
        told = sagemaker.describe_inference_component(InferenceComponentName="component")
        assert (told["InferenceComponentStatus"], told["RuntimeConfig"]) == ("InService", {"DesiredCopyCount": 1, "CurrentCopyCount": 1})
        assert told["Specification"]["ModelName"] == "model"
        assert sagemaker.list_tags(ResourceArn=told["InferenceComponentArn"])["Tags"] == [{"Key": "team", "Value": "seeds"}]
        assert hosts.serving == {"component": "/aws/sagemaker/InferenceComponents/component"}
        answer = runtime.invoke_endpoint(EndpointName=empty, InferenceComponentName="component", Body=b"x")
        assert answer["Body"].read() == b"component"

        sagemaker.update_inference_component_runtime_config(InferenceComponentName="component", DesiredRuntimeConfig={"CopyCount": 0})
        assert hosts.serving == {}
        with refused("ValidationError", "Inference Component has no capacity to process this request."):
            runtime.invoke_endpoint(EndpointName=empty, InferenceComponentName="component", Body=b"x")
        sagemaker.update_inference_component_runtime_config(InferenceComponentName="component", DesiredRuntimeConfig={"CopyCount": 2})
        assert list(hosts.serving) == ["component"]
        with refused("ValidationError", "not found on endpoint"):
            runtime.invoke_endpoint(EndpointName=empty, InferenceComponentName="other", Body=b"x")


def test_an_endpoint_is_deleted_after_its_components(sagemaker: Any, hosts: Hosts, empty: str) -> None:
    sagemaker.create_inference_component(**request())
    with refused("ValidationException", "it has inference components, such as component"):
        sagemaker.delete_endpoint(EndpointName=empty)
    (row,) = sagemaker.list_inference_components(EndpointNameEquals=empty)["InferenceComponents"]
    assert (row["InferenceComponentName"], row["EndpointName"]) == ("component", empty)
    sagemaker.delete_inference_component(InferenceComponentName="component")
    assert sagemaker.list_inference_components()["InferenceComponents"] == []
    with refused("ValidationException", "Could not find inference component"):
        sagemaker.describe_inference_component(InferenceComponentName="component")
    sagemaker.delete_endpoint(EndpointName=empty)
    assert sagemaker.list_endpoints()["Endpoints"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"EndpointName": "none"}, "Could not find endpoint"),
        ({"VariantName": "other"}, "takes no inference components"),
        ({"Specification": {"ModelName": "none", "ComputeResourceRequirements": {"MinMemoryRequiredInMb": 128}}}, "Could not find model"),
        ({"Specification": {"ModelName": "model"}}, "ComputeResourceRequirements is required"),
        ({"Specification": {"Container": {"Image": "a"}}}, "are emulated"),
    ],
)
def test_a_component_without_a_place_is_refused(sagemaker: Any, empty: str, changes: dict[str, Any], said: str) -> None:
    with refused("ValidationException", said):
        sagemaker.create_inference_component(**request(**changes))
    sagemaker.create_inference_component(**request())
    with refused("ValidationException", "Cannot create already existing inference component"):
        sagemaker.create_inference_component(**request())


def test_what_belongs_together_is_asked_for(sagemaker: Any) -> None:
    sagemaker.create_model(ModelName="model", PrimaryContainer={"Image": IMAGE}, ExecutionRoleArn=ROLE)
    bare = {"VariantName": "all", "InstanceType": "ml.m7i.large", "InitialInstanceCount": 1}
    with refused("ValidationException", "ExecutionRoleArn is required"):
        sagemaker.create_endpoint_config(EndpointConfigName="config", ProductionVariants=[bare])
    both = [bare, {**bare, "VariantName": "other", "ModelName": "model"}]
    with refused("ValidationException", "cannot be in one endpoint configuration"):
        sagemaker.create_endpoint_config(EndpointConfigName="config", ProductionVariants=both, ExecutionRoleArn=ROLE)


def test_a_variant_is_scaled_between_limits_until_it_is_deleted(sagemaker: Any, scaling: Any, hosts: Hosts) -> None:
    """Requests as in "Register a model" and "Define a scaling policy", SageMaker AI developer guide."""
    add_endpoint_config(sagemaker)
    variant = {**OF_VARIANT, "ResourceId": "endpoint/my-endpoint/variant/AllTraffic"}
    with refused("ValidationException", "Could not find endpoint"):
        scaling.register_scalable_target(**variant, MinCapacity=1, MaxCapacity=8)
    sagemaker.create_endpoint(EndpointName="my-endpoint", EndpointConfigName="config")
    with refused("ValidationException", "Maximum capacity cannot be less than minimum capacity"):
        scaling.register_scalable_target(**variant, MinCapacity=3, MaxCapacity=2)
    with refused("ValidationException", "only inference components scale to zero"):
        scaling.register_scalable_target(**variant, MinCapacity=0, MaxCapacity=2)
    with refused("ValidationException", "variant not found"):
        scaling.register_scalable_target(**{**variant, "ResourceId": "endpoint/my-endpoint/variant/other"}, MinCapacity=1, MaxCapacity=2)
    assert scaling.register_scalable_target(**variant, MinCapacity=1, MaxCapacity=8)["ScalableTargetARN"].endswith(
        scaling.register_scalable_target(**variant, MaxCapacity=9)["ScalableTargetARN"].rpartition("/")[2]
    )
    (target,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 9)
    tracking = {
        "TargetValue": 70.0,
        "PredefinedMetricSpecification": {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"},
        "ScaleInCooldown": 600,
        "ScaleOutCooldown": 300,
    }
    policy = {"PolicyName": "scale", "PolicyType": "TargetTrackingScaling", "TargetTrackingScalingPolicyConfiguration": tracking}
    arn = scaling.put_scaling_policy(**variant, **policy)["PolicyARN"]
    assert arn.endswith(":resource/sagemaker/endpoint/my-endpoint/variant/AllTraffic:policyName/scale")
    (kept,) = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    assert kept["TargetTrackingScalingPolicyConfiguration"] == tracking
    scaling.delete_scaling_policy(**variant, PolicyName="scale")
    with refused("ObjectNotFoundException", "No scaling policy found"):
        scaling.delete_scaling_policy(**variant, PolicyName="scale")
    sagemaker.delete_endpoint(EndpointName="my-endpoint")
    assert scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"] == []
    with refused("ObjectNotFoundException", "No scalable target found for service namespace: sagemaker"):
        scaling.deregister_scalable_target(**variant)


def test_a_component_scales_to_zero(sagemaker: Any, scaling: Any, empty: str) -> None:
    """Requests as in "Scale an endpoint to zero instances", SageMaker AI developer guide."""
    sagemaker.create_inference_component(**request())
    target = {**TARGET, "ResourceId": "inference-component/component"}
    scaling.register_scalable_target(**target, MinCapacity=0, MaxCapacity=1)
    step = {
        "AdjustmentType": "ChangeInCapacity",
        "MetricAggregationType": "Maximum",
        "Cooldown": 60,
        "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
    }
    scaling.put_scaling_policy(**target, PolicyName="from-zero", PolicyType="StepScaling", StepScalingPolicyConfiguration=step)
    with refused("ValidationException", "TargetTrackingScalingPolicyConfiguration is required"):
        scaling.put_scaling_policy(**target, PolicyName="load", PolicyType="TargetTrackingScaling")
    (kept,) = scaling.describe_scaling_policies(ServiceNamespace="sagemaker", ResourceId=target["ResourceId"])["ScalingPolicies"]
    assert kept["StepScalingPolicyConfiguration"] == step
    scaling.deregister_scalable_target(**target)
    assert scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"] == []
    with refused("ValidationException", "are scalable targets of this control plane"):
        scaling.register_scalable_target(
            ServiceNamespace="ecs", ResourceId="service/a/b", ScalableDimension="ecs:service:DesiredCount", MinCapacity=1, MaxCapacity=2
        )


def test_faults_meet_the_new_services_too(plane: ControlPlane, scaling: Any) -> None:
    plane.fault(operation="DescribeScalableTargets", code="AccessDeniedException")
    with refused("AccessDeniedException", "not authorized to perform: application-autoscaling:DescribeScalableTargets"):
        scaling.describe_scalable_targets(ServiceNamespace="sagemaker")


def test_a_shortage_fails_the_endpoint(plane: ControlPlane, sagemaker: Any, hosts: Hosts) -> None:
    add_endpoint_config(sagemaker)
    plane.fault(kind="capacity", instance_type="ml.m7i.large")
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    told = sagemaker.describe_endpoint(EndpointName="endpoint")
    assert told["EndpointStatus"] == "Failed"
    assert "InsufficientInstanceCapacity" in told["FailureReason"]
    sagemaker.delete_endpoint(EndpointName="endpoint")


def test_the_public_hub_is_a_folder_of_documents(tmp_path: Path) -> None:
    document = {"HostingEcrUri": "image", "DefaultInferenceInstanceType": "ml.g5.2xlarge"}
    (tmp_path / "a-model.json").write_text(json.dumps(document, indent=2))
    asked = {"HubName": "SageMakerPublicHub", "HubContentType": "Model"}
    with ControlPlane(runner=None, hub=tmp_path) as plane, client(plane) as sagemaker:
        told = sagemaker.describe_hub_content(**asked, HubContentName="a-model")
        assert json.loads(told["HubContentDocument"]) == document
        assert told["HubContentArn"] == "arn:aws:sagemaker:us-east-1:aws:hub-content/SageMakerPublicHub/Model/a-model/1.0.0"
        for other in ({"HubContentName": "b-model"}, {"HubContentName": "a-model", "HubName": "mine"}):
            with refused("ResourceNotFound", "does not exist in hub"):
                sagemaker.describe_hub_content(**{**asked, **other})
