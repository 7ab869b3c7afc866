"""Where trimtab keeps things in S3: one bucket, one prefix, names by content. Pure.

    BUCKET/PREFIX/content/<sha256>             a file, or a bundle: small files one after another
    BUCKET/PREFIX/content/index-<sha256>       which names a channel has, and where their bytes lie
    BUCKET/PREFIX/channels/<sha256>.manifest   SageMaker's manifest of a channel, written after all that it names
    BUCKET/PREFIX/runs/<run id>/               a run's output and checkpoints

With a KMS key `content` and `channels` lie under PREFIX/kms-<name of the key>/: what is there was all encrypted with that key, so a user
who asks for it never gets bytes that somebody sent without.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from trimtab.errors import SpecError

# "Bucket naming rules", Amazon S3 user guide: 3-63 characters; what the ends may be is left to S3
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[A-Za-z0-9!_.*'()/-]+")  # "Creating object key names": characters that are safe everywhere
_ACCOUNT = re.compile(r"\d{12}")


def default_bucket(region: str, account: str) -> str:
    """The bucket that is made when it is needed and none was named.

    The policy AmazonSageMakerFullAccess, which most execution roles have, gives objects only where a name holds `sagemaker`.
    """
    return f"trimtab-sagemaker-{region}-{account}"


@dataclass(frozen=True)
class S3Place:
    """A bucket and a prefix in it (no slash at its ends).

    `owner` is the account (12 digits) that must own the bucket: with it a bucket that somebody else registered under the same name gets
    and gives nothing. `kms_key` is the id, ARN or alias of the KMS key to encrypt with; without one the bucket's own setting holds.
    Raises SpecError for names that S3 does not take.
    """

    bucket: str
    prefix: str = "trimtab"
    owner: str | None = None
    kms_key: str | None = None

    def __post_init__(self) -> None:
        if not _BUCKET.fullmatch(self.bucket):
            raise SpecError(f"{self.bucket!r} is not the name of a bucket: use 3 to 63 of a-z, 0-9, '-' and '.', without s3://")
        parts = self.prefix.split("/")
        if not _KEY.fullmatch(self.prefix) or any(part in ("", ".", "..") for part in parts):
            raise SpecError(f"{self.prefix!r} is not a prefix: use letters, digits, '-', '_' and '.', with '/' only between them")
        if self.owner is not None and not _ACCOUNT.fullmatch(self.owner):
            raise SpecError(f"the bucket's owner {self.owner!r} is not an AWS account: give its 12 digits")

    @property
    def store(self) -> str:
        """The prefix under which content and channels lie."""
        if self.kms_key is None:
            return self.prefix
        return f"{self.prefix}/kms-{hashlib.sha256(self.kms_key.encode()).hexdigest()[:16]}"

    @property
    def content(self) -> str:
        """The prefix of all objects that are named by content, with its slash."""
        return f"{self.store}/content/"

    def channel(self, digest: str) -> str:
        """The key of a channel's manifest."""
        return f"{self.store}/channels/{digest}.manifest"

    def run(self, run_id: str) -> str:
        """The prefix of a run's output and checkpoints, with its slash."""
        return f"{self.prefix}/runs/{run_id}/"

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def named(self) -> dict[str, Any]:
        """The arguments of every request about this bucket."""
        return {"Bucket": self.bucket, **({} if self.owner is None else {"ExpectedBucketOwner": self.owner})}

    def encryption(self) -> dict[str, Any]:
        """The further arguments of a request that makes an object."""
        return {} if self.kms_key is None else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key}


def parse_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://BUCKET/KEY`. Raises SpecError for anything else."""
    bucket, slash, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket) or not slash:
        raise SpecError(f"{uri!r} is not a place in S3: write  s3://BUCKET/PREFIX/")
    return bucket, key
