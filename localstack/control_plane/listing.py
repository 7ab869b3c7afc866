"""What the List operations have in common: filters on name, status and time, an order, and pages that new items do not shift."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, TypeVar

from control_plane.refusal import Refused, invalid

Item = TypeVar("Item")
_TIMES = ("CreationTime", "LastModifiedTime")
_PAGE = 10  # what the service returns when MaxResults is not given


def wanted(summary: dict[str, Any], request: dict[str, Any], name: str, status: str = "") -> bool:
    """Whether a summary passes the request's filters; `name` and `status` are the summary's members that these are about."""
    if request.get("NameContains", "").lower() not in summary[name].lower():
        return False
    if "StatusEquals" in request and summary[status] != request["StatusEquals"]:
        return False
    for each in _TIMES:
        if f"{each}After" in request and not summary[each] > request[f"{each}After"]:
            return False
        if f"{each}Before" in request and not summary[each] < request[f"{each}Before"]:
            return False
    return True


def page(
    items: Iterable[Item], request: dict[str, Any], order: Callable[[Item], Any], name: Callable[[Item], str], *, descending: bool
) -> tuple[list[Item], str | None]:
    """One page of the items in order, and the token of the next one, or None.

    A token holds the place of the page's last item, not a count, so that no item is skipped or comes twice when others are added.
    Raises Refused for a token that is none.
    """

    def key(item: Item) -> list[Any]:
        value = order(item)
        return [value.timestamp() if isinstance(value, datetime) else value, name(item)]

    rows = sorted(items, key=key, reverse=descending)
    if token := request.get("NextToken"):
        last = _read(token)
        try:
            rows = [each for each in rows if (key(each) < last if descending else key(each) > last)]
        except TypeError as exc:  # a token of a list in another order
            raise _no_token() from exc
    size = request.get("MaxResults", _PAGE)
    shown = rows[:size]
    return shown, _token(key(shown[-1])) if len(rows) > size else None


def _token(place: list[Any]) -> str:
    return base64.b64encode(json.dumps(place).encode()).decode()


def _read(token: str) -> list[Any]:
    try:
        place = json.loads(base64.b64decode(token, validate=True))
    except (binascii.Error, ValueError) as exc:
        raise _no_token() from exc
    if not isinstance(place, list) or len(place) != 2:
        raise _no_token()
    return place


def _no_token() -> Refused:
    return invalid("The provided pagination token is invalid")
