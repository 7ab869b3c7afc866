"""The HTTP contract on a server started directly: a base model and an adapter beside it, with a key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.endpoint_contract import http
from contract.http_contract import HttpContract, ask, counted, wait_until_free
from contract.rough_clients import RoughClients
from support.direct_server import DirectServer, tree, wait_until
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.endpoint import Endpoint
from trimtab.spec import ServeSpec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KEY = "Tr1m-tab/key+of=this_test"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectServer]:
    artifact = make_adapter(tmp_path_factory.mktemp("artifact"), model)
    job = tree(tmp_path_factory.mktemp("served"), model, artifact, KEY)
    with DirectServer(job, ServeSpec(name="lighthouse", max_running=4, max_waiting=16), TRIMTAB_HOST="0.0.0.0") as server:
        yield server


@pytest.fixture(scope="module")
def served(server: DirectServer) -> Endpoint:
    return server.endpoint()


class TestServer(HttpContract, RoughClients):
    models = ("tuned", "base")
    listed = ("tuned", "base", "tiny-lighthouse", "lighthouse")

    @pytest.fixture
    def endpoint(self, served: Endpoint) -> Endpoint:
        return served


def test_what_it_says_of_itself(server: DirectServer) -> None:
    record = server.record()
    assert record["pid"] == server.process.pid
    assert record["models"] == ["tuned", "base", "tiny-lighthouse", "lighthouse"]
    assert record["engine"]


def test_more_than_may_wait_are_told_to_come_back(served: Endpoint) -> None:
    wait_until_free(served)
    endless = {"prompt": ["The keeper"] * 10, "max_tokens": 4000}
    clients = [subprocess.Popen([sys.executable, "-c", _ASK, served.url, KEY, repr(endless)], stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        wait_until(lambda: counted(served)["trimtab_waiting"] == 16)
        assert counted(served)["trimtab_running"] == 4
        refused = ask(served, "/v1/completions", {"prompt": "too many", "max_tokens": 1})
        assert refused.refusal[0] == 429
        assert "try again" in refused.refusal[1]
        assert int(refused.headers["retry-after"]) >= 1
        assert ask(served, "/ping").status == 200, "full is not ill"
        clients[0].kill()
        wait_until(lambda: counted(served)["trimtab_waiting"] == 6)
        assert counted(served)["trimtab_running"] == 4
        assert ask(served, "/v1/completions", {"prompt": ["too"] * 11, "max_tokens": 1}).status == 429, "10 places are free"
    finally:
        for client in clients:
            client.kill()
            client.wait()
    wait_until_free(served)


_ASK = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1] + "/v1/completions", data=json.dumps(eval(sys.argv[3])).encode())
request.add_header("Authorization", "Bearer " + sys.argv[2])
urllib.request.urlopen(request).read()
"""


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(served: Endpoint) -> None:
    for body in ({"prompt": "ship at dawn " * 80_000}, {"messages": [{"role": "user", "content": "ship at dawn " * 80_000}]}):
        status, message = ask(served, "/invocations", body).refusal
        assert status == 400
        assert "characters cannot fit the context of" in message


def test_a_body_of_more_prompts_than_are_taken_at_once_is_refused(served: Endpoint) -> None:
    wait_until_free(served)
    status, message = ask(served, "/v1/completions", {"prompt": ["The keeper"] * 21, "max_tokens": 1}).refusal
    assert status == 400
    assert "21 prompts in one body are more than the 20" in message
    assert len(ask(served, "/v1/completions", {"prompt": ["The keeper"] * 20, "max_tokens": 1}).json["choices"]) == 20


def test_the_log_holds_no_prompt_no_answer_and_no_key(server: DirectServer, served: Endpoint) -> None:
    text = served.generate("Zanzibar", max_new_tokens=40)
    http(served.url + "/v1/Zanzibar?key=Zanzibar", b'{"Zanzibar": 1', key=KEY)
    http(served.url + "/invocations", b'{"inputs": "Zanzibar", "parameters": {"temperature": "Zanzibar"}}', key=KEY)
    written = server.written()
    assert "/v1/completions 200 " in written
    assert "other 404 " in written
    assert "/invocations 400 " in written
    assert "Zanzibar" not in written
    assert text[:20] not in written
    assert KEY not in written
    assert KEY.encode() not in Path(f"/proc/{server.engine()}/environ").read_bytes()


def test_the_front_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "openvino", "openvino_genai", "vllm", "peft", "click", "rich", "boto3", "docker"}
    code = f"import sys, trimtab_runtime.__main__, trimtab_runtime.serve; print(*{heavy!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_front_maps_nothing_heavy(server: DirectServer) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert not [name for name in ("libtorch", "libopenvino") if name in maps]
    assert os.getsid(server.engine()) == server.engine()
