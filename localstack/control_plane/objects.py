"""S3 as the control plane uses it: find what a prefix holds, fetch it and send it, many objects at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

THREADS = 8


class TransferFailed(Exception):
    """An object could not be found, fetched or sent; the text is what the job's or the endpoint's reason says of it."""


@dataclass(frozen=True)
class Object:
    """One object of a bucket; `size` in bytes."""

    key: str
    size: int


def client_of(service: str, aws_url: str, region: str, account: str, **config: Any) -> Any:
    """A boto3 client of the emulator at `aws_url`, with more of botocore's Config where it is given.

    Its credentials are made up, so that real ones never go there; LocalStack takes the account from the access key id.
    """
    usual = {"s3": {"addressing_style": "path"}, "retries": {"mode": "standard", "max_attempts": 5}, "max_pool_connections": 4 * THREADS}
    return boto3.client(
        service,
        endpoint_url=aws_url,
        region_name=region,
        aws_access_key_id=account,
        aws_secret_access_key="unused",
        config=Config(**{**usual, **config}),
    )


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`. Raises TransferFailed for what is no such address."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if match is None:
        raise TransferFailed(f"{uri} is no s3:// address")
    return match[1], match[2]


def place_in(folder: Path, relative: str) -> Path:
    """The file in a folder that part of a key means. Raises TransferFailed for one outside of it: keys may hold `//` and `..`."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise TransferFailed(f"the key's part {relative!r} names no file in its folder")
    return folder / path


class Objects:
    """The objects of one S3. Safe to use from several threads. Errors are TransferFailed's."""

    def __init__(self, aws_url: str, region: str, account: str) -> None:
        self.client = client_of("s3", aws_url, region, account)

    def close(self) -> None:
        self.client.close()

    def find(self, bucket: str, prefix: str, *, folders: bool = False) -> list[Object]:
        """What lies under a key prefix, by key; the empty objects that stand for folders only where they are asked for."""
        with _telling(f"s3://{bucket}/{prefix}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            found = [Object(each["Key"], each["Size"]) for page in pages for each in page.get("Contents", [])]
        return sorted((each for each in found if folders or not (each.key.endswith("/") and each.size == 0)), key=lambda each: each.key)

    def read(self, bucket: str, key: str) -> bytes:
        with _telling(f"s3://{bucket}/{key}"):
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
            with body:
                data: bytes = body.read()
        return data

    def fetch(self, bucket: str, wanted: Mapping[str, Path]) -> None:
        """Objects into files, by key; folders are made. The first that fails is raised."""

        def one(key: str, path: Path) -> None:
            with _telling(f"s3://{bucket}/{key}"):
                self.client.download_file(bucket, key, str(path))

        for path in wanted.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        _together(functools.partial(one, key, path) for key, path in wanted.items())

    def send(self, bucket: str, files: Mapping[str, Path], kms_key: str = "") -> None:
        """Files into objects, by key; with SSE-KMS where a key is named. The first that fails is raised."""
        extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}

        def one(key: str, path: Path) -> None:
            with _telling(f"s3://{bucket}/{key}"):
                self.client.upload_file(str(path), bucket, key, ExtraArgs=extra)

        _together(functools.partial(one, key, path) for key, path in files.items())


class _telling:
    """Turns what boto3 raises into TransferFailed, which names the object."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, ClientError):
            error, status = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
            raise TransferFailed(f"{error.get('Code', '')} ({status}): {error.get('Message', '')} {self.uri}") from exc
        if isinstance(exc, (BotoCoreError, Boto3Error)):
            raise TransferFailed(f"{exc} {self.uri}") from exc


def _together(jobs: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
