"""What HTTP and tests' wishes bring: signatures, unknown operations, faults, interruptions, the record of requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ConnectionClosedError, HTTPClientError, ReadTimeoutError

import control_plane
from control_plane import ControlPlane
from control_plane.store import TrainingJob
from support.plane import ACCOUNT, client, job_request, refused
from support.training_jobs import until

FOLDER = Path(control_plane.__file__).parents[1]
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=AKIA/20261122/us-east-1/sagemaker/aws4_request, SignedHeaders=host, Signature=0"}


def _send(plane: ControlPlane, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(plane.url).netloc, timeout=60)
    try:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def _asked(plane: ControlPlane) -> list[str]:
    return [name for name, _ in plane.requests]


def test_a_request_must_be_signed(plane: ControlPlane) -> None:
    target = {"X-Amz-Target": "SageMaker.ListTrainingJobs"}
    assert _send(plane, "POST", "/", {}, target) == (
        403,
        {"__type": "MissingAuthenticationTokenException", "message": "Missing Authentication Token"},
    )
    assert _send(plane, "POST", "/", {}, target | {"Authorization": "Bearer x"})[1]["__type"] == "IncompleteSignatureException"
    assert _send(plane, "POST", "/endpoints/e/invocations", b"x")[0] == 403
    assert _send(plane, "POST", "/", {}, target | SIGNED) == (200, {"TrainingJobSummaries": []})


def test_a_folder_of_its_own_goes_with_it(tmp_path: Path) -> None:
    with ControlPlane(runner=None) as plane:
        (plane.work / "job").mkdir()
        (plane.work / "job" / "model").write_text("weights")
        work = plane.work
    assert not work.exists()
    with ControlPlane(runner=None, work=tmp_path):
        pass
    assert tmp_path.exists()


def test_what_is_no_operation_and_no_json_is_refused(plane: ControlPlane, sagemaker: Any) -> None:
    with refused("UnknownOperationException"):
        sagemaker.list_apps()
    for target in ("SageMaker.NoSuchThing", "DynamoDB_20120810.ListTables", "", "SageMaker"):
        status, answer = _send(plane, "POST", "/", {}, SIGNED | {"X-Amz-Target": target})
        assert (status, answer["__type"]) == (400, "UnknownOperationException")
    for body in (b"{", b"[]", b"1", b"\xff"):
        status, answer = _send(plane, "POST", "/", body, SIGNED | {"X-Amz-Target": "SageMaker.ListTrainingJobs"})
        assert (status, answer["__type"]) == (400, "SerializationException"), body
    assert _send(plane, "GET", "/nowhere")[0] == 404
    assert _send(plane, "GET", "/_control/nowhere")[0] == 404


def test_every_request_is_on_record_as_it_came(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request())
    with refused("ValidationException"):
        sagemaker.create_training_job(**job_request("a_b"))
    assert plane.requests == [("CreateTrainingJob", job_request()), ("CreateTrainingJob", job_request("a_b"))]


def test_throttling_is_over_after_as_many_times_as_asked(plane: ControlPlane) -> None:
    assert _send(plane, "POST", "/_control/faults", {"operation": "CreateTrainingJob", "code": "ThrottlingException", "times": 2})[0] == 200
    with client(plane, retries={"mode": "standard", "total_max_attempts": 5}) as patient:
        patient.create_training_job(**job_request())
    assert _asked(plane) == ["CreateTrainingJob"] * 3
    assert list(plane.store.jobs) == ["job"]
    plane.fault(code="ThrottlingException", times=-1)
    with client(plane) as hasty:
        for _ in range(3):
            with refused("ThrottlingException", "Rate exceeded"):
                hasty.list_models()
        assert len(_send(plane, "GET", "/_control/faults")[1]["faults"]) == 1
        assert _send(plane, "DELETE", "/_control/faults") == (200, {"faults": []})
        assert hasty.list_models()["Models"] == []


def test_credentials_expire_and_permissions_are_missing_on_request(plane: ControlPlane, sagemaker: Any) -> None:
    plane.fault(code="ExpiredTokenException")
    with refused("ExpiredTokenException", "The security token included in the request is expired"):
        sagemaker.create_training_job(**job_request())
    plane.fault(operation="CreateTrainingJob", code="AccessDeniedException")
    sagemaker.list_models()  # another operation
    with refused("AccessDeniedException", "is not authorized to perform: sagemaker:CreateTrainingJob on resource: arn:aws:sagemaker:"):
        sagemaker.create_training_job(**job_request())
    plane.fault(code="InternalFailure", message="said so")
    with refused("InternalFailure", "said so"):
        sagemaker.list_models()
    plane.fault(operation="InvokeEndpoint", code="ServiceUnavailable")
    with client(plane, "sagemaker-runtime") as runtime, refused("ServiceUnavailable"):
        runtime.invoke_endpoint(EndpointName="e", Body=b"x")
    assert plane.store.jobs == {}


def test_an_answer_lost_on_its_way_leaves_the_job(plane: ControlPlane) -> None:
    plane.fault(operation="CreateTrainingJob", drop=True, after=True)
    with client(plane) as hasty, pytest.raises(ConnectionClosedError):
        hasty.create_training_job(**job_request())
    assert list(plane.store.jobs) == ["job"]
    plane.fault(operation="CreateTrainingJob", code="InternalFailure", after=True)
    with client(plane, retries={"mode": "standard", "total_max_attempts": 2}) as patient, refused("ResourceInUse"):
        patient.create_training_job(**job_request("second"))  # its first try went through, its second meets it
    assert list(plane.store.jobs) == ["job", "second"]


def test_an_answer_is_late_on_request(plane: ControlPlane) -> None:
    plane.fault(operation="ListModels", hang=0.3)
    began = time.monotonic()
    with client(plane) as made:
        made.list_models()
    assert time.monotonic() - began >= 0.3
    plane.fault(operation="CreateTrainingJob", hang=300.0, after=True)
    with client(plane, read_timeout=0.2) as hasty, pytest.raises(ReadTimeoutError):
        hasty.create_training_job(**job_request())
    until(lambda: list(plane.store.jobs) == ["job"])  # the client has given up, not the control plane


def test_closing_waits_for_no_late_answer() -> None:
    def ask() -> None:
        with contextlib.suppress(HTTPClientError), client(plane, read_timeout=600) as made:
            made.list_models()

    with ControlPlane(runner=None) as plane:
        plane.fault(operation="ListModels", hang=300.0)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        until(lambda: plane.requests)
        began = time.monotonic()
        plane.close()
        assert time.monotonic() - began < 60
        asking.join(60)
        assert not asking.is_alive()


def test_capacity_is_short_on_request(plane: ControlPlane, sagemaker: Any) -> None:
    plane.set_quota("ml.g5.xlarge for training job usage", 1)
    plane.fault(kind="capacity", instance_type="ml.g5.xlarge")
    sagemaker.create_training_job(**job_request("cpu"))
    assert plane.store.jobs["cpu"].status == "InProgress"
    sagemaker.create_training_job(**job_request("gpu", ResourceConfig={"InstanceType": "ml.g5.xlarge", "InstanceCount": 1}))
    told = sagemaker.describe_training_job(TrainingJobName="gpu")
    assert told["TrainingJobStatus"] == "Failed"
    assert told["FailureReason"].startswith("CapacityError: Unable to provision requested ML compute capacity.")
    plane.fault(kind="capacity", hang=30.0)
    sagemaker.create_training_job(**job_request("later"))
    assert plane.store.jobs["later"].shortage == 30.0
    assert plane.store.jobs["cpu"].shortage == 0.0


def test_spot_instances_are_taken_away_on_request(plane: ControlPlane, sagemaker: Any) -> None:
    spot = {"EnableManagedSpotTraining": True, "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60}}
    sagemaker.create_training_job(**job_request("spot", **spot))
    sagemaker.create_training_job(**job_request("dear"))
    assert _send(plane, "POST", "/_control/interrupt/spot") == (200, {})
    assert plane.store.jobs["spot"].interruptions.is_set()
    assert _send(plane, "POST", "/_control/interrupt/dear")[0] == 404
    plane.store.jobs["spot"].finish("Completed")
    assert _send(plane, "POST", "/_control/interrupt/spot")[0] == 404


def test_quotas_are_set_over_http(plane: ControlPlane) -> None:
    assert _send(plane, "POST", "/_control/quotas", {"ml.p4d.24xlarge for training job usage": 2})[0] == 200
    assert plane.store.quotas.get("ml.p4d.24xlarge for training job usage") == 2
    for wrong in (
        {"ml.p4d.24xlarge": 1},
        {"ml.p4d.24xlarge for training job usage": "2"},
        {"ml.p4d.24xlarge for training job usage": -1},
        [],
    ):
        assert _send(plane, "POST", "/_control/quotas", wrong)[0] == 400


@pytest.mark.parametrize("wrong", [{}, {"code": 1}, {"cod": "x"}, {"kind": "x"}, {"code": "X", "times": "2"}, [1]])
def test_a_fault_that_is_none_is_refused(plane: ControlPlane, wrong: Any) -> None:
    assert _send(plane, "POST", "/_control/faults", wrong)[0] == 400
    assert plane.faults.waiting() == []


def test_health_says_what_runs(plane: ControlPlane) -> None:
    assert _send(plane, "GET", "/_control/health") == (200, {"status": "ok", "aws_url": plane.aws_url, "runner": None})


def test_a_fault_of_its_own_is_answered_as_one(plane: ControlPlane, sagemaker: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def start(self, job: TrainingJob) -> None:
            raise RuntimeError(f"no room for {job.name}")

        def close(self) -> None:
            pass

    plane.place(ACCOUNT, "us-east-1").training = Broken()
    with refused("InternalFailure", "RuntimeError: no room for job"):
        sagemaker.create_training_job(**job_request())
    assert "Traceback" in capsys.readouterr().err
    sagemaker.list_models()  # it goes on


def test_an_answer_that_the_model_does_not_allow_is_not_given(plane: ControlPlane, sagemaker: Any) -> None:
    """botocore does not look at what it is answered, so that a wrong answer here would prove a client right that no service would."""
    sagemaker.create_training_job(**job_request())
    job = plane.store.jobs["job"]
    told = "the answer to DescribeTrainingJob is not what the model of sagemaker has"
    right, job.arn = job.arn, "arn:aws:sagemaker:nowhere"
    with refused("InternalFailure", told, "'arn:aws:sagemaker:nowhere' at 'trainingJobArn'", "regular expression"):
        sagemaker.describe_training_job(TrainingJobName="job")
    job.arn, job.status = right, "Finished"  # type: ignore[assignment]
    with refused("InternalFailure", told, "'Finished' at 'trainingJobStatus'", "enum value set"):
        sagemaker.describe_training_job(TrainingJobName="job")
    job.status = "InProgress"
    job.request["HyperParameters"] = {"k" * 300: "v"}
    with refused("InternalFailure", told, "'hyperParameters'", "less than or equal to 256"):
        sagemaker.describe_training_job(TrainingJobName="job")
    del job.request["HyperParameters"]
    assert sagemaker.describe_training_job(TrainingJobName="job")["TrainingJobStatus"] == "InProgress"


def test_a_body_of_no_size_or_too_large_is_not_read(plane: ControlPlane) -> None:
    for length in ("-1", "x", str(2**40)):
        connection = http.client.HTTPConnection(urlsplit(plane.url).netloc, timeout=60)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        with contextlib.closing(connection), contextlib.closing(connection.getresponse()) as answer:
            assert answer.status == 413


def test_a_process_runner_needs_a_command() -> None:
    with pytest.raises(ValueError, match="needs a command"):
        ControlPlane(runner="process")


def test_the_program_serves_until_it_is_told_to_end() -> None:
    program = [sys.executable, "-m", "control_plane", "--port", "0", "--runner", "none"]
    with subprocess.Popen(program, cwd=FOLDER, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        said = started.stdout.readline()
        url = urlsplit(said.removeprefix("control plane: ").strip())
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/_control/health")
            with contextlib.closing(connection.getresponse()) as answer:
                assert answer.status == 200
        started.terminate()
        assert started.wait(60) == 0
