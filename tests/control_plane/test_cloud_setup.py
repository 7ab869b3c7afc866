"""What a start of LocalStack stands on: the environment that localstack/setup makes, and the container of compose.yaml."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import cloud
from support.cloud import HERE
from support.training_jobs import PATIENCE


def setup(**environment: object) -> subprocess.CompletedProcess[str]:
    given = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run([HERE / "setup"], env=given, capture_output=True, text=True, timeout=PATIENCE, check=False)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_setup_is_quick_the_second_time_and_refuses_another_python(localstack_venv: Path, tmp_path: Path) -> None:
    done = setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = setup(PYTHON=program(tmp_path / "python3.9", "exit 1"), LOCALSTACK_VENV=tmp_path / "venv")
    assert done.returncode == 1
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr


def test_setup_says_what_to_do_when_pip_fails(localstack_venv: Path, tmp_path: Path) -> None:
    """With a Python that makes an environment in a moment, without the pip that comes with it: a pip is lent to it."""
    lent = tmp_path / "lent"
    lent.mkdir()
    (lent / "pip").symlink_to(next(localstack_venv.glob("lib/python*/site-packages/pip")))
    quick = program(
        tmp_path / "python",
        f'if [ "$1 $2" = "-m venv" ]; then shift 2; exec {sys.executable} -m venv --without-pip "$@"; fi; exec {sys.executable} "$@"',
    )
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    done = setup(PYTHON=quick, PYTHONPATH=lent, LOCALSTACK_VENV=tmp_path / "venv", **nowhere)
    assert done.returncode == 1
    assert "No matching distribution found for localstack-core" in done.stderr
    assert "pip could not install" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "venv" / "setup.sha256").exists()


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The only service of compose.yaml."""
    [service] = yaml.safe_load((HERE / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    found: dict[str, Any] = service
    return found


def test_the_container_of_the_compose_file_is_the_release_that_was_tried(composed: dict[str, Any]) -> None:
    release = re.search(r"^localstack-core\[runtime\]==(\S+)", (HERE / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert release is not None
    assert composed["image"] == f"localstack/localstack:{release[1]}"
    assert tuple(map(int, release[1].split("."))) <= (4, 14, 0)  # later images want a token
    assert composed["ports"] == ["127.0.0.1:${S3_PORT:-4566}:4566"]
    assert composed["healthcheck"]["test"][-1] == "http://127.0.0.1:4566/_localstack/health"


def test_the_container_gets_what_cloud_py_gives_its_process(composed: dict[str, Any], tmp_path: Path) -> None:
    ours, its = cloud.environment(4566, tmp_path), composed["environment"]
    for name in ("SERVICES", "SKIP_SSL_CERT_DOWNLOAD", "DISABLE_EVENTS", "DNS_ADDRESS"):
        assert its[name] == ours[name]
    assert its["BUCKET"] == f"${{BUCKET:-{cloud.BUCKET}}}"
    [mount] = composed["volumes"]
    here, place, mode = mount.split(":")
    assert (place, mode) == ("/etc/localstack/init/ready.d", "ro")
    assert [each.name for each in (HERE / here).iterdir()] == ["bucket.sh"]


def test_the_containers_init_step_makes_the_bucket_and_the_role_of_cloud_py(
    localstack: str, localstack_venv: Path, aws: Callable[..., Any], tmp_path: Path
) -> None:
    """Run here, in an account where there are none yet; the image's `awslocal` is the AWS CLI with LocalStack's address."""
    account, bucket = "111122223333", f"init-{uuid.uuid4().hex[:8]}"
    program(tmp_path / "awslocal", f'exec {localstack_venv}/bin/python {localstack_venv}/bin/aws --endpoint-url {localstack} "$@"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "AWS_DEFAULT_REGION": cloud.REGION}
    environment |= {"AWS_ACCESS_KEY_ID": account, "AWS_SECRET_ACCESS_KEY": "test", "BUCKET": bucket}
    ready = HERE / "init" / "ready.d" / "bucket.sh"
    done = subprocess.run([ready], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    iam = aws("iam", account=account)
    made, theirs = (each.get_role(RoleName=cloud.ROLE)["Role"]["AssumeRolePolicyDocument"] for each in (iam, aws("iam")))
    assert made == theirs, json.dumps(made)
    policies = [each.list_attached_role_policies(RoleName=cloud.ROLE)["AttachedPolicies"] for each in (iam, aws("iam"))]
    assert policies[0] == policies[1] != []
    aws("s3", account=account).delete_bucket(Bucket=bucket)  # which is there
    iam.detach_role_policy(RoleName=cloud.ROLE, PolicyArn=policies[0][0]["PolicyArn"])
    iam.delete_role(RoleName=cloud.ROLE)
