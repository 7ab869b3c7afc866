"""An endpoint's beginning and end on SageMaker: several things that are made in order, once each, and removed whole.

Creating has no token of the client's, but names are unique: a tag tells whose the thing is that has the name, when an answer was lost.
An endpoint can be deleted only when it is neither being created nor updated, so an end may have to wait; what was taken on to wait is the
guardian's (guardian.py).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab.aws.hosting_request import SCALES_TAG, alarm_name, target_of
from trimtab.aws.logs import LogReader
from trimtab.aws.refusals import asking, error_code, is_passing
from trimtab.aws.request import SUBMISSION_TAG
from trimtab.aws.session import Aws
from trimtab.errors import EndpointError, TrimtabError

APPEARING = 10.0  # seconds in which what was asked for may still appear
CONSISTENT = 30.0  # seconds in which what was made a moment ago may not be known everywhere
BEARABLE = 30.0  # seconds of failures that pass, one after another, before they are told
LOG_TAIL = 15  # lines
BUSY = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")

_GROUPS = {"endpoint": "/aws/sagemaker/Endpoints", "component": "/aws/sagemaker/InferenceComponents"}
_KINDS = {  # operation -> the ARN's kind, in the order in which they are made
    "CreateModel": "model",
    "CreateEndpointConfig": "endpoint-config",
    "CreateEndpoint": "endpoint",
    "CreateInferenceComponent": "inference-component",
}
_ABSENT = ("could not find", "not found", "does not exist")  # as SageMaker says it


@dataclass(frozen=True)
class Standing:
    """How an endpoint, or its inference component, stands. `instances` are those that are there and paid for."""

    status: str
    reason: str
    created: datetime
    instances: int = 0


class Creation:
    """The making of one endpoint. `made` names, by operation, what is or may be there and is ours.

    `unseen` tells that something of it may still appear: what became of a request was never said, or what it made was not seen yet.
    """

    def __init__(self, aws: Aws, id: str, bodies: Mapping[str, Mapping[str, Any]]) -> None:
        self._aws, self._id, self._bodies = aws, id, bodies
        self._tag = {"Key": SUBMISSION_TAG, "Value": uuid.uuid4().hex}
        self.made: list[str] = []
        self.unseen = False

    def send(self, operation: str) -> None:
        """Create one of the four. Raises EndpointError when it is not there afterwards; a name that another has is not ours to remove."""
        body = self._bodies[operation]
        body = {**body, "Tags": [*body["Tags"], self._tag]}
        self.made.append(operation)
        self.unseen = True  # an interruption may come at any moment from here on
        try:
            self._ask(operation, body)
        except EndpointError as exc:
            cause = exc.__cause__ or exc
            taken = "already existing" in str(cause) or error_code(cause) == "ResourceInUse"
            if not taken and not is_passing(cause):
                self.unseen = False
                self.made.remove(operation)  # it was refused
                raise
            there = self._is_ours(operation, 0.0 if taken else APPEARING)
            self.unseen = not (there or taken)
            if there:  # only the answer was lost
                return
            if taken and there is False:
                self.made.remove(operation)
                raise EndpointError(
                    f"there is a {_said(operation)} {self._id} already, and it is another one's: repeat the command, it takes a new name"
                ) from exc
            raise
        self.unseen = operation in ("CreateEndpoint", "CreateInferenceComponent")  # which are looked for before they are deleted

    def _ask(self, operation: str, body: Mapping[str, Any]) -> None:
        """Send it, again while AWS does not yet know everywhere what was made a moment ago ("CreateEndpoint", API reference)."""
        until, pause = time.monotonic() + CONSISTENT, 0.5
        while True:
            try:
                with asking(f"to create the {_said(operation)} {self._id}", action=f"sagemaker:{operation}", error=EndpointError):
                    getattr(self._aws.client("sagemaker"), _method(operation))(**body)
                return
            except EndpointError as exc:
                if not (len(self.made) > 1 and is_absent(exc) and self._id in str(exc.__cause__) and time.monotonic() + pause < until):
                    raise
            time.sleep(pause := pause * 2)

    def scale(self) -> None:
        """Register what scales, with its policies and its alarm. Raises EndpointError."""
        client = None
        for name, body in self._bodies.items():
            operation = name.partition(" ")[0]
            if operation in ("RegisterScalableTarget", "PutScalingPolicy"):
                client = client or self._aws.client("application-autoscaling")
                if operation not in self.made:
                    self.made.append(operation)
                with asking(f"to scale {self._id}", action=f"application-autoscaling:{operation}", error=EndpointError):
                    answer = getattr(client, _method(operation))(**body)
            elif operation == "PutMetricAlarm":
                with asking(f"for an alarm of {self._id}", action="cloudwatch:PutMetricAlarm", error=EndpointError):
                    self._aws.client("cloudwatch").put_metric_alarm(**body, AlarmActions=[answer["PolicyARN"]])

    def _is_ours(self, operation: str, patience: float) -> bool | None:
        """Whether the thing is there and this client made it; None when AWS does not say."""
        arn = f"{arn_prefix(self._aws)}:{_KINDS[operation]}/{self._id}"
        until = time.monotonic() + patience
        while True:
            try:
                return tags_of(self._aws, arn).get(SUBMISSION_TAG) == self._tag["Value"]
            except EndpointError as exc:
                if not is_absent(exc):
                    return None
            if time.monotonic() >= until:
                return False
            time.sleep(1.0)


def look(aws: Aws, id: str) -> Standing | None:
    """How the endpoint stands; None where there is none."""
    try:
        with asking(f"how {id} stands", action="sagemaker:DescribeEndpoint", error=EndpointError):
            found = aws.client("sagemaker").describe_endpoint(EndpointName=id)
    except EndpointError as exc:
        if is_absent(exc):
            return None
        raise
    count = sum(each.get("CurrentInstanceCount", 0) for each in found.get("ProductionVariants", []))
    return Standing(found["EndpointStatus"], found.get("FailureReason", ""), found["CreationTime"], count)


def look_at_component(aws: Aws, id: str) -> Standing | None:
    """How its inference component stands; None where there is none."""
    try:
        with asking(f"how the inference component {id} stands", action="sagemaker:DescribeInferenceComponent", error=EndpointError):
            found = aws.client("sagemaker").describe_inference_component(InferenceComponentName=id)
    except EndpointError as exc:
        if is_absent(exc):
            return None
        raise
    copies = found.get("RuntimeConfig", {}).get("CurrentCopyCount", 0)
    return Standing(found["InferenceComponentStatus"], found.get("FailureReason", ""), found["CreationTime"], copies)


def wait(look: Callable[[], Standing | None], until: float, poll: float, show: Callable[[Standing, float], None]) -> Standing | None:
    """How it stands when it is no more being made or changed; None when it is gone. A network that is away meanwhile is waited for.

    Raises TimeoutError at `until` (monotonic), EndpointError for what will not pass.
    """
    began, standing = time.monotonic(), None
    while True:
        now = time.monotonic()
        try:
            standing = look()
        except EndpointError as exc:
            if exc.__cause__ is None or not is_passing(exc.__cause__) or now >= until:
                raise
        else:
            if standing is None or standing.status not in BUSY:
                return standing
            show(standing, now - began)
        if now >= until:
            raise TimeoutError(standing.status if standing else "unknown")
        time.sleep(min(poll, max(until - now, 0.05)))


def lines(aws: Aws, id: str) -> Iterator[str]:
    """What the containers printed, by endpoint and component; empty where there is no log."""
    for group in _GROUPS.values():
        reader = LogReader(aws.client("logs"), f"{group}/{id}", "AllTraffic")
        yield from (line.text for line in reader.read())


def failure(aws: Aws, id: str, standing: Standing) -> str:
    """Why it failed, what to do, and its last lines."""
    try:
        tail = list(lines(aws, id))[-LOG_TAIL:]
    except TrimtabError as exc:
        tail = [f"(its log could not be read: {exc})"]
    said = f"{id} failed: {standing.reason.rstrip('. ') or 'SageMaker gives no reason'}: {_remedy(standing.reason)}"
    return "\n".join([said, *(["Its last lines:", *(f"  {line}" for line in tail)] if tail else [])])


def _remedy(reason: str) -> str:
    if "apacity" in reason:
        return "AWS has no such machine free now; wait, or choose another with  --backend-option instance_type=TYPE  or another region"
    if "image" in reason and ("not exist" in reason or "pull" in reason):
        return "send it there with  trimtab image push DEVICE REPOSITORY --target serve , or name another with  --backend-option image=URI"
    if "model data" in reason:
        return "the role must be allowed s3:GetObject and s3:ListBucket where the model lies; see  trimtab plan"
    if "health check" in reason or "ping" in reason:
        return "the server did not come up in time; its own lines tell why, else give it longer with  --backend-option start_seconds=3600"
    return "mend what it names and deploy again"


def remove(aws: Aws, id: str, patience: float, poll: float = 2.0, *, scales: str | None = None) -> None:
    """Delete all that an endpoint consists of, in order: what scales it, its component, itself, its configuration, its model.

    `scales` is what does: "variant", "component", "" for nothing; None: its tags are asked. Whatever is refused before it, the endpoint
    itself is deleted. Waits until it can be and is gone. Quiet for what is gone already. Raises EndpointError for the first step that was
    refused, or TimeoutError after `patience` seconds; what is not deleted by then stays, and a repetition goes on.
    """
    until, refused = time.monotonic() + patience, list[Exception]()

    @contextlib.contextmanager
    def anyway() -> Iterator[None]:
        try:
            yield
        except (TrimtabError, TimeoutError) as exc:
            refused.append(exc)

    blind = None
    if scales is None:
        try:
            scales = _tag_of(aws, id, SCALES_TAG)
        except TrimtabError as exc:
            blind = exc
    for kind in ("variant", "component"):
        if blind or scales == kind:
            with anyway():
                target = target_of(id, component=kind == "component")
                _quietly(aws, "application-autoscaling", "DeregisterScalableTarget", f"to stop scaling {id}", **target)
    if blind or scales == "component":
        with anyway():
            _quietly(aws, "cloudwatch", "DeleteAlarms", f"to delete the alarm of {id}", AlarmNames=[alarm_name(id)])
        with anyway():
            _end(aws, lambda: look_at_component(aws, id), "DeleteInferenceComponent", {"InferenceComponentName": id}, until, poll)
    if blind and refused:  # nobody knows whether these were needed
        refused.insert(0, blind)
    try:
        _end(aws, lambda: look(aws, id), "DeleteEndpoint", {"EndpointName": id}, until, poll)
    except (TrimtabError, TimeoutError):
        if not refused:
            raise
    if refused:  # their tags tell a repetition what is still to be removed, and they cost nothing
        raise refused[0]
    with anyway():
        _quietly(aws, "sagemaker", "DeleteEndpointConfig", f"to delete the configuration {id}", EndpointConfigName=id)
    with anyway():
        _quietly(aws, "sagemaker", "DeleteModel", f"to delete the model {id}", ModelName=id)
    if refused:
        raise refused[0]


def _tag_of(aws: Aws, id: str, key: str) -> str:
    """A tag of what is still there of an endpoint; empty for none."""
    for kind in ("endpoint", "endpoint-config", "model"):
        try:
            if value := tags_of(aws, f"{arn_prefix(aws)}:{kind}/{id}").get(key):
                return value
        except EndpointError as exc:
            if not is_absent(exc):
                raise
    return ""


def tags_of(aws: Aws, arn: str) -> dict[str, str]:
    """Raises EndpointError, for a thing that is not there too."""
    with asking(f"for the tags of {arn.rpartition('/')[2]}", action="sagemaker:ListTags", error=EndpointError):
        pages = aws.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def arn_prefix(aws: Aws) -> str:
    return f"arn:{aws.partition}:sagemaker:{aws.region}:{aws.account}"


def _end(aws: Aws, look: Callable[[], Standing | None], operation: str, named: dict[str, str], until: float, poll: float) -> None:
    """Delete it as soon as that can be, and wait until it is gone. Bears failures that pass."""
    name = next(iter(named.values()))
    bearable = time.monotonic() + BEARABLE
    while True:
        status, refused = "", None
        try:
            if (standing := look()) is None:
                return
            status = standing.status
        except EndpointError as exc:  # how it stands is not known: it may be to be deleted all the same
            refused = exc
        if status not in BUSY:
            try:
                was = _quietly(aws, "sagemaker", operation, f"to delete the {_said(operation)} {name}", **named)
                if refused is not None and not was:
                    return
            except EndpointError as exc:
                if "in-progress" not in str(exc.__cause__):  # another changes it just now
                    refused = refused or exc
        if refused is None:
            bearable = time.monotonic() + BEARABLE
        elif not is_passing(refused.__cause__ or refused) or time.monotonic() >= bearable:
            raise refused
        if time.monotonic() >= until:
            raise refused or TimeoutError(status)
        time.sleep(poll if status in BUSY else min(poll, 0.2) if refused is None else poll)


def patiently(look: Callable[[], Standing | None], poll: float) -> Standing | None:
    """How it stands, asked again while what fails may pass."""
    until = time.monotonic() + BEARABLE
    while True:
        try:
            return look()
        except EndpointError as exc:
            if not is_passing(exc.__cause__ or exc) or time.monotonic() + poll >= until:
                raise
        time.sleep(poll)


def _quietly(aws: Aws, service: str, operation: str, what: str, **members: Any) -> bool:
    """Whether there was such a thing."""
    try:
        with asking(what, action=f"{service}:{operation}", error=EndpointError):
            getattr(aws.client(service), _method(operation))(**members)
    except EndpointError as exc:
        if not is_absent(exc):
            raise
        return False
    return True


def is_absent(exc: TrimtabError) -> bool:
    """Whether AWS said that there is no such thing; SageMaker answers a ValidationException for that."""
    code, said = error_code(exc.__cause__ or exc), str(exc.__cause__).lower()
    if code in ("ObjectNotFoundException", "ResourceNotFound", "ResourceNotFoundException"):
        return True
    return code == "ValidationException" and any(words in said for words in _ABSENT)


def _said(operation: str) -> str:
    words = {"Model": "model", "EndpointConfig": "endpoint configuration", "Endpoint": "endpoint", "InferenceComponent": "component"}
    return words[operation.removeprefix("Create").removeprefix("Delete")]


def _method(operation: str) -> str:
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in operation).lstrip("_")
