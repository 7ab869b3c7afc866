"""Images without an engine: what they are built from, what they are called, which are refused, and what goes wrong is told as."""

from __future__ import annotations

import base64
import contextlib
import gc
import http.server
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab import images
from trimtab.errors import BackendError, BackendUnavailable, SpecError
from trimtab.images import context, wheels
from trimtab.images.building import failure, past_the_proxy
from trimtab.images.plan import Plan, refusal
from trimtab.images.pushing import ecr_login, refused
from trimtab.spec import SPEC_VERSION

ROOT = Path(__file__).parents[2]
AGAIN = "trimtab image build xeon"


def pinned(text: str) -> dict[str, str]:
    """Names in one spelling, and exact versions; a line that is neither that nor a comment fails."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


KINDS = [(device, target) for device in context.DEVICES for target in context.TARGETS]


@pytest.mark.parametrize(("device", "target"), KINDS)
def test_a_dockerfile_keeps_to_what_every_builder_and_platform_takes(device: str, target: str) -> None:
    text = (ROOT / "containers" / device / target / "Dockerfile").read_text()
    assert len(text.splitlines()) < 60
    assert not re.search(r"--mount|--chmod|<<|^# *syntax|apt-get|^VOLUME|^ADD|^USER|:latest", text, re.MULTILINE)
    base = r"vllm/vllm-openai:v\d+\.\d+\.\d+" if (device, target) == ("gpu", "serve") else r"python:3\.11\.\d+-slim-\w+"
    assert re.search(rf"^ARG BASE={base}$", text, re.MULTILINE)
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == [f"${{BASE}} AS {target}"]
    assert re.search(r'^ENTRYPOINT \["python3?", "-P", "-m", "trimtab_runtime.entrypoint"\]$', text, re.MULTILINE)
    assert text.rstrip().endswith(f'CMD ["{target}"]')
    assert re.findall(r"^EXPOSE (.*)$", text, re.MULTILINE) == (["8080"] if target == "serve" else [])
    assert re.search(rf"\bTRIMTAB_DEVICE={device}\b", text)
    assert text.index("COPY requirements.txt") < text.index("COPY trimtab-*.whl")


@pytest.mark.parametrize(("device", "target"), KINDS)
def test_the_shell_lines_of_a_dockerfile_are_a_shells(device: str, target: str, tmp_path: Path) -> None:
    """What sh would refuse, and a step that would go on after a part of it failed."""
    text = (ROOT / "containers" / device / target / "Dockerfile").read_text()
    steps = re.findall(r"^RUN ((?:.*\\\n(?:\s*#.*\n)*)*.*)", text, re.MULTILINE)
    assert len(steps) == 3
    for step in steps:
        script = re.sub(r"\\\n(\s*#.*\n)*", " ", step)  # a builder leaves out comments between continued lines
        assert not script.endswith("\\")
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)
        assert ";" not in re.sub(r"(['\"]).*?\1", "", script) or script.startswith("set -e;"), script


def test_packages_are_pinned_as_the_tests_have_them() -> None:
    tested = pinned((ROOT / ".ci" / "constraints.txt").read_text())
    for device in context.DEVICES:
        required = pinned((ROOT / "containers" / device / "train" / "requirements.txt").read_text())
        assert {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy", "jinja2", "pydantic"} <= set(
            required
        )
        assert {name: version for name, version in required.items() if name in tested} == {
            name: version for name, version in tested.items() if name in required
        }
    serve = pinned((ROOT / "containers" / "xeon" / "serve" / "requirements.txt").read_text())
    assert serve.items() <= tested.items()
    assert {"openvino-genai", "tokenizers", "jinja2", "h11", "pydantic", "numpy"} <= set(serve)
    assert {name for name in serve if name.startswith(("torch", "transformers", "huggingface", "hf-", "httpx"))} == set()
    xeon = pinned((ROOT / "containers" / "xeon" / "train" / "requirements.txt").read_text())
    assert {name for name in xeon if name.startswith(("nvidia", "cuda", "triton", "pandas", "docker", "boto"))} == set()
    torch = re.search(r"^TORCH=(\S+)$", (ROOT / ".ci" / "setup").read_text(), re.MULTILINE)
    assert torch is not None
    assert xeon["torch"] == torch[1]


def test_the_wheel_is_the_same_whenever_and_wherever_it_is_packed(tmp_path: Path) -> None:
    first = context.context("xeon")
    shutil.copytree(ROOT / "sdk" / "trimtab", tmp_path / "trimtab", copy_function=shutil.copyfile)
    shutil.copytree(ROOT / "entrypoints" / "trimtab_runtime", tmp_path / "trimtab_runtime", copy_function=shutil.copyfile)
    shutil.copytree(ROOT / "containers", tmp_path / "trimtab" / "containers")  # as an installed wheel has them
    (tmp_path / f"trimtab-{context.version()}.dist-info").mkdir()
    (tmp_path / f"trimtab-{context.version()}.dist-info" / "METADATA").write_text(f"Name: trimtab\nVersion: {context.version()}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import trimtab; from trimtab.images import context\nprint(trimtab.__file__, context.digest(context.context('xeon')))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "trimtab" / "__init__.py"), context.digest(first)]


def test_the_wheel_is_one_that_pip_installs(tmp_path: Path) -> None:
    name, content = next((name, content) for name, content in context.context("xeon").items() if name.endswith(".whl"))
    (tmp_path / name).write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(tmp_path / name),
    ]
    subprocess.run(command, check=True)
    installed = tmp_path / "site" / "trimtab_runtime" / "entrypoint.py"
    assert installed.read_bytes() == (ROOT / "entrypoints" / "trimtab_runtime" / "entrypoint.py").read_bytes()
    assert (tmp_path / "site" / "trimtab" / "catalog.toml").exists()
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert not [name for name in names if "/containers/" in name or name.endswith(".pyc")]


def test_what_one_target_holds_leaves_the_other_as_it_is() -> None:
    train, serve = context.context("xeon"), context.context("xeon", "serve")
    assert {name for name in train if not name.startswith("trimtab_xeon-")} == serve.keys()
    assert [name for name in serve if train[name] == serve[name]] == [name for name in serve if name.endswith(".whl")]


def test_the_kernels_go_into_the_image_that_trains_on_xeons_where_they_are_installed(tmp_path: Path) -> None:
    packed = context.pack_kernels()
    held = [name for kind in KINDS for name in context.context(*kind) if name.startswith("trimtab_xeon-")]
    assert held == ([] if packed is None else [packed[0]])
    assert "WITHOUT the compiled kernels, so plain torch computes" in context.said_of_kernels({"trimtab-1.whl": b""})
    if packed is None:
        pytest.skip("trimtab-xeon is not built here: .venv/bin/python entrypoints/trimtab_xeon/build.py")
    assert re.fullmatch(r"trimtab_xeon-[0-9.]+-py3-none-manylinux_2_\d+_x86_64\.whl", packed[0])
    assert context.said_of_kernels(dict([packed])) == f"with the compiled kernels, {packed[0]}"
    assert context.pack_kernels() == packed
    (tmp_path / packed[0]).write_bytes(packed[1])
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(tmp_path / packed[0])], check=True)
    names = sorted(path.name for path in (tmp_path / "site" / "trimtab_xeon").iterdir() if path.is_file())
    assert names == ["__init__.py", "kernels.so", "py.typed"]


def test_a_tag_says_device_target_version_and_contents() -> None:
    tag = images.tag_of("xeon")
    assert re.fullmatch(rf"trimtab-xeon-train:{re.escape(context.version())}-[0-9a-f]{{12}}", tag)
    assert images.tag_of("xeon") == tag
    assert (
        len({tag, images.tag_of("gpu"), images.tag_of("xeon", base="python:3.12"), images.tag_of("xeon", arguments={"CPU_INDEX": "x"})})
        == 4
    )
    assert images.tag_of("gpu", "serve").startswith("trimtab-gpu-serve:")


def test_images_of_equal_sources_on_different_bases_share_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Plan.of("xeon"), Plan.of("xeon", base="python:3.12-slim")
    assert here.source == there.source
    assert here.digest != there.digest
    monkeypatch.setenv("TRIMTAB_BASE_IMAGE", "python:3.12-slim")
    assert Plan.of("xeon").tag == there.tag


def test_what_there_is_not_is_refused_with_what_there_is() -> None:
    with pytest.raises(SpecError, match="devices are xeon, gpu"):
        images.tag_of("tpu")
    with pytest.raises(SpecError, match="targets are train, serve"):
        images.tag_of("xeon", "play")
    with pytest.raises(SpecError, match="no build argument FLASH_ATTN; it has CPU_INDEX"):
        images.tag_of("xeon", arguments={"FLASH_ATTN": "x"})


def test_an_image_in_which_a_job_runs_is_not_refused() -> None:
    plan = Plan.of("xeon")
    assert refusal(plan.tag, plan.labels(), "amd64", "amd64") == ""
    assert refusal("registry.example.com:5000/us/train:latest", plan.labels(), "amd64", "amd64") == ""
    assert refusal(f"registry.example.com:5000/us/train:{plan.tag.rpartition(':')[2]}", plan.labels(), "amd64", "amd64") == ""


@pytest.mark.parametrize(
    ("changed", "architecture", "why"),
    [
        ({}, "arm64", "is for arm64 and this engine runs amd64"),
        ({"spec_version": str(SPEC_VERSION + 1)}, "amd64", f"spec_version {SPEC_VERSION + 1} and this trimtab writes {SPEC_VERSION}"),
        ({"context": "0" * 64}, "amd64", "was moved: it holds what belongs under 000000000000"),
    ],
)
def test_an_image_in_which_it_would_not_is_refused_with_the_next_command(changed: dict[str, str], architecture: str, why: str) -> None:
    plan = Plan.of("xeon")
    said = refusal(plan.tag, {**plan.labels(), **changed}, architecture, "amd64")
    assert why in said
    assert said.endswith(f"build it here:  {AGAIN} --force" if architecture == "arm64" else f"build it:  {AGAIN} --force")
    assert "has none of its labels" in refusal("python:3.11", {}, "amd64", "amd64")


@pytest.mark.parametrize(
    ("error", "last", "said"),
    [
        (
            "The command '/bin/sh -c pip' returned a non-zero code: 1",
            ["OSError: [Errno 28] No space left on device"],
            "docker system prune",
        ),
        ("write /var/lib/docker/tmp/x: no space left on device", [], "docker system prune"),
        ("The command '/bin/sh -c python -c 'import sys...' returned a non-zero code: 86", [], "no Python 3.11 or 3.12"),
        (
            "The command '/bin/sh -c python -c 'import sys...' returned a non-zero code: 127",
            ["/bin/sh: python: not found"],
            "no Python 3.11",
        ),
        ("Get https://registry.invalid/v2/: dial tcp: lookup registry.invalid: no such host", [], "is the base image some:base here"),
        (
            "The command '/bin/sh -c set -e' returned a non-zero code: 1",
            ["Step 3/9 : RUN", "ERROR: no match for torch"],
            "ERROR: no match for torch",
        ),
    ],
)
def test_a_build_that_fails_says_why_and_what_next(error: str, last: list[str], said: str) -> None:
    told = failure(error, last, Plan.of("xeon", base="some:base"), AGAIN)
    assert said in told
    assert AGAIN in told.splitlines()[-1]
    assert "Step 3" not in told


def test_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(BackendUnavailable, match=r"no Docker engine answers at unix:.*nothing.sock: start it .*try again"):
        images.engine()


# the SDK asks for a version while it makes its client, and leaves the socket to the garbage collector when that fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        deaf.listen()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/deaf.sock")
        with pytest.raises(BackendUnavailable, match="no Docker engine answers"):
            images.engine(timeout=0.5)
        gc.collect()


def test_without_the_docker_sdk_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['docker'] = None\nfrom trimtab import images\n"
    code += "try: images.engine()\nexcept images.present.BackendUnavailable as exc: print(exc)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "images and the docker backend need the docker SDK:  pip install 'trimtab[docker]'\n"


def test_images_are_named_without_the_docker_sdk() -> None:
    code = "import sys; from trimtab import images; images.tag_of('xeon'); print({'docker', 'boto3', 'rich', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_folder_of_wheels_is_found_in_pips_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thing-1.0+cpu-py3-none-any.whl").write_bytes(b"wheel")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/nowhere {tmp_path}/a file://{tmp_path}/b")
    assert wheels.configured("thing-*+cpu-*.whl") == tmp_path / "b"
    assert wheels.configured("other-*.whl") is None
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text(f"[global]\nfind-links = {tmp_path}/b\n")
    assert wheels.configured("thing-*.whl") == tmp_path / "b"


def test_a_folder_of_wheels_is_served_on_loopback_while_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "thing.whl").write_bytes(b"wheel")
    with wheels.served(tmp_path) as address, wheels.served(tmp_path) as another:
        assert address != another
        for where in (address, another):
            assert where.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(f"{where}thing.whl", timeout=10) as answer:
                assert answer.read() == b"wheel"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}thing.whl", timeout=10)
    with pytest.raises(BackendError, match="give --find-links a folder"), wheels.served(tmp_path / "none"):
        pass


def test_the_folder_is_reached_past_a_proxy_and_what_was_exempt_stays_so() -> None:
    proxies = {"default": {"httpProxy": "http://proxy:3128", "noProxy": "*.example.com,10.0.0.0/8"}, "tcp://other:2375": {"httpProxy": "x"}}
    assert past_the_proxy(proxies, "http+docker://localhost") == dict.fromkeys(
        ("NO_PROXY", "no_proxy"), "*.example.com,10.0.0.0/8,127.0.0.1"
    )
    assert past_the_proxy(proxies, "tcp://other:2375")["no_proxy"] == "127.0.0.1"
    assert past_the_proxy({}, "http+docker://localhost")["NO_PROXY"] == "127.0.0.1"


REGISTRY = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/team/trimtab"


class _Ecr(http.server.BaseHTTPRequestHandler):
    """GetAuthorizationToken as the ECR API reference has it: signed requests for that action alone."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        asked = self.headers["X-Amz-Target"] == "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
        known = "Credential=AKIDEXAMPLE/" in self.headers.get("Authorization", "") and "/eu-central-1/ecr/" in self.headers["Authorization"]
        token = base64.b64encode(b"AWS:a-password:with-a-colon").decode()
        answer = {"authorizationData": [{"authorizationToken": token, "expiresAt": 1.8e9}]}
        if not (asked and known):
            answer = {"__type": "UnrecognizedClientException", "message": "The security token included in the request is invalid."}
        body = json.dumps(answer).encode()
        self.send_response(200 if asked and known else 400)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ecr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ecr)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_login_to_ecr_comes_from_the_aws_credentials(ecr: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert ecr_login(REGISTRY) == {"username": "AWS", "password": "a-password:with-a-colon"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOTHER")
    with pytest.raises(BackendError, match=r"AWS gave no login to ECR .*invalid.*aws sts get-caller-identity"):
        ecr_login(REGISTRY)


def test_without_aws_credentials_there_is_no_login_to_ecr(ecr: None) -> None:
    with pytest.raises(BackendError, match=r"AWS gave no login to ECR \(Unable to locate credentials\)"):
        ecr_login(REGISTRY)


def test_other_registries_are_left_to_dockers_logins() -> None:
    assert ecr_login("registry.example.com/team/trimtab") is None
    assert ecr_login("docker.io/123456789012.dkr.ecr.eu-central-1.amazonaws.com") is None


@pytest.mark.parametrize(
    ("error", "repository", "said"),
    [
        ("unauthorized: authentication required", "registry.example.com/us/x", "docker login registry.example.com"),
        ("denied: requested access to the resource is denied", "us/x", "docker login"),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "127.0.0.1:1/x", "up and reachable, and push again"),
        ("name unknown: The repository does not exist", REGISTRY, "create-repository --region eu-central-1 --repository-name team/trimtab"),
    ],
)
def test_a_push_that_fails_says_what_next(error: str, repository: str, said: str) -> None:
    assert said in refused(error, repository)
