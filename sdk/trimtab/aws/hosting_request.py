"""What an endpoint on SageMaker is asked to be: the bodies of CreateModel, CreateEndpointConfig, CreateEndpoint and what scales it. Pure.

Sources: these operations and ProductionVariant, Amazon SageMaker API reference; "Automatic scaling of Amazon SageMaker AI models" and
"Scale an endpoint to zero instances", Amazon SageMaker AI developer guide; RegisterScalableTarget and PutScalingPolicy, Application Auto
Scaling API reference. Model, configuration, endpoint and inference component all have the endpoint's id as their name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.aws import limits
from trimtab.aws.containers import KINDS, Container
from trimtab.aws.hosting_instances import Patience
from trimtab.aws.request import listing, number, pairs, tags_of, yes_or_no
from trimtab.errors import SpecError

ENDPOINT_TAG, TITLE_TAG, OWNER_TAG, TTL_TAG = "trimtab-endpoint", "trimtab-title", "trimtab-owner", "trimtab-ttl-minutes"
CONTAINER_TAG, MODELS_TAG, SCALES_TAG, ENDS_TAG = "trimtab-container", "trimtab-models", "trimtab-scales", "trimtab-ends"
WITH_CLIENT = "with-client"
VARIANT = "AllTraffic"
OF_VARIANT, OF_COMPONENT = "sagemaker:variant:DesiredInstanceCount", "sagemaker:inference-component:DesiredCopyCount"


@dataclass(frozen=True)
class HostingSettings:
    """How an endpoint stands on SageMaker, beside the model itself.

    `container` is one of trimtab, vllm, lmi, tgi; `image` takes the place of its own. `instances` are there at the start; with
    `max_instances` or `min_instances` their number follows the load: `target_requests` a minute for each. `min_instances=0` gives all of
    them back while nobody asks. `cooldown_seconds` is how long the load must be low before one is given back.
    """

    role: str = ""
    container: str = "trimtab"
    image: str | None = None
    instance_type: str | None = None
    instances: int = 1
    min_instances: int | None = None
    max_instances: int | None = None
    target_requests: float = 30.0
    cooldown_seconds: int = 300
    download_seconds: int | None = None
    start_seconds: int | None = None
    ami: str | None = None
    model_uri: str | None = None
    jumpstart: str | None = None
    accept_eula: bool = False
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    volume_kms_key: str | None = None
    network_isolation: bool | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> HostingSettings:
        """From values as the command line gives them, texts, or as Python does; None is not given. Raises SpecError for what is none."""
        found = {name: value for name, value in given.items() if value is not None}
        for name in ("download_seconds", "start_seconds", "target_requests"):
            if name in found:
                found[name] = number(name, found[name])
        for name in ("instances", "min_instances", "max_instances", "cooldown_seconds", "download_seconds", "start_seconds"):
            if name in found:
                found[name] = _count(name, found[name])
        for name in ("network_isolation", "accept_eula"):
            if name in found:
                found[name] = yes_or_no(name, found[name])
        for name in ("subnets", "security_groups"):
            if name in found:
                found[name] = listing(found[name])
        if "tags" in found:
            found["tags"] = pairs("tags", found["tags"])
        return cls(**found)

    def __post_init__(self) -> None:
        if self.container not in KINDS:
            raise SpecError(f"there is no container {self.container!r}: give one of {', '.join(KINDS)}, and another image with  image=URI")
        if bool(self.subnets) != bool(self.security_groups):
            raise SpecError("a VPC is given by both: set  --backend-option subnets=...  and  --backend-option security_groups=...")
        if own := [name for name in self.tags if name.startswith(("aws:", "trimtab-"))]:
            raise SpecError(f"the tag {own[0]} is not yours to set: names that begin with aws: and trimtab- are taken; choose another")
        if self.model_uri is not None and self.jumpstart is not None:
            raise SpecError("a model is either in S3 or one of JumpStart's: give model_uri or jumpstart, not both")
        if self.accept_eula and self.jumpstart is None:
            raise SpecError("accept_eula is for a model of JumpStart: leave it out, or add  --backend-option jumpstart=MODEL-ID")
        if self.instances < 1:
            raise SpecError("an endpoint begins with one instance at least: set instances=1; min_instances=0 lets it go to none later")
        low, high = self.bounds
        if not low <= self.instances <= high:
            raise SpecError(
                f"instances={self.instances} is not between min_instances ({low}) and max_instances ({high}): change one of them"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most instances."""
        low = min(self.instances, self.max_instances or self.instances) if self.min_instances is None else self.min_instances
        return low, self.max_instances or max(self.instances, low)

    @property
    def scales(self) -> bool:
        """Whether the number of instances follows the load."""
        return self.bounds != (self.instances, self.instances)

    @property
    def isolated(self) -> bool:
        """Whether the container reaches no network, which is so unless something else is asked for."""
        return self.network_isolation is not False

    @property
    def scaled(self) -> str:
        """What scales it: "variant", "component", or "" for nothing."""
        return "" if not self.scales else "component" if self.to_zero else "variant"

    @property
    def to_zero(self) -> bool:
        """Whether it may have no instance; SageMaker does that for inference components only."""
        return self.bounds[0] == 0


