"""The endpoint contract on the process backend, and how its server begins and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.endpoint_contract import EndpointContract
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.endpoint import Endpoint, deploy
from trimtab.errors import EndpointError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("artifact"), model)


@pytest.fixture(scope="module")
def served(model: Path, artifact: Path) -> Iterator[Endpoint]:
    with deploy(artifact, model) as endpoint:
        yield endpoint


class TestProcessEndpoint(EndpointContract):
    @pytest.fixture
    def endpoint(self, served: Endpoint) -> Endpoint:
        return served


def test_an_address_is_enough(served: Endpoint) -> None:
    with Endpoint(served.url + "/") as other:
        assert other.generate("The keeper", max_new_tokens=4) == served.generate("The keeper", max_new_tokens=4)
    assert served.ready(), "closing an endpoint made from an address ends nothing"


@pytest.mark.parametrize("address", ["", "127.0.0.1:8080", "ftp://127.0.0.1", "http://", "file:///etc/hosts"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(EndpointError, match=r"give one such as http://127\.0\.0\.1:8080"):
        Endpoint(address)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(EndpointError, match=r"nothing answers at .* deploy it again"):
        Endpoint(f"http://127.0.0.1:{port}").chat("hello")


def test_something_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EndpointError, match=r"did not answer within 0\.2 s"):
            Endpoint(url, timeout=0.2).chat("hello")

        def answer(text: bytes) -> None:
            connection = silent.accept()[0]
            connection.recv(65_536)
            connection.sendall(text)
            connection.close()

        silent.accept()[0].close()
        for text, message in (
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "not JSON"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "OpenAI"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "broke off"),
            (b"", "broke off"),
            (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\nbad", "answered 502: bad"),
        ):
            thread = threading.Thread(target=answer, args=(text,))
            thread.start()
            with pytest.raises(EndpointError, match=message):
                Endpoint(url).chat("hello")
            thread.join()


def test_a_base_model_alone_then_closed(model: Path) -> None:
    with deploy(None, model) as endpoint:
        assert endpoint.models() == ["base"]
        assert endpoint.generate("The keeper", max_new_tokens=3)
    assert not endpoint.ready()
    endpoint.close()
    with pytest.raises(EndpointError, match="nothing answers"):
        endpoint.generate("a")


def test_what_cannot_be_served_says_why(model: Path, artifact: Path, served: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="holds no model"):
        deploy(artifact, tmp_path)
    with pytest.raises(EndpointError, match="leave backend out"):
        deploy(artifact, model, backend="moon")
    with pytest.raises(EndpointError, match=r"ended with exit code 1 .*\n(.*\n)*cannot listen .* choose another port"):
        deploy(artifact, model, port=int(served.url.rpartition(":")[2]))
    with pytest.raises(EndpointError, match=r"larger ready_timeout"):
        deploy(artifact, model, ready_timeout=0.01)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EndpointError, match=r"exit code 1 .*\n(.*\n)*.*tokenizer\.json"):
        deploy(None, tmp_path)


def test_sigterm_lets_the_running_answer_finish_and_the_log_holds_no_prompt(model: Path, tmp_path: Path) -> None:
    (tmp_path / "input" / "data").mkdir(parents=True)
    (tmp_path / "input" / "data" / "model").symlink_to(model)
    environ = {**os.environ, "TRIMTAB_ROOT": str(tmp_path), "TRIMTAB_PORT": "0", "HF_HUB_OFFLINE": "1"}
    record = tmp_path / "output" / "data" / "endpoint.json"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "trimtab_runtime", "serve"], env=environ, stdout=log, stderr=log)
    try:
        while not record.exists():
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        url = json.loads(record.read_text())["url"]
        body = json.dumps({"prompt": "Zanzibar", "max_tokens": 300, "temperature": 2, "seed": 3, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", data=body), timeout=60) as answer:
            first = answer.readline().decode()
            server.send_signal(signal.SIGTERM)
            lines = [first, *(line.decode() for line in answer)]
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    assert lines[-2:] == ["data: [DONE]\n", "\n"]
    events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2] if line.strip()]
    assert events[-1]["finish_reason"] in ("stop", "length")
    text = "".join(event["text"] for event in events)
    assert len(text) > 100
    written = (tmp_path / "log").read_text()
    assert "/v1/completions 200" in written
    assert "Zanzibar" not in written
    assert text[:40] not in written
    assert not record.exists()


def test_the_server_ends_with_its_client_however_it_dies(model: Path) -> None:
    program = (
        f"from trimtab.endpoint import deploy; import time; e = deploy(None, {str(model)!r}); print(e.url, flush=True); time.sleep(600)"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        endpoint = Endpoint(client.stdout.readline().strip())
        assert endpoint.ready()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    deadline = time.monotonic() + 20
    while endpoint.ready(timeout=1) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not endpoint.ready()
