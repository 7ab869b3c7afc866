"""How a run stands, from what SageMaker describes; the wording of failures is that of its own documentation and service."""

from __future__ import annotations

import pytest

from trimtab.aws import instances
from trimtab.aws.standing import failure, standing
from trimtab.backends.base import RunHandle, RunState
from trimtab.events import Finished, Step

HANDLE = RunHandle("sagemaker", "trim-7f3a9c21")
STEP = Step(step=5, of=20, epoch=0.5, loss=2.0, lr=1e-4, grad_norm=1, tokens_per_second=400, seconds_left=75, memory_mb=900)


def described(status: str, secondary: str, said: str = "", **more):
    return {
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "SecondaryStatusTransitions": [{"Status": secondary, "StatusMessage": said}],
        **more,
    }


def failed(said: str, kind: str = "ml.m7i.4xlarge"):
    return described("Failed", "Failed", FailureReason=said, ResourceConfig={"InstanceType": kind, "InstanceCount": 1})


@pytest.mark.parametrize(
    ("status", "secondary", "state"),
    [
        ("InProgress", "Starting", RunState.PENDING),
        ("InProgress", "Pending", RunState.PENDING),
        ("InProgress", "Downloading", RunState.PENDING),
        ("InProgress", "Training", RunState.RUNNING),
        ("InProgress", "Interrupted", RunState.RUNNING),
        ("InProgress", "Uploading", RunState.RUNNING),
        ("Stopping", "Stopping", RunState.RUNNING),
        ("Completed", "Completed", RunState.SUCCEEDED),
        ("Failed", "Failed", RunState.FAILED),
        ("Stopped", "Stopped", RunState.STOPPED),
        ("Stopped", "MaxRuntimeExceeded", RunState.STOPPED),
    ],
)
def test_every_status_is_a_state(status, secondary, state):
    assert standing(HANDLE, described(status, secondary), []).state is state


def test_what_it_waits_for_is_told_and_then_how_far_it_is():
    waiting = standing(HANDLE, described("InProgress", "Downloading", "Downloading input data"), [])
    assert (waiting.reason, waiting.progress) == ("Downloading: Downloading input data", 0)
    training = standing(HANDLE, described("InProgress", "Training", "Training image download completed."), [STEP])
    assert (training.reason, training.progress, training.eta, training.step) == ("", 0.25, 75, STEP)


def test_a_run_that_succeeded_has_no_reason_but_its_own():
    assert standing(HANDLE, described("Completed", "Completed"), [STEP, Finished(state="succeeded", seconds=9)]).reason == ""
    assert standing(HANDLE, described("Completed", "Completed"), [STEP]).progress == 1


def test_limits_that_were_reached_are_named():
    limits = {"StoppingCondition": {"MaxRuntimeInSeconds": 5400, "MaxWaitTimeInSeconds": 7200}}
    assert "time limit of 90 minutes" in standing(HANDLE, described("Stopped", "MaxRuntimeExceeded", **limits), []).reason
    assert "within 120 minutes" in standing(HANDLE, described("Stopped", "MaxWaitTimeExceeded", **limits), []).reason
    assert "trimtab resume sagemaker://trim-7f3a9c21" in standing(HANDLE, described("Stopped", "Stopped"), []).reason


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("AlgorithmError: tokens.npy is damaged\n\nTraceback (most recent call last):\n  File", "tokens.npy is damaged"),
        ("AlgorithmError: the loss is nan at step 3, exit code: 1", "the loss is nan at step 3"),
        ("ClientError: Data download failed: NoSuchKey", "Data download failed: NoSuchKey"),
        ("InternalServerError: We encountered an internal error. Please try again.", "We encountered an internal error. Please try again."),
    ],
)  # fmt: skip
def test_the_cause_is_told_without_what_surrounds_it(said, cause):
    assert failure(HANDLE, failed(said)) == cause


@pytest.mark.parametrize(
    "said", ["", "AlgorithmError: , exit code: 137", "AlgorithmError: exit code: 137", "AlgorithmError: , exit code: 2"]
)
def test_an_end_without_a_cause_says_what_to_type(said):
    found = failure(HANDLE, failed(said))
    assert "without a word" in found
    assert "trimtab resume sagemaker://trim-7f3a9c21" in found
    assert ("out of memory?" in found) == ("137" in said)


CAPACITY = "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance type."


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("ml.m7i.4xlarge", "ml.r7i.4xlarge"),
        ("ml.m6i.4xlarge", "ml.r7i.2xlarge"),
        ("ml.g6e.2xlarge", "ml.g6e.xlarge"),
        ("ml.g6.xlarge", "ml.g6.2xlarge"),
        ("ml.p5.48xlarge", "ml.p5.4xlarge"),
    ],
)
def test_no_capacity_names_another_type_of_the_same_device(kind, other):
    found = failure(HANDLE, failed(CAPACITY, kind))
    assert f"no {kind} is free now" in found
    assert found.endswith(f"trimtab resume {HANDLE} --backend-option instance_type={other}")
    assert instances.find(other).room_mb >= instances.find(kind).room_mb


def test_no_capacity_of_a_type_like_which_there_is_no_other_says_to_wait():
    for kind in ("ml.r7i.48xlarge", "ml.unknown.large"):
        found = failure(HANDLE, failed(CAPACITY, kind))
        assert found.endswith(f"no {kind} is free now: try it later with  trimtab resume {HANDLE}")
    assert "no instance of that type is free" in failure(HANDLE, {"FailureReason": CAPACITY})


@pytest.mark.parametrize("name", sorted(instances.instances()))
def test_a_type_is_never_its_own_replacement(name):
    one, other = instances.find(name), instances.instead_of(name)
    assert other is None or (other.name != name and bool(other.gpus) == bool(one.gpus) and other.room_mb >= one.room_mb)
