"""SageMaker's runtime: an endpoint's container is asked, and its answer handed on, whole or as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from control_plane import event_stream, validation
from control_plane.operations_components import serving_component
from control_plane.operations_hosting import serving
from control_plane.place import Place
from control_plane.refusal import Refused
from control_plane.store import Endpoint, Request

_LONGEST_MESSAGE = 1024  # characters of a container's error that are handed on
_PART = 64 * 1024  # bytes of a streamed part at most
_TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency metrics for each container in"
    " Amazon CloudWatch, resolve the issue, and try again."
)


def read(operation: str, endpoint: str, headers: Mapping[str, str], body: bytes) -> Request:
    """The request's members out of the path, the headers that the model names, and the body."""
    shape = validation.operation("sagemaker-runtime", operation).input_shape
    request: Request = {"EndpointName": endpoint, "Body": body}
    given = {name.lower(): value for name, value in headers.items()}
    for name, member in shape.members.items():
        header = member.serialization.get("name", "").lower()
        if member.serialization.get("location") == "header" and header in given:
            request[name] = given[header]
    return request


def invoke(request: Request, place: Place, *, streamed: bool) -> tuple[dict[str, str], Iterator[bytes]]:
    """The answer's headers and body. Raises Refused (ModelError) for an answer of the container that is an error, or none."""
    endpoint = serving(request["EndpointName"], place.store)
    if place.hosting is None:
        raise Refused("ServiceUnavailable", "This control plane runs no containers.", 503)
    variant, asked = _variant(request, endpoint), endpoint.name
    if "InferenceComponentName" in request:
        asked = serving_component(request["InferenceComponentName"], endpoint.name, place.store).name
    elif "ModelName" not in endpoint.config.variants[0]:
        raise Refused(
            "ValidationError",
            "Inference Component Name header is required for endpoints to which you plan to deploy inference"
            " components. Please include Inference Component Name header or consider using SageMaker models.",
        )
    try:
        status, answered, chunks = place.hosting.invoke(asked, request["Body"], _asked(request))
    except TimeoutError as exc:
        raise model_error(0, _TIMED_OUT, endpoint) from exc
    except OSError as exc:
        raise model_error(0, f"the container could not be reached: {exc}", endpoint) from exc
    answered = {name.lower(): value for name, value in answered.items()}
    if not 200 <= status < 300:
        raise model_error(status, _whole(chunks, endpoint).decode(errors="replace"), endpoint)
    headers = {"x-Amzn-Invoked-Production-Variant": variant}
    for name in ("X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-New-Session-Id", "X-Amzn-SageMaker-Closed-Session-Id"):
        if name.lower() in answered:
            headers[name] = answered[name.lower()]
    content_type = answered.get("content-type", "application/octet-stream")
    if streamed:
        headers |= {"X-Amzn-SageMaker-Content-Type": content_type, "Content-Type": "application/vnd.amazon.eventstream"}
        return headers, _events(chunks)
    return headers | {"Content-Type": content_type}, iter([_whole(chunks, endpoint)])


def _whole(chunks: Iterator[bytes], endpoint: Endpoint) -> bytes:
    try:
        return b"".join(chunks)
    except OSError as exc:
        raise model_error(0, f"the container broke its answer off: {exc}", endpoint) from exc


def _variant(request: Request, endpoint: Endpoint) -> str:
    names = [str(each["VariantName"]) for each in endpoint.config.variants]
    wanted = request.get("TargetVariant", names[0])
    if wanted not in names:
        raise Refused("ValidationError", f"Variant {wanted} not found for endpoint {endpoint.name}.")
    return str(wanted)


def _asked(request: Request) -> dict[str, str]:
    """The headers that the container gets: the client's, under the names that InvokeEndpoint has for them."""
    members = validation.operation("sagemaker-runtime", "InvokeEndpoint").input_shape.members
    return {members[name].serialization["name"]: str(value) for name, value in request.items() if name not in ("EndpointName", "Body")}


def _events(chunks: Iterator[bytes]) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        if hasattr(chunks, "close"):
            stack.callback(chunks.close)
        try:
            for chunk in chunks:
                for at in range(0, len(chunk), _PART):
                    yield event_stream.event("PayloadPart", chunk[at : at + _PART])
        except OSError as exc:
            code = "ModelInvocationTimeExceeded" if isinstance(exc, TimeoutError) else "StreamBroken"  # the model's two codes
            yield event_stream.exception("ModelStreamError", {"Message": str(exc) or "the stream broke", "ErrorCode": code})


def model_error(status: int, message: str, endpoint: Endpoint) -> Refused:
    """ModelError in the service's words; `status` is the container's, 0 when it did not answer."""
    side, group = "client" if 400 <= status < 500 else "server", f"/aws/sagemaker/Endpoints/{endpoint.name}"
    where = f"https://{endpoint.region}.console.aws.amazon.com/cloudwatch/home?region={endpoint.region}#logEventViewer:group={group}"
    said = message[:_LONGEST_MESSAGE]
    members: dict[str, Any] = {
        "OriginalStatusCode": status,
        "OriginalMessage": said,
        "LogStreamArn": f"arn:aws:logs:{endpoint.region}:{endpoint.account}:log-group:{group}",
    }
    text = f'Received {side} error ({status}) from primary with message "{said}".'
    return Refused("ModelError", f"{text} See {where} in account {endpoint.account} for more information.", 424, members)
