"""Small things of a run in S3: its record, and the removal of all that lies under its prefix."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from trimtab.aws.place import S3Place
from trimtab.aws.refusals import asking, error_code
from trimtab.errors import BackendError

_AT_ONCE = 1000  # keys that one DeleteObjects takes
_ROUNDS = 5  # times that an object is made anew while a request to make it is still being carried out
_TAKEN = {"PreconditionFailed", "412"}  # the object is there
_AT_WORK = {"ConditionalRequestConflict", "409"}  # another request is making it
_RUN = re.compile(r"(.+/)?runs/[^/]+/")


def make(s3: Any, place: S3Place, key: str, value: object) -> bool:
    """Write a JSON object where there is none; whether it is this one that is there.

    When the answer to a request that made it was lost, boto3's repetition of it finds the object there: so what is there is compared.
    """
    body = json.dumps(value, indent=1, ensure_ascii=False).encode()
    for attempt in range(_ROUNDS):
        with asking(f"to keep {place.uri(key)}", action="s3:PutObject"):
            try:
                s3.put_object(**place.named(), Key=key, Body=body, ContentType="application/json", IfNoneMatch="*", **place.encryption())
                return True
            except s3.exceptions.ClientError as exc:
                if error_code(exc) in _TAKEN:
                    break
                if error_code(exc) not in _AT_WORK or attempt + 1 == _ROUNDS:
                    raise
        time.sleep(0.2 * (attempt + 1))
    return _body(s3, place, key) == body


def read(s3: Any, place: S3Place, key: str) -> Any:
    """Raises BackendError where there is none, or what is there is no JSON."""
    body = _body(s3, place, key)
    try:
        return json.loads(body)
    except ValueError as exc:
        raise BackendError(f"{place.uri(key)} is damaged ({exc}): run the job again") from exc


def _body(s3: Any, place: S3Place, key: str) -> bytes:
    with asking(f"for {place.uri(key)}", action="s3:GetObject"):
        found: bytes = s3.get_object(**place.named(), Key=key)["Body"].read()
    return found


def exists(s3: Any, place: S3Place, key: str) -> bool:
    with asking(f"whether there is {place.uri(key)}", action="s3:ListBucket"):
        page = s3.list_objects_v2(**place.named(), Prefix=key, MaxKeys=1)
    return any(item["Key"] == key for item in page.get("Contents", []))


def remove(s3: Any, place: S3Place, key: str) -> None:
    with asking(f"to remove {place.uri(key)}", action="s3:DeleteObject"):
        s3.delete_object(**place.named(), Key=key)


def delete(s3: Any, place: S3Place, prefix: str) -> None:
    """Delete every object of a run, whose prefix ends with `runs/<run id>/`. Raises BackendError for any other prefix: what lies there
    may be anybody's.
    """
    if not _RUN.fullmatch(prefix):
        raise BackendError(
            f"{place.uri(prefix)} is no place of a run, and nothing was deleted there: look at it with  aws s3 ls {place.uri(prefix)} "
            f" and remove it with  aws s3 rm --recursive  if it is yours"
        )
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
