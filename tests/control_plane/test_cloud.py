"""`make cloud` and `localstack/cloud.py` as a user starts them: what they print is enough for boto3, and nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

import cloud
from cloud import free_port
from control_plane.container import NAME_LABEL
from support.cloud import HERE
from support.training_jobs import PATIENCE, until

# what a job does here: it says how it was called, and, when it is asked to, goes on for ever whatever it is told
SCRIPT = """
printf '%s %s\\n' "$1" "$TREE" >"$TREE/model/said"
if [ -n "$ENDLESS" ]; then trap '' TERM INT HUP; echo $$ >"$PIDS"; while :; do sleep 0.1; done; fi
"""
IN_ITS_OWN_NETWORK = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    fcntl.ioctl(probe, 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
JOB = """
import boto3, time
sagemaker = boto3.client("sagemaker")
def start(name, **more):
    sagemaker.create_training_job(
        TrainingJobName=name, RoleArn=boto3.client("iam").get_role(RoleName="SageMakerExecutionRole")["Role"]["Arn"],
        AlgorithmSpecification={"TrainingImage": "IMAGE", "TrainingInputMode": "File"},
        OutputDataConfig={"S3OutputPath": "s3://BUCKET/out", "CompressionType": "NONE"}, StoppingCondition={"MaxRuntimeInSeconds": 3600},
        ResourceConfig={"InstanceType": "ml.m7i.large", "InstanceCount": 1, "VolumeSizeInGB": 1}, **more)
def endless():
    start("endless", Environment={"ENDLESS": "1", "PIDS": "PLACE"})
""".replace("BUCKET", cloud.BUCKET)


@dataclass
class Started:
    """A command that runs, and what it said to export."""

    process: subprocess.Popen[str]
    printed: dict[str, str]
    temporary: Path
    inside: Sequence[str] = ()  # what a command is preceded by that is to run where it does

    def ask(self, code: str) -> list[str]:
        """The lines that Python code prints that has nothing but what was printed."""
        command = [*self.inside, sys.executable, "-c", code]
        environment = {"PATH": os.environ["PATH"], **self.printed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def leaves_nothing(self) -> None:
        """It ends by itself, now that it was told to, and its temporary files, LocalStack's among them, are gone."""
        said, _ = self.process.communicate(timeout=PATIENCE)
        assert "Traceback" not in said, said
        assert list(self.temporary.iterdir()) == []


