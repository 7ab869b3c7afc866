"""The bucket: found, refused, or made; and what is in it."""

from __future__ import annotations

from typing import Any

from trimtab.aws.place import S3Place, default_bucket
from trimtab.aws.refusals import asking, error_code
from trimtab.errors import StagingError

_HOME = "us-east-1"  # the region that is not named when a bucket is made
_PAGE = 1000  # keys that S3 lists at once


class Stored:
    """The sizes of objects under a place's content: of the first thousand keys in one request, of others one by one.

    A LIST for a whole key stands in for a HEAD, because the answer to a HEAD has no body: it cannot tell expired credentials from a missing
    permission, and without s3:ListBucket not even either from an object that is not there.
    """

    def __init__(self, s3: Any, place: S3Place, page: dict[str, Any]) -> None:
        self._s3, self._place = s3, place
        self._sizes = {found["Key"]: int(found["Size"]) for found in page.get("Contents", [])}
        self._last = max(self._sizes, default="") if page["IsTruncated"] else None  # None: there is nothing after it

    def size(self, key: str) -> int | None:
        """Bytes of an object, None when it was not there."""
        if self._last is None or key <= self._last:
            return self._sizes.get(key)
        return self.ask(key)

    def ask(self, key: str) -> int | None:
        """`size` as it is now."""
        page = self._s3.list_objects_v2(**self._place.named(), Prefix=key, MaxKeys=1)
        return next((int(found["Size"]) for found in page.get("Contents", []) if found["Key"] == key), None)


def find_bucket(s3: Any, place: S3Place) -> Stored:
    """What the place holds. The owner's default bucket is made where there is none.

    Raises StagingError when the bucket is absent, in another region than the client's, or another account's.
    """
    region = s3.meta.region_name
    asked = f"what is in {place.uri(place.content)}"
    with asking(asked, action="s3:ListBucket", error=StagingError):
        try:
            page = s3.list_objects_v2(**place.named(), Prefix=place.content, MaxKeys=_PAGE)
        except s3.exceptions.ClientError as exc:
            if error_code(exc) != "NoSuchBucket":
                raise
            if place.owner is None or place.bucket != default_bucket(region, place.owner):
                raise StagingError(
                    f"there is no bucket {place.bucket}: make it with  aws s3 mb s3://{place.bucket} --region {region} , or leave the "
                    "bucket out to use the account's default one"
                ) from exc
            _make(s3, place, region)
            page = s3.list_objects_v2(**place.named(), Prefix=place.content, MaxKeys=_PAGE)
    refuse_elsewhere(s3, place.bucket, page)
    return Stored(s3, place, page)


def refuse_elsewhere(s3: Any, bucket: str, answer: dict[str, Any]) -> None:
    """Raises StagingError when the answer to a request about a bucket says that it is in another region than the client's."""
    region = s3.meta.region_name
    found = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", region)
    if found != region:  # boto3 goes there by itself, a training job does not
        raise StagingError(
            f"the bucket {bucket} is in {found}, and jobs run in {region}: use that region with  --backend-option region={found} , "
            f"or a bucket of {region}"
        )


def _make(s3: Any, place: S3Place, region: str) -> None:
    """A private bucket in which unfinished uploads end by themselves. Another client may do the same at the same time."""
    where = {} if region == _HOME else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    with asking(f"to make the bucket {place.bucket}", action="s3:CreateBucket", error=StagingError):
        try:
            s3.create_bucket(Bucket=place.bucket, **where)
        except s3.exceptions.BucketAlreadyOwnedByYou:
            return
        s3.get_waiter("bucket_exists").wait(**place.named(), WaiterConfig={"Delay": 1, "MaxAttempts": 20})
    with asking(f"to close the bucket {place.bucket} to the public", action="s3:PutBucketPublicAccessBlock", error=StagingError):
        closed = dict.fromkeys(("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True)
        s3.put_public_access_block(**place.named(), PublicAccessBlockConfiguration=closed)
    with asking(
        f"to have unfinished uploads in {place.bucket} end by themselves", action="s3:PutLifecycleConfiguration", error=StagingError
    ):
        rule = {
            "ID": "trimtab: unfinished uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": f"{place.prefix}/"},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        }
        s3.put_bucket_lifecycle_configuration(**place.named(), LifecycleConfiguration={"Rules": [rule]})
