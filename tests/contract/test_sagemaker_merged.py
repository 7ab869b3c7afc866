"""A run on SageMaker that leaves its merged model there, and the endpoint that is served from where it lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane import ControlPlane
from support.hosting import IN_PROCESSES, ROLE, Account, reaching, until
from trimtab.backends.sagemaker import SageMakerBackend
from trimtab.endpoint import deploy
from trimtab.run import Run


@pytest.fixture(scope="module")
def account(localstack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    command = [sys.executable, "-m", "trimtab_runtime"]
    with (
        ControlPlane(aws_url=localstack, runner="process", command=command, settings=IN_PROCESSES) as plane,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables = reaching(localstack, plane.url)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield (account := Account(variables, plane))
        until(lambda: account.left() == [], lambda: f"left behind: {account.left()}")


def test_a_merged_model_is_served_from_where_its_run_left_it(account: Account, small_job, staged, tmp_path: Path) -> None:
    job = small_job.model_copy(update={"train": staged.train.model_copy(update={"keep_merged": True, "max_steps": 2})})
    backend = SageMakerBackend(role=ROLE, image="000000000000.dkr.ecr.us-east-1.amazonaws.com/any:1", home=tmp_path, poll_seconds=0.2)
    try:
        run = Run(backend.submit(job, staged.channels), backend)
        run.wait(120)
        uri = backend.merged_uri(run.handle)
        assert uri.startswith("s3://")
        assert uri.endswith("/output/model/merged/")
        artifact = run.artifact()
        assert not (artifact.path / "merged").exists(), "what is served from there is not fetched"
        assert artifact.manifest["spec"]["keep_merged"] is True
        before = len(account.plane.requests)
        with run.deploy(role=ROLE, poll_seconds=0.2) as there:
            (made,) = [sent for name, sent in account.plane.requests[before:] if name == "CreateModel"]
            assert made["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] == uri
            answer = there.generate("The keeper", max_new_tokens=8)
        with deploy(artifact, title="here") as here:
            assert here.generate("The keeper", max_new_tokens=8) == answer
    finally:
        backend.aws.close()


def test_a_whole_model_is_served_from_where_its_run_left_it(account: Account, small_job, staged, tmp_path: Path) -> None:
    """Of the method full the artifact itself is the model: nothing is merged, and nothing is sent back."""
    whole = {"method": "full", "lora_rank": 32, "max_steps": 2}
    job = small_job.model_copy(update={"train": staged.train.model_copy(update=whole)})
    backend = SageMakerBackend(role=ROLE, image="000000000000.dkr.ecr.us-east-1.amazonaws.com/any:1", home=tmp_path, poll_seconds=0.2)
    try:
        run = Run(backend.submit(job, staged.channels), backend)
        run.wait(120)
        uri = backend.merged_uri(run.handle)
        assert uri.startswith("s3://")
        assert uri.endswith("/output/model/")
        before = len(account.plane.requests)
        with run.deploy(role=ROLE, poll_seconds=0.2) as there:
            (made,) = [sent for name, sent in account.plane.requests[before:] if name == "CreateModel"]
            assert made["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] == uri
            answer = there.generate("The keeper", max_new_tokens=8)
        with deploy(run.artifact(), title="here") as here:
            assert here.generate("The keeper", max_new_tokens=8) == answer
    finally:
        backend.aws.close()


def test_a_run_that_left_none_is_merged_here(account: Account, small_job, staged, tmp_path: Path) -> None:
    job = small_job.model_copy(update={"train": staged.train.model_copy(update={"max_steps": 1})})
    backend = SageMakerBackend(role=ROLE, image="000000000000.dkr.ecr.us-east-1.amazonaws.com/any:1", home=tmp_path, poll_seconds=0.2)
    try:
        run = Run(backend.submit(job, staged.channels), backend)
        run.wait(120)
        assert backend.merged_uri(run.handle) == ""
        assert set(run.to_deploy()) == {"backend", "title", "artifact"}
        assert run.to_deploy("process")["backend"] == "process"
    finally:
        backend.aws.close()
