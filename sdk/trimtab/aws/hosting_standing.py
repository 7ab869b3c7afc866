"""The endpoints of an account that trimtab made: how they stand, what they cost, and what is left of those that are not there any more."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab.aws import endpoint_life
from trimtab.aws.hosting_request import ENDPOINT_TAG, TITLE_TAG, TTL_TAG
from trimtab.aws.instances import find
from trimtab.aws.refusals import asking
from trimtab.aws.session import Aws
from trimtab.deployers.base import PREFIX, EndpointHandle, EndpointRecord, EndpointState
from trimtab.errors import EndpointError, SpecError

_STATES = {
    "Creating": EndpointState.STARTING, "Failed": EndpointState.FAILED, "OutOfService": EndpointState.FAILED,
    "UpdateRollbackFailed": EndpointState.FAILED, "Deleting": EndpointState.ENDED,
}  # fmt: skip
_LISTS = {"endpoint": "list_endpoints", "endpoint-config": "list_endpoint_configs", "model": "list_models"}
_MEMBERS = {
    "endpoint": ("Endpoints", "EndpointName"),
    "endpoint-config": ("EndpointConfigs", "EndpointConfigName"),
    "model": ("Models", "ModelName"),
}


def records(aws: Aws, id: str = "") -> list[EndpointRecord]:
    """Newest first; with `id` that one alone. Things of ours are known by their tag. Raises EndpointError."""
    found: dict[str, EndpointRecord] = {}
    for kind in _LISTS:
        for name, row in _listed(aws, kind, id or PREFIX):
            if name in found or (id and name != id):
                continue
            try:
                tags = endpoint_life.tags_of(aws, row[f"{_MEMBERS[kind][1].removesuffix('Name')}Arn"])
            except EndpointError as exc:
                if endpoint_life.is_absent(exc):  # deleted meanwhile
                    continue
                raise
            if tags.get(ENDPOINT_TAG) == name:
                found[name] = _record(aws, kind, name, row, tags)
    return sorted(found.values(), key=lambda record: record.created, reverse=True)


def _listed(aws: Aws, kind: str, contains: str) -> Iterator[tuple[str, dict[str, Any]]]:
    client, (member, name) = aws.client("sagemaker"), _MEMBERS[kind]
    action = f"sagemaker:{''.join(part.capitalize() for part in _LISTS[kind].split('_'))}"
    with asking(f"for your {member}", action=action, error=EndpointError):
        for page in client.get_paginator(_LISTS[kind]).paginate(NameContains=contains, MaxResults=100):
            for row in page[member]:
                yield row[name], row


def _record(aws: Aws, kind: str, name: str, row: dict[str, Any], tags: dict[str, str]) -> EndpointRecord:
    handle, title, created = EndpointHandle("sagemaker", name), tags.get(TITLE_TAG, ""), row["CreationTime"].astimezone(UTC)
    expires = _expires(created, tags.get(TTL_TAG, ""))
    if kind != "endpoint":
        what = "model" if kind == "model" else "configuration"
        return EndpointRecord(
            handle, title, EndpointState.ENDED, created, reason=f"only its {what} is left", orphan=f"a {what} without an endpoint"
        )
    standing = endpoint_life.look(aws, name)
    if standing is None:
        return EndpointRecord(handle, title, EndpointState.ENDED, created, reason="it was deleted just now")
    overdue = expires is not None and expires < datetime.now(UTC) - timedelta(minutes=10)
    return EndpointRecord(
        handle,
        title,
        _STATES.get(standing.status, EndpointState.SERVING),
        created,
        reason=standing.reason,
        url=f"{aws.client('sagemaker-runtime').meta.endpoint_url}/endpoints/{name}/invocations",
        usd_per_hour=_usd(aws, name, standing.instances),
        expires=expires,
        orphan=f"its time was over at {expires:%F %H:%M} UTC and nothing has ended it" if overdue and expires else "",
    )


def _expires(created: datetime, minutes: str) -> datetime | None:
    try:
        return created + timedelta(minutes=float(minutes))
    except (ValueError, OverflowError):
        return None


def _usd(aws: Aws, name: str, instances: int) -> float | None:
    """What its instances cost an hour, by the table; those that are still to come count too. None: not known."""
    try:
        with asking(f"for the configuration {name}", action="sagemaker:DescribeEndpointConfig", error=EndpointError):
            variant = aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=name)["ProductionVariants"][0]
        to_zero = "ManagedInstanceScaling" in variant
        return find(variant["InstanceType"], aws.region).usd_per_hour * (
            instances if to_zero else instances or variant["InitialInstanceCount"]
        )
    except (EndpointError, SpecError, KeyError):
        return None
