"""The test session's own AWS: LocalStack on a free port, in an environment that localstack/setup makes once, and control planes on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

HERE = Path(__file__).parents[2] / "localstack"
sys.path.insert(0, str(HERE))  # its packages are no part of the distribution

import cloud  # noqa: E402
from control_plane import ControlPlane, Settings  # noqa: E402

QUICK = Settings(grace=30.0, notice=30.0, sync_every=0.2)  # enough for a slow machine; what is to be killed has settings of its own


@pytest.fixture(scope="session")
def localstack_venv() -> Path:
    """LocalStack's environment: made the first time, checked in a moment afterwards."""
    done = subprocess.run([HERE / "setup"], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        pytest.fail(f"localstack/setup: {done.stderr.strip()}", pytrace=False)
    return cloud.VENV


@pytest.fixture(scope="session")
def localstack(localstack_venv: Path) -> Iterator[str]:
    """The URL of the session's LocalStack, with the default bucket and role."""
    with cloud.LocalStack(0, localstack_venv) as found:
        cloud.prepare(found.url, cloud.BUCKET)
        yield found.url


@pytest.fixture(scope="session")
def control_plane(localstack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The session's control plane: jobs run in containers, with graces that no test waits for.

    It works in pytest's folder: what a run that is killed leaves there, a later one removes.
    """
    with ControlPlane(aws_url=localstack, runner="docker", settings=QUICK, work=tmp_path_factory.mktemp("plane")) as plane:
        yield plane


@pytest.fixture(scope="module")
def amazon(localstack: str, control_plane: ControlPlane) -> Iterator[dict[str, str]]:
    """The variables with which every client, here and in other processes, reaches this session's AWS."""
    variables = {
        "AWS_ENDPOINT_URL": localstack,
        **{
            f"AWS_ENDPOINT_URL_{name}": control_plane.url
            for name in ("SAGEMAKER", "SAGEMAKER_RUNTIME", "SERVICE_QUOTAS", "APPLICATION_AUTO_SCALING")
        },
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def aws(localstack: str) -> Iterator[Callable[..., Any]]:
    """Real boto3 clients of the session's AWS: aws("s3"), aws("sagemaker", plane.url); twelve digits as key are another account."""
    with contextlib.ExitStack() as opened:

        def client(service: str, url: str = localstack, account: str = "test") -> Any:
            config = Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 3}, read_timeout=70)
            made = boto3.client(
                service, endpoint_url=url, region_name=cloud.REGION, aws_access_key_id=account, aws_secret_access_key="test", config=config
            )
            return opened.enter_context(contextlib.closing(made))

        yield client


@pytest.fixture
def bucket(aws: Callable[..., Any]) -> Iterator[str]:
    """A bucket of the test's own."""
    s3, name = aws("s3"), f"test-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=name)
    yield name
    for each in s3.list_objects_v2(Bucket=name).get("Contents", []):
        s3.delete_object(Bucket=name, Key=each["Key"])
    s3.delete_bucket(Bucket=name)
