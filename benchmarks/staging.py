"""How quickly a folder of large files gets into S3, against what else there is:  python benchmarks/staging.py --check

trimtab's staging as its backend does it, planned then sent, and both again when the job is submitted, which finds all of it there (with
its notes of digests empty at first, so that every byte is hashed, too), `aws s3 cp --recursive`, boto3's upload_file, and
s3transfer on the AWS common runtime (CRT), each as a process of its own from its start to its end, on one endpoint, in turns whose order
changes. The figure is the smallest, over the others, of the median of (other's seconds / trimtab's seconds) in the same turn.

The endpoint is a LocalStack of its own on this machine (--endpoint for another), so it measures what a client costs, beside a server that
takes most of the two cores; no network is in it. The others live in .cloud/staging, a virtual environment that is made the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".cloud" / "staging"
OTHERS = ["awscli==1.46.3", "boto3==1.44.5", "awscrt==0.38.1"]
BAR = 0.95

OURS = """
import sys
from pathlib import Path
from trimtab.aws.channels import plan_channel
from trimtab.aws.place import S3Place
from trimtab.aws.session import Aws
from trimtab.aws.upload import upload
folder, bucket, prefix = sys.argv[1:]
with Aws() as aws:
    for _ in range(2):
        upload([plan_channel(Path(folder), "train")], aws.client("s3"), S3Place(bucket, prefix))
"""
PLAIN = """
import sys
from pathlib import Path
import boto3
folder, bucket, prefix = sys.argv[1:]
s3 = boto3.client("s3")
for path in sorted(Path(folder).iterdir()):
    s3.upload_file(str(path), bucket, f"{prefix}/{path.name}")
"""
CRT = """
import os, sys
from pathlib import Path
import botocore.session
from s3transfer.crt import BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer, CRTTransferManager, create_s3_crt_client
folder, bucket, prefix = sys.argv[1:]
session, region, endpoint = botocore.session.Session(), os.environ["AWS_DEFAULT_REGION"], os.environ["AWS_ENDPOINT_URL"]
credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
client = create_s3_crt_client(region, credentials, use_ssl=endpoint.startswith("https:"))
with CRTTransferManager(client, BotocoreCRTRequestSerializer(session, {"region_name": region, "endpoint_url": endpoint})) as transfers:
    futures = [transfers.upload(str(path), bucket, f"{prefix}/{path.name}") for path in sorted(Path(folder).iterdir())]
    for future in futures:
        future.result()
"""


@dataclass(frozen=True)
class Turn:
    """`seconds` by the clock; `processor`: seconds of a core, the client's alone."""

    seconds: float
    processor: float


def commands(folder: Path, bucket: str, prefix: str) -> dict[str, list[str]]:
    """What to run for each contender."""
    other, rest = str(VENV / "bin" / "python"), [str(folder), bucket, prefix]
    return {
        "trimtab": [sys.executable, "-c", OURS, *rest],
        "aws s3 cp": [str(VENV / "bin" / "aws"), "s3", "cp", "--recursive", "--only-show-errors", str(folder), f"s3://{bucket}/{prefix}/"],
        "boto3": [other, "-c", PLAIN, *rest],
        "crt": [other, "-c", CRT, *rest],
    }


