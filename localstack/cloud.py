"""An AWS of this machine: LocalStack (S3, STS, IAM, CloudWatch Logs, Secrets Manager) and a SageMaker that really runs its jobs.

    python localstack/cloud.py        prints what to export, and runs until Ctrl-C

Needs boto3 and docker, and LocalStack in an environment of its own, which localstack/setup makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

if __name__ == "__main__":  # as a package's modules it is found by whoever imports this one
    sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from control_plane import ControlPlane

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".cloud" / "localstack"
SERVICES = "s3,sts,iam,logs,cloudwatch,secretsmanager"
REGION, ACCOUNT = "us-east-1", "000000000000"
BUCKET, ROLE = f"sagemaker-{REGION}-{ACCOUNT}", "SageMakerExecutionRole"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START = 120.0  # seconds to answer

# A process that keeps watch, and its child, LocalStack. When the other end of the standard input is closed, however whoever started it
# died, LocalStack is killed and its folder removed. What S3 holds would be in one constant folder, where another one's deletion of a bucket
# would take it away.
_LAUNCH = """
import os, runpy, shutil, signal, sys, threading
folder = sys.argv.pop()
child = os.fork()
if child:
    alone = threading.Event()
    def watch():
        sys.stdin.buffer.read()
        alone.set()
        os.kill(child, signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()
    status = os.waitpid(child, 0)[1]
    if alone.is_set():
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    os._exit(os.waitstatus_to_exitcode(status) & 255)
from localstack.services.s3 import provider
provider.DEFAULT_S3_TMP_DIR = os.path.join(folder, "objects")
runpy.run_module("localstack.runtime.main", run_name="__main__", alter_sys=True)
"""


class CloudError(Exception):
    """It cannot be started; the text ends with what to do."""


class LocalStack:
    """LocalStack as a process on a loopback port. A context manager; `url` answers from its beginning on.

    `venv` is an environment that localstack/setup made; port 0 is any free one. Raises CloudError.
    """

    def __init__(self, port: int = 4566, venv: Path = VENV) -> None:
        self.port, self.venv = port or free_port(), venv
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalStack:
        python = self.venv / "bin" / "python"
        if not python.exists():
            raise CloudError(f"LocalStack is not in {self.venv}: make it with  {HERE / 'setup'}")
        refuse_taken(self.port, "--s3-port")
        self.folder = Path(tempfile.mkdtemp(prefix="localstack-"))
        try:
            (self.folder / "objects").mkdir()
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [python, "-c", _LAUNCH, self.folder],
                    env=environment(self.port, self.folder),
                    cwd=self.folder,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is ours: it is ended when jobs need it no more
                )
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ended: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # there is nothing that it would save, and its own stop can hang
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START
        while not healthy(f"{self.url}/_localstack/health"):
            if self._process.poll() is not None:
                raise CloudError(
                    f"LocalStack ended as it started:\n{self._said()}\nIts environment may be broken: remove {self.venv}, run setup"
                )
            if time.monotonic() > until:
                raise CloudError(
                    f"LocalStack did not answer within {START:.0f} s:\n{self._said()}\nTry again when the machine is less busy"
                )
            time.sleep(0.1)

    def _said(self) -> str:
        lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-20:])


class Cloud:
    """LocalStack and the control plane, with a bucket and an execution role. A context manager.

    `command` is for the process runner; `root_variable` and `port_variable` name the tree and the port to it. `volumes`: whether containers
    have volumes in place of folders (None: unless this is root). Raises CloudError.
    """

    def __init__(
        self,
        s3_port: int = 4566,
        port: int = 4567,
        runner: Literal["docker", "process"] = "docker",
        bucket: str = BUCKET,
        *,
        command: Sequence[str] = (),
        root_variable: str = "SM_ML_ROOT",
        port_variable: str = "SAGEMAKER_BIND_TO_PORT",
        volumes: bool | None = None,
        venv: Path = VENV,
    ) -> None:
        self.port, self.runner, self.bucket, self.command = port, runner, bucket, list(command)
        self.root_variable, self.port_variable, self.volumes = root_variable, port_variable, volumes
        self.localstack = LocalStack(s3_port, venv)
        self.role = f"arn:aws:iam::{ACCOUNT}:role/{ROLE}"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Cloud:
        try:
            from control_plane import ControlPlane, Settings
        except ImportError as exc:
            raise CloudError(
                f"{exc}: the control plane needs  pip install boto3 docker  (or run it with {VENV / 'bin' / 'python'})"
            ) from exc
        refuse_taken(self.port, "--port")
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.localstack)
            prepare(self.localstack.url, self.bucket)
            settings = Settings(root_variable=self.root_variable, port_variable=self.port_variable, volumes=self.volumes)
            self.plane: ControlPlane = opened.enter_context(
                ControlPlane(aws_url=self.localstack.url, runner=self.runner, command=self.command, port=self.port, settings=settings)
            )
            self._open = opened.pop_all()
        return self

    def __exit__(self, *ended: object) -> None:
        self._open.close()

    def variables(self) -> dict[str, str]:
        """What a client of it needs in its environment."""
        return client_variables(self.localstack.url, self.plane.url)


def client_variables(aws_url: str, sagemaker_url: str) -> dict[str, str]:
    """botocore's own names for where each service is, made-up credentials, and no proxy on the way."""
    return {
        "AWS_ENDPOINT_URL": aws_url,
        "AWS_ENDPOINT_URL_SAGEMAKER": sagemaker_url,
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": sagemaker_url,
        "AWS_ENDPOINT_URL_SERVICE_QUOTAS": sagemaker_url,
        "AWS_ENDPOINT_URL_APPLICATION_AUTO_SCALING": sagemaker_url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "NO_PROXY": "127.0.0.1,localhost",
    }


def environment(port: int, folder: Path) -> dict[str, str]:
    """LocalStack's whole environment: nothing of the caller's goes in, so that it behaves the same everywhere."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "FILESYSTEM_ROOT": str(folder / "fs"),
        "OVERRIDE_IN_DOCKER": "0",  # else it writes to /var/lib/localstack where /.dockerenv exists
        "SKIP_SSL_CERT_DOWNLOAD": "1",  # else it asks the network
        "DISABLE_EVENTS": "1",  # no analytics
        "DNS_ADDRESS": "0",  # no DNS server
        "SERVICES": SERVICES,
        "GATEWAY_SERVER": "hypercorn",  # the default server listens on all interfaces, whatever it is told
        "GATEWAY_LISTEN": f"127.0.0.1:{port}",
    }


def prepare(aws_url: str, bucket: str) -> None:
    """The bucket, and a role for SageMaker. Raises CloudError."""
    import boto3
    from botocore.exceptions import ClientError

    session = boto3.Session("test", "test", region_name=REGION)
    trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
    with (
        contextlib.closing(session.client("s3", endpoint_url=aws_url)) as s3,
        contextlib.closing(session.client("iam", endpoint_url=aws_url)) as iam,
    ):
        try:
            s3.create_bucket(Bucket=bucket)
            iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]}))
            iam.attach_role_policy(RoleName=ROLE, PolicyArn="arn:aws:iam::aws:policy/AmazonSageMakerFullAccess")
        except ClientError as exc:
            raise CloudError(
                f"the bucket {bucket} or the role {ROLE} could not be made ({exc}): choose another name with --bucket"
            ) from exc


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refuse_taken(port: int, option: str) -> None:
    """Raise CloudError where something listens on a loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers of an ended one is no hindrance
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            raise CloudError(f"port {port} is taken ({exc.strerror}): end what listens there, or choose another with  {option}") from exc


def healthy(url: str) -> bool:
    """Whether it answers 200. It is on this machine: a proxy of the environment is not asked."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def exports(variables: Mapping[str, str]) -> str:
    """As lines for a shell."""
    return "\n".join(f"export {name}={value}" for name, value in variables.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cloud.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--s3-port", type=int, default=4566, help="LocalStack's (4566); 0: any free one")
    parser.add_argument("--port", type=int, default=4567, help="SageMaker's (4567); 0: any free one")
    parser.add_argument("--runner", choices=("docker", "process"), default="docker", help="what runs a job: its image, or COMMAND")
    parser.add_argument(
        "--volumes", action="store_true", default=None, help="containers have volumes in place of folders, as where you are not root"
    )
    parser.add_argument("--bucket", default=BUCKET, help=f"made at the start ({BUCKET})")
    parser.add_argument("--venv", type=Path, default=VENV, help=f"LocalStack's environment ({VENV})")
    parser.add_argument("--root-variable", default="SM_ML_ROOT", help="names the stand-in of /opt/ml to COMMAND (SM_ML_ROOT)")
    parser.add_argument("--port-variable", default="SAGEMAKER_BIND_TO_PORT", help="names the port to serve on to COMMAND")
    parser.add_argument(
        "command", nargs="*", metavar="COMMAND", help="for --runner process, after --: what the image's ENTRYPOINT would be"
    )
    given = parser.parse_args(arguments)
    if given.runner == "process" and not given.command:
        parser.error("--runner process needs a command:  cloud.py --runner process -- python -m my_package")

    def end(number: int, frame: FrameType | None) -> None:
        """The first signal ends it wherever it is, the second one at once."""
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    for each in ENDING:
        signal.signal(each, end)
    try:
        cloud = Cloud(
            given.s3_port,
            given.port,
            given.runner,
            given.bucket,
            command=given.command,
            root_variable=given.root_variable,
            port_variable=given.port_variable,
            volumes=given.volumes,
            venv=given.venv,
        )
        with cloud:
            print(exports(cloud.variables()), flush=True)
            print(f"# bucket {cloud.bucket}, role {cloud.role}; Ctrl-C ends it", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except CloudError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
