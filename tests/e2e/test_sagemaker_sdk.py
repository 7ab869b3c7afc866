"""AWS's own SDK, version 3, in an environment of its own: it asks for the very jobs that the backend renders, and trains with our image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from control_plane import ControlPlane
from trimtab.backends.sagemaker import SageMakerBackend
from trimtab.run import Run
from trimtab.spec import JobSpec
from trimtab.staging import Staged

SDK = Path(__file__).parents[1] / "support" / "sagemaker_sdk"
ROLE = "arn:aws:iam::000000000000:role/SageMakerExecutionRole"
REGISTRY = "000000000000.dkr.ecr.us-east-1.amazonaws.com"
KEY = "arn:aws:kms:us-east-1:000000000000:key/1234abcd-12ab-34cd-56ef-1234567890ab"

# No tag without a value is among them: the SDK leaves out what is empty inside a structure, and botocore then misses the tag's value.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "spot": {"spot": True, "max_wait_minutes": 180},
    "warm-pool": {"keep_alive_minutes": 10},
    "private": {
        "subnets": "subnet-0a1b2c3d,subnet-1a2b3c4d",
        "security_groups": "sg-0a1b2c3d",
        "kms_key": KEY,
        "volume_kms_key": KEY,
        "network_isolation": False,
        "tags": "team=search,cost-center=42",
    },
    "two-instances": {"encrypt_traffic": True, "instance_type": "ml.c7i.8xlarge", "volume_gb": 100},
}


@dataclass(frozen=True)
class Sdk:
    """The SDK in its environment. `home` is a folder of its own, where it finds nobody's settings."""

    python: str
    home: Path

    def submit(self, verb: str, requests: list[dict[str, Any]], sagemaker_url: str, aws_url: str) -> dict[str, Any]:
        """What submit.py answers."""
        asked, answer = self.home / f"{verb}.json", self.home / f"{verb}-answer.json"
        asked.write_text(json.dumps(requests), encoding="utf-8")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "AWS_ENDPOINT_URL": aws_url,
            "AWS_ENDPOINT_URL_SAGEMAKER": sagemaker_url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",  # what follows the log does not know of a session's region
            "SAGEMAKER_ADMIN_CONFIG_OVERRIDE": str(SDK / "config.yaml"),
            "SAGEMAKER_VALIDATE_ROLE": "false",  # else it simulates the role's policies, which LocalStack cannot
        }
        done = subprocess.run(
            [self.python, SDK / "submit.py", verb, asked, answer],
            env=environment, cwd=self.home, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"submit.py {verb}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}", pytrace=False)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found | {"printed": done.stdout + done.stderr}


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Sdk:
    """Its environment is made the first time, by pip as it is configured here."""
    done = subprocess.run(
        [SDK / "setup"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode:
        pytest.fail(done.stderr.strip(), pytrace=False)
    return Sdk(done.stdout.strip(), tmp_path_factory.mktemp("sdk"))


@pytest.fixture(scope="module")
def job(small_job: JobSpec, staged: Staged) -> JobSpec:
    return small_job.model_copy(update={"train": staged.train})


@pytest.fixture(scope="module")
def rendered(job: JobSpec, staged: Staged) -> dict[str, dict[str, Any]]:
    """Our requests, by the settings that they are of. Nothing is asked of AWS for them."""

    def render(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        backend = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/trimtab-xeon-train:1", bucket="our-bucket", region="us-east-1", **settings)
        spec = job.model_copy(update={"nodes": 2}) if name == "two-instances" else job
        request: dict[str, Any] = backend.render(spec, staged.channels, f"trim-{name}")["training_job"]
        return request

    return {name: render(name, settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def created(sdk: Sdk, rendered: dict[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What the SDK answered when it was given them all, and what came over the network, by the jobs' names. No job runs."""
    with ControlPlane(runner=None) as plane:
        answer = sdk.submit("create", list(rendered.values()), plane.url, "http://127.0.0.1:9")  # of other services it needs none
        yield answer, {request["TrainingJobName"]: request for name, request in plane.requests if name == "CreateTrainingJob"}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sdk_given_our_request_sends_an_equal_one(created, rendered, name):
    _, received = created
    assert received[f"trim-{name}"] == rendered[name]


def test_the_settings_are_in_the_requests(rendered):
    """Else the comparison above would be of nothing much."""
    assert rendered["spot"]["EnableManagedSpotTraining"]
    assert rendered["spot"]["CheckpointConfig"]["S3Uri"].endswith("/checkpoints")
    assert rendered["warm-pool"]["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert rendered["private"]["VpcConfig"]["Subnets"] == ["subnet-0a1b2c3d", "subnet-1a2b3c4d"]
    assert rendered["private"]["OutputDataConfig"]["KmsKeyId"] == rendered["private"]["ResourceConfig"]["VolumeKmsKeyId"] == KEY
    assert rendered["private"]["EnableNetworkIsolation"] is False
    assert {"Key": "cost-center", "Value": "42"} in rendered["private"]["Tags"]
    assert rendered["two-instances"]["ResourceConfig"]["InstanceCount"] == 2


def test_the_sdk_reads_what_it_is_answered(created):
    answer, _ = created
    assert answer["jobs"] == [{"name": f"trim-{name}", "status": "InProgress"} for name in SETTINGS]


def test_it_speaks_to_nobody_else(created):
    answer, _ = created
    assert answer["hosts"] == ["127.0.0.1"]


@pytest.fixture
def backend(
    localstack: str, control_plane: ControlPlane, xeon_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SageMakerBackend]:
    """Our own client of the session's AWS."""
    variables = {
        "AWS_ENDPOINT_URL": localstack,
        "AWS_ENDPOINT_URL_SAGEMAKER": control_plane.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/{xeon_image}", home=tmp_path / "home", poll_seconds=0.2)
    yield found
    found.aws.close()


def test_model_trainer_runs_our_image_to_completion(sdk, backend, job, staged, localstack, control_plane):
    backend.upload(job, staged.channels)
    ours = backend.render(job, staged.channels, "trim-by-sdk")["training_job"]
    answer = sdk.submit("train", [ours], control_plane.url, localstack)
    (ended,) = answer["jobs"]
    assert ended["status"] == "Completed"
    assert "step=6/6" in answer["printed"]  # it followed the log
    assert answer["hosts"] == ["127.0.0.1"]

    (sent,) = [
        request for name, request in control_plane.requests if name == "CreateTrainingJob" and request["TrainingJobName"] == ended["name"]
    ]
    named = {"TrainingJobName": ended["name"]}  # it puts the time behind the name
    assert sent == {name: value for name, value in ours.items() if name != "Tags"} | named

    run = Run.attach(f"sagemaker://{ended['name']}", role=ROLE, home=backend.home)
    assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]
    artifact = run.artifact()
    artifact.verify()
    assert artifact.manifest["metrics"]["steps"] == 6
    run.backend.aws.close()
