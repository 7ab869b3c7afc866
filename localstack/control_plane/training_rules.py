"""What a CreateTrainingJob request must be beyond its shapes. The rules are from SageMaker's API reference and its developer guide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from control_plane.refusal import invalid
from control_plane.store import Request

LONGEST = 28 * 24 * 3600  # seconds: MaxRuntimeInSeconds' limit in the API reference of StoppingCondition
NOT_EMULATED = ("ServerlessJobConfig", "ModelPackageConfig", "MlflowConfig", "SessionChainingConfig")
_MODES = ("File", "FastFile")
_LOCAL_DISKS = re.compile(  # families with NVMe disks of their own: a "d" behind the generation, and these (EC2 user guide, instance store)
    r"ml\.(?:[a-z]+\d+[a-z]*d[a-z]*|g5|g6|g6e|g7|g7e|p5|p5e|p5en|p6-b200|p6-b300|p6e-gb200|trn1|trn1n|trn2|dl1)\."
)
_NOT_EMULATED_RESOURCES = (
    "TrainingPlanArn",
    "InstancePlacementConfig",
    "InstancePreferences",
    "SelectedInstanceType",
    "SelectedInstanceCount",
)
_TAKEN = ("input", "model", "output", "code", "errors", "sagemaker", "failure")  # folders below /opt/ml that are the platform's


def instances(request: Request) -> dict[str, int]:
    """How many instances of each type a job asks for."""
    resources = request["ResourceConfig"]
    groups = resources.get("InstanceGroups") or [resources]
    counted: dict[str, int] = {}
    for each in groups:
        counted[each["InstanceType"]] = counted.get(each["InstanceType"], 0) + int(each["InstanceCount"])
    return counted


def refuse_contradictions(request: Request, account: str) -> None:
    """Raises Refused (ValidationException) for the first rule that a request breaks."""
    for found in broken(request, account):
        raise invalid(found)


def broken(request: Request, account: str) -> Iterator[str]:
    """Each rule that a request breaks, as a sentence."""
    for name in NOT_EMULATED:
        if name in request:
            yield f"{name} is not emulated by this control plane."
    missing = [name for name in ("AlgorithmSpecification", "ResourceConfig", "StoppingCondition") if name not in request]
    if missing:  # the model leaves them out of its required members for serverless jobs alone
        yield f"{missing[0]} is required for a training job that is not serverless."
        return
    if request["RoleArn"].split(":")[4] != account:
        yield "Cross-account pass role is not allowed."
    yield from _algorithm(request["AlgorithmSpecification"])
    yield from _resources(request["ResourceConfig"])
    yield from _time(request)
    yield from _channels(request)
    yield from _output(request)
    if request.get("EnableNetworkIsolation") and request.get("RemoteDebugConfig", {}).get("EnableRemoteDebug"):
        yield "RemoteDebugConfig cannot be enabled with EnableNetworkIsolation: a container without network cannot be reached."


def _algorithm(algorithm: Request) -> Iterator[str]:
    named, image = algorithm.get("AlgorithmName"), algorithm.get("TrainingImage")
    if bool(named) == bool(image):
        yield "You must specify either AlgorithmName or TrainingImage in AlgorithmSpecification, but not both."
    elif named:
        yield f'Could not find algorithm "{named}".'
    names = [each["Name"] for each in algorithm.get("MetricDefinitions", [])]
    if len(set(names)) < len(names):
        yield "Metric definition names must be unique."
    for each in algorithm.get("MetricDefinitions", []):
        try:
            re.compile(each["Regex"])
        except re.error as exc:
            yield f"Invalid regular expression {each['Regex']!r} of the metric {each['Name']}: {exc}."
    if (mode := algorithm.get("TrainingInputMode", "File")) not in _MODES:
        yield f"TrainingInputMode {mode} is not emulated by this control plane; it has {' and '.join(_MODES)}."


def _resources(resources: Request) -> Iterator[str]:
    for name in _NOT_EMULATED_RESOURCES:
        if name in resources:
            yield f"ResourceConfig.{name} is not emulated by this control plane."
    single = "InstanceType" in resources or "InstanceCount" in resources
    if "InstanceGroups" in resources:
        if single:
            yield "InstanceGroups cannot be specified together with InstanceType and InstanceCount."
        groups = resources["InstanceGroups"]
    elif "InstanceType" in resources and "InstanceCount" in resources:
        groups = [resources]
    else:
        groups = []
    if not groups:
        yield "InstanceType and InstanceCount, or InstanceGroups, are required in ResourceConfig."
    if any(each["InstanceCount"] < 1 for each in groups):
        yield "InstanceCount must be at least 1."
    if resources.get("VolumeSizeInGB", 1) < 1:
        yield "VolumeSizeInGB must be at least 1."
    if "VolumeKmsKeyId" in resources:
        for each in groups:
            if _LOCAL_DISKS.match(each["InstanceType"]):
                yield f"You can't request a VolumeKmsKeyId when using an instance type with local storage ({each['InstanceType']})."


def _time(request: Request) -> Iterator[str]:
    condition, spot = request["StoppingCondition"], request.get("EnableManagedSpotTraining", False)
    longest, wait = condition.get("MaxRuntimeInSeconds", 86400), condition.get("MaxWaitTimeInSeconds")
    if longest > LONGEST:
        yield f"Invalid MaxRuntimeInSeconds. It must be less than or equal to {LONGEST}."
    if spot and (wait is None or wait < longest):
        yield "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds"
    if not spot and wait is not None:
        yield "Invalid MaxWaitTimeInSeconds. It is only supported when EnableManagedSpotTraining is set to true"
    if spot and request["ResourceConfig"].get("KeepAlivePeriodInSeconds"):
        yield "KeepAlivePeriodInSeconds is not supported with EnableManagedSpotTraining."


def _channels(request: Request) -> Iterator[str]:
    channels = request.get("InputDataConfig", [])
    groups = [each["InstanceGroupName"] for each in request["ResourceConfig"].get("InstanceGroups", [])]
    names = [each["ChannelName"] for each in channels]
    if len(set(names)) < len(names):
        yield "Channel names must be unique: " + ", ".join(sorted({each for each in names if names.count(each) > 1}))
    for each in channels:
        source, name = each["DataSource"], each["ChannelName"]
        if name in (".", ".."):
            yield f"Invalid channel name {name}: no folder can have it."
        if len(source) != 1:
            yield f"Channel {name} must have exactly one data source."
        elif "S3DataSource" not in source:
            yield f"{next(iter(source))} is not emulated by this control plane (channel {name})."
        if (mode := each.get("InputMode", "File")) not in _MODES:
            yield f"InputMode {mode} is not emulated by this control plane (channel {name}); it has {' and '.join(_MODES)}."
        s3 = source.get("S3DataSource", {})
        if s3.get("AttributeNames") and s3["S3DataType"] != "AugmentedManifestFile":
            yield f"AttributeNames can only be specified for S3DataType AugmentedManifestFile (channel {name})."
        if s3.get("S3DataType", "S3Prefix") not in ("S3Prefix", "ManifestFile"):
            yield f"S3DataType {s3['S3DataType']} is not emulated by this control plane (channel {name}); it has S3Prefix and ManifestFile."
        if missing := [each for each in s3.get("InstanceGroupNames", []) if each not in groups]:
            yield f"The instance group {missing[0]} of channel {name} is none of the job's."
    image = request["AlgorithmSpecification"].get("TrainingImageConfig", {})
    if image.get("TrainingRepositoryAccessMode") == "Vpc" and "VpcConfig" not in request:
        yield "VpcConfig is required when TrainingRepositoryAccessMode is Vpc."


def _output(request: Request) -> Iterator[str]:
    places = {"OutputDataConfig.S3OutputPath": request["OutputDataConfig"]["S3OutputPath"]}
    checkpoints = request.get("CheckpointConfig")
    if checkpoints is not None:
        places["CheckpointConfig.S3Uri"] = checkpoints["S3Uri"]
        path = PurePosixPath(checkpoints.get("LocalPath", "/opt/ml/checkpoints"))
        below = path.parts[3:4] if path.parts[:3] == ("/", "opt", "ml") else ()
        if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/opt/ml") or path == PurePosixPath("/"):
            yield f"Invalid CheckpointConfig.LocalPath {path}: it must be an absolute path of a folder of its own."
        elif below and below[0] in _TAKEN:
            yield f"Invalid CheckpointConfig.LocalPath {path}: /opt/ml/{below[0]} is reserved by SageMaker."
    for name, uri in places.items():
        if not uri.startswith("s3://"):
            yield f"Invalid {name} {uri}: it must be an S3 URI."
