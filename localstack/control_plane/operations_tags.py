"""Tags of everything that has an ARN here."""

from __future__ import annotations

from typing import Any

from control_plane.place import Place
from control_plane.refusal import Refused, invalid
from control_plane.store import Request, Store

MOST = 50  # tags of one resource


def new_tags(tags: list[dict[str, str]], held: dict[str, str] | None = None) -> dict[str, str]:
    """`held` with the request's tags. Raises Refused for a reserved or repeated key, and for more than MOST together."""
    keys = [each["Key"] for each in tags]
    if reserved := [key for key in keys if key.lower().startswith("aws:")]:
        raise invalid(f"Invalid tag key {reserved[0]}: keys that begin with aws: are reserved for AWS use.")
    if len(set(keys)) < len(keys):
        raise invalid("Duplicate tag keys found.")
    merged = dict(held or {}) | {each["Key"]: each["Value"] for each in tags}
    if len(merged) > MOST:
        raise Refused("ResourceLimitExceeded", f"A resource can have at most {MOST} tags; this one would have {len(merged)}.")
    return merged


def shown(tags: dict[str, str]) -> list[dict[str, str]]:
    """As answers have them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def add_tags(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        held = _held(request, place.store)
        held.update(new_tags(request["Tags"], held))
        return {"Tags": shown(held)}


def list_tags(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        return {"Tags": shown(_held(request, place.store))}


def delete_tags(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        held = _held(request, place.store)
        for key in request["TagKeys"]:
            held.pop(key, None)
        return {}


def _held(request: Request, store: Store) -> dict[str, str]:
    """The tags of what the ARN names."""
    arn = request["ResourceArn"]
    if arn not in store.tags:
        raise invalid(f"Resource not found: {arn}")
    return store.tags[arn]