@contextlib.contextmanager
def running(command: Sequence[object], temporary: Path, inside: Callable[[int], Sequence[str]] = lambda pid: ()) -> Iterator[Started]:
    """The command, with nothing of this machine's AWS settings, from when it says that it is there."""
    temporary.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MAKE"))}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=HERE.parent,
        env=environment | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield Started(process, exported(process.stdout), temporary, inside(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def exported(lines: Iterator[str]) -> dict[str, str]:
    """What it says to export, until it says that it is there."""
    found = {}
    for line in lines:
        if line.startswith("#"):
            return found
        match = re.fullmatch(r"export (AWS_\w+|NO_PROXY)=(\S+)", line.strip())
        assert match is not None, line + "".join(lines)
        found[match[1]] = match[2]
    pytest.fail("it ended")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for an image's ENTRYPOINT where there is no engine."""
    path = tmp_path_factory.mktemp("script") / "script"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(scope="module")
def started(localstack_venv: Path, ports: tuple[int, int], script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """`make cloud`; in the end Ctrl-C, which reaches all that the terminal runs, while a job is running that heeds nothing."""
    options = ["--s3-port", ports[0], "--port", ports[1], "--runner", "process", "--root-variable", "TREE", "--", "/bin/sh", script]
    pids = script.with_name("pid")
    # make need not look at this environment, which runs
    command = ["make", "-o", "setup", "cloud", f"PY={sys.executable}", f"OPTIONS={shlex.join(map(str, options))}"]
    with running(command, tmp_path_factory.mktemp("make")) as found:
        yield found
        found.ask(JOB.replace("PLACE", str(pids)) + "endless()")
        until(lambda: written(pids))
        os.killpg(found.process.pid, signal.SIGINT)
        found.leaves_nothing()
    assert not alive(int(pids.read_text()))
    assert all(map(free, ports))


def test_what_is_printed_is_enough_for_boto3_to_run_a_job(started: Started) -> None:
    code = """
print(boto3.client("sts").get_caller_identity()["Account"], [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]])
start("one")
while (found := sagemaker.describe_training_job(TrainingJobName="one"))["TrainingJobStatus"] == "InProgress":
    time.sleep(0.2)
body = boto3.client("s3").get_object(Bucket="BUCKET", Key="out/one/output/model/said")["Body"].read().decode()
print(found["TrainingJobStatus"], found.get("FailureReason"), body.split()[0], body.split()[1].endswith("algo-1"))
print(boto3.client("service-quotas").list_service_quotas(ServiceCode="sagemaker")["Quotas"] != [])
"""
    said = started.ask(JOB + code.replace("BUCKET", cloud.BUCKET))
    assert said == [f"000000000000 ['{cloud.BUCKET}']", "Completed None train True", "True"]


def test_a_secret_is_kept(started: Started) -> None:
    code = """
import boto3
secrets = boto3.client("secretsmanager")
secrets.create_secret(Name="mine/token", SecretString="first")
secrets.put_secret_value(SecretId="mine/token", SecretString="second")
print(secrets.get_secret_value(SecretId="mine/token")["SecretString"])
secrets.delete_secret(SecretId="mine/token", ForceDeleteWithoutRecovery=True)
try:
    secrets.get_secret_value(SecretId="mine/token")
except secrets.exceptions.ResourceNotFoundException:
    print("gone")
"""
    assert started.ask(code) == ["second", "gone"]


@pytest.fixture
def offline() -> Sequence[str]:
    """What a command is preceded by that is to have a loopback interface and no other."""
    alone = ["unshare", "-n", sys.executable, "-c", IN_ITS_OWN_NETWORK]
    tools = shutil.which("unshare") and shutil.which("nsenter")
    if not tools or subprocess.run([*alone, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("not run, because only root can take the network away, with unshare and nsenter: a start without the network")
    return alone


def test_it_runs_without_the_network_and_ends_when_it_is_terminated(
    localstack_venv: Path, offline: Sequence[str], script: Path, tmp_path: Path
) -> None:
    options = ["--s3-port", "0", "--port", "0", "--runner", "process", "--root-variable", "TREE", "--", "/bin/sh", script]
    pids = tmp_path / "pid"
    code = """
import errno, socket
try:
    socket.create_connection(("192.0.2.1", 80), 5)
except OSError as exc:
    print(errno.errorcode[exc.errno])
boto3.client("s3").put_object(Bucket="BUCKET", Key="a", Body=b"kept")
print(boto3.client("s3").get_object(Bucket="BUCKET", Key="a")["Body"].read())
print(boto3.client("secretsmanager").create_secret(Name="a", SecretString="b")["Name"])
endless()
"""
    code = JOB.replace("PLACE", str(pids)) + code.replace("BUCKET", cloud.BUCKET)
    command = [*offline, HERE / "cloud.py", *options]
    with running(command, tmp_path / "temporary", lambda pid: ["nsenter", "-n", "-t", str(pid)]) as found:
        assert found.ask(code) == ["ENETUNREACH", "b'kept'", "a"]
        until(lambda: written(pids))
        found.process.send_signal(signal.SIGTERM)
        found.leaves_nothing()
    assert found.process.returncode == 0
    assert not alive(int(pids.read_text()))


def test_ctrl_c_ends_the_containers_too(localstack_venv: Path, job_image: str, client: DockerClient, tmp_path: Path) -> None:
    ports, name = (free_port(), free_port()), f"deaf-{uuid.uuid4().hex[:8]}"
    code = (
        JOB.replace("IMAGE", job_image)
        + f"""
boto3.client("s3").put_object(Bucket="{cloud.BUCKET}", Key="code/script", Body=b"trap '' TERM INT HUP; while :; do sleep 0.1; done")
source = {{"S3DataType": "S3Prefix", "S3Uri": "s3://{cloud.BUCKET}/code/"}}
start("{name}", InputDataConfig=[{{"ChannelName": "code", "DataSource": {{"S3DataSource": source}}}}])
"""
    )
    labelled = {"label": f"{NAME_LABEL}=sagemaker-{name}-algo-1"}
    with running([sys.executable, HERE / "cloud.py", "--s3-port", ports[0], "--port", ports[1]], tmp_path / "temporary") as found:
        found.ask(code)
        until(lambda: client.containers.list(filters=labelled))
        found.process.send_signal(signal.SIGINT)
        found.leaves_nothing()
    assert found.process.returncode == 0
    assert client.containers.list(all=True, filters=labelled) == []
    assert all(map(free, ports))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads what listens from /proc, which Linux has")
def test_nothing_listens_but_on_loopback(started: Started, ports: tuple[int, int]) -> None:
    """Of the command's process and of LocalStack's, which it started."""
    mine = {started.process.pid, *children(started.process.pid)}
    assert len(mine) >= 3  # make, the command, LocalStack
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
    """Of all its threads; each may end meanwhile."""
    for task in here(Path(f"/proc/{pid}/task")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, task.joinpath("children").read_text().split()):
                yield child
                yield from children(child)


def links(pid: int) -> Iterator[str]:
    """What its sockets are called; each may be closed meanwhile."""
    for entry in here(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(FileNotFoundError):
            if (found := re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))) is not None:
                yield found[1]


def here(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return list(folder.iterdir())
    return []


def written(path: Path) -> bool:
    """To the end of its line."""
    return path.exists() and path.read_text().endswith("\n")


def alive(pid: int) -> bool:
    """Not so of one that has ended and that nobody has waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class TestReadme:
    text = (HERE / "README.md").read_text(encoding="utf-8")

    def test_its_code_runs(self, started: Started) -> None:
        blocks = re.findall(r"```python\n(.*?)```", self.text, re.S)
        assert len(blocks) == 2
        for block in blocks:
            started.ask(f"import sys; sys.path.insert(0, {str(HERE)!r})\n{block}")

    def test_what_it_says_to_export_is_what_is_printed(self, started: Started, ports: tuple[int, int]) -> None:
        shown = self.text.replace(":4566", f":{ports[0]}").replace(":4567", f":{ports[1]}")
        assert cloud.exports(started.printed) in shown
        assert f"# bucket {cloud.BUCKET}, role arn:aws:iam::{cloud.ACCOUNT}:role/{cloud.ROLE};" in shown

    def test_it_names_every_option(self) -> None:
        done = subprocess.run([sys.executable, HERE / "cloud.py", "--help"], capture_output=True, text=True, timeout=PATIENCE, check=True)
        options = set(re.findall(r"--[a-z0-9-]+", done.stdout)) - {"--help"}
        assert {each for each in options if f"`{each}" not in self.text} == set()


def test_a_port_that_is_taken_is_told_with_its_remedy(localstack_venv: Path, ports: tuple[int, int], started: Started) -> None:
    for taken, option in zip(ports, ("--s3-port", "--port"), strict=True):
        given = {"--s3-port": free_port(), "--port": free_port()} | {option: taken}
        words = [str(word) for pair in given.items() for word in pair]
        done = subprocess.run([sys.executable, HERE / "cloud.py", *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"port {taken} is taken")
        assert option in done.stderr.splitlines()[-1]


def test_a_missing_environment_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(cloud.CloudError, match=r"make it with .*localstack/setup"), cloud.LocalStack(free_port(), tmp_path):
        pass


def test_localstack_ends_with_whoever_started_it(localstack_venv: Path, tmp_path: Path) -> None:
    code = "import cloud, os\nwith cloud.LocalStack(0) as aws: print(aws.port, flush=True); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGKILL
    until(lambda: free(int(done.stdout)))


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_two_at_once_do_not_touch_each_others_objects(localstack: str, aws: Callable[..., Any], started: Started) -> None:
    """They keep objects above 512 KB in files, by default both in the same folder."""
    body, name = bytes(1 << 20), f"twin-{uuid.uuid4().hex[:8]}"
    mine, other = aws("s3"), aws("s3", started.printed["AWS_ENDPOINT_URL"])
    for s3 in (mine, other):
        s3.create_bucket(Bucket=name)
    mine.put_object(Bucket=name, Key="b", Body=body)
    other.put_object(Bucket=name, Key="b", Body=body)
    other.delete_object(Bucket=name, Key="b")
    other.delete_bucket(Bucket=name)
    with mine.get_object(Bucket=name, Key="b")["Body"] as answer:
        assert answer.read() == body
    mine.delete_object(Bucket=name, Key="b")
    mine.delete_bucket(Bucket=name)


def test_a_shells_exports_are_lines() -> None:
    assert cloud.exports({"A": "1", "B": "2"}) == "export A=1\nexport B=2"
