"""A bucket and a folder of files for it, and a proxy between them that can be told to go wrong."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from support.faulty_proxy import FaultyProxy
from trimtab.aws.place import S3Place
from trimtab.aws.session import Aws

ACCOUNT = "000000000000"
REGION = "us-east-1"
MIB = 1 << 20


@dataclass
class Staging:
    """`s3` asks through the `proxy`, `direct` asks LocalStack itself; `folder` holds the files to stage, `cache` the notes of digests."""

    proxy: FaultyProxy
    s3: Any
    direct: Any
    place: S3Place
    folder: Path
    cache: Path

    def objects(self, prefix: str = "") -> dict[str, int]:
        """The objects under a prefix, with their sizes."""
        pages = self.direct.get_paginator("list_objects_v2").paginate(Bucket=self.place.bucket, Prefix=prefix)
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}

    def unfinished(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.direct.list_multipart_uploads(Bucket=self.place.bucket).get("Uploads", [])
        return found

    def fill(self, **sizes: float) -> None:
        """Random files of so many MiB, by name; "__" is a slash in it."""
        for name, mib in sizes.items():
            path = self.folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(round(mib * MIB)))

    def environment(self) -> dict[str, str]:
        """For a client in another process, through the proxy."""
        return {**os.environ, "TRIMTAB_CACHE": str(self.cache)}


@contextlib.contextmanager
def staging(localstack: str, root: Path) -> Iterator[Staging]:
    """All of it, on a LocalStack; AWS's variables must name the proxy while `Aws` is used, so they are set here."""
    name = f"staging-{uuid.uuid4().hex[:12]}"
    (root / "folder").mkdir()
    direct = boto3.client("s3", endpoint_url=localstack, region_name=REGION, aws_access_key_id="test", aws_secret_access_key="test")
    with FaultyProxy(localstack) as proxy, contextlib.closing(direct), _environment(AWS_ENDPOINT_URL=proxy.url), Aws(REGION) as aws:
        direct.create_bucket(Bucket=name)
        found = Staging(proxy, aws.client("s3"), direct, S3Place(name, "t", ACCOUNT), root / "folder", root / "cache")
        try:
            yield found
        finally:
            for upload in found.unfinished():
                direct.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
            while keys := [{"Key": key} for key in found.objects()][:1000]:
                direct.delete_objects(Bucket=name, Delete={"Objects": keys})
            direct.delete_bucket(Bucket=name)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    variables |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
