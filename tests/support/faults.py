"""What goes wrong on request between a client and a service (faulty_proxy.py): refusals as AWS writes them, silence, lines that break."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """What goes wrong: an answer instead of the service's, or a connection that is cut after some bytes, or silence before either."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    wait: float = 0.0  # seconds before anything else
    gate: threading.Event | None = None  # what is waited for before anything else, a minute at most
    cut_request: int | None = None  # bytes of the request's body that are read before the connection ends
    cut_answer: int | None = None  # bytes of the service's answer that are passed on before it ends


def refused(status: int, code: str, message: str, headers: dict[str, str] | None = None, more: str = "") -> Fault:
    """An error as S3 writes it; `more` are further elements."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
    return Fault(status, {"Content-Type": "application/xml", **(headers or {})}, body.encode())


def refused_json(status: int, code: str, message: str) -> Fault:
    """An error as services with a JSON protocol write it, such as SageMaker and CloudWatch Logs."""
    body = json.dumps({"__type": code, "message": message}).encode()
    return Fault(status, {"Content-Type": "application/x-amz-json-1.1", "x-amzn-ErrorType": code}, body)


def slow_down() -> Fault:
    return refused(503, "SlowDown", "Please reduce your request rate.")


def internal_error() -> Fault:
    return refused(500, "InternalError", "We encountered an internal error. Please try again.")


def request_timeout() -> Fault:
    said = "Your socket connection to the server was not read from or written to within the timeout period."
    return refused(400, "RequestTimeout", said, {"Connection": "close"})


def expired_token() -> Fault:
    return refused(400, "ExpiredToken", "The provided token has expired.")


def access_denied(action: str, resource: str = "arn:aws:s3:::bucket/key") -> Fault:
    who = "arn:aws:sts::123456789012:assumed-role/Trainer/me"
    said = (
        f'User: {who} is not authorized to perform: {action} on resource: "{resource}" because no identity-based policy allows the action'
    )
    return refused(403, "AccessDenied", said)


def other_region(region: str, bucket: str = "bucket") -> Fault:
    said = "The bucket you are attempting to access must be addressed using the specified endpoint."
    more = f"<Endpoint>{bucket}.s3.{region}.amazonaws.com</Endpoint><Bucket>{bucket}</Bucket>"
    return refused(301, "PermanentRedirect", said, {"x-amz-bucket-region": region}, more)


def hang(seconds: float) -> Fault:
    """Silence, and then the end of the connection."""
    return Fault(wait=seconds, cut_request=0)


def late(seconds: float) -> Fault:
    """The service's own answer, later."""
    return Fault(wait=seconds)


def held_until(gate: threading.Event) -> Fault:
    """The service's own answer, once something else has happened."""
    return Fault(gate=gate)


def cut_request(after: int = 0) -> Fault:
    """The connection ends while the request's body is on its way; the service gets nothing of it."""
    return Fault(cut_request=after)


def cut_answer(after: int = 0) -> Fault:
    """The service does what it is asked, and its answer's body ends after so many bytes."""
    return Fault(cut_answer=after)


def lost_answer() -> Fault:
    """The service does what it is asked, and nothing of its answer arrives."""
    return Fault(cut_answer=-1)
