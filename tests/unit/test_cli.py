"""The command line: options are the spec's fields, results are on standard output, exit codes are 0, 1 and 2."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contract.backend_contract import finish, until
from trimtab import Run, TrainSpec
from trimtab.backends.base import RunHandle
from trimtab.backends.process import ProcessBackend
from trimtab.cli import main
from trimtab.fit_cli import fit
from trimtab.job import FILLED_IN
from trimtab.spec import JobSpec

PAGES = Path(__file__).parents[1] / "support" / "pages"


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Start a shell script as a run of the command line's own backend; its handle as text."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))

    def start(script: str, *, until_done: bool = True) -> str:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        backend = ProcessBackend(python=str(program))
        handle = backend.submit(JobSpec(train=TrainSpec(model="a/model"), data=("x",)), {})
        if until_done:
            finish(backend, handle)
        return str(handle)

    return start


def test_every_field_of_the_spec_is_an_option_of_fit():
    options = {parameter.name: parameter for parameter in fit.params}
    for name, field in {**TrainSpec.model_fields, **JobSpec.model_fields}.items():
        if name in FILLED_IN | {"train", "data"}:
            continue
        assert options[name].opts == ["--" + name.replace("_", "-")]
        assert options[name].help.startswith(field.description)
    assert FILLED_IN & set(options) == set()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["fit"], "Missing argument 'DATA...'"),
        (["fit", "x"], "Missing option '--model'"),
        (["fit", "x", "--model", "m", "--method", "ful"], "'ful' is not one of 'qlora', 'lora', 'full'"),
        (["fit", "x", "--model", "m", "--lora-rang", "3"], "--lora-rank"),
        (["status"], "Missing argument 'HANDLE'"),
        (["go"], "No such command 'go'. There are: chat, close, "),
        (["statsu"], "No such command 'statsu'. Did you mean 'status'?"),
        (["image", "bild", "xeon"], "No such command 'bild'. Did you mean 'build'?"),
    ],
)
def test_a_command_line_that_is_none_ends_with_2(line, said, capsys):
    assert main(line) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["fit", "x", "--model", "smolm2"], "There is no model 'smolm2'"),
        (["fit", "x", "--model", "smollm2-135m-instruct", "--epochs", "0"], "epochs: "),
        (["status", "process://trim-00000000"], "trimtab list"),
        (["logs", "7"], "a handle looks like process://"),
        (["resume", "nowhere://x"], "no backend 'nowhere'"),
    ],
)
def test_what_trimtab_refuses_ends_with_1_and_a_message_without_traceback(line, said, capsys):
    assert main(line) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("trimtab: ")
    assert said in captured.err
    assert captured.out == ""


def test_a_message_steers_no_terminal(tiny_model, tmp_path, capsys):
    records = tmp_path / "r.csv"
    records.write_text('"a\x1b[2J","\x1b]0;mine\x07b"\n1,2\n')
    assert main(["fit", str(records), "--model", str(tiny_model)]) == 1
    said = capsys.readouterr().err
    assert "[2J" in said
    assert "\x1b" not in said
    assert "\x07" not in said


def test_values_that_do_not_go_together_are_said_without_the_insides_of_a_check(capsys):
    assert main(["fit", "x", "--model", "m", "--method", "full", "--use-dora"]) == 1
    assert capsys.readouterr().err == (
        "trimtab: method full trains the whole model and leaves it whole, and use_dora is for adapters: leave it out, "
        "or choose  --method lora\n"
    )


def test_status_logs_and_list_of_a_run(run_script, capsys):
    handle = run_script("echo one; echo two")
    assert main(["status", handle]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{handle} is failed\n")
    assert f"trimtab resume {handle}" in out

    assert main(["status", handle, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["handle"], facts["state"], facts["done"], facts["step"]) == (handle, "failed", True, None)

    assert main(["logs", handle]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"

    assert main(["list"]) == 0
    assert capsys.readouterr().out.split()[0] == handle
    assert main(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["handle"], row["model"], row["state"]) == (handle, "a/model", "failed")


def test_logs_follow_until_the_run_is_stopped(run_script, capsys):
    handle = run_script("echo one; trap 'echo bye; exit' TERM; while :; do sleep 0.05; done", until_done=False)
    follower = subprocess.Popen([sys.executable, "-m", "trimtab", "logs", "-f", handle], stdout=subprocess.PIPE, text=True)
    assert follower.stdout.readline() == "one\n"
    assert main(["stop", handle]) == 0
    assert main(["stop", handle]) == 0
    assert follower.communicate(timeout=20)[0].endswith("bye\n")
    assert follower.returncode == 0
    assert f"{handle} is stopped" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "state"), [("s", "stopped"), ("d", "running")])
def test_ctrl_c_asks_a_person_whether_to_leave_the_run_or_to_stop_it(run_script, tmp_path, typed, state):
    again = f"[ -e {tmp_path}/again ]"
    handle = run_script(f"if {again}; then trap exit TERM; touch {tmp_path}/up; while :; do sleep 0.05; done; fi; touch {tmp_path}/again")
    person, terminal = pty.openpty()
    command = [sys.executable, "-m", "trimtab", "resume", handle]
    watching = subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    until(lambda: (tmp_path / "up").exists(), "the run to be up again")
    time.sleep(0.5)  # it is watched by then, or will be as soon as the resume returns
    watching.send_signal(signal.SIGINT)
    seen = b""
    while b"[s]top" not in seen:
        seen += os.read(person, 1024)
    os.write(person, f"{typed}\n".encode())
    with contextlib.suppress(OSError):  # the end of a terminal that nobody holds any more
        while piece := os.read(person, 1024):
            seen += piece
    os.close(person)
    assert watching.communicate(timeout=30)[0] == b""
    assert watching.returncode == 130
    assert str(Run.attach(handle).status().state) in (state, "pending" if state == "running" else state)
    assert (b"trimtab resume" if typed == "s" else b"trimtab stop") in seen
    Run.attach(handle).stop()


def test_a_reader_that_leaves_early_is_no_error(run_script):
    handle = run_script("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done")
    command = [sys.executable, "-m", "trimtab", "logs", handle]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "line 0\n"
    reader.stdout.close()
    assert reader.stderr.read() == ""
    reader.stderr.close()
    assert reader.wait(20) == 0


def test_a_rendered_dry_run_prints_the_request_and_a_plan_its_steps(tiny_model, staged, capsys):
    options = ["--model", str(tiny_model), "--method", "lora", "--lora-rank", "4", "--dtype", "float32", "--max-seq-len", "128"]
    options += ["--questions", "0", "--replay", "0", "--learning-rate", "1e-3", "--max-steps", "6"]
    assert main(["fit", str(PAGES), *options, "--dry-run=render"]) == 0
    captured = capsys.readouterr()
    request = json.loads(captured.out)
    assert request["hyperparameters"] == staged.train.to_hyperparameters()
    assert "ledger: " in captured.err

    assert main(["plan", str(PAGES), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


def test_ctrl_c_leaves_the_run_going_and_says_how_to_end_it(tiny_model, staged, tmp_path):
    environment = {**os.environ, "TRIMTAB_HOME": str(tmp_path)}
    options = ["--method", "lora", "--max-seq-len", "128", "--questions", "0", "--replay", "0", "--epochs", "10000"]
    command = [sys.executable, "-m", "trimtab", "fit", str(PAGES), "--model", str(tiny_model), *options]
    client = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = []
    for line in client.stderr:
        said.append(line)
        if line.startswith("run process://"):
            break
    else:
        pytest.fail("no run: " + "".join(said))
    handle = said[-1].split()[1]
    run = Run(RunHandle.parse(handle), ProcessBackend(tmp_path))
    try:
        time.sleep(0.5)  # into the waiting
        client.send_signal(signal.SIGINT)
        out, rest = client.communicate(timeout=20)
        assert client.returncode == 130
        assert f"trimtab stop {handle}" in rest
        assert "Traceback" not in rest
        assert out == ""
        assert not run.status().done
    finally:
        run.stop()


def test_a_done_run_is_removed_and_is_then_not_found(run_script, capsys, tmp_path):
    handle = run_script("exit 0")
    assert main(["remove", handle]) == 0
    assert list((tmp_path / "home" / "runs").iterdir()) == []
    assert main(["remove", handle]) == 1
    assert "trimtab list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("memory", 2, "takes NAME=VALUE, such as memory=8g"),
        ("=8g", 2, "takes NAME=VALUE"),
        ("memory=8g", 1, "no option 'memory'"),
        ("pythn=x", 1, "did you mean python?"),
    ],
)
def test_a_wrong_setting_of_the_backend_is_refused(run_script, capsys, setting, code, said):
    for line in (["fit", "x", "--model", "m"], ["plan", "x", "--model", "m"], ["resume", run_script("exit 0")]):
        assert main([*line, "--backend-option", setting]) == code
        assert said in capsys.readouterr().err
