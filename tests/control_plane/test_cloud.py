"""`localstack/cloud.py` as a user starts it: what it prints is enough for boto3, it listens nowhere but on loopback, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cloud
from cloud import free_port
from support.cloud import HERE
from support.training_jobs import until


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(scope="module")
def started(localstack_venv: Path, ports: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The command, with nothing of this machine's AWS settings."""
    temporary = tmp_path_factory.mktemp("temporary")
    script = 'printf "%s %s\\n" "$1" "$TREE" >"$TREE/model/said"'
    command = ["--s3-port", str(ports[0]), "--port", str(ports[1]), "--runner", "process", "--root-variable", "TREE"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, HERE / "cloud.py", *command, "--", "/bin/sh", "-c", script, "job"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stdout.read()
    assert list(temporary.iterdir()) == []
    assert all(map(free, ports))


@pytest.fixture(scope="module")
def printed(started: subprocess.Popen[str]) -> dict[str, str]:
    """What it says to export, until it says that it is there."""
    assert started.stdout is not None
    found = {}
    for line in started.stdout:
        if line.startswith("#"):
            return found
        match = re.fullmatch(r"export (AWS_\w+)=(\S+)", line.strip())
        assert match is not None, line
        found[match[1]] = match[2]
    pytest.fail("it ended")


def in_a_shell(printed: dict[str, str], code: str) -> str:
    """The output of Python code that has only what was printed."""
    environment = {"PATH": os.environ["PATH"], **printed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_printed_is_enough_for_boto3_to_run_a_job(printed: dict[str, str]) -> None:
    code = """
import boto3, time
print(boto3.client("sts").get_caller_identity()["Account"], [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]])
sagemaker = boto3.client("sagemaker")
role = boto3.client("iam").get_role(RoleName="SageMakerExecutionRole")["Role"]["Arn"]
sagemaker.create_training_job(
    TrainingJobName="one", RoleArn=role, AlgorithmSpecification={"TrainingImage": "any:1", "TrainingInputMode": "File"},
    OutputDataConfig={"S3OutputPath": "s3://BUCKET/out", "CompressionType": "NONE"}, StoppingCondition={"MaxRuntimeInSeconds": 60},
    ResourceConfig={"InstanceType": "ml.m7i.large", "InstanceCount": 1, "VolumeSizeInGB": 1})
while (found := sagemaker.describe_training_job(TrainingJobName="one"))["TrainingJobStatus"] == "InProgress":
    time.sleep(0.2)
body = boto3.client("s3").get_object(Bucket="BUCKET", Key="out/one/output/model/said")["Body"].read().decode()
print(found["TrainingJobStatus"], found.get("FailureReason"), body.split()[0], body.split()[1].endswith("algo-1"))
print(boto3.client("service-quotas").list_service_quotas(ServiceCode="sagemaker")["Quotas"] != [])
"""
    code = code.replace("BUCKET", cloud.BUCKET)
    assert in_a_shell(printed, code).splitlines() == [f"000000000000 ['{cloud.BUCKET}']", "Completed None train True", "True"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads what listens from /proc, which Linux has")
def test_nothing_listens_but_on_loopback(printed: dict[str, str], started: subprocess.Popen[str], ports: tuple[int, int]) -> None:
    """Of the command's process and of LocalStack's, which it started."""
    mine = {started.pid, *children(started.pid)}
    assert len(mine) >= 2
    sockets = {link for pid in mine for link in links(pid)}
    found = {
        (address, int(port, 16))
        for table in ("tcp", "tcp6", "udp", "udp6")
        for fields in (line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        for address, port in [fields[1].split(":")]
        if fields[9] in sockets and (table.startswith("udp") or fields[3] == "0A")
    }
    assert {port for _, port in found} >= set(ports)
    assert {address for address, _ in found} == {"0100007F"}  # 127.0.0.1, as the kernel writes it


def children(pid: int) -> Iterator[int]:
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        yield child
        yield from children(child)


def links(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if (found := re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))) is not None:
            yield found[1]


class TestReadme:
    text = (HERE / "README.md").read_text(encoding="utf-8")

    def test_its_code_runs(self, printed: dict[str, str]) -> None:
        blocks = re.findall(r"```python\n(.*?)```", self.text, re.S)
        assert len(blocks) == 2
        for block in blocks:
            in_a_shell(printed | {"PYTHONPATH": str(HERE)}, block)

    def test_what_it_says_to_export_is_what_is_printed(self, printed: dict[str, str], ports: tuple[int, int]) -> None:
        shown = self.text.replace(":4566", f":{ports[0]}").replace(":4567", f":{ports[1]}")
        assert cloud.exports(printed) in shown
        assert f"# bucket {cloud.BUCKET}, role arn:aws:iam::{cloud.ACCOUNT}:role/{cloud.ROLE};" in shown

    def test_it_names_every_option(self) -> None:
        done = subprocess.run([sys.executable, HERE / "cloud.py", "--help"], capture_output=True, text=True, timeout=60, check=True)
        options = set(re.findall(r"--[a-z0-9-]+", done.stdout)) - {"--help"}
        assert {each for each in options if f"`{each}" not in self.text} == set()


def test_a_port_that_is_taken_is_told_with_its_remedy(localstack_venv: Path, ports: tuple[int, int], printed: dict[str, str]) -> None:
    for taken, option in zip(ports, ("--s3-port", "--port"), strict=True):
        given = {"--s3-port": free_port(), "--port": free_port()} | {option: taken}
        words = [str(word) for pair in given.items() for word in pair]
        done = subprocess.run([sys.executable, HERE / "cloud.py", *words], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"port {taken} is taken")
        assert option in done.stderr.splitlines()[-1]


def test_a_missing_environment_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(cloud.CloudError, match=r"make it with .*localstack/setup"), cloud.LocalStack(free_port(), tmp_path):
        pass


def test_localstack_ends_with_whoever_started_it(localstack_venv: Path, tmp_path: Path) -> None:
    code = "import cloud, os\nwith cloud.LocalStack(0) as aws: print(aws.port, flush=True); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == -signal.SIGKILL
    until(lambda: free(int(done.stdout)), 20)


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_two_at_once_do_not_touch_each_others_objects(localstack: str, aws: Callable[..., Any], localstack_venv: Path) -> None:
    """They keep objects above 512 KB in files, by default both in the same folder."""
    body = bytes(1 << 20)
    with cloud.LocalStack(free_port(), localstack_venv) as other:
        for s3 in (aws("s3"), aws("s3", other.url)):
            s3.create_bucket(Bucket="twin")
        aws("s3", other.url).put_object(Bucket="twin", Key="a", Body=body)
        aws("s3", other.url).delete_object(Bucket="twin", Key="a")
        aws("s3", other.url).delete_bucket(Bucket="twin")
        aws("s3").put_object(Bucket="twin", Key="b", Body=body)
        with aws("s3").get_object(Bucket="twin", Key="b")["Body"] as answer:
            assert answer.read() == body
        aws("s3").delete_object(Bucket="twin", Key="b")
        aws("s3").delete_bucket(Bucket="twin")


def test_setup_is_quick_the_second_time_and_refuses_another_python(localstack_venv: Path, tmp_path: Path) -> None:
    done = subprocess.run([HERE / "setup"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(old), "LOCALSTACK_VENV": str(tmp_path / "venv")}
    done = subprocess.run([HERE / "setup"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr


def test_setup_says_what_to_do_when_pip_fails(tmp_path: Path) -> None:
    environment = {**os.environ, "LOCALSTACK_VENV": str(tmp_path / "venv"), "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run([HERE / "setup"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip could not install" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "venv" / "setup.sha256").exists()


def test_the_container_of_the_compose_file_is_the_release_that_was_tried() -> None:
    """Read as text, so that no YAML reader is needed: one image, pinned; one port, on loopback; the services that cloud.py asks for."""
    text = (HERE / "compose.yaml").read_text(encoding="utf-8")
    release = re.search(r"localstack-core\[runtime\]==(\S+)", (HERE / "requirements.txt").read_text(encoding="utf-8"))
    assert release is not None
    assert re.findall(r"image: (\S+)", text) == [f"localstack/localstack:{release[1]}"]
    assert tuple(map(int, release[1].split("."))) <= (4, 14, 0)  # later images want a token
    assert re.findall(r'- "?(\S+):4566"?', text) == ["127.0.0.1:${S3_PORT:-4566}"]
    assert f"SERVICES: {cloud.SERVICES}" in text
    ready = HERE / "init" / "ready.d" / "bucket.sh"
    assert os.access(ready, os.X_OK)
    assert subprocess.run(["bash", "-n", ready], check=False).returncode == 0
    assert cloud.BUCKET in ready.read_text(encoding="utf-8")
    assert cloud.ROLE in ready.read_text(encoding="utf-8")


def test_a_shells_exports_are_lines() -> None:
    assert cloud.exports({"A": "1", "B": "2"}) == "export A=1\nexport B=2"
