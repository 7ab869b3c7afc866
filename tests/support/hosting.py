"""A SageMaker that serves with a small program in place of images, deployers for it, and a count of all that an endpoint consists of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from control_plane import ControlPlane, Settings
from support.tiny_adapter import make_lively_model
from trimtab.aws import endpoint_life
from trimtab.aws.session import Aws
from trimtab.deployers.base import EndpointHandle
from trimtab.deployers.sagemaker import SageMakerDeployer
from trimtab.serving import Serving, serving

ROLE = "SageMakerExecutionRole"
HUB = Path(__file__).parent / "hub"
PATIENCE = 60.0

# takes what the container takes whose variables it is given, and refuses what that refuses
PROGRAM = r"""
import http.server, json, os, pathlib, signal, sys
env, root = os.environ, pathlib.Path(os.environ["TRIMTAB_ROOT"])
kind = "vllm" if "SM_VLLM_MODEL" in env else "lmi" if "OPTION_ROLLING_BATCH" in env else "tgi" if "SM_NUM_GPUS" in env else "ours"
if (root / "model" / "breaks.json").exists():
    sys.exit("RuntimeError: the weights do not fit")
slow = root / "model" / "slow.json"
released = pathlib.Path(json.loads(slow.read_text())) if slow.exists() else None
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.say(200 if released is None or released.exists() else 503, {})
    def say(self, status, answer):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("prompt") == "die":
            os._exit(3)
        if body.get("prompt") == "refuse":
            return self.say(400, {"error": {"message": "temperature is out of range; give 0 to 2"}})
        if kind in ("lmi", "tgi") and "prompt" in body or kind == "vllm" and "inputs" in body:
            return self.say(422, {"error": "missing field", "kind": kind})
        if "parameters" in body and (body["parameters"].get("temperature") == 0 or body["parameters"].get("top_p", 0.5) >= 1):
            return self.say(422, {"error": "`temperature` must be strictly positive, `top_p` must be < 1.0"})
        if "model" in body and body["model"] not in (env.get("SM_VLLM_SERVED_MODEL_NAME"), "base", "tuned") and kind != "ours":
            return self.say(404, {"error": {"message": "no such model"}})
        words = ["the", " lamp", " is", " lit"]
        text = "".join(words)
        if not body.get("stream"):
            if "messages" in body:
                return self.say(200, {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": text}}]})
            if "prompt" in body:
                return self.say(200, {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})
            told = {"generated_text": text, "details": {"finish_reason": "length"}}
            return self.say(200, told if kind == "lmi" else [told])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for at, word in enumerate(words):
            last = at == len(words) - 1
            if "messages" in body:
                event = {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": "stop" if last else None}]}
            elif "prompt" in body:
                event = {"choices": [{"index": 0, "text": word, "finish_reason": "stop" if last else None}]}
            else:
                event = {"token": {"id": at, "text": word, "special": False}, "generated_text": text if last else None}
                if last:
                    event["details"] = {"finish_reason": "length"}
            plain = kind == "lmi" and "messages" not in body
            self.wfile.write((b"" if plain else b"data: ") + json.dumps(event).encode() + (b"\n" if plain else b"\n\n"))
            self.wfile.flush()
        if "inputs" not in body:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
print("serving", sorted(path.name for path in (root / "model").iterdir()), flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(env["TRIMTAB_PORT"])), Handler).serve_forever()
"""

IN_PROCESSES = Settings(grace=5.0, root_variable="TRIMTAB_ROOT", port_variable="TRIMTAB_PORT")


def reaching(localstack: str, plane: str) -> dict[str, str]:
    """The variables with which every client, here and in other processes, reaches this AWS."""
    names = ("SAGEMAKER", "SAGEMAKER_RUNTIME", "SERVICE_QUOTAS", "APPLICATION_AUTO_SCALING")
    return {
        "AWS_ENDPOINT_URL": localstack,
        **{f"AWS_ENDPOINT_URL_{name}": plane for name in names},
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@pytest.fixture(scope="module")
def hosting_plane(localstack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane whose endpoints are the small program."""
    program = tmp_path_factory.mktemp("program") / "serve.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    work = tmp_path_factory.mktemp("plane")  # which a test run that is cut off leaves to the next one's cleaning
    with ControlPlane(aws_url=localstack, runner="process", command=command, settings=IN_PROCESSES, hub=HUB, work=work) as plane:
        for kind in ("ml.g5.xlarge", "ml.g5.12xlarge", "ml.g6.xlarge", "ml.g5.4xlarge"):
            plane.set_quota(f"{kind} for endpoint usage", 4)
        yield plane


@pytest.fixture(scope="module")
def hosting_amazon(localstack: str, hosting_plane: ControlPlane) -> Iterator[dict[str, str]]:
    variables = reaching(localstack, hosting_plane.url)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


class Account:
    """All that endpoints consist of, counted in the account itself."""

    def __init__(self, variables: dict[str, str], plane: ControlPlane) -> None:
        self.variables, self.plane = variables, plane

    def client(self, service: str) -> Any:
        url = self.variables["AWS_ENDPOINT_URL"] if service in ("cloudwatch", "s3") else self.plane.url
        return boto3.client(service, endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")

    def left(self, id: str = "trim-ep-") -> list[str]:
        """Names of everything with this id, guardians too."""
        found: list[str] = []
        with contextlib.closing(self.client("sagemaker")) as sagemaker:
            for verb, member, name in (
                ("list_endpoints", "Endpoints", "EndpointName"),
                ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
                ("list_models", "Models", "ModelName"),
                ("list_inference_components", "InferenceComponents", "InferenceComponentName"),
            ):
                found += [f"{member} {row[name]}" for row in getattr(sagemaker, verb)(NameContains=id)[member]]
        with contextlib.closing(self.client("application-autoscaling")) as scaling:
            targets = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
            found += [row["ResourceId"] for row in targets if id in row["ResourceId"]]
        with contextlib.closing(self.client("cloudwatch")) as cloudwatch:
            found += [row["AlarmName"] for row in cloudwatch.describe_alarms()["MetricAlarms"] if id in row["AlarmName"]]
        return found + [f"guardian {pid}" for pid in self.guardians(id)]

    def guardians(self, id: str = "trim-ep-") -> list[int]:
        """Processes that guard an endpoint of this account; those of other test sessions reach another one."""
        reach = f"AWS_ENDPOINT_URL_APPLICATION_AUTO_SCALING={self.plane.url}".encode()  # which no test puts a proxy before
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended just now
                words = (path / "cmdline").read_bytes().split(b"\0")
                if b"trimtab.aws.guardian" in words and id.encode() in words[-2] and reach in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def end_guardians(self, id: str = "trim-ep-") -> None:
        for pid in self.guardians(id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def account(hosting_amazon: dict[str, str], hosting_plane: ControlPlane) -> Iterator[Account]:
    """Nothing of an endpoint may be there before or after the test."""
    made = Account(hosting_amazon, hosting_plane)
    assert made.left() == []
    yield made
    hosting_plane.faults.clear()
    try:
        until(lambda: made.left() == [], lambda: f"left behind: {made.left()}", 15)
    finally:  # a test that failed does not make those after it fail
        made.end_guardians()
        for id in {found[0] for name in made.left() if (found := re.search(r"trim-ep-[0-9a-f]{8}", name))}:
            with Aws("us-east-1") as aws:
                endpoint_life.remove(aws, id, 30.0, 0.1)


@pytest.fixture
def deployer_of(hosting_amazon: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., SageMakerDeployer]]:
    """Deployers of the test's own."""
    made: list[SageMakerDeployer] = []

    def new(**settings: Any) -> SageMakerDeployer:
        made.append(SageMakerDeployer(**({"role": ROLE, "home": tmp_path / "home", "poll_seconds": 0.1} | settings)))
        return made[-1]

    yield new
    for deployer in made:
        deployer.aws.close()


@pytest.fixture(scope="session")
def lively_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture
def base_alone(lively_model: Path) -> Serving:
    """The small model by itself."""
    return serving(base_model=lively_model)


def until(true: Callable[[], bool], said: Callable[[], str] = lambda: "it did not come true", seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.1)


def handle(id: str) -> EndpointHandle:
    return EndpointHandle("sagemaker", id)
