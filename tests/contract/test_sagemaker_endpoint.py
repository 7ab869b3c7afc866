"""The endpoint contract on SageMaker: our server as a process of a local control plane, asked through InvokeEndpoint and its stream."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from contract.endpoint_contract import EndpointContract, Invoke, Invoked
from control_plane import ControlPlane
from support.hosting import IN_PROCESSES, ROLE, Account, reaching, until
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.aws.session import Aws
from trimtab.endpoint import Endpoint, close, deploy, deploy_request, endpoints
from trimtab.errors import EndpointError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def account(localstack: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """A SageMaker that runs the server of this checkout; no endpoint of these tests is left in it."""
    place = tmp_path_factory.mktemp("endpoints")
    command = [sys.executable, "-m", "trimtab_runtime"]
    with (
        ControlPlane(aws_url=localstack, runner="process", command=command, settings=IN_PROCESSES, work=place / "plane") as plane,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables = reaching(localstack, plane.url)
        for name, value in {**variables, "TRIMTAB_HOME": str(place / "home"), "TRIMTAB_CACHE": str(place / "cache")}.items():
            patch.setenv(name, value)
        yield (account := Account(variables, plane))
        until(lambda: account.left() == [], lambda: f"left behind: {account.left()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact"), model)


@pytest.fixture(scope="module")
def served(account: Account, model: Path, artifact: Path) -> Iterator[Endpoint]:
    with deploy(artifact, model, backend="sagemaker", role=ROLE, dtype="float32", poll_seconds=0.2) as endpoint:
        yield endpoint


class TestSageMakerEndpoint(EndpointContract):
    @pytest.fixture
    def endpoint(self, served: Endpoint) -> Endpoint:
        return served

    @pytest.fixture(scope="class")
    @classmethod
    def invoke(cls, served: Endpoint) -> Iterator[Invoke]:
        """InvokeEndpoint, or the stream where one is asked for; a container's refusal is an answer."""
        assert served.handle is not None
        named = {"EndpointName": served.handle.id}
        with Aws() as aws:
            client = aws.client("sagemaker-runtime")

            def ask(body: bytes | dict[str, Any], *, content_type: str = "application/json", accept: str = "application/json") -> Invoked:
                data = json.dumps(body).encode() if isinstance(body, dict) else body
                given = {**named, "Body": data, "ContentType": content_type, "Accept": accept}
                try:
                    if isinstance(body, dict) and body.get("stream"):
                        answer = client.invoke_endpoint_with_response_stream(**given)
                        with contextlib.closing(answer["Body"]) as stream:
                            data = b"".join(event["PayloadPart"]["Bytes"] for event in stream)
                    else:
                        answer = client.invoke_endpoint(**given)
                        with contextlib.closing(answer["Body"]) as stream:
                            data = stream.read()
                except ClientError as exc:
                    return Invoked(exc.response["OriginalStatusCode"], {}, exc.response["OriginalMessage"].encode())
                return Invoked(200, {"content-type": answer["ContentType"]}, data)

            yield ask

    def test_a_body_over_six_megabytes_is_refused(self, endpoint: Endpoint) -> None:
        """By the platform, before the server sees it; the client does not even send it."""
        with pytest.raises(EndpointError, match="6 MB: shorten it"):
            endpoint.generate("a" * (6 << 20))


def test_it_is_known_by_its_handle_from_anywhere(served: Endpoint) -> None:
    assert served.models() == ["tuned", "tiny-lighthouse"]
    with Endpoint.attach(str(served.handle), role=ROLE) as other:
        assert other.generate("The keeper") == served.generate("The keeper")
    assert served.ready()  # who attached to it has not ended it
    (record,) = [record for record in endpoints("sagemaker", role=ROLE) if record.handle == served.handle]
    assert record.title == "tiny-lighthouse"
    assert any("openvino" in line or "ready" in line or "serv" in line for line in served.logs())


def test_what_is_asked_is_what_is_shown(account: Account, model: Path, artifact: Path, served: Endpoint) -> None:
    shown = deploy_request(artifact, model, backend="sagemaker", role=ROLE, dtype="float32")
    assert list(shown["requests"]) == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert served.handle is not None
    sent = {name: body for name, body in account.plane.requests if name in shown["requests"]}
    ours = json.dumps({name: {**body, "Tags": []} for name, body in shown["requests"].items()}).replace(
        shown["handle"].partition("//")[2], "ID"
    )
    theirs = json.dumps({name: {**body, "Tags": []} for name, body in sent.items()}).replace(served.handle.id, "ID")
    assert json.loads(ours) == json.loads(theirs)


def test_a_model_that_is_not_merged_yet_is_shown_all_the_same(
    account: Account, model: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    shown = deploy_request(artifact, model, backend="sagemaker", role=ROLE)
    assert list(shown["requests"]) == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert shown["upload"]["bytes"] >= (model / "model.safetensors").stat().st_size
    assert any("is not merged yet" in said for said in shown["choices"])
    assert not (tmp_path / "merged").exists()


def test_a_base_model_alone_ends_at_its_handle(account: Account, model: Path) -> None:
    endpoint = deploy(None, model, backend="sagemaker", role=ROLE, detach=True, poll_seconds=0.2)
    assert endpoint.handle is not None
    assert endpoint.models()[0] == "base"
    assert endpoint.generate("The keeper", max_new_tokens=3)
    close(endpoint.handle, role=ROLE)
    assert not [name for name in account.left() if endpoint.handle.id in name]
