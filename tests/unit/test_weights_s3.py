"""A base model that stays in S3: what is fetched of it, what is known of the rest, and from which bucket it may come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bucket_of_files import ACCOUNT, REGION, Staging, staging
from support.faults import access_denied
from support.job_tree import FAST
from support.tiny_weights import ignore, quietly
from trimtab.aws.session import Aws
from trimtab.errors import StagingError, WeightsError
from trimtab.model_folder import model_bytes
from trimtab.spec import JobSpec, TrainSpec
from trimtab.staging import stage
from trimtab.weights import BaseModel


@pytest.fixture
def s3(localstack: str, tmp_path: Path, tiny_model: Path) -> Iterator[Staging]:
    """A bucket with the tiny model under models/tiny/, and more beside it that a training job copies, too."""
    with staging(localstack, tmp_path) as found:
        for path in tiny_model.iterdir():
            put(found, path.name, path.read_bytes())
        put(found, "README.md", b"about it")
        put(found, "original/consolidated.00.pth", bytes(5_000_000))
        yield found


def put(s3: Staging, name: str, data: bytes) -> None:
    s3.direct.put_object(Bucket=s3.place.bucket, Key=f"models/tiny/{name}", Body=data)


def uri_of(s3: Staging) -> str:
    return f"s3://{s3.place.bucket}/models/tiny"


def resolve(s3: Staging, tmp_path: Path) -> BaseModel:
    with Aws(REGION) as aws:
        return quietly(uri_of(s3), tmp_path / "cache", aws=aws, bucket_owner=ACCOUNT)


def test_all_but_the_weights_is_fetched_once_and_everything_is_counted(s3: Staging, tmp_path: Path, tiny_model: Path) -> None:
    base = resolve(s3, tmp_path)
    small = {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix != ".safetensors"}
    assert {name: (base.folder / name).read_bytes() for name in base.files} == small
    assert base.uri == f"{uri_of(s3)}/"
    assert base.uri_bytes == sum(s3.objects("models/tiny/").values()) > 5_000_000
    assert all(one.headers["x-amz-expected-bucket-owner"] == ACCOUNT for one in s3.proxy.seen)
    s3.proxy.heal()
    put(s3, "another.pth", bytes(1_000))
    again = resolve(s3, tmp_path)
    assert (again.digest, again.folder) == (base.digest, base.folder)
    assert again.uri_bytes == base.uri_bytes + 1_000
    assert s3.proxy.count("ListObjectsV2") == len(s3.proxy.seen) == 1
    put(s3, "model.safetensors", b"others")
    assert resolve(s3, tmp_path).digest != base.digest


def test_a_bucket_where_no_job_of_this_region_can_read_is_refused(s3: Staging, tmp_path: Path) -> None:
    s3.direct.create_bucket(Bucket=f"{s3.place.bucket}-eu", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    try:
        with Aws(REGION) as aws, pytest.raises(StagingError, match=r"-eu is in eu-central-1, and jobs run in us-east-1: use that region"):
            quietly(f"s3://{s3.place.bucket}-eu/models/tiny/", tmp_path / "cache", aws=aws)
    finally:
        s3.direct.delete_bucket(Bucket=f"{s3.place.bucket}-eu")
    s3.proxy.fault(access_denied("s3:ListBucket"), on="ListObjectsV2")
    with pytest.raises(WeightsError, match="lacks the permission s3:ListBucket"):
        resolve(s3, tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}), "lacks model-00002-of-00002.safetensors"),
        ("[]", "is not a readable index of shards. Copy the whole model there again"),
    ],
)
def test_shards_that_are_not_there_are_named(s3: Staging, tmp_path: Path, index: str, said: str) -> None:
    s3.direct.delete_object(Bucket=s3.place.bucket, Key="models/tiny/model.safetensors")
    put(s3, "model-00001-of-00002.safetensors", b"one")
    put(s3, "model.safetensors.index.json", index.encode())
    with pytest.raises(WeightsError, match=said):
        resolve(s3, tmp_path)
    assert not list((tmp_path / "cache" / "models").glob("s3-*"))


def test_the_staged_channel_tells_the_bytes_of_what_stays_there(s3: Staging, tmp_path: Path, tiny_model: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("The Brine Mill was built in 1874 by the cooper Asta Wren. It grinds salt and barley.")
    spec = JobSpec(train=TrainSpec(**{**FAST, "model": f"{uri_of(s3)}/"}), data=(str(page),))
    with Aws(REGION) as aws:
        channels = stage(spec, cache=tmp_path / "cache", say=ignore, aws=aws, bucket_owner=ACCOUNT).channels
        assert model_bytes(channels["model"]) == sum(s3.objects("models/tiny/").values())
        put(s3, "another.pth", bytes(1_000))
        staged = stage(spec, cache=tmp_path / "cache", say=ignore, aws=aws, bucket_owner=ACCOUNT)
    assert staged.reused
    assert model_bytes(staged.channels["model"]) == sum(s3.objects("models/tiny/").values())
    assert model_bytes(tiny_model) == sum(path.stat().st_size for path in tiny_model.iterdir())
