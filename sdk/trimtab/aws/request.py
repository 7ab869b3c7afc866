"""What a training job on SageMaker is asked to be: the body of CreateTrainingJob. Pure.

Source: CreateTrainingJob, Amazon SageMaker API reference; "Use managed spot training", "Train using a heterogeneous cluster" and
"Run training and inference containers in internet-free mode", Amazon SageMaker AI developer guide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import SpecError
from trimtab.layout import EVENTS_VARIABLE
from trimtab.spec import JobSpec

RUN_TAG, MODEL_TAG, SUBMISSION_TAG = "trimtab-run", "trimtab-model", "trimtab-submission"
CHECKPOINTS = "/opt/ml/checkpoints"
METRICS = ("loss", "epoch", "lr", "grad_norm", "tokens_per_second", "memory_mb")

_NUMBER = "([0-9.eE+-]+)"
_NOT_IN_TAGS = re.compile(r"[^\w\s.:/=+\-@]")  # letters, digits, blanks and these (the model's pattern of a tag's value)
_YES, _NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
_WAIT = 3600  # seconds that a spot job may wait for instances beyond its running time, where nothing else is asked for


@dataclass(frozen=True)
class Settings:
    """How a job runs on SageMaker, beside the job itself. Keys are ARNs or ids of KMS keys.

    `spot`: instances that may be taken away, at a lower price; `max_wait_minutes` is what such a job may wait for them beyond its running
    time. `keep_alive_minutes`: the instances wait so long for the next job (a warm pool, which is billed). `network_isolation`: the
    container reaches nothing but its peers.
    """

    role: str
    instance_type: str | None = None
    volume_gb: int | None = None
    spot: bool = False
    max_wait_minutes: float | None = None
    max_pending_minutes: float | None = None
    keep_alive_minutes: float | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    volume_kms_key: str | None = None
    network_isolation: bool = True
    encrypt_traffic: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """From values as the command line gives them, texts, or as Python does. Raises SpecError for one that is none."""
        found = dict(given)
        for name in ("max_wait_minutes", "max_pending_minutes", "keep_alive_minutes", "volume_gb"):
            if name in found:
                found[name] = number(name, found[name])
        for name in ("spot", "network_isolation", "encrypt_traffic"):
            if name in found:
                found[name] = yes_or_no(name, found[name])
        for name in ("subnets", "security_groups"):
            if name in found:
                found[name] = listing(found[name])
        if "volume_gb" in found:
            found["volume_gb"] = round(found["volume_gb"])
        if "tags" in found:
            found["tags"] = pairs("tags", found["tags"])
        return cls(**{"role": "", **found})

    @classmethod
    def anew(cls, was: Mapping[str, Any], asked: Settings, given: Collection[str]) -> Settings:
        """Settings as they were noted (`asdict`), but for those that are expressly given now."""
        values = {**was, **{name: getattr(asked, name) for name in given}}
        return cls(**{**values, "subnets": tuple(values["subnets"]), "security_groups": tuple(values["security_groups"])})

    def __post_init__(self) -> None:
        if bool(self.subnets) != bool(self.security_groups):
            raise SpecError("a VPC is given by both: set  --backend-option subnets=...  and  --backend-option security_groups=...")
        if self.max_wait_minutes is not None and not self.spot:
            raise SpecError("max_wait_minutes is for instances that may be taken away: add  --backend-option spot=yes")
        if self.keep_alive_minutes is not None and self.spot:
            raise SpecError("spot instances are not kept: leave keep_alive_minutes out, or spot")
        if own := [name for name in self.tags if name.startswith(("aws:", "trimtab-"))]:
            raise SpecError(f"the tag {own[0]} is not yours to set: names that begin with aws: and trimtab- are taken; choose another")


@dataclass(frozen=True)
class Allocation:
    """What the request names of the account: the image, the instance, and s3:// addresses. `max_seconds` is the hard stop."""

    image: str
    instance: str
    volume_gb: int | None
    max_seconds: int
    run_uri: str  # s3://bucket/prefix/runs/<run id>
    channels: Mapping[str, Mapping[str, str]]  # an S3DataSource for each channel


