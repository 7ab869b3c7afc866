"""`localstack/cloud.py` and `python -m control_plane` when they are ended early, twice, or killed; and behind a proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cloud
from control_plane import ControlPlane
from support.cloud import HERE
from support.training_jobs import until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_ended_while_it_starts_ends_at_once_and_leaves_nothing(localstack_venv: Path, tmp_path: Path, number: int) -> None:
    command = [sys.executable, HERE / "cloud.py", "--s3-port", "0", "--port", "0"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until(lambda: list(tmp_path.glob("localstack-*/log")), 30)
        process.send_signal(number)
        began = time.monotonic()
        said, complaints = process.communicate(timeout=30)
    assert (process.returncode, said, complaints) == (0, b"", b"")
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_localstack_ends_with_whoever_started_it(localstack_venv: Path, tmp_path: Path) -> None:
    """Killed while it starts, which is sooner than when it is there."""
    code = """
import cloud, os, pathlib, threading, time
def kill():
    while not list(pathlib.Path(os.environ["TMPDIR"]).glob("localstack-*/log")):
        time.sleep(0.01)
    time.sleep(1)
    os.kill(os.getpid(), 9)
threading.Thread(target=kill).start()
with cloud.LocalStack(0): time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: not list(tmp_path.iterdir()), 20)


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ControlPlane(runner=None) as plane:
        assert cloud.healthy(f"{plane.url}/_control/health")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_the_program_ends_in_order(tmp_path: Path, number: int) -> None:
    program = [sys.executable, "-m", "control_plane", "--port", "0", "--runner", "none"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(program, cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline().startswith("control plane: ")
        assert len(list(tmp_path.iterdir())) == 1
        started.send_signal(number)
        assert started.wait(10) == 0
    assert list(tmp_path.iterdir()) == []
