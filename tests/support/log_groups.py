"""Log groups of a real CloudWatch Logs service for tests, written to as SageMaker's agent writes."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from trimtab.aws import logs
from trimtab.aws.session import refuse_page

JOB = "trim-7f3a9c21"
NOW = int(time.time() * 1000)


@contextlib.contextmanager
def client_at(url: str, *, attempts: int = 1, silence: float = 0.8) -> Iterator[Any]:
    """boto3's client of logs, impatient, so that what the reader itself does about failures is seen."""
    config = Config(retries={"total_max_attempts": attempts, "mode": "standard"}, read_timeout=silence, connect_timeout=2)
    given = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test", "config": config}
    with contextlib.closing(boto3.client("logs", endpoint_url=url, **given)) as client:
        client.meta.events.register("after-call", refuse_page)  # as every client of `Aws` has it
        yield client


class Group:
    """A log group of the test's own, written to as SageMaker's agent writes: in batches, each stream by itself."""

    def __init__(self, client: Any) -> None:
        self.client, self.name, self.streams = client, f"/test/{uuid.uuid4().hex[:12]}", set[str]()

    def write(self, stream: str, *lines: str | tuple[int, str], at: int = NOW) -> None:
        """Lines into `<job>/<stream>`; a line is a text, written at `at`, or a time in milliseconds and a text."""
        name = stream if "/" in stream else f"{JOB}/{stream}"
        if not self.streams:
            self.client.create_log_group(logGroupName=self.name)
        if name not in self.streams:
            self.client.create_log_stream(logGroupName=self.name, logStreamName=name)
            self.streams.add(name)
        events = [
            {"timestamp": line[0], "message": line[1]} if isinstance(line, tuple) else {"timestamp": at, "message": line} for line in lines
        ]
        if events:
            self.client.put_log_events(logGroupName=self.name, logStreamName=name, logEvents=events)


@pytest.fixture
def log_client(localstack: str) -> Iterator[Any]:
    with client_at(localstack, attempts=4, silence=30) as made:
        yield made


@pytest.fixture
def log_group(log_client: Any) -> Iterator[Group]:
    made = Group(log_client)
    yield made
    if made.streams:
        log_client.delete_log_group(logGroupName=made.name)


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in [("LOOK_EVERY", 0.0), ("SHORTEST_WAIT", 0.02), ("LONGEST_WAIT", 0.05)]:
        monkeypatch.setattr(logs, name, seconds)
