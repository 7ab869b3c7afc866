"""What goes wrong between a client and S3: throttling, cut lines, credentials that expire, clients that are killed or are two.

LocalStack stands behind a proxy that makes it go wrong. Afterwards the same command must send only what had not arrived.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bucket_of_files import MIB, Staging, staging
from support.faults import (
    Fault,
    access_denied,
    cut_answer,
    cut_request,
    expired_token,
    hang,
    held_until,
    internal_error,
    late,
    lost_answer,
    other_region,
    request_timeout,
    slow_down,
)
from trimtab.aws.channels import plan_channel
from trimtab.aws.download import Received, download
from trimtab.aws.upload import PART, Sent, upload
from trimtab.errors import StagingError


@pytest.fixture
def s3(localstack: str, tmp_path: Path) -> Iterator[Staging]:
    with staging(localstack, tmp_path) as found:
        yield found


def send(s3: Staging) -> Sent:
    return upload([plan_channel(s3.folder, "train", cache=s3.cache)], s3.s3, s3.place)


def is_whole(s3: Staging) -> None:
    """Everything that a channel of the folder needs is there, and nothing is left to send or to pay for."""
    channel = plan_channel(s3.folder, "train", cache=s3.cache)
    there = s3.objects()
    assert {s3.place.content + content.name: content.size for content in channel.objects}.items() <= there.items()
    assert s3.place.channel(channel.digest) in there
    assert not s3.unfinished()
    assert send(s3) == Sent(0, 0)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("UploadPart", slow_down()),
        ("UploadPart", internal_error()),
        ("UploadPart", request_timeout()),
        ("UploadPart", cut_request(3 * MIB)),
        ("UploadPart", lost_answer()),
        ("PutObject", slow_down()),
        ("PutObject", lost_answer()),
        ("CreateMultipartUpload", internal_error()),
        ("CompleteMultipartUpload", slow_down()),
        ("CompleteMultipartUpload", lost_answer()),
        ("ListObjectsV2", internal_error()),
        ("ListObjectsV2", cut_answer(40)),
    ],
)
def test_what_passes_is_ridden_out(s3: Staging, operation: str, fault: Fault) -> None:
    s3.fill(model=33, small=0.1)
    s3.proxy.fault(fault, on=operation, times=2)
    send(s3)
    assert s3.proxy.count(operation) > 2
    is_whole(s3)


def test_a_service_that_stays_away_is_told_and_what_arrived_is_kept(s3: Staging) -> None:
    s3.fill(model=50)
    s3.proxy.fault(access_denied("s3:PutObject"), on="UploadPart", times=99, after=2)
    with pytest.raises(StagingError, match=r"lacks the permission s3:PutObject.*ask an administrator"):
        send(s3)
    s3.proxy.heal()
    assert send(s3).bytes < 50 * MIB
    is_whole(s3)


def test_credentials_that_expire_in_the_middle(s3: Staging) -> None:
    s3.fill(model=70, two=2)
    s3.proxy.fault(expired_token(), on="UploadPart", times=99, after=3)
    with pytest.raises(StagingError, match=r"what arrived stays there.*has expired.*aws sso login.*repeat the command"):
        send(s3)
    s3.proxy.heal()
    sent = send(s3)
    assert sent.bytes == s3.proxy.received("UploadPart", "PutObject")
    assert 20 * MIB < sent.bytes < 35 * MIB, "70 are four parts of 16 and one of 6: two of these are left, any two"
    is_whole(s3)


def test_a_bucket_of_another_region_is_named(s3: Staging) -> None:
    s3.fill(small=0.1)
    s3.proxy.fault(other_region("eu-central-1"), on=lambda seen: True, times=99)
    with pytest.raises(StagingError, match=r"bucket is in eu-central-1: use that region with  --backend-option region=eu-central-1"):
        send(s3)


def test_a_bucket_of_another_region_is_named_where_boto3_would_follow_it(s3: Staging) -> None:
    s3.fill(small=0.1)
    s3.direct.delete_bucket(Bucket=s3.place.bucket)
    s3.direct.create_bucket(Bucket=s3.place.bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    with pytest.raises(StagingError, match=r"is in eu-central-1, and jobs run in us-east-1: use that region with"):
        send(s3)


@pytest.mark.parametrize(
    ("operation", "action"),
    [
        ("ListObjectsV2", "s3:ListBucket"),
        ("PutObject", "s3:PutObject"),
        ("CreateMultipartUpload", "s3:PutObject"),
        ("ListMultipartUploads", "s3:ListBucketMultipartUploads"),
    ],
)
def test_a_permission_that_is_missing_is_named(s3: Staging, operation: str, action: str) -> None:
    s3.fill(model=17, small=0.1)
    bare = Fault(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
    for fault in (access_denied(action), bare):
        s3.proxy.fault(fault, on=operation, times=99)
        with pytest.raises(StagingError, match=rf"lacks the permission {action}.*ask an administrator"):
            send(s3)
        s3.proxy.heal()


CLIENT = """
import sys
from pathlib import Path
from trimtab.aws.channels import plan_channel
from trimtab.aws.place import S3Place
from trimtab.aws.session import Aws
from trimtab.aws.upload import upload
folder, bucket = sys.argv[1:]
with Aws() as aws:
    print(upload([plan_channel(Path(folder), "train")], aws.client("s3"), S3Place(bucket, "t", "000000000000")))
