"""Staging to S3 and fetching from it, against a real LocalStack, with a proxy that notes every request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.bucket_of_files import ACCOUNT, MIB, Staging, staging
from support.faults import late
from trimtab.aws import bucket as bucket_module
from trimtab.aws import upload as upload_module
from trimtab.aws.channels import BUNDLE, PlannedChannel, plan_channel
from trimtab.aws.download import Received, download
from trimtab.aws.place import S3Place, default_bucket
from trimtab.aws.session import Aws
from trimtab.aws.upload import PART, Sent, part_size, upload
from trimtab.errors import StagingError
from trimtab_runtime.channels import unfold


@pytest.fixture
def s3(localstack: str, tmp_path: Path) -> Iterator[Staging]:
    with staging(localstack, tmp_path) as found:
        yield found


def send(s3: Staging, place: S3Place | None = None) -> tuple[PlannedChannel, Sent]:
    """The folder planned and sent, as the backend does it."""
    planned = plan_channel(s3.folder, "train", cache=s3.cache)
    return planned, upload([planned], s3.s3, place or s3.place)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_staged_is_in_the_container_what_it_was(s3: Staging, tmp_path: Path) -> None:
    s3.fill(model=18, two=3, small__a=0.1, small__b=0.1, empty=0)
    seen: list[tuple[int, int]] = []
    channel = plan_channel(s3.folder, "train", cache=s3.cache)
    sent = upload([channel], s3.s3, s3.place, lambda done, of: seen.append((done, of)))
    assert sent.objects == len(channel.objects) + 1
    assert sent.bytes == sum(s3.objects().values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(content.size for content in channel.objects)

    manifest = s3.direct.get_object(Bucket=s3.place.bucket, Key=s3.place.channel(channel.digest))["Body"].read()
    first, *names = json.loads(manifest)
    there = tmp_path / "there"
    there.mkdir()
    for name in names:
        s3.direct.download_file(s3.place.bucket, first["prefix"].removeprefix(f"s3://{s3.place.bucket}/") + name, str(there / name))
    assert unfold(there)
    assert tree(there) == tree(s3.folder)

    made = [one for one in s3.proxy.seen if one.operation in ("PutObject", "CompleteMultipartUpload")]
    assert made[-1].path.endswith(f"/channels/{channel.digest}.manifest"), "the manifest is last"
    assert all(one.headers["if-none-match"] == "*" for one in made)
    assert all(one.headers["x-amz-expected-bucket-owner"] == ACCOUNT for one in s3.proxy.seen)
    checked = [one for one in s3.proxy.seen if one.operation in ("PutObject", "UploadPart")]
    assert all("x-amz-checksum-sha256" in one.headers or "x-amz-checksum-crc32" in one.headers for one in checked)
    assert {one.headers["x-amz-content-sha256"] for one in checked} == {"UNSIGNED-PAYLOAD"}, "no body is hashed twice on its way"


def test_what_is_there_is_not_sent(s3: Staging) -> None:
    s3.fill(model=18, small=0.1)
    planned, sent = send(s3)
    assert sent.bytes > 18 * MIB
    s3.proxy.heal()
    again, sent = send(s3)
    assert (again.digest, sent) == (planned.digest, Sent(0, 0))
    assert sum(one.received for one in s3.proxy.seen) == 0
    assert len(s3.proxy.seen) == 2, "a look at the content and one at the manifest"
    (s3.folder / "small").write_bytes(b"other")
    again, sent = send(s3)
    index = again.objects[-1]
    assert sent == Sent(5 + index.size + len(again.manifest(s3.place)), 3)


def test_ten_thousand_small_files_are_at_most_twenty_objects(s3: Staging) -> None:
    for number in range(10_000):
        (s3.folder / f"{number}.txt").write_bytes(number.to_bytes(4, "big") * 2_500)
    before, sent = send(s3)
    assert before.files == 10_000
    assert all(content.size <= 1.25 * BUNDLE for content in before.objects)
    assert sent.objects == len(s3.objects()) <= 20
    assert send(s3)[1] == Sent(0, 0)
    (s3.folder / "77.txt").write_bytes(b"other")
    again = send(s3)[1]
    assert again.objects == 3, "one bundle, the index, the manifest"
    assert again.bytes < 20 * MIB


def test_beyond_the_first_page_objects_are_asked_for_one_by_one(s3: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.fill(a=1, b=2, c=0.1)
    planned, _ = send(s3)
    for digest in ("0" * 64, "f" * 64):
        s3.direct.put_object(Bucket=s3.place.bucket, Key=s3.place.content + digest)
    for page in (1, 2, 3, 4, 7):
        monkeypatch.setattr(bucket_module, "_PAGE", page)
        s3.proxy.heal()
        assert upload([planned], s3.s3, s3.place) == Sent(0, 0)
        assert s3.proxy.count("ListObjectsV2") == len(s3.proxy.seen)
        asked = 2 + len(planned.objects) - (page - 1 if page < 6 else len(planned.objects))
        assert len(s3.proxy.seen) == asked


def test_with_a_key_everything_is_encrypted_with_it_and_kept_apart(s3: Staging) -> None:
    s3.fill(model=18, small=0.1)
    plain, _ = send(s3)
    s3.proxy.heal()
    key = "arn:aws:kms:us-east-1:000000000000:key/12345678-1234-1234-1234-123456789012"
    place = replace(s3.place, kms_key=key)
    sealed, sent = send(s3, place)
    assert sent.objects == 4, "what lies there without the key does not count"
    makers = [one for one in s3.proxy.seen if one.operation in ("PutObject", "CreateMultipartUpload")]
    assert len(makers) == 4
    assert all(one.headers["x-amz-server-side-encryption"] == "aws:kms" for one in makers)
    assert all(one.headers["x-amz-server-side-encryption-aws-kms-key-id"] == key for one in makers)
    assert all("/kms-" in one.path for one in makers)
    assert sealed.manifest_uri(place) != plain.manifest_uri(s3.place)


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_the_default_bucket_is_made_and_closed(s3: Staging, region: str) -> None:
    s3.fill(small=0.1)
    place = S3Place(default_bucket(region, ACCOUNT), f"test-{time.time_ns()}", ACCOUNT)
    with Aws(region) as aws:
        with contextlib.suppress(s3.direct.exceptions.NoSuchBucket):  # that of other tests, which is made again when it is needed
            for page in s3.direct.get_paginator("list_objects_v2").paginate(Bucket=place.bucket):
                for found in page.get("Contents", []):
                    s3.direct.delete_object(Bucket=place.bucket, Key=found["Key"])
            s3.direct.delete_bucket(Bucket=place.bucket)
        try:
            assert upload([plan_channel(s3.folder, "train", cache=s3.cache)], aws.client("s3"), place).objects == 3
            closed = s3.direct.get_public_access_block(Bucket=place.bucket)["PublicAccessBlockConfiguration"]
            assert all(closed.values())
            assert len(closed) == 4
            rule = s3.direct.get_bucket_lifecycle_configuration(Bucket=place.bucket)["Rules"][0]
            assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
            assert (s3.direct.get_bucket_location(Bucket=place.bucket)["LocationConstraint"] or "us-east-1") == region
        finally:
            for key in s3.direct.list_objects_v2(Bucket=place.bucket)["Contents"]:
                s3.direct.delete_object(Bucket=place.bucket, Key=key["Key"])
            s3.direct.delete_bucket(Bucket=place.bucket)


def test_another_bucket_is_not_made(s3: Staging) -> None:
    s3.fill(small=0.1)
    with pytest.raises(
        StagingError, match=r"there is no bucket nobodys-1234: make it with  aws s3 mb s3://nobodys-1234 --region us-east-1"
    ):
        send(s3, S3Place("nobodys-1234"))


def test_a_file_that_changes_while_it_is_sent_is_refused(s3: Staging) -> None:
    s3.fill(model=40)
    channel = plan_channel(s3.folder, "train", cache=s3.cache)
    s3.proxy.fault(late(1.0), on="CreateMultipartUpload")

    def change() -> None:
        assert s3.proxy.wait(lambda: s3.proxy.count("CreateMultipartUpload") == 1)
        with (s3.folder / "model").open("r+b") as file:
            file.write(b"changed")

    thread = threading.Thread(target=change)
    thread.start()
    with pytest.raises(StagingError, match=r"model was changed while it was sent: wait until"):
        upload([channel], s3.s3, s3.place)
    thread.join()
    assert not [key for key in s3.objects() if "index" not in key]
    assert not s3.unfinished()


def test_what_a_manifest_states_wrongly_never_becomes_an_object(s3: Staging) -> None:
    s3.fill(model=18, two=2)
    for path in s3.folder.iterdir():
        os.utime(path, (time.time() - 100, time.time() - 100))
    for name in ("model", "two"):
        shutil.rmtree(s3.cache, ignore_errors=True)
        stated = {name: {"bytes": (s3.folder / name).stat().st_size, "sha256": "5" * 64}}
        (s3.folder / "manifest.json").write_text(json.dumps({"files": stated}))
        with pytest.raises(StagingError, match=rf"{name} does not have the contents that .*manifest.json states.*Remove the folder"):
            send(s3)
        assert f"{s3.place.content}{'5' * 64}" not in s3.objects()
        assert not s3.unfinished()


def test_a_note_that_is_wrong_is_forgotten(s3: Staging) -> None:
    s3.fill(model=18)
    moment = time.time() - 100
    os.utime(s3.folder / "model", (moment, moment))
    plan_channel(s3.folder, "train", cache=s3.cache)
    with (s3.folder / "model").open("r+b") as file:
        file.write(b"changed, and the time set back")
    os.utime(s3.folder / "model", (moment, moment))
    with pytest.raises(StagingError, match="model has other contents than when it was last read: repeat the command"):
        send(s3)
    send(s3)
    assert f"{s3.place.content}{hashlib.sha256((s3.folder / 'model').read_bytes()).hexdigest()}" in s3.objects()


def test_an_object_that_somebody_else_put_there_is_noticed(s3: Staging) -> None:
    s3.fill(two=2)
    channel = plan_channel(s3.folder, "train", cache=s3.cache)
    s3.direct.put_object(Bucket=s3.place.bucket, Key=s3.place.content + channel.objects[0].name, Body=b"short")
    with pytest.raises(StagingError, match=r"has 5 bytes, not 2097152: another program wrote it. Remove it:  aws s3 rm s3://"):
        upload([channel], s3.s3, s3.place)


def test_uploads_that_nobody_goes_on_with_are_aborted(s3: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.fill(model=18)
    ours, others = f"{s3.place.content}{'7' * 64}", "elsewhere"
    for key in (ours, others):
        s3.direct.create_multipart_upload(Bucket=s3.place.bucket, Key=key)
    monkeypatch.setattr(upload_module, "_STALE", upload_module._STALE * 0)
    send(s3)
    assert [one["Key"] for one in s3.unfinished()] == [others]


def test_parts_are_as_many_as_s3_takes() -> None:
    assert part_size(1) == part_size(10_000 * PART) == PART
    for size in (10_000 * PART + 1, 5 << 40, 48_800 << 30):
        assert part_size(size) % MIB == 0
        assert -(-size // part_size(size)) <= 10_000


def stored(s3: Staging) -> dict[str, bytes]:
    """Objects as they come about: in parts, in one piece, empty, nested, made by a console for a folder."""
    files = {"a/model.bin": os.urandom(20 * MIB), "whole.bin": os.urandom(17 * MIB), "b.json": b"{}", "empty": b"", "größe 家": b"x"}
    (s3.folder / "big").write_bytes(files["a/model.bin"])
    s3.direct.upload_file(str(s3.folder / "big"), s3.place.bucket, "out/a/model.bin")
    for name, data in files.items():
        if name != "a/model.bin":
            s3.direct.put_object(Bucket=s3.place.bucket, Key=f"out/{name}", Body=data)
    for folder in ("out/", "out/a/"):
        s3.direct.put_object(Bucket=s3.place.bucket, Key=folder)
    s3.direct.put_object(Bucket=s3.place.bucket, Key="outside", Body=b"not wanted")
    return files


def test_a_prefix_is_fetched_whole_and_once(s3: Staging, tmp_path: Path) -> None:
    files, seen = stored(s3), list[tuple[int, int]]()
    total = sum(map(len, files.values()))
    folder = tmp_path / "made" / "out"
    received = download(s3.s3, f"s3://{s3.place.bucket}/out", folder, owner=ACCOUNT, show=lambda done, of: seen.append((done, of)))
    assert received == Received(total, len(files))
    assert tree(folder) == files
    assert seen[-1] == (total, total)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert all(one.headers["x-amz-expected-bucket-owner"] == ACCOUNT for one in s3.proxy.seen)
    s3.proxy.heal()
    assert download(s3.s3, f"s3://{s3.place.bucket}/out", folder) == Received(0, 0)
    assert not s3.proxy.seen


@pytest.mark.parametrize("key", ["out/../../x", "out//x", "out/a/./b", "out/..", "out/a\\b"])
def test_a_key_that_climbs_out_is_refused(s3: Staging, tmp_path: Path, key: str) -> None:
    s3.direct.put_object(Bucket=s3.place.bucket, Key="out/good", Body=b"x")
    s3.direct.put_object(Bucket=s3.place.bucket, Key=key, Body=b"x")
    with pytest.raises(StagingError, match="cannot be the name of a file under a folder: rename the object"):
        download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prefix_that_cannot_be_a_folder_is_refused(s3: Staging, tmp_path: Path) -> None:
    with pytest.raises(StagingError, match=r"there is nothing in s3://.*/out/: see what there is with  aws s3 ls"):
        download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
    for key in ("out/a", "out/a/b"):
        s3.direct.put_object(Bucket=s3.place.bucket, Key=key, Body=b"x")
    with pytest.raises(StagingError, match="holds a and a/b, and the first cannot be a file and a folder: remove one"):
        download(s3.s3, f"s3://{s3.place.bucket}/out/", tmp_path / "out")
