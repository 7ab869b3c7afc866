"""How a server begins and ends, and what becomes of it when its engine, its disk or its client does not do as it should."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from contract.endpoint_contract import Invoked, http
from contract.http_contract import ask, counted
from support.direct_server import DirectServer, children, engines_of, tree, wait_until
from support.tiny_adapter import make_lively_model
from trimtab.endpoint import Endpoint
from trimtab.layout import JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.serve import serve

ENDLESS = {"prompt": "Zanzibar", "max_tokens": 4000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Iterator[JobDir]:
    """A tree, and at the end no process that served it."""
    job = tree(tmp_path / "tree", model)
    yield job
    wait_until(lambda: not list(engines_of(job.root)), 10, "processes are left")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def asking(endpoint: Endpoint, *bodies: dict[str, Any]) -> Iterator[list[Invoked]]:
    """Ask while the block goes on; the answers are there at its end."""
    answers: list[Invoked] = []
    with ThreadPoolExecutor(len(bodies)) as pool:
        first, before = "trimtab_time_to_first_token_seconds_count", counted(endpoint)
        waiting = [pool.submit(ask, endpoint, "/v1/completions", body) for body in bodies]
        wait_until(lambda: counted(endpoint)["trimtab_running"] == len(bodies))
        wait_until(lambda: counted(endpoint).get(first, 0) == before.get(first, 0) + len(bodies))
        so_far = counted(endpoint)["trimtab_tokens_out_total"]
        wait_until(lambda: counted(endpoint)["trimtab_tokens_out_total"] > so_far + 20 * len(bodies))
        yield answers
        answers += [answer.result(60) for answer in waiting]


def test_an_engine_that_dies_is_started_again_once(job: JobDir) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # float32: in bfloat16 rounding may lead the random model to bytes that are no character yet, and a stream's head waits for one
    with DirectServer(job, ServeSpec(dtype="float32"), TRIMTAB_PORT=str(port)) as server:
        wait_until(lambda: server.process.poll() is not None or _listens(port))
        loading = http(url + "/ping")
        assert loading.refusal == (503, "the model is loading: ask again in a moment")
        assert int(loading.headers["retry-after"]) >= 1
        assert http(url + "/v1/completions", ENDLESS).status == 503
        assert not job.endpoint.exists(), "it has not answered"
        endpoint = server.endpoint()
        first = server.engine()
        with asking(endpoint, ENDLESS, {**ENDLESS, "stream": True}) as answers:
            os.kill(first, signal.SIGKILL)
        status, message = answers[0].refusal
        assert status == 503
        assert "killed by SIGKILL" in message
        assert "out of memory" in message
        assert answers[1].status == 200, "its head had gone out"
        assert answers[1].body.endswith(b"data: [DONE]\n\n")
        assert "killed by SIGKILL" in answers[1].events[-1]["error"]["message"]
        while not endpoint.ready():
            assert http(url + "/ping").status in (200, 503)
            time.sleep(0.05)
        assert endpoint.generate("The keeper", max_new_tokens=3)
        assert counted(endpoint)["trimtab_engine_restarts_total"] == 1
        assert not Path(f"/proc/{first}").exists()

        with asking(endpoint, ENDLESS) as answers:
            os.kill(server.engine(), signal.SIGSEGV)
        assert answers[0].refusal[0] == 503
        assert server.process.wait(20) == 1
        assert "killed by SIGSEGV" in job.cause()
        assert "started again once already" in job.cause()
        assert "Zanzibar" not in job.failure.read_text() + server.written()
        assert not job.endpoint.exists()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_sigterm_lets_running_answers_finish(job: JobDir) -> None:
    with DirectServer(job, ServeSpec(grace_seconds=60)) as server:
        endpoint = server.endpoint()
        body = {**ENDLESS, "max_tokens": 400}
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with asking(endpoint, streamed, body) as answers:
            server.terminate()
            wait_until(lambda: not endpoint.ready())
            assert ask(endpoint, "/ping").refusal == (503, "the server is ending: ask another one")
            assert ask(endpoint, "/v1/completions", {"prompt": "late"}).status == 503
        assert server.process.wait(20) == 0
        assert [answer.status for answer in answers] == [200, 200]
        assert [answer["usage"]["completion_tokens"] for answer in (answers[0].events[-1], answers[1].json)] == [400, 400]
        assert answers[0].body.endswith(b"data: [DONE]\n\n")
        assert not job.endpoint.exists()
        assert not job.failure.exists()


def test_what_does_not_finish_in_its_grace_is_told_so(job: JobDir) -> None:
    with DirectServer(job, ServeSpec(grace_seconds=0.3)) as server:
        endpoint = server.endpoint()
        with asking(endpoint, ENDLESS, {**ENDLESS, "stream": True}) as answers:
            server.terminate()
        assert server.process.wait(20) == 0
        assert answers[0].refusal == (503, "the server is ending: ask again in a moment")
        assert "the server is ending" in answers[1].events[-1]["error"]["message"]


def test_a_second_sigterm_waits_for_nobody(job: JobDir) -> None:
    with DirectServer(job, ServeSpec(grace_seconds=60)) as server:
        endpoint = server.endpoint()
        with urllib.request.urlopen(endpoint.url + "/v1/completions", json.dumps({**ENDLESS, "stream": True}).encode()) as answer:
            assert answer.readline().startswith(b"data: ")
            server.terminate()
            wait_until(lambda: "1 running answers get 60 s" in server.written())
            server.terminate()
            assert server.process.wait(10) == 0


def test_other_reasons_to_end_do_not_cut_short_what_a_signal_lets_finish(job: JobDir) -> None:
    with DirectServer(job, ServeSpec(grace_seconds=60), stdin=subprocess.PIPE, TRIMTAB_UNTIL_STDIN_CLOSES="1") as server:
        endpoint = server.endpoint()
        with asking(endpoint, {**ENDLESS, "max_tokens": 600}) as answers:
            server.terminate()
            wait_until(lambda: "1 running answers get 60 s" in server.written())
            assert server.process.stdin is not None
            server.process.stdin.close()
        assert server.process.wait(20) == 0
        assert answers[0].status == 200
        assert answers[0].json["usage"]["completion_tokens"] == 600


def test_an_engine_does_not_outlive_its_server(job: JobDir) -> None:
    with DirectServer(job) as server:
        endpoint = server.endpoint()
        assert len(list(engines_of(job.root))) == 2
        with urllib.request.urlopen(endpoint.url + "/v1/completions", json.dumps({**ENDLESS, "stream": True}).encode()) as answer:
            assert answer.readline().startswith(b"data: ")
            engine = server.engine()
            server.process.kill()
            server.process.wait()
            wait_until(lambda: not Path(f"/proc/{engine}").exists(), 5, "the engine goes on without its server")


def test_it_ends_with_whoever_holds_its_input(job: JobDir) -> None:
    with DirectServer(job, stdin=subprocess.PIPE, TRIMTAB_UNTIL_STDIN_CLOSES="1") as server:
        endpoint = server.endpoint()
        assert endpoint.ready()
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.process.wait(20) == 0
        assert not job.failure.exists()


def test_it_ends_when_its_time_is_over_and_when_it_is_still_loading(job: JobDir) -> None:
    with DirectServer(job, ServeSpec(ttl_minutes=0.001)) as server:
        assert server.process.wait(20) == 0
        assert "0.001 minutes are over" in server.written()
    with DirectServer(job) as server:
        wait_until(lambda: children(server.process.pid) != [])
        server.terminate()
        assert server.process.wait(20) == 0
    assert not job.failure.exists()


def test_a_full_disk_and_a_tree_that_cannot_be_written_end_nothing(model: Path, tmp_path: Path) -> None:
    job = tree(tmp_path / "tree", model)
    (job.root / "output").write_text("no folder")
    port = free_port()
    environment = {**os.environ, "TRIMTAB_ROOT": str(job.root), "TRIMTAB_PORT": str(port)}
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "trimtab_runtime", "serve"], env=environment, stdin=subprocess.DEVNULL, stdout=full, stderr=full
        )
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        wait_until(lambda: server.poll() is not None or endpoint.ready())
        assert endpoint.generate("The keeper", max_new_tokens=2)
        server.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


def test_a_model_that_cannot_be_loaded_says_why_and_is_not_tried_again(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    job = tree(tmp_path / "tree", broken)
    with DirectServer(job) as server:
        assert server.process.wait(30) == 1
        assert "model.safetensors" in job.cause()
        assert "started again" not in server.written()
        assert not job.endpoint.exists()


@pytest.mark.parametrize(
    ("environment", "key", "message"),
    [
        ({"TRIMTAB_HOST": "0.0.0.0"}, None, r"others reach 0\.0\.0\.0 and there is no API key: write one to .*api_key"),
        ({"TRIMTAB_HOST": "::"}, None, "there is no API key"),
        ({}, "", "holds no key: write one line"),
        ({}, "two words", "holds no key"),
        ({"TRIMTAB_PORT": "99999"}, None, "TRIMTAB_PORT is '99999'"),
        ({"TRIMTAB_PORT": "http"}, None, "TRIMTAB_PORT is 'http'"),
        ({"TRIMTAB_HOST": "no.such.host.invalid"}, "k", "cannot listen on no.such.host.invalid:0 .* choose another port"),
        ({"TRIMTAB_SERVE": "{"}, None, "TRIMTAB_SERVE is not JSON"),
        ({"TRIMTAB_SERVE": '{"max_runing": 3}'}, None, "did you mean max_running"),
        ({"TRIMTAB_SERVE": '{"spec_version": 0}'}, None, "spec_version"),
        ({"TRIMTAB_SERVE": '{"engine": "vllm"}'}, None, "the engine vllm is not installed here"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], key: str | None, message: str
) -> None:
    job = tree(tmp_path, model, key=key)
    for name, value in {"TRIMTAB_ROOT": str(job.root), **environment}.items():
        monkeypatch.setenv(name, value)
    assert serve(job) == 1
    assert re.search(message, job.cause())


def test_a_port_that_is_taken_and_a_folder_without_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("TRIMTAB_PORT", str(taken.getsockname()[1]))
        job = tree(tmp_path / "one", model)
        assert serve(job) == 1
        assert "cannot listen on 127.0.0.1" in job.cause()
        assert "choose another port" in job.cause()
    monkeypatch.delenv("TRIMTAB_PORT")
    job = JobDir(tmp_path / "two")
    assert serve(job) == 1
    assert "holds no model" in job.cause()
    shutil.copytree(model, job.channel("model"))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (job.channel("model") / name).write_text('{"cut')
        assert serve(job) == 1
        assert re.search(rf"{name} is .*copy the model's files again", job.cause())
    (job.channel("model") / "tokenizer.json").unlink()
    assert serve(job) == 1
    assert "has no tokenizer.json" in job.cause()


def test_what_nobody_foresaw_is_told_too(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "adapter_config.json").write_text("{}")
    (artifact / "adapter_model.safetensors").write_bytes(b"")
    (artifact / "trimtab.json").write_text('{"spec": "a manifest of another kind"}')
    job = tree(tmp_path / "tree", model, artifact)
    assert serve(job) == 1
    assert "the server has a fault: AttributeError" in job.cause()
    assert "serve.py" in capfd.readouterr().err, "where it came from"