"""


def client(s3: Staging) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, s3.folder, s3.place.bucket], env=s3.environment(), stdout=subprocess.PIPE, text=True
    )


def test_a_client_that_is_killed_sends_only_the_rest_the_next_time(s3: Staging) -> None:
    s3.fill(a=2, model=100)
    s3.proxy.fault(late(60), on="UploadPart", times=99, after=4)  # the others are on their way when it dies
    with client(s3) as process:
        assert s3.proxy.wait(lambda: s3.proxy.received("UploadPart") == 4 * PART)
        process.send_signal(signal.SIGKILL)
    assert len(s3.unfinished()) == 1
    assert not [key for key in s3.objects() if key.endswith(".manifest")]
    s3.proxy.heal()
    sent = send(s3)
    assert 100 * MIB - 4 * PART <= sent.bytes <= 102 * MIB - 4 * PART + 2_000
    is_whole(s3)


def test_two_clients_that_send_the_same_make_it_once(s3: Staging) -> None:
    s3.fill(model=70, two=2, small__a=0.1)
    clients = [client(s3) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] and process.returncode for process in clients] == [0, 0, 0]
    is_whole(s3)
    ends = [one for one in s3.proxy.seen if one.operation == "CompleteMultipartUpload"]
    # S3 lets the first one make the object and refuses the others; LocalStack looks before it makes it, so two at once may both pass,
    # or one of them, even the one that made it, gets its own KeyError as a 500, which boto3 tries again and is then refused
    assert sum(one.status == 200 for one in ends) <= 2
    assert any(one.status in (200, 500) for one in ends)
    assert {one.headers.get("if-none-match") for one in ends} == {"*"}


@pytest.mark.parametrize("by", ["another's upload that ended", "another's object"])
def test_an_upload_that_another_client_ends_is_begun_anew(s3: Staging, by: str) -> None:
    s3.fill(model=40)
    channel = plan_channel(s3.folder, "train", cache=s3.cache)
    key = s3.place.content + channel.objects[0].name
    ended = threading.Event()
    s3.proxy.fault(held_until(ended), on="UploadPart", times=1, after=2)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            upload([channel], s3.s3, s3.place)
        except StagingError as exc:
            failures.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert s3.proxy.wait(lambda: s3.proxy.count("UploadPart") == 3)
        if by == "another's object":
            s3.direct.put_object(Bucket=s3.place.bucket, Key=key, Body=(s3.folder / "model").read_bytes())
        else:
            with contextlib.suppress(s3.direct.exceptions.NoSuchUpload):  # boto3 asks again when an answer is late
                s3.direct.abort_multipart_upload(Bucket=s3.place.bucket, Key=key, UploadId=s3.unfinished()[0]["UploadId"])
    finally:
        ended.set()
        thread.join()
    assert not failures
    is_whole(s3)


@pytest.mark.parametrize("fault", [cut_answer(3 * MIB), slow_down(), lost_answer(), hang(0.5)])
def test_an_answer_that_is_cut_short_is_asked_for_again(s3: Staging, tmp_path: Path, fault: Fault) -> None:
    data = os.urandom(20 * MIB)
    s3.direct.put_object(Bucket=s3.place.bucket, Key="out/model", Body=data)
    s3.proxy.fault(fault, on="GetObject", times=2)
    download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    assert (tmp_path / "out" / "model").read_bytes() == data
    assert s3.proxy.count("GetObject") == 3 + 2


def test_a_download_that_fails_leaves_no_folder_and_goes_on_where_it_was(s3: Staging, tmp_path: Path) -> None:
    data = {name: os.urandom(size * MIB) for name, size in {"a": 1, "b": 40}.items()}
    for name, content in data.items():
        s3.direct.put_object(Bucket=s3.place.bucket, Key=f"out/{name}", Body=content)
    s3.proxy.fault(expired_token(), on="GetObject", times=99, after=3)
    with pytest.raises(StagingError, match=r"what was fetched stays.*has expired.*aws sso login"):
        download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    s3.proxy.heal()
    received = download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    assert received.bytes <= 41 * MIB - 17 * MIB
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == data
    assert received != Received(0, 0)


def test_an_object_that_changes_while_it_is_fetched_is_refused_then_fetched(s3: Staging, tmp_path: Path) -> None:
    old, new = os.urandom(40 * MIB), os.urandom(40 * MIB)
    s3.direct.put_object(Bucket=s3.place.bucket, Key="out/model", Body=old)
    s3.proxy.fault(late(1.0), on="GetObject", times=99, after=2)
    failures: list[str] = []

    def work() -> None:
        try:
            download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
        except StagingError as exc:
            failures.append(str(exc))

    thread = threading.Thread(target=work)
    thread.start()
    assert s3.proxy.wait(lambda: s3.proxy.count("GetObject") >= 3)
    s3.direct.put_object(Bucket=s3.place.bucket, Key="out/model", Body=new)
    thread.join()
    assert len(failures) == 1
    assert "an object was changed while it was fetched: wait until" in failures[0]
    s3.proxy.heal()
    download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    assert (tmp_path / "out" / "model").read_bytes() == new
