"""The serve images: what is in them, that pip agrees with their lists, and how a server in one starts, answers and ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from docker.errors import APIError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.containers import SOMEONE, container, ended, own, small_image
from trimtab import images
from trimtab.cli import main
from trimtab.errors import BackendError
from trimtab.images import Plan
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.entrypoint import USER

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

CONTAINERS = Path(__file__).parents[2] / "containers"
LEFT_OUT = {"huggingface-hub", "openvino-telemetry"}  # with what only they need
KEY = "a-key-of-this-test"

# asks the server from inside its container, which has no network but its loopback: prints status and body
ASK = """
import json, sys, urllib.error, urllib.request
path, key, body = sys.argv[1:]
asked = urllib.request.Request(f"http://127.0.0.1:8080{path}", body.encode() or None, {"Authorization": f"Bearer {key}"} if key else {})
try:
    answer = urllib.request.urlopen(asked, timeout=60)
except urllib.error.HTTPError as refused:
    answer = refused
print(json.dumps([answer.status, answer.read().decode()]))
"""


def resolved(*wanted: str) -> dict[str, list[str]]:
    """What pip would install: names, each with its version and what it requires. Nothing is installed, only metadata are fetched."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [one["metadata"] for one in json.loads(done.stdout)["install"]]
    return {canonicalize_name(one["name"]): [one["version"], *one.get("requires_dist", [])] for one in found}


