"""Training jobs that are refused at the call, and lists of them by status."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane import ControlPlane, validation
from control_plane.training_rules import _LOCAL_DISKS
from support.plane import job_request, refused

IMAGE = job_request()["AlgorithmSpecification"]["TrainingImage"]
GROUPS = {"InstanceGroups": [{"InstanceType": "ml.m7i.large", "InstanceCount": 1, "InstanceGroupName": "cpu"}], "VolumeSizeInGB": 1}
FILES = {"FileSystemId": "fs-12345678901", "FileSystemAccessMode": "ro", "FileSystemType": "EFS", "DirectoryPath": "/d"}


def _channel(name: str = "train", /, **source: Any) -> dict[str, Any]:
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://b/d", **source}}}


def _algorithm(**members: Any) -> dict[str, Any]:
    return {"AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File", **members}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (_algorithm(MetricDefinitions=[{"Name": "loss", "Regex": "loss=([0-9"}]), "Invalid regular expression 'loss=([0-9' of the metric"),
        (_algorithm(TrainingInputMode="Pipe"), "TrainingInputMode Pipe is not emulated"),
        ({"InputDataConfig": [_channel() | {"InputMode": "Pipe"}]}, "InputMode Pipe is not emulated"),
        ({"InputDataConfig": [_channel(S3DataType="AugmentedManifestFile")]}, "S3DataType AugmentedManifestFile is not emulated"),
        (
            {"InputDataConfig": [{"ChannelName": "a", "DataSource": {"FileSystemDataSource": FILES}}]},
            "FileSystemDataSource is not emulated",
        ),
        ({"InputDataConfig": [_channel("..")]}, "Invalid channel name ..: no folder can have it."),
        ({"InputDataConfig": [_channel(".")]}, "Invalid channel name .: no folder can have it."),
        ({"InputDataConfig": [_channel(InstanceGroupNames=["gpu"])]}, "The instance group gpu of channel train is none of the job's."),
        (
            {"InputDataConfig": [_channel(InstanceGroupNames=["cpu", "gpu"])], "ResourceConfig": GROUPS},
            "The instance group gpu of channel train is none of the job's.",
        ),
        (
            {"ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1, "VolumeKmsKeyId": "key"}},
            "You can't request a VolumeKmsKeyId when using an instance type with local storage",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_at_the_call(plane: ControlPlane, sagemaker: Any, changes: dict[str, Any], message: str) -> None:
    with refused("ValidationException", message):
        sagemaker.create_training_job(**job_request(**changes))
    assert plane.store.jobs == {}


def test_disks_of_their_own_have_the_families_that_aws_names() -> None:
    types = validation.enum("sagemaker", "TrainingInstanceType")
    with_disks = {each.split(".")[1] for each in types if _LOCAL_DISKS.match(each)}
    assert with_disks >= {"g4dn", "g5", "g6", "g6e", "p3dn", "p4d", "p4de", "p5", "p5e", "p5en", "trn1"}
    assert not with_disks & {"m4", "m5", "m6i", "m7i", "c5", "c5n", "c6i", "c7i", "r5", "r7i", "t3", "p2", "p3"}


def test_of_a_status_and_a_number_the_newest_jobs_are_taken_first(plane: ControlPlane, sagemaker: Any) -> None:
    """ListTrainingJobs in the API reference: MaxResults are retrieved first, whatever their status, and filtered then."""
    for at in range(5):
        sagemaker.create_training_job(**job_request(f"job-{at}"))
    for at in (0, 3, 4):
        plane.store.jobs[f"job-{at}"].finish("Completed")

    def page(**asked: Any) -> tuple[list[str], str | None]:
        answer = sagemaker.list_training_jobs(**asked)
        return [each["TrainingJobName"] for each in answer["TrainingJobSummaries"]], answer.get("NextToken")

    names, token = page(StatusEquals="InProgress", MaxResults=2)
    assert names == []
    assert token is not None
    assert page(StatusEquals="InProgress", MaxResults=2, NextToken=token)[0] == ["job-1", "job-2"]
    assert page(StatusEquals="InProgress", MaxResults=2, NextToken=token, SortOrder="Descending")[0] == ["job-2", "job-1"]
    assert page(StatusEquals="Completed", MaxResults=2, SortBy="Name")[0] == ["job-3", "job-4"]
    pages = sagemaker.get_paginator("list_training_jobs").paginate(StatusEquals="Completed", PaginationConfig={"PageSize": 2})
    assert [each["TrainingJobName"] for page in pages for each in page["TrainingJobSummaries"]] == ["job-3", "job-4", "job-0"]
    assert page(StatusEquals="InProgress") == (["job-1", "job-2"], None)
