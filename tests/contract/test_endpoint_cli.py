"""The commands around endpoints: deployed, listed, talked to, compared, closed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.direct_server import wait_until
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.cli import main
from trimtab.endpoint import Endpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(place := tmp_path_factory.mktemp("home")))
        yield place


@pytest.fixture(scope="module")
def deployed(home: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The handle of a detached endpoint: the tiny model, an adapter beside it, and a key."""
    artifact = make_adapter(tmp_path_factory.mktemp("artifact"), model)
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("a-brass-key\n")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        line = ["deploy", str(model), "--adapter", f"keeper={artifact}", "--api-key-file", str(key), "--detach", "--ttl", "30", "--json"]
        assert main(line) == 0
    handle = json.loads(said.getvalue())["handle"]
    yield handle
    assert main(["close", handle]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["endpoints", "--backend", "process", "--json"]) == 0
    assert json.loads(said.getvalue()) == []


def test_what_answers_is_listed_with_its_end_and_without_its_key(deployed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["endpoints", "--backend", "process", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["handle"], found["state"], found["orphan"]) == (deployed, "serving", "")
    assert found["created"] < found["expires"]
    assert main(["endpoints", "--backend", "process"]) == 0
    text = capsys.readouterr().out
    assert deployed in text
    assert "ends in 29:" in text
    assert "a-brass-key" not in text
    assert main(["endpoints", "--backend", "process", "--keys"]) == 0
    assert "key a-brass-key" in capsys.readouterr().out


def test_a_chat_streams_and_a_refusal_does_not_end_it(deployed: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who keeps the key?\n\n" + "ship " * 9000 + "\nWho keeps the key?\nstop\nnever asked\n"))
    assert main(["chat", deployed, "--model", "keeper", "--max-tokens", "6"]) == 1
    said = capsys.readouterr()
    with Endpoint.attach(deployed) as endpoint:
        first = endpoint.chat("Who keeps the key?", model="keeper", max_new_tokens=6)
        talk = [("user", "Who keeps the key?"), ("assistant", first), ("user", "Who keeps the key?")]
        second = endpoint.chat([{"role": role, "content": text} for role, text in talk], model="keeper", max_new_tokens=6)
    assert said.out == f"{first}\n{second}\n"
    assert said.err.count(" s, the first words after ") == 2
    assert "context" in said.err


def test_one_question_to_an_address_needs_its_key(deployed: str, capsys, monkeypatch) -> None:
    with Endpoint.attach(deployed) as endpoint:
        url, expected = endpoint.url, endpoint.generate("The keeper", max_new_tokens=5)
    line = ["chat", url, "--question", "The keeper", "--complete", "--max-tokens", "5"]
    assert main(line) == 1
    assert "answered 401" in capsys.readouterr().err
    monkeypatch.setenv("TRIMTAB_API_KEY", "a-brass-key")
    assert main(line) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_comparison_asks_an_endpoint_where_it_is(deployed: str, capsys, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    line = ["compare", f"{deployed}#keeper", f"plain={deployed}#base", "-q", "Who keeps the key?", "--max-tokens", "4", "--html", str(page)]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [column["label"] for column in found["columns"]] == [f"keeper at {deployed}", "plain"]
    assert "Who keeps the key?" in page.read_text()


def test_a_dry_run_prints_the_request_and_starts_nothing(home: Path, model: Path, capsys) -> None:
    before = sorted((home / "endpoints").glob("*")) if (home / "endpoints").exists() else []
    assert main(["deploy", str(model), "--dry-run", "--max-running", "3"]) == 0
    assert '\\"max_running\\": 3' in capsys.readouterr().out
    assert sorted((home / "endpoints").glob("*") if (home / "endpoints").exists() else []) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_held_open_ends_with_the_command(home: Path, model: Path, number: int) -> None:
    command = [sys.executable, "-m", "trimtab", "deploy", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().strip()
        said = process.stderr.readline()
        assert Endpoint(url).ready()
        process.send_signal(number)
        said += process.stderr.read()
        assert process.wait(30) == 0
    assert "with OpenAI's interface under /v1" in said
    wait_until(lambda: not Endpoint(url).ready(timeout=1))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["deploy", "process://trim-00000000"], "trimtab list"),
        (["chat", "process://trim-ep-00000000", "--question", "x"], "trimtab endpoints"),
        (["deploy", "/no/such/folder"], "/no/such/folder"),
        (["deploy", "a/model", "--backend-option", "memry=8g"], "memry"),
        (["chat", "http://127.0.0.1:9", "--question", "x"], "nothing answers"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_type(line: list[str], said: str, home: Path, capsys) -> None:
    assert main(line) == 1
    assert said in capsys.readouterr().err