def test_the_xeon_list_is_what_pip_resolves_it_to() -> None:
    required = [Requirement(line) for line in lines_of(CONTAINERS / "xeon" / "serve" / "requirements.txt")]
    found = resolved(*map(str, required))
    pinned = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in required}
    assert {name: found[name][0] for name in pinned} == pinned
    needed = set(pinned)
    assert not needed & LEFT_OUT
    for name in pinned:  # what a package needs is in the list, too, unless it is left out
        wants = [Requirement(line) for line in found[name][1:]]
        needed |= {canonicalize_name(one.name) for one in wants if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert needed - set(pinned) == LEFT_OUT


def test_what_the_gpu_image_finds_in_vllms_own_is_there_in_versions_that_both_take() -> None:
    """As far as metadata tell: the engine's and the server's ranges are resolved together."""
    ours = [Requirement(line) for line in lines_of(CONTAINERS / "gpu" / "serve" / "requirements.txt")]
    vllm = next(one for one in ours if one.name == "vllm")
    base = re.search(r"^ARG BASE=vllm/vllm-openai:v(\S+)$", (CONTAINERS / "gpu" / "serve" / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert str(vllm.specifier) == f"=={base[1]}"
    platform = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--target", "none"]
    asked = resolved(str(vllm), "--no-deps", *platform)["vllm"][1:]
    light = {"fastapi", *(one.name for one in ours if one.name != "vllm")}
    theirs = [line for line in asked if Requirement(line).name in light]
    assert "fastapi" in {Requirement(line).name for line in theirs}
    together = resolved(*theirs, *platform)  # what vLLM brings by itself
    for one in ours:
        if one.name != "vllm":
            assert one.specifier.contains(together[canonicalize_name(one.name)][0]), (str(one), together[canonicalize_name(one.name)][0])


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def look(client: DockerClient, image: str, code: str) -> Any:
    """What a program in the image prints, as JSON."""
    with container(client, image, entrypoint=["python", "-P", "-c", code], user=str(SOMEONE)) as started:
        return json.loads(ended(started, 0).splitlines()[-1])


def test_the_xeon_serve_image_is_small_and_holds_what_it_says(client: DockerClient, xeon_serve_image: str) -> None:
    found = images.inspect(xeon_serve_image, client)
    assert found.size <= 0.5e9
    assert found.current
    assert found.labels["target"] == "serve"
    assert found.labels["source"] == Plan.of("xeon", "serve").source
    assert images.find("xeon", "serve", client).labels["source"] == found.labels["source"]
    code = (
        "import importlib.util as u, json, openvino\nunwanted = 'torch transformers huggingface_hub openvino_telemetry pip boto3 httpx2'\n"
    )
    code += "print(json.dumps([[m for m in unwanted.split() if u.find_spec(m)], openvino.Core().available_devices]))"
    assert look(client, xeon_serve_image, code) == [[], ["CPU"]]


def test_it_adds_no_programs_no_powers_and_no_secrets(
    client: DockerClient, xeon_serve_image: str, base_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, os, stat\nfound, on_path = [], os.environ['PATH'].split(':')\n"
        "for folder, folders, files in os.walk('/'):\n"
        "    folders[:] = [one for one in folders if os.path.join(folder, one) not in ('/proc', '/sys', '/dev', '/tmp')]\n"
        "    for name in files:\n"
        "        path = os.path.join(folder, name); mode = os.lstat(path).st_mode\n"
        "        if stat.S_ISREG(mode) and (mode & 0o6002 or mode & 0o111 and folder in on_path): found.append(path)\n"
        "print(json.dumps(found))"
    )
    base = set(look(client, base_image, code))
    assert set(look(client, xeon_serve_image, code)) - base == set()
    facts = client.api.inspect_image(xeon_serve_image)
    assert set(facts["Config"]["ExposedPorts"]) == {"8080/tcp"}
    of_base = {line.partition("=")[0] for line in client.api.inspect_image(base_image)["Config"]["Env"] or []}
    ours = {line.partition("=")[0] for line in facts["Config"]["Env"]} - of_base
    assert ours == {"HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TRIMTAB_DEVICE", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
    # nothing of the builder's environment gets into a layer or its history
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "TRIMTAB_API_KEY"):
        monkeypatch.setenv(name, "a-secret-of-the-builder")
    assert images.build("xeon", "serve", base=base_image, client=client, say=lambda line: None) == xeon_serve_image
    said = json.dumps([facts, client.api.history(xeon_serve_image), Plan.of("xeon", "serve").labels()])
    assert not re.search(r"a-secret-of-the-builder|token=|password|aws_", said, re.IGNORECASE)


def test_a_start_compiles_nothing(client: DockerClient, xeon_serve_image: str) -> None:
    """Each module that the server and its engine import has its byte code in the image."""
    code = (
        "import importlib.util as u, json, os, sys\n"
        "import trimtab_runtime.entrypoint, trimtab_runtime.serve, trimtab_runtime.engines.worker, trimtab_runtime.engines.openvino\n"
        "files = [m.__file__ for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').endswith('.py')]\n"
        "print(json.dumps([f for f in files if '/opt/venv/' in f and not os.path.exists(u.cache_from_source(f))]))"
    )
    assert look(client, xeon_serve_image, code) == []


@pytest.fixture
def tree(tmp_path: Path, tiny_model: Path) -> JobDir:
    """What a server reads: a model, and the key that it asks for."""
    job = JobDir(tmp_path / "tree")
    shutil.copytree(tiny_model, job.model)
    job.api_key.parent.mkdir(parents=True)
    job.api_key.write_text(f"{KEY}\n")
    job.api_key.chmod(0o600)
    return job


def ask(started: Container, path: str, key: str = "", body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and body; 0 while nobody listens."""
    found = started.exec_run(["python", "-P", "-c", ASK, path, key, json.dumps(body) if body else ""], user=str(SOMEONE))
    if found.exit_code:
        assert "Connection refused" in found.output.decode(), found.output.decode()
        return 0, ""
    status, said = json.loads(found.output)
    return status, said


def answers(started: Container) -> None:
    """Wait until it is ready."""
    until = time.monotonic() + 120
    while True:
        started.reload()
        assert started.status == "running", started.logs().decode()
        with contextlib.suppress(APIError):  # it ended since
            if ask(started, "/ping")[0] == 200:
                return
        assert time.monotonic() < until, started.logs().decode()
        time.sleep(0.3)


QUESTION = {"inputs": "The keeper", "parameters": {"max_new_tokens": 5}}


def test_any_user_serves_without_powers_network_or_a_root_to_write_to(client: DockerClient, xeon_serve_image: str, tree: JobDir) -> None:
    tree.endpoint.parent.mkdir(parents=True)
    if os.getuid() == 0:
        own(tree.root, SOMEONE)
    how = {"user": f"{SOMEONE}:{SOMEONE}", "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"], "pids_limit": 200}
    with container(client, xeon_serve_image, tree, **how) as started:
        answers(started)
        assert ask(started, "/invocations", "", QUESTION)[0] == 401
        assert ask(started, "/v1/models")[0] == 401
        status, said = ask(started, "/invocations", KEY, QUESTION)
        assert (status, list(json.loads(said)[0])) == (200, ["generated_text"])
        assert json.loads(tree.endpoint.read_text())["engine"].startswith("openvino")
        started.stop(timeout=60)
        said = ended(started, 0)
    assert "entrypoint:" not in said
    assert KEY not in said
    assert "The keeper" not in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root may read what the container's user wrote")
def test_root_becomes_a_user_without_powers_to_whom_the_model_is_not_given(
    client: DockerClient, xeon_serve_image: str, tree: JobDir
) -> None:
    """The layout of SageMaker: all is root's. The model is a mount that nobody writes to; the key is closed to others."""
    for path in tree.model.iterdir():
        path.chmod(0o644)
    mounts = [f"{tree.model}:/opt/ml/model:ro", f"{tree.root}:/opt/ml:rw"]
    with container(client, xeon_serve_image, command=["serve"], volumes=mounts) as started:
        answers(started)
        assert ask(started, "/invocations", KEY, QUESTION)[0] == 200
        users = started.exec_run(["sh", "-c", "cat /proc/[0-9]*/status"]).output.decode()
        assert sorted(set(re.findall(r"^Uid:\s+(\d+)", users, re.MULTILINE))) == ["0", str(USER)]  # PID 1 and whoever looks; the server
        started.stop(timeout=60)
        said = ended(started, 0)
    assert "entrypoint:" not in said
    assert {path.stat().st_uid for path in (tree.model, *tree.model.rglob("*"))} == {0}
    assert (tree.root / "output").stat().st_uid == tree.api_key.stat().st_uid == USER
    assert stat.S_IMODE(tree.api_key.stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="a model that another user owns is closed to the container's")
def test_a_model_alone_is_enough_where_a_platform_checks_who_asks(client: DockerClient, xeon_serve_image: str, tree: JobDir) -> None:
    """As SageMaker starts it: root, `serve`, only /opt/ml/model; here closed to all but root, on a read-only root."""
    (tree.model / "model.safetensors").chmod(0o600)
    mounts = [f"{tree.model}:/opt/ml/model:ro"]
    environment = {SERVE_VARIABLE: ServeSpec(open=True).to_text()}
    with container(client, xeon_serve_image, command=["serve"], volumes=mounts, environment=environment) as started:
        answers(started)
        assert ask(started, "/invocations", "", QUESTION)[0] == 200
        started.stop(timeout=60)
        assert f"stays root: user {USER} could not read /opt/ml/model/model.safetensors (Read-only file system)" in ended(started, 0)


def test_without_a_key_it_does_not_serve_others(client: DockerClient, xeon_serve_image: str, tree: JobDir) -> None:
    tree.api_key.unlink()
    if os.getuid() == 0:
        own(tree.root, SOMEONE)
    with container(client, xeon_serve_image, tree, user=f"{SOMEONE}:{SOMEONE}") as started:
        assert "api_key" in ended(started, 1)
    assert "api_key" in tree.failure.read_text()


def test_the_commands(xeon_serve_image: str, base_image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "build", "xeon", "--target", "serve", "--base", base_image]) == 0
    assert capsys.readouterr().out == f"{xeon_serve_image}\n"
    assert main(["image", "inspect", "xeon", "--target", "serve", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"]["target"] == "serve"
    assert main(["image", "list", "--json"]) == 0
    assert {one["tag"]: one["current"] for one in json.loads(capsys.readouterr().out)}[xeon_serve_image]
    assert main(["image", "prune", "--dry-run", "--json"]) == 0
    assert xeon_serve_image not in {one["tag"] for one in json.loads(capsys.readouterr().out)["removed"]}


def test_the_gpu_image_refuses_a_base_without_vllm(client: DockerClient, base_image: str) -> None:
    with pytest.raises(BackendError, match=r"(?s)No matching distribution found for vllm==.*trimtab image build gpu --target serve$"):
        images.build("gpu", "serve", base=base_image, client=client, say=lambda line: None)


def test_the_gpu_image_builds_on_a_base_that_has_what_it_asks_for(client: DockerClient, xeon_serve_image: str, base_image: str) -> None:
    """vLLM's image is out of reach here. The stand-in has all the packages but vLLM, of which it has only the name and the version."""
    vllm = next(line for line in lines_of(CONTAINERS / "gpu" / "serve" / "requirements.txt") if line.startswith("vllm"))
    version = vllm.partition("==")[2]
    packages = "/opt/venv/lib/python3.11/site-packages"
    steps = [
        f"COPY --from={base_image} /usr/local/lib/python3.11/site-packages/pip {packages}/pip",
        f"RUN cd {packages} && rm -r trimtab* && mkdir vllm-{version}.dist-info && "
        f"printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n' >vllm-{version}.dist-info/METADATA",
    ]
    with small_image(client, xeon_serve_image, *steps) as base:
        tag = images.build("gpu", "serve", base=base, client=client, say=lambda line: None)
        try:
            with container(client, tag, user=str(SOMEONE), network_mode="none") as started:
                said = ended(started, 1)
            assert "/opt/ml" in said  # it holds no model
            code = "import json, sys, trimtab_runtime.serve as s; print(json.dumps([s.__file__, 'torch' in sys.modules]))"
            assert look(client, tag, code) == ["/opt/trimtab/packages/trimtab_runtime/serve.py", False]
        finally:
            client.images.remove(tag, force=True)