@dataclass(frozen=True)
class Allocation:
    """What the requests name of the account: the container, the machine, where the model lies.

    `memory_mb` (2^20 bytes) and `vcpus` are what a copy of an inference component reserves. `source` is an S3DataSource.
    """

    container: Container
    instance: str
    gpus: int
    vcpus: int
    memory_mb: int
    patience: Patience
    source: Mapping[str, Any] | None
    volume_gb: int | None = None


def model_source(uri: str) -> dict[str, Any]:
    """Files under a prefix, as they are."""
    return {"S3Uri": uri if uri.endswith("/") else f"{uri}/", "S3DataType": "S3Prefix", "CompressionType": "None"}


def tags(
    settings: HostingSettings,
    id: str,
    *,
    title: str,
    models: Sequence[str],
    owner: str,
    container: str,
    ttl_minutes: float | None,
    detach: bool = True,
) -> list[dict[str, str]]:
    """Those of all that belongs to an endpoint: what it serves, how it is asked, on which machine its client is, with what it ends."""
    own = {ENDPOINT_TAG: id, TITLE_TAG: title, MODELS_TAG: " ".join(models), OWNER_TAG: owner, CONTAINER_TAG: container}
    if settings.scales:
        own[SCALES_TAG] = settings.scaled
    if not detach:
        own[ENDS_TAG] = WITH_CLIENT
    if ttl_minutes is not None:
        own[TTL_TAG] = f"{ttl_minutes:g}"
    return tags_of({**settings.tags, **own})


