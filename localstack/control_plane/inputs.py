"""What SageMaker looks for in S3 before it takes a training job or a model in: that its data is there."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from control_plane.objects import client_of
from control_plane.refusal import Refused, invalid
from control_plane.store import Request

_NOTHING = (
    'No S3 objects found under S3 URL "{uri}" given in input data source. Please ensure that the bucket exists in the selected region'
    ' ({region}), that objects exist under that S3 prefix, and that the role "{role}" has "s3:ListBucket" permissions on bucket "{bucket}".'
)


class Inputs:
    """Looks at `aws_url` for one account in one region; `close` ends its connections."""

    def __init__(self, aws_url: str, account: str, region: str) -> None:
        self.region = region
        self.s3 = client_of("s3", aws_url, region, account, connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 3})

    def refuse_empty(self, request: Request) -> None:
        """Raises Refused for a channel without objects, or in a bucket that is not there, not allowed, or another region's."""
        for uri in s3_uris(request):
            parts = urlsplit(uri)
            if not self._has_objects(parts.netloc, parts.path.lstrip("/")):
                raise invalid(_NOTHING.format(uri=uri, bucket=parts.netloc, region=self.region, role=request["RoleArn"]))

    def refuse_absent_model(self, container: Request) -> None:
        """Raises Refused for model data that is not there."""
        source = container.get("ModelDataSource", {}).get("S3DataSource", {})
        if uri := source.get("S3Uri") or container.get("ModelDataUrl"):
            parts = urlsplit(uri)
            key = parts.path.lstrip("/")
            found = self._first(parts.netloc, key)
            if found is None or (source.get("S3DataType") != "S3Prefix" and found != key):
                raise invalid(f"Could not find model data at {uri}.")

    def _has_objects(self, bucket: str, prefix: str) -> bool:
        return self._first(bucket, prefix) is not None

    def _first(self, bucket: str, prefix: str) -> str | None:
        """The first key with a prefix, which is the prefix itself where there is such an object."""
        try:
            there = self.s3.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", self.region)
            found = self.s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents") if there == self.region else None
            return str(found[0]["Key"]) if found else None
        except ClientError as exc:
            if exc.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                return None
            raise Refused("InternalFailure", f"S3 could not be asked for s3://{bucket}/{prefix}: {exc}", 500) from exc
        except BotoCoreError as exc:
            raise Refused("InternalFailure", f"S3 could not be asked for s3://{bucket}/{prefix}: {exc}", 500) from exc

    def close(self) -> None:
        self.s3.close()


def s3_uris(request: Request) -> Iterator[str]:
    """The S3 prefixes and manifests of the channels."""
    for channel in request.get("InputDataConfig", []):
        if "S3DataSource" in channel["DataSource"]:
            yield channel["DataSource"]["S3DataSource"]["S3Uri"]
