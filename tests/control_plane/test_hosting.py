"""Endpoints that really answer: a container of a few lines of Python behind unmodified boto3."""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from docker import DockerClient

import cloud
from control_plane import ControlPlane, Settings
from control_plane.container import LABEL
from control_plane.hosting import HostingRunner
from control_plane.store import Endpoint, EndpointConfig, Model, Store
from support.script_runs import MINE, derived
from support.training_jobs import PATIENCE, until

SERVER = r"""
import http.server, os, pathlib, signal, sys, threading, time
assert sys.argv[1:] == ["serve"] and "BREAKS" not in os.environ
model, asked_again = pathlib.Path("/opt/ml/model"), threading.Event()
def healthy():
    return os.environ.get("HEALTHY", "1") == "1" and ("HELD" not in os.environ or os.path.exists("/go"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if healthy() else 500)
        self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"fail":
            self.send_error(418)
            return
        if body == b"never":
            time.sleep(600)
        self.send_response(200)
        self.send_header("Content-Type", self.headers["Accept"] or "text/plain")
        self.end_headers()
        if body == b"two parts":
            self.wfile.write(b"one")
            asked_again.wait(600)
            self.wfile.write(b"two")
            return
        asked_again.set()
        files = {str(path.relative_to(model)): path.read_text() for path in sorted(model.rglob("*")) if path.is_file()}
        self.wfile.write(repr((body, self.headers["Content-Type"], os.environ.get("MINE"), files)).encode())
    def log_message(self, *args):
        pass
def end(*_):
    print("ending", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print("serving", flush=True)
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def image(client: DockerClient, base_image: str) -> Iterator[str]:
    written = base64.b64encode(SERVER.encode()).decode()
    tag = derived(
        client, f"{MINE}serve:1", f"FROM {base_image}", f"RUN echo {written} | base64 -d >/serve.py", 'ENTRYPOINT ["python3", "/serve.py"]'
    )
    yield tag
    client.images.remove(tag)


class Endpoints:
    """Endpoints of one image on the session's control plane."""

    def __init__(self, plane: ControlPlane, aws: Callable[..., Any], bucket: str, image: str) -> None:
        self.plane, self.bucket, self.image = plane, bucket, image
        self.sagemaker, self.runtime = aws("sagemaker", plane.url), aws("sagemaker-runtime", plane.url)
        self.s3, self.logs = aws("s3"), aws("logs")
        self.names: list[str] = []  # of those that are there

    def config(self, *, isolated: bool = False, timeout: int = 480, **container: Any) -> str:
        """A model and a configuration of it."""
        name = f"model-{uuid.uuid4().hex[:8]}"
        self.sagemaker.create_model(
            ModelName=name,
            PrimaryContainer={"Image": self.image, **container},
            ExecutionRoleArn=f"arn:aws:iam::{cloud.ACCOUNT}:role/{cloud.ROLE}",
            EnableNetworkIsolation=isolated,
        )
        variant = {"VariantName": "AllTraffic", "ModelName": name, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
        variant["ContainerStartupHealthCheckTimeoutInSeconds"] = timeout
        self.sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
        return name

    def start(self, **more: Any) -> str:
        config = self.config(**more)
        self.sagemaker.create_endpoint(EndpointName=config, EndpointConfigName=config)
        self.names.append(config)
        return config

    def wait(self, name: str) -> dict[str, Any]:
        until(lambda: self.describe(name)["EndpointStatus"] not in ("Creating", "Updating"))
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.sagemaker.describe_endpoint(EndpointName=name)
        return found

    def ask(self, name: str, body: bytes, **more: str) -> bytes:
        with self.runtime.invoke_endpoint(EndpointName=name, Body=body, **more)["Body"] as answer:
            data: bytes = answer.read()
        return data

    def delete(self, name: str) -> None:
        self.wait(name)  # one that is still created or updated is not deleted
        self.sagemaker.delete_endpoint(EndpointName=name)
        self.names.remove(name)

        def gone() -> bool:
            with contextlib.suppress(ClientError):
                self.describe(name)
                return False
            return True

        until(gone)

    def lines(self, name: str) -> list[str]:
        group, found = f"/aws/sagemaker/Endpoints/{name}", []
        for stream in self.logs.describe_log_streams(logGroupName=group)["logStreams"]:
            assert stream["logStreamName"].startswith("AllTraffic/i-")
            events = self.logs.get_log_events(logGroupName=group, logStreamName=stream["logStreamName"], startFromHead=True)
            found += [each["message"] for each in events["events"]]
        return found


@pytest.fixture
def endpoints(control_plane: ControlPlane, aws: Callable[..., Any], bucket: str, image: str) -> Iterator[Endpoints]:
    made = Endpoints(control_plane, aws, bucket, image)
    yield made
    for name in list(made.names):
        made.delete(name)


def containers(client: DockerClient, endpoints: Endpoints, *, all: bool = False) -> list[Any]:
    place: Any = endpoints.plane.place(endpoints.plane.account, endpoints.plane.region)
    found: list[Any] = client.containers.list(all=all, filters={"label": f"{LABEL}={place.hosting.engine.mark}"})
    return found


def packed(files: dict[str, str]) -> bytes:
    with io.BytesIO() as whole:
        with tarfile.open(fileobj=whole, mode="w:gz") as tar:
            for name, text in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(text.encode())
                tar.addfile(entry, io.BytesIO(text.encode()))
        return whole.getvalue()


def test_a_packed_model_answers_and_ends(endpoints: Endpoints, client: DockerClient) -> None:
    endpoints.s3.put_object(Bucket=endpoints.bucket, Key="m/model.tar.gz", Body=packed({"weights": "w", "deep/config": "c"}))
    name = endpoints.start(ModelDataUrl=f"s3://{endpoints.bucket}/m/model.tar.gz", Environment={"MINE": "1"})
    assert endpoints.wait(name)["EndpointStatus"] == "InService"
    answer = endpoints.ask(name, b"hello", ContentType="application/json")
    assert answer == repr((b"hello", "application/json", "1", {"deep/config": "c", "weights": "w"})).encode()
    endpoints.delete(name)
    assert endpoints.lines(name) == ["serving", "ending"]
    assert containers(client, endpoints, all=True) == []


def test_an_unpacked_model_behind_isolation(endpoints: Endpoints) -> None:
    for key, text in (("m/weights", "w"), ("m/deep/config", "c")):
        endpoints.s3.put_object(Bucket=endpoints.bucket, Key=key, Body=text)
    source = {"S3Uri": f"s3://{endpoints.bucket}/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    name = endpoints.start(ModelDataSource={"S3DataSource": source}, isolated=True)
    assert endpoints.wait(name)["EndpointStatus"] == "InService"
    assert endpoints.ask(name, b"x").endswith(repr({"deep/config": "c", "weights": "w"}).encode() + b")")


def test_a_stream_comes_as_it_is_made(endpoints: Endpoints) -> None:
    name = endpoints.start()
    endpoints.wait(name)
    stream = endpoints.runtime.invoke_endpoint_with_response_stream(EndpointName=name, Body=b"two parts")["Body"]
    with contextlib.closing(stream):
        parts = (event["PayloadPart"]["Bytes"] for event in stream)
        assert next(parts) == b"one"
        endpoints.ask(name, b"go on")  # the container waits for it
        assert list(parts) == [b"two"]


def test_an_answer_that_takes_too_long_is_a_model_error(localstack: str, aws: Callable[..., Any], bucket: str, image: str) -> None:
    with ControlPlane(aws_url=localstack, settings=Settings(answer=1.0)) as plane:
        endpoints = Endpoints(plane, aws, bucket, image)
        name = endpoints.start()
        endpoints.wait(name)
        with pytest.raises(endpoints.runtime.exceptions.ModelError, match="Your invocation timed out while waiting") as raised:
            endpoints.ask(name, b"never")
    assert raised.value.response["OriginalStatusCode"] == 0


def test_the_containers_error_is_a_model_error(endpoints: Endpoints) -> None:
    name = endpoints.start()
    endpoints.wait(name)
    with pytest.raises(endpoints.runtime.exceptions.ModelError) as raised:
        endpoints.ask(name, b"fail")
    assert raised.value.response["OriginalStatusCode"] == 418


def test_what_does_not_serve_fails_with_its_reason(endpoints: Endpoints) -> None:
    endpoints.s3.put_object(Bucket=endpoints.bucket, Key="broken.tar.gz", Body=b"no archive")
    began: list[tuple[str, str]] = []

    def start(reason: str, **asked: Any) -> None:
        began.append((endpoints.start(**asked), reason))

    start("The primary container for production variant AllTraffic did not pass the ping health check.", Environment={"BREAKS": "1"})
    endpoints.s3.put_object(Bucket=endpoints.bucket, Key="marked/deep/", Body=b"")  # as S3's console makes a folder
    marked = {"S3Uri": f"s3://{endpoints.bucket}/marked/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    start("Failed to download model data", ModelDataSource={"S3DataSource": marked})
    start("Failed to extract model data archive", ModelDataUrl=f"s3://{endpoints.bucket}/broken.tar.gz")
    start("does not exist", Image="123456789012.dkr.ecr.us-east-1.amazonaws.com/none-of-ours:1")
    for name, reason in began:
        found = endpoints.wait(name)
        assert found["EndpointStatus"] == "Failed", reason
        assert reason in found["FailureReason"]


def test_one_that_answers_the_ping_with_an_error_fails_when_its_time_is_over(localstack: str, image: str, tmp_path: Path) -> None:
    store = Store()
    model = Model("m", "arn", {"PrimaryContainer": {"Image": image, "Environment": {"HEALTHY": "0"}}})
    config = EndpointConfig("c", "arn", {"ProductionVariants": [{"VariantName": "one", "ContainerStartupHealthCheckTimeoutInSeconds": 2}]})
    endpoint = Endpoint("e", "arn", config, account=store.account, region=store.region)
    with contextlib.closing(HostingRunner(localstack, store.region, tmp_path)) as runner:
        began = time.monotonic()
        runner.start(endpoint, model, config)
        assert endpoint.settled.wait(PATIENCE)
        assert time.monotonic() - began >= 2
        assert endpoint.failure_reason.startswith("The primary container for production variant one did not pass the ping health check.")
        with pytest.raises(ConnectionError):
            runner.invoke("e", b"", {})


def test_a_process_serves_where_there_is_no_engine(localstack: str, aws: Callable[..., Any], bucket: str, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    local = SERVER.replace('"/opt/ml/model"', 'os.environ["SM_ML_ROOT"] + "/model"').replace(
        "8080", 'int(os.environ["SAGEMAKER_BIND_TO_PORT"])'
    )
    script.write_text(local.replace('"0.0.0.0"', '"127.0.0.1"'))
    with ControlPlane(aws_url=localstack, runner="process", command=[sys.executable, str(script)]) as plane:
        endpoints = Endpoints(plane, aws, bucket, "any:1")
        endpoints.s3.put_object(Bucket=bucket, Key="model.tar.gz", Body=packed({"weights": "w"}))
        name = endpoints.start(ModelDataUrl=f"s3://{bucket}/model.tar.gz")
        assert endpoints.wait(name)["EndpointStatus"] == "InService"
        assert b"'weights': 'w'" in endpoints.ask(name, b"x")
        endpoints.delete(name)
        assert endpoints.lines(name) == ["serving", "ending"]


def test_an_update_takes_over_when_it_answers(endpoints: Endpoints, client: DockerClient) -> None:
    name = endpoints.start(Environment={"MINE": "old"})
    endpoints.wait(name)
    config = endpoints.config(Environment={"MINE": "new", "HELD": "1"})
    endpoints.sagemaker.update_endpoint(EndpointName=name, EndpointConfigName=config)
    until(lambda: len(containers(client, endpoints)) == 2)
    [new] = [each for each in containers(client, endpoints) if "HELD=1" in each.attrs["Config"]["Env"]]
    assert b"'old'" in endpoints.ask(name, b"x")
    assert endpoints.describe(name)["EndpointStatus"] == "Updating"
    assert new.exec_run(["touch", "/go"])[0] == 0
    found = endpoints.wait(name)
    assert (found["EndpointStatus"], found.get("FailureReason")) == ("InService", None)
    assert b"'new'" in endpoints.ask(name, b"x")
    until(lambda: sorted(endpoints.lines(name)) == ["ending", "serving", "serving"])
