"""Small things of a run in S3: its record, and the removal of all that lies under its prefix."""

from __future__ import annotations

import json
from typing import Any

from trimtab.aws.place import S3Place
from trimtab.aws.refusals import asking, error_code
from trimtab.errors import BackendError

_AT_ONCE = 1000  # keys that one DeleteObjects takes


def make(s3: Any, place: S3Place, key: str, value: object) -> bool:
    """Write a JSON object where there is none; whether it was written."""
    body = json.dumps(value, indent=1, ensure_ascii=False).encode()
    with asking(f"to keep {place.uri(key)}", action="s3:PutObject"):
        try:
            s3.put_object(**place.named(), Key=key, Body=body, ContentType="application/json", IfNoneMatch="*", **place.encryption())
        except s3.exceptions.ClientError as exc:
            if error_code(exc) not in ("PreconditionFailed", "412"):
                raise
            return False
    return True


def read(s3: Any, place: S3Place, key: str) -> Any:
    """Raises BackendError where there is none, or what is there is no JSON."""
    with asking(f"for {place.uri(key)}", action="s3:GetObject"):
        body = s3.get_object(**place.named(), Key=key)["Body"].read()
    try:
        return json.loads(body)
    except ValueError as exc:
        raise BackendError(f"{place.uri(key)} is damaged ({exc}): run the job again") from exc


def exists(s3: Any, place: S3Place, key: str) -> bool:
    with asking(f"whether there is {place.uri(key)}", action="s3:ListBucket"):
        page = s3.list_objects_v2(**place.named(), Prefix=key, MaxKeys=1)
    return any(item["Key"] == key for item in page.get("Contents", []))


def delete(s3: Any, place: S3Place, prefix: str) -> None:
    """Delete every object under a prefix that ends with a slash."""
    assert prefix.endswith("/"), prefix  # else neighbours whose names begin alike would go, too
    with asking(f"to delete what is under {place.uri(prefix)}"):
        for page in s3.get_paginator("list_objects_v2").paginate(**place.named(), Prefix=prefix, PaginationConfig={"PageSize": _AT_ONCE}):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
            if not keys:
                continue
            refused = s3.delete_objects(**place.named(), Delete={"Objects": keys, "Quiet": True}).get("Errors", [])
            if refused:
                raise BackendError(
                    f"{place.uri(refused[0]['Key'])} and {len(refused) - 1} more could not be deleted ({refused[0].get('Message', '')}): "
                    "see that you may call s3:DeleteObject, then repeat the command"
                )
