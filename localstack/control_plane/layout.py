"""The folder tree of one training instance, `/opt/ml`, and the files in it that tell the container what it is part of.

Source: "Amazon SageMaker AI Training Storage Folders" and "How Amazon SageMaker AI Provides Training Information" (developer guide).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

INSIDE = PurePosixPath("/opt/ml")
CHECKPOINTS = INSIDE / "checkpoints"
INTERFACE = "eth0"
_GROUP = "homogeneousCluster"  # the group of a job that names none


@dataclass(frozen=True)
class Host:
    """One of a job's machines: `algo-1` and so on."""

    name: str
    instance_type: str
    group: str = _GROUP


def hosts_of(resources: Mapping[str, Any]) -> list[Host]:
    """The machines of a ResourceConfig; those of instance groups are numbered through."""
    found = [each for each in resources.get("InstanceGroups") or [resources] for _ in range(each["InstanceCount"])]
    return [Host(f"algo-{number}", each["InstanceType"], each.get("InstanceGroupName", _GROUP)) for number, each in enumerate(found, 1)]


@dataclass(frozen=True)
class Tree:
    """One machine's folders, here; `root` is seen as `/opt/ml` there."""

    root: Path

    @property
    def input(self) -> Path:
        return self.root / "input"

    @property
    def config(self) -> Path:
        return self.input / "config"

    def channel(self, name: str) -> Path:
        return self.input / "data" / name

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def data(self) -> Path:
        """What is uploaded beside the model."""
        return self.output / "data"

    @property
    def failure(self) -> Path:
        return self.output / "failure"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def make(self, channels: Sequence[str] = ()) -> Tree:
        """The folders, each with mode 0755 whatever the umask is."""
        wanted = [self.config, self.model, self.data, self.checkpoints, *(self.channel(name) for name in channels)]
        for folder in [self.root, self.input, self.input / "data", self.output, *wanted]:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        return self

    def reason(self) -> str:
        """The first 1,024 characters of the failure file; empty where there is none. A container may have made anything of that name."""
        here = self.root.resolve() / "output" / "failure"
        if here.resolve() != here or not self.failure.is_file():
            return ""
        try:
            with self.failure.open(encoding="utf-8", errors="replace") as file:
                return file.read(1024)
        except OSError:
            return ""


def write_config(tree: Tree, request: Mapping[str, Any], host: Host, hosts: Sequence[Host]) -> None:
    """`input/config`: hyperparameters.json, resourceconfig.json, inputdataconfig.json and, where it is asked for, checkpointconfig.json."""
    mode = request["AlgorithmSpecification"].get("TrainingInputMode", "File")
    found = {
        "hyperparameters": dict(request.get("HyperParameters", {})),
        "resourceconfig": resource_config(host, hosts),
        "inputdataconfig": {each["ChannelName"]: _channel_facts(each, mode) for each in request.get("InputDataConfig", [])},
    }
    if checkpoints := request.get("CheckpointConfig"):
        found["checkpointconfig"] = {"LocalPath": str(CHECKPOINTS), **checkpoints}
    for name, content in found.items():
        path = tree.config / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        path.chmod(0o644)


def resource_config(host: Host, hosts: Sequence[Host]) -> dict[str, Any]:
    """What resourceconfig.json says on `host`."""
    groups: dict[str, list[Host]] = {}
    for each in hosts:
        groups.setdefault(each.group, []).append(each)
    return {
        "current_host": host.name,
        "current_instance_type": host.instance_type,
        "current_group_name": host.group,
        "hosts": [each.name for each in hosts],
        "instance_groups": [
            {"instance_group_name": name, "instance_type": each[0].instance_type, "hosts": [one.name for one in each]}
            for name, each in groups.items()
        ],
        "network_interface_name": INTERFACE,
    }


def _channel_facts(channel: Mapping[str, Any], mode: str) -> dict[str, Any]:
    source = channel.get("DataSource", {}).get("S3DataSource", {})
    found = {
        "TrainingInputMode": channel.get("InputMode", mode),
        "S3DistributionType": source.get("S3DataDistributionType", "FullyReplicated"),
        "RecordWrapperType": channel.get("RecordWrapperType", "None"),
    }
    return found | ({"ContentType": channel["ContentType"]} if "ContentType" in channel else {})


def container_environment(request: Mapping[str, Any], arn: str, region: str) -> dict[str, str]:
    """What a training container finds in its environment. There is no SM_ variable: toolkits inside make those."""
    own = {"TRAINING_JOB_NAME": request["TrainingJobName"], "TRAINING_JOB_ARN": arn, "AWS_REGION": region}
    return {**request.get("Environment", {}), **own}


def local_checkpoints(request: Mapping[str, Any]) -> PurePosixPath:
    """Where the container has its checkpoints."""
    return PurePosixPath(request.get("CheckpointConfig", {}).get("LocalPath") or CHECKPOINTS)
