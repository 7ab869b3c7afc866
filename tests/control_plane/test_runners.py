"""What runs jobs and endpoints: its settings and its account everywhere, its threads, its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

import cloud
from control_plane import ControlPlane, Settings, cloudwatch
from control_plane.hosting import HostingRunner
from control_plane.refusal import Refused
from control_plane.runner import Runner
from control_plane.store import Endpoint, EndpointConfig, Model
from support.plane import client
from support.training_jobs import until

COMMAND = ["/bin/sh", "-c"]
QUICK = Settings(grace=0.5, sync_every=0.2)


@pytest.fixture
def runner(localstack: str, tmp_path: Path) -> Iterator[Runner]:
    with contextlib.closing(Runner(localstack, cloud.REGION, tmp_path, "process", ["true"])) as made:
        yield made


def test_settings_are_those_of_every_account_and_region(localstack: str) -> None:
    with ControlPlane(localstack, "process", COMMAND, settings=QUICK) as plane:
        for place in (plane.place(cloud.ACCOUNT, "us-east-1"), plane.place("111122223333", "eu-west-1")):
            for runs in (place.training, place.hosting):
                assert isinstance(runs, Runner)
                assert runs.settings is QUICK
                assert runs.account == place.store.account


def test_another_accounts_lines_are_in_its_own_logs(localstack: str) -> None:
    account = "111122223333"
    with ControlPlane(localstack, "process", [*COMMAND, "echo mine; echo w >$SM_ML_ROOT/model/w", "job"], settings=QUICK) as plane:
        session = boto3.Session(account, "any", region_name="us-east-1")
        with (
            client(plane, account=account) as sagemaker,
            contextlib.closing(session.client("logs", endpoint_url=localstack)) as logs,
            contextlib.closing(session.client("s3", endpoint_url=localstack)) as s3,
        ):
            s3.create_bucket(Bucket="of-another-account")
            sagemaker.create_training_job(
                TrainingJobName="theirs",
                RoleArn=f"arn:aws:iam::{account}:role/trainer",
                AlgorithmSpecification={"TrainingImage": "any:1", "TrainingInputMode": "File"},
                OutputDataConfig={"S3OutputPath": "s3://of-another-account/out"},
                ResourceConfig={"InstanceType": "ml.m7i.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
                StoppingCondition={"MaxRuntimeInSeconds": 60},
            )
            assert plane.place(account, "us-east-1").store.jobs["theirs"].ended.wait(30)
            streams = logs.describe_log_streams(logGroupName=cloudwatch.TRAINING)["logStreams"]
            events = logs.get_log_events(logGroupName=cloudwatch.TRAINING, logStreamName=streams[0]["logStreamName"])["events"]
            assert [each["message"] for each in events] == ["mine"]
            (found,) = s3.list_objects_v2(Bucket="of-another-account")["Contents"]
            s3.delete_object(Bucket="of-another-account", Key=found["Key"])
            s3.delete_bucket(Bucket="of-another-account")
            logs.delete_log_group(logGroupName=cloudwatch.TRAINING)


def test_what_was_begun_is_waited_for_and_nothing_begins_afterwards(runner: Runner) -> None:
    """From many threads at once, while it is closed."""
    begun, ended, release = [], [], threading.Event()

    def work() -> None:
        begun.append(1)
        release.wait(20)
        ended.append(1)

    def begin() -> None:
        for _ in range(50):
            runner.begin(work, "work")

    callers = [threading.Thread(target=begin) for _ in range(4)]
    for each in callers:
        each.start()
    until(lambda: len(begun) >= 20, 20)
    closing = threading.Thread(target=runner.close)
    closing.start()
    for each in callers:
        each.join()
    release.set()
    closing.join(30)
    assert not closing.is_alive()
    assert len(begun) == len(ended)
    runner.begin(work, "too late")
    time.sleep(0.05)
    assert len(begun) == len(ended)


def test_an_endpoint_that_is_being_deleted_ends_with_its_runner(localstack: str, tmp_path: Path, aws: Callable[..., Any]) -> None:
    """Its container does not heed SIGTERM: nobody waits its thirty seconds."""
    server = tmp_path / "server.py"
    server.write_text("""
import http.server, os, signal
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.HTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
""")
    config = EndpointConfig("c", "arn", {"ProductionVariants": [{"VariantName": "one", "ModelName": "m"}]})
    endpoint = Endpoint("deaf", "arn", config, account=cloud.ACCOUNT, region=cloud.REGION)
    runner = HostingRunner(localstack, cloud.REGION, tmp_path / "work", "process", ["python3", str(server)])
    gone = threading.Event()
    try:
        runner.start(endpoint, Model("m", "arn", {"PrimaryContainer": {"Image": "any:1"}}), config)
        assert endpoint.settled.wait(30)
        assert endpoint.status == "InService", endpoint.failure_reason
        runner.stop(endpoint, gone.set)
        time.sleep(0.3)
        assert not gone.is_set()
    finally:
        began = time.monotonic()
        runner.close()
    assert gone.is_set()
    assert time.monotonic() - began < 10
    assert list((tmp_path / "work" / "endpoints").iterdir()) == []
    aws("logs").delete_log_group(logGroupName="/aws/sagemaker/Endpoints/deaf")


def test_one_that_is_ending_takes_in_no_further_account() -> None:
    with ControlPlane(runner=None) as plane:
        there = plane.place(cloud.ACCOUNT, cloud.REGION)
    assert plane.place(cloud.ACCOUNT, cloud.REGION) is there
    with pytest.raises(Refused, match="is ending"):
        plane.place("111122223333", cloud.REGION)