def measure(endpoint: str, megabytes: int, rounds: int, files: int, *, stated: bool = False) -> dict[str, list[Turn]]:
    """What each contender took in each turn, in the order of the turns."""
    import boto3

    bucket, prefix = f"trimtab-benchmark-{uuid.uuid4().hex[:12]}", "data"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TRIMTAB_"))},
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "test"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", "test"),
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
    }
    session = boto3.Session(
        environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], region_name=environment["AWS_DEFAULT_REGION"]
    )
    s3 = session.client("s3", endpoint_url=endpoint)
    found: dict[str, list[Turn]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "data"
        folder.mkdir()
        for number in range(files):
            with (folder / f"model-{number + 1:05}-of-{files:05}.safetensors").open("wb") as file:
                for _ in range(megabytes // files):
                    file.write(os.urandom(1 << 20))
        if stated:
            facts = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
            (folder / "trimtab-weights.json").write_text(json.dumps({"files": facts}))
        time.sleep(3)  # a file that was just written may change unnoticed, and would be hashed twice
        s3.create_bucket(Bucket=bucket)
        try:
            for turn in range(rounds):
                contenders = list(commands(folder, bucket, prefix).items())
                for name, command in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                    cache = Path(work) / f"cache-{turn}"  # a new one for each turn: nothing is noted
                    before, began = processor_seconds(), time.monotonic()
                    subprocess.run(command, env={**environment, "TRIMTAB_CACHE": str(cache)}, check=True)
                    one = Turn(time.monotonic() - began, processor_seconds() - before)
                    found.setdefault(name, []).append(one)
                    empty(s3, bucket)
                    print(f"{name:<10} {one.seconds:6.2f} s  {one.processor:6.2f} s of a core", file=sys.stderr)
        finally:
            empty(s3, bucket)
            s3.delete_bucket(Bucket=bucket)
            s3.close()
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def empty(s3: object, bucket: str) -> None:
    """Remove what a contender stored, so that the disk does not fill and nobody finds it there."""
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):  # type: ignore[attr-defined]
        for found in page.get("Contents", []):
            s3.delete_object(Bucket=bucket, Key=found["Key"])  # type: ignore[attr-defined]


def processor_seconds() -> float:
    """Of all child processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    """For each of the others the median, over the turns, of its seconds over ours."""
    ours = turns["trimtab"]
    return {
        name: statistics.median(other.seconds / own.seconds for other, own in zip(theirs, ours, strict=True))
        for name, theirs in turns.items()
        if name != "trimtab"
    }


def make_venv() -> None:
    """The others' environment; quick when it is there."""
    stamp = VENV / "made-of"
    if stamp.is_file() and stamp.read_text() == "\n".join(OTHERS):
        return
    print(f"staging: making {VENV.relative_to(ROOT)}, once", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    subprocess.run([str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *OTHERS], check=True)
    stamp.write_text("\n".join(OTHERS))


@contextlib.contextmanager
def endpoint_of(given: str | None) -> Iterator[str]:
    """The endpoint that was given, else that of a LocalStack which lives as long."""
    if given:
        yield given
        return
    subprocess.run([str(ROOT / "localstack" / "setup")], check=True)
    sys.path.insert(0, str(ROOT / "localstack"))
    from cloud import LocalStack

    with LocalStack(port=4576) as found:
        yield found.url


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"end with 1 when the figure is below {BAR}")
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of lines")
    parser.add_argument("--mb", type=int, default=1024, help="MiB of data  [default: 1024]")
    parser.add_argument("--files", type=int, default=4, help="files that they are in  [default: 4]")
    parser.add_argument("--rounds", type=int, default=5, help="turns  [default: 5]")
    parser.add_argument("--stated", action="store_true", help="a manifest states the digests, as one does beside a model that was fetched")
    parser.add_argument("--endpoint", help="another S3 endpoint than a LocalStack of its own")
    asked = parser.parse_args()
    make_venv()
    with endpoint_of(asked.endpoint) as endpoint:
        turns = measure(endpoint, asked.mb, asked.rounds, asked.files, stated=asked.stated)
    against = ratios(turns)
    figure = min(against.values())
    if asked.json:
        found = {name: [asdict(one) for one in taken] for name, taken in turns.items()}
        print(json.dumps({"mib": asked.mb, "turns": found, "ratios": against, "figure": figure, "bar": BAR}, indent=1))
    else:
        for name, taken in turns.items():
            seconds, processor = (statistics.median(values) for values in zip(*map(astuple, taken), strict=True))
            ratio = "" if name == "trimtab" else f"  its seconds / trimtab's: {against[name]:.3f}"
            print(f"{name:<10} {seconds:6.2f} s  {asked.mb / seconds:5.0f} MiB/s  {processor:5.2f} s of a core{ratio}")
        print(f"against the best {figure:.3f}  bar {BAR}  {'kept' if figure >= BAR else 'MISSED'}")
    return 1 if asked.check and figure < BAR else 0


if __name__ == "__main__":
    sys.exit(main())
