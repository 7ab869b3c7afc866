"""Training jobs of shell scripts on the session's control plane, asked for with unmodified boto3."""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from docker import DockerClient

import cloud
from control_plane import ControlPlane, cloudwatch
from control_plane.container import LABEL, NAME_LABEL
from support.script_runs import MINE, derived

PATIENCE = 180.0  # seconds: a busy machine takes long to start a container, and what does not come is told late
OVER = ("Completed", "Failed", "Stopped")
WAITS = "until [ -f /go ]; do sleep 0.05; done\n"  # in a script: here it waits for `let_go`
GRACEFUL = """
trap 'echo caught; echo saved >/opt/ml/model/weights; exit 143' TERM
echo going; while :; do sleep 0.1; done
"""


@pytest.fixture(scope="session")
def job_image(client: DockerClient, base_image: str) -> Iterator[str]:
    """An image that runs the script in its channel `code`, as an ECR address whose registry is not there."""
    tag = derived(client, f"{MINE}job:1", f"FROM {base_image}", 'ENTRYPOINT ["/bin/sh", "/opt/ml/input/data/code/script"]')
    yield f"123456789012.dkr.ecr.us-east-1.amazonaws.com/{tag}"
    client.images.remove(tag)


@dataclass
class Jobs:
    """Jobs of one bucket on one control plane."""

    plane: ControlPlane
    sagemaker: Any
    s3: Any
    logs: Any
    bucket: str
    image: str

    def put(self, key: str, data: bytes | str) -> str:
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=data.encode() if isinstance(data, str) else data)
        return f"s3://{self.bucket}/{key}"

    def start(self, script: str, **more: Any) -> str:
        """A job of a shell script; `more` is merged into its request, `resources`, `limits` and `output` into these parts of it."""
        name = f"job-{uuid.uuid4().hex[:8]}"
        self.put(f"{name}/code/script", script)
        parts = {each: more.pop(each, {}) for each in ("resources", "limits", "output", "algorithm")}
        self.sagemaker.create_training_job(
            TrainingJobName=name,
            RoleArn=f"arn:aws:iam::{cloud.ACCOUNT}:role/{cloud.ROLE}",
            AlgorithmSpecification={"TrainingImage": self.image, "TrainingInputMode": "File", **parts["algorithm"]},
            InputDataConfig=[prefix("code", f"s3://{self.bucket}/{name}/code/"), *more.pop("channels", [])],
            OutputDataConfig={"S3OutputPath": f"s3://{self.bucket}/out", **parts["output"]},
            ResourceConfig={"InstanceType": "ml.m7i.large", "InstanceCount": 1, "VolumeSizeInGB": 1, **parts["resources"]},
            StoppingCondition={"MaxRuntimeInSeconds": 1200, **parts["limits"]},
            **more,
        )
        return name

    def spot(self, script: str, **more: Any) -> str:
        limits = {"MaxWaitTimeInSeconds": 2400, **more.pop("limits", {})}
        checkpoints = {"S3Uri": f"s3://{self.bucket}/checkpoints"}
        return self.start(script, EnableManagedSpotTraining=True, CheckpointConfig=checkpoints, limits=limits, **more)

    def describe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.sagemaker.describe_training_job(TrainingJobName=name)
        return found

    def wait(self, name: str) -> dict[str, Any]:
        until(lambda: self.describe(name)["TrainingJobStatus"] in OVER)
        return self.describe(name)

    def run(self, script: str, **more: Any) -> dict[str, Any]:
        return self.wait(self.start(script, **more))

    def streams(self, name: str) -> list[str]:
        found = self.logs.describe_log_streams(logGroupName=cloudwatch.TRAINING, logStreamNamePrefix=f"{name}/")
        return sorted(each["logStreamName"] for each in found["logStreams"])

    def lines(self, name: str, host: str = "") -> list[str]:
        """Every line that the job has printed, stream after stream."""
        found = []
        with contextlib.suppress(self.logs.exceptions.ResourceNotFoundException):
            for stream in self.streams(name):
                if f"/{host}" in stream:
                    events = self.logs.get_log_events(logGroupName=cloudwatch.TRAINING, logStreamName=stream, startFromHead=True)
                    found += [each["message"] for each in events["events"]]
        return found

    def until_printed(self, name: str, line: str) -> None:
        """Not for a job that ended before it printed it."""

        def printed() -> bool:
            over = self.describe(name)  # asked before the lines, of which none comes after the end
            found = self.lines(name)
            assert line in found or over["TrainingJobStatus"] not in OVER, (over.get("FailureReason"), found)
            return line in found

        until(printed)

    def let_go(self, name: str) -> None:
        """A script goes on that WAITS on the job's first machine."""
        engine = self.plane.place(self.plane.account, self.plane.region).training.engine  # type: ignore[union-attr]
        labels = [f"{LABEL}={engine.mark}", f"{NAME_LABEL}=sagemaker-{name}-algo-1"]
        [container] = engine.client.containers.list(filters={"label": labels})
        code, said = container.exec_run(["touch", "/go"])
        assert code == 0, said

    def object(self, key: str) -> bytes:
        with self.s3.get_object(Bucket=self.bucket, Key=key)["Body"] as body:
            data: bytes = body.read()
        return data

    def keys(self, prefix: str) -> list[str]:
        return [each["Key"][len(prefix) :] for each in self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])]

    def packed(self, name: str, archive: str = "model.tar.gz") -> dict[str, str]:
        with tarfile.open(fileobj=io.BytesIO(self.object(f"out/{name}/output/{archive}"))) as tar:
            return {each.name: (tar.extractfile(each) or io.BytesIO()).read().decode() for each in tar.getmembers()}


@pytest.fixture
def jobs(control_plane: ControlPlane, aws: Callable[..., Any], bucket: str, job_image: str) -> Jobs:
    return Jobs(control_plane, aws("sagemaker", control_plane.url), aws("s3"), aws("logs"), bucket, job_image)


def until(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def prefix(name: str, uri: str, **source: str) -> dict[str, Any]:
    facts = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated", **source}
    return {"ChannelName": name, "DataSource": {"S3DataSource": facts}}


def statuses(found: dict[str, Any]) -> list[str]:
    return [each["Status"] for each in found["SecondaryStatusTransitions"]]


def client_at(client: Any, url: str) -> Any:
    """A client like another one, of another control plane."""
    return boto3.client(
        "sagemaker", endpoint_url=url, region_name=client.meta.region_name, aws_access_key_id="test", aws_secret_access_key="test"
    )