def training_job(spec: JobSpec, run_id: str, settings: Settings, granted: Allocation, number: int = 1) -> dict[str, Any]:
    """The request of the run's life `number`, 1 for the first; they differ by name, and by what a resume asks for anew."""
    resources: dict[str, Any] = {"InstanceType": granted.instance, "InstanceCount": spec.nodes}
    if granted.volume_gb is not None:
        resources["VolumeSizeInGB"] = granted.volume_gb
    if settings.volume_kms_key:
        resources["VolumeKmsKeyId"] = settings.volume_kms_key
    if settings.keep_alive_minutes is not None:
        resources["KeepAlivePeriodInSeconds"] = math.ceil(settings.keep_alive_minutes * 60)
    output = {"S3OutputPath": f"{granted.run_uri}/output", "CompressionType": "NONE"}
    request: dict[str, Any] = {
        "TrainingJobName": life_name(run_id, number),
        "RoleArn": settings.role,
        "AlgorithmSpecification": {
            "TrainingImage": granted.image,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": f"train:{name}", "Regex": f" {name}={_NUMBER}"} for name in METRICS],
        },
        "HyperParameters": spec.train.to_hyperparameters(),
        "InputDataConfig": [
            {"ChannelName": name, "DataSource": {"S3DataSource": dict(source)}} for name, source in granted.channels.items()
        ],
        "OutputDataConfig": output | ({"KmsKeyId": settings.kms_key} if settings.kms_key else {}),
        "ResourceConfig": resources,
        "StoppingCondition": _stopping(settings, granted.max_seconds),
        "CheckpointConfig": {"S3Uri": f"{granted.run_uri}/checkpoints", "LocalPath": CHECKPOINTS},
        "Environment": {EVENTS_VARIABLE: "log"},
        "EnableNetworkIsolation": settings.network_isolation,
        "EnableInterContainerTrafficEncryption": settings.encrypt_traffic,
        "EnableManagedSpotTraining": settings.spot,
        "Tags": tags_of({**settings.tags, RUN_TAG: run_id, MODEL_TAG: spec.train.model}),
    }
    if settings.subnets:
        request["VpcConfig"] = {"Subnets": list(settings.subnets), "SecurityGroupIds": list(settings.security_groups)}
    return request


def manifest_source(uri: str) -> dict[str, str]:
    """The source of a channel whose objects a manifest names."""
    return {"S3DataType": "ManifestFile", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}


def prefix_source(uri: str) -> dict[str, str]:
    """The source of a channel that is all that lies under a prefix."""
    return {"S3DataType": "S3Prefix", "S3Uri": uri if uri.endswith("/") else f"{uri}/", "S3DataDistributionType": "FullyReplicated"}


def _stopping(settings: Settings, max_seconds: int) -> dict[str, int]:
    found = {"MaxRuntimeInSeconds": max_seconds}
    if settings.spot:
        waits = _WAIT if settings.max_wait_minutes is None else math.ceil(settings.max_wait_minutes * 60)
        found["MaxWaitTimeInSeconds"] = max_seconds + waits
    if settings.max_pending_minutes is not None:
        found["MaxPendingTimeInSeconds"] = math.ceil(settings.max_pending_minutes * 60)
    return found


def life_name(run_id: str, number: int) -> str:
    """The training job of a run's life: the run's own name, and for those after a resume with their number."""
    return run_id if number == 1 else f"{run_id}-{number}"


def life_number(run_id: str, name: str) -> int | None:
    """Which life of the run a training job's name means; None for another one's."""
    if name == run_id:
        return 1
    found = re.fullmatch(re.escape(run_id) + r"-([1-9][0-9]*)", name)
    return int(found[1]) if found and int(found[1]) > 1 else None


def tags_of(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as the service takes them; characters that it refuses become underscores, and values end after 256."""
    return [{"Key": name, "Value": _NOT_IN_TAGS.sub("_", value)[:256]} for name, value in values.items()]


def volume_gb(input_bytes: int) -> int:
    """GB of disk for a job: what it reads, twice for what is unpacked and cached, and room for checkpoints.

    In steps of 50, because instances that are kept warm are only taken by a job that asks for the same disk.
    """
    return 50 * math.ceil((2 * input_bytes / 1e9 + 20) / 50)


def yes_or_no(name: str, value: bool | str) -> bool:
    """A switch as the command line gives it. Raises SpecError for a word that is neither."""
    if isinstance(value, bool):
        return value
    if value.lower() in _YES | _NO:
        return value.lower() in _YES
    raise SpecError(f"{name}={value} is neither yes nor no: give one of them")


def number(name: str, value: float | str) -> float:
    """A number above zero as the command line gives it. Raises SpecError for anything else."""
    try:
        found = float(value)
    except ValueError as exc:
        raise SpecError(f"{name}={value} is no number: give one, such as {name}=30") from exc
    if not (math.isfinite(found) and found > 0):
        raise SpecError(f"{name}={value}: give a number above zero, such as {name}=30")
    return found


def listing(value: str | Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them, or a sequence of names."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else tuple(value)


def pairs(name: str, value: str | Mapping[str, str]) -> dict[str, str]:
    """`a=1,b=2`, or a mapping. Raises SpecError for a part without an equals sign."""
    if not isinstance(value, str):
        return dict(value)
    parts = [part.partition("=") for part in listing(value)]
    for key, equals, _ in parts:
        if not (key and equals):
            raise SpecError(f"{name}={value}: give KEY=VALUE with commas between them, such as {name}=team=search,cost-center=42")
    return {key: text for key, _, text in parts}