def requests(settings: HostingSettings, id: str, granted: Allocation, tagged: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Every body, by the operation that takes it, in the order in which they are sent."""
    vpc = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)} if settings.subnets else None
    container: dict[str, Any] = {"Image": granted.container.image, "Environment": dict(granted.container.environment)}
    if granted.source is not None:
        container["ModelDataSource"] = {"S3DataSource": dict(granted.source)}
    model = {
        "ModelName": id,
        "PrimaryContainer": container,
        "ExecutionRoleArn": settings.role,
        "EnableNetworkIsolation": settings.isolated,
        "VpcConfig": vpc,
        "Tags": tagged,
    }
    starting = {
        "ModelDataDownloadTimeoutInSeconds": granted.patience.download,
        "ContainerStartupHealthCheckTimeoutInSeconds": granted.patience.health,
    }
    low, high = settings.bounds
    variant: dict[str, Any] = {
        "VariantName": VARIANT,
        "InstanceType": granted.instance,
        "InitialInstanceCount": settings.instances,
        **starting,
        "VolumeSizeInGB": granted.volume_gb,
        "InferenceAmiVersion": settings.ami or granted.container.ami,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"} if high > 1 else None,
    }
    config: dict[str, Any] = {
        "EndpointConfigName": id,
        "ProductionVariants": [variant],
        "Tags": tagged,
        "KmsKeyId": settings.volume_kms_key,
    }
    found = {"CreateModel": _given(model), "CreateEndpointConfig": config, "CreateEndpoint": _endpoint(id, tagged)}
    if settings.to_zero:
        variant["ManagedInstanceScaling"] = {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": high}
        config |= {"ExecutionRoleArn": settings.role, "EnableNetworkIsolation": settings.isolated, "VpcConfig": vpc}
        found["CreateInferenceComponent"] = _component(settings, id, granted, starting, tagged)
    else:
        variant |= {"ModelName": id, "InitialVariantWeight": 1.0}
    config["ProductionVariants"] = [_given(variant)]
    found["CreateEndpointConfig"] = _given(config)
    return found | _scaling(settings, id, low, high)


def _endpoint(id: str, tagged: list[dict[str, str]]) -> dict[str, Any]:
    return {"EndpointName": id, "EndpointConfigName": id, "Tags": tagged}


def _component(
    settings: HostingSettings, id: str, granted: Allocation, starting: Mapping[str, int], tagged: list[dict[str, str]]
) -> dict[str, Any]:
    """A copy fills an instance: all its GPUs, or all its processors but one."""
    needs: dict[str, Any] = {"MinMemoryRequiredInMb": granted.memory_mb}
    if granted.gpus:
        needs["NumberOfAcceleratorDevicesRequired"] = granted.gpus
    else:
        needs["NumberOfCpuCoresRequired"] = max(granted.vcpus - 1, 1)
    return {
        "InferenceComponentName": id,
        "EndpointName": id,
        "VariantName": VARIANT,
        "Specification": {"ModelName": id, "StartupParameters": dict(starting), "ComputeResourceRequirements": needs},
        "RuntimeConfig": {"CopyCount": settings.instances},
        "Tags": tagged,
    }


def _scaling(settings: HostingSettings, id: str, low: int, high: int) -> dict[str, dict[str, Any]]:
    """The target and its policies. Target tracking cannot leave zero, so a step and an alarm on refused invocations do."""
    if not settings.scales:
        return {}
    target = target_of(id, component=settings.to_zero)
    metric = "SageMakerInferenceComponentInvocationsPerCopy" if settings.to_zero else "SageMakerVariantInvocationsPerInstance"
    tracking = {
        "TargetValue": settings.target_requests,
        "PredefinedMetricSpecification": {"PredefinedMetricType": metric},
        "ScaleInCooldown": settings.cooldown_seconds,
        "ScaleOutCooldown": 60,
    }
    found: dict[str, dict[str, Any]] = {
        "RegisterScalableTarget": {**target, "MinCapacity": low, "MaxCapacity": high},
        "PutScalingPolicy": {
            "PolicyName": f"{id}-load",
            **target,
            "PolicyType": "TargetTrackingScaling",
            "TargetTrackingScalingPolicyConfiguration": tracking,
        },
    }
    if settings.to_zero:
        step = {
            "AdjustmentType": "ChangeInCapacity",
            "MetricAggregationType": "Maximum",
            "Cooldown": 60,
            "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
        }
        found["PutScalingPolicy from zero"] = {
            "PolicyName": alarm_name(id),
            **target,
            "PolicyType": "StepScaling",
            "StepScalingPolicyConfiguration": step,
        }
        found["PutMetricAlarm"] = {  # its action, the policy's ARN, is known once that is made
            "AlarmName": alarm_name(id),
            "AlarmDescription": "trimtab: somebody asks an endpoint that has no instance",
            "Namespace": "AWS/SageMaker",
            "MetricName": "NoCapacityInvocationFailures",
            "Dimensions": [{"Name": "InferenceComponentName", "Value": id}],
            "Statistic": "Sum",
            "Period": 60,
            "EvaluationPeriods": 1,
            "DatapointsToAlarm": 1,
            "Threshold": 1.0,
            "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            "TreatMissingData": "notBreaching",
        }
    return found


def target_of(id: str, *, component: bool) -> dict[str, str]:
    """What Application Auto Scaling calls an endpoint's instances, or an inference component's copies."""
    resource = f"inference-component/{id}" if component else f"endpoint/{id}/variant/{VARIANT}"
    return {"ServiceNamespace": "sagemaker", "ResourceId": resource, "ScalableDimension": OF_COMPONENT if component else OF_VARIANT}


def alarm_name(id: str) -> str:
    return f"{id}-from-zero"


def refuse(bodies: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SpecError for what the services would refuse, and for anything that looks like a secret."""
    for name, body in bodies.items():
        operation = name.partition(" ")[0]
        scaling = operation in ("RegisterScalableTarget", "PutScalingPolicy")
        service = "application-autoscaling" if scaling else "cloudwatch" if operation == "PutMetricAlarm" else "sagemaker"
        limits.refuse(operation, body, service)
        limits.refuse_secrets(body)


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _count(name: str, value: float | str) -> int:
    """A whole number, zero too."""
    try:
        found = float(value)
    except ValueError as exc:
        raise SpecError(f"{name}={value} is no number: give one, such as {name}=2") from exc
    if found < 0 or found != int(found):
        raise SpecError(f"{name}={value}: give a whole number, such as {name}=2")
    return int(found)
