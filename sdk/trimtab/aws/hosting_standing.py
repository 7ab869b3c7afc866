"""The endpoints of an account that trimtab made: how they stand, what they cost, and what is left of those that are not there any more."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trimtab.aws import endpoint_life, guardian
from trimtab.aws.endpoint_life import Standing
from trimtab.aws.hosting_request import ENDPOINT_TAG, ENDS_TAG, OWNER_TAG, TITLE_TAG, TTL_TAG, WITH_CLIENT
from trimtab.aws.instances import find
from trimtab.aws.refusals import asking
from trimtab.aws.session import Aws
from trimtab.deployers.base import PREFIX, EndpointHandle, EndpointRecord, EndpointState
from trimtab.errors import EndpointError, SpecError

YOUNG = timedelta(minutes=15)  # another client may be about to make an endpoint of a model and a configuration

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


@dataclass(frozen=True)
class Facts:
    """What does not change of an endpoint: its tags, and the production variant of its configuration ({}: not known)."""

    tags: Mapping[str, str]
    variant: Mapping[str, Any]


def facts_of(aws: Aws, name: str) -> Facts:
    """Raises EndpointError, for an endpoint that is not there too."""
    return Facts(endpoint_life.tags_of(aws, f"{endpoint_life.arn_prefix(aws)}:endpoint/{name}"), _variant(aws, name))


def log_of(home: Path, id: str) -> Path:
    """The log of an endpoint's guardian, on the machine and in the TRIMTAB_HOME of the client that made it."""
    return home / "sagemaker" / f"{id}.log"


def records(aws: Aws, home: Path, id: str = "") -> list[EndpointRecord]:
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
                found[name] = _listed_one(aws, home, kind, name, row, tags)
    return sorted(found.values(), key=lambda record: record.created, reverse=True)


def _listed(aws: Aws, kind: str, contains: str) -> Iterator[tuple[str, dict[str, Any]]]:
    client, (member, name) = aws.client("sagemaker"), _MEMBERS[kind]
    action = f"sagemaker:{''.join(part.capitalize() for part in _LISTS[kind].split('_'))}"
    with asking(f"for your {member}", action=action, error=EndpointError):
        for page in client.get_paginator(_LISTS[kind]).paginate(NameContains=contains, MaxResults=100):
            for row in page[member]:
                yield row[name], row


def _listed_one(aws: Aws, home: Path, kind: str, name: str, row: dict[str, Any], tags: dict[str, str]) -> EndpointRecord:
    handle, title, created = EndpointHandle("sagemaker", name), tags.get(TITLE_TAG, ""), row["CreationTime"].astimezone(UTC)
    if kind != "endpoint":
        what = "model" if kind == "model" else "configuration"
        young = created > datetime.now(UTC) - YOUNG
        return EndpointRecord(
            handle,
            title,
            EndpointState.ENDED,
            created,
            reason=f"only its {what} is there" + (", and its endpoint may be about to come" if young else ""),
            orphan="" if young else f"a {what} without an endpoint",
        )
    standing = endpoint_life.look(aws, name)
    if standing is None:
        return EndpointRecord(handle, title, EndpointState.ENDED, created, reason="it was deleted just now")
    return record(aws, home, name, Facts(tags, _variant(aws, name)), standing)


def record(aws: Aws, home: Path, name: str, facts: Facts, standing: Standing) -> EndpointRecord:
    """An endpoint that is there. Nothing is asked of AWS."""
    created, state = standing.created.astimezone(UTC), _STATES.get(standing.status, EndpointState.SERVING)
    expires = _expires(created, facts.tags.get(TTL_TAG, ""))
    hint, orphan = "", ""
    if facts.tags.get(ENDS_TAG) == WITH_CLIENT:
        host, lives = facts.tags.get(OWNER_TAG, "another machine"), guardian.lives(log_of(home, name))
        words = f"it should end with its client on {host}"
        if lives is False and host == platform.node():
            orphan = f"{words}, and nothing that does that is there any more"
        elif not lives:
            hint = words
    if expires is not None and expires < datetime.now(UTC):
        orphan = f"its time was over at {expires:%F %H:%M} UTC and nothing has ended it"
    return EndpointRecord(
        EndpointHandle("sagemaker", name),
        facts.tags.get(TITLE_TAG, ""),
        state,
        created,
        reason=standing.reason or hint,
        url=f"{aws.client('sagemaker-runtime').meta.endpoint_url}/endpoints/{name}/invocations",
        usd_per_hour=_usd(aws, facts.variant, standing.instances),
        expires=expires,
        orphan="" if state is EndpointState.ENDED else orphan,
    )


def _expires(created: datetime, minutes: str) -> datetime | None:
    try:
        return created + timedelta(minutes=float(minutes))
    except (ValueError, OverflowError):
        return None


def _variant(aws: Aws, name: str) -> dict[str, Any]:
    try:
        with asking(f"for the configuration {name}", action="sagemaker:DescribeEndpointConfig", error=EndpointError):
            found: dict[str, Any] = aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=name)["ProductionVariants"][0]
            return found
    except EndpointError:
        return {}


def _usd(aws: Aws, variant: Mapping[str, Any], instances: int) -> float | None:
    """What its instances cost an hour, by the table; those that are still to come count too. None: not known."""
    try:
        to_zero = "ManagedInstanceScaling" in variant
        count = instances if to_zero else instances or variant["InitialInstanceCount"]
        return find(variant["InstanceType"], aws.region).usd_per_hour * int(count)
    except (SpecError, KeyError):
        return None
