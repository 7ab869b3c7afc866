"""One HTTP request: who asks, for what; its answer, its error, or the fault that was put in its way."""

from __future__ import annotations

import json
import re
import sys
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from control_plane import invocations, validation
from control_plane.faults import Fault
from control_plane.operations import OPERATIONS, carry_out
from control_plane.place import Place
from control_plane.refusal import Refused

if TYPE_CHECKING:
    from control_plane.server import ControlPlane

_SERVICES = {
    "SageMaker": "sagemaker",
    "ServiceQuotasV20190624": "service-quotas",
    "AnyScaleFrontendService": "application-autoscaling",
}  # X-Amz-Target's prefix -> botocore's name
_CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 +Credential=([^/,]+)/\d{8}/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request")
_INVOCATION = re.compile(r"/endpoints/([^/]+)/(invocations|invocations-response-stream)")
_JSON = "application/x-amz-json-1.1"
_LONGEST = 32 * 1024 * 1024  # bytes of a request; larger ones are not read


class Exchange(BaseHTTPRequestHandler):
    """A connection and the requests on it; AWS's clients keep it for many."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "control-plane"
    server: Any

    @property
    def plane(self) -> ControlPlane:
        plane: ControlPlane = self.server.plane
        return plane

    def handle(self) -> None:
        """A client that goes away in the middle is nothing to report."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing; `requests` records what was asked."""

    def do_GET(self) -> None:
        self._control({}) if self.path.startswith("/_control/") else self._send(404, b"")

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        given = self.headers.get("Content-Length") or "0"
        length = int(given) if given.isascii() and given.isdecimal() else _LONGEST + 1
        if length > _LONGEST:
            self.close_connection = True
            self._refuse(Refused("RequestEntityTooLargeException", f"Content-Length {given} is not within {_LONGEST} bytes", 413))
            return
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        if path.startswith("/_control/"):
            try:
                self._control(json.loads(body or b"{}"))
            except ValueError as exc:
                self._send_json(400, {"message": str(exc)})
        elif found := _INVOCATION.fullmatch(path):
            self._invocation(unquote(found.group(1)), body, streamed=found.group(2) != "invocations")
        else:
            self._operation(body)

    def _operation(self, body: bytes) -> None:
        """JSON 1.1: the operation's name is in a header, the request is the body."""
        try:
            prefix, _, name = self.headers.get("X-Amz-Target", "").partition(".")
            if prefix not in _SERVICES or not name:
                raise Refused("UnknownOperationException", f"X-Amz-Target {self.headers.get('X-Amz-Target')!r} names no operation.")
            place = self._place()
            try:
                document = json.loads(body or b"{}")
            except ValueError as exc:
                raise Refused("SerializationException", "The request's body is no JSON") from exc
            self.plane.record(name, document)
            fault = self._fault(name, place)
            if fault is not None and not fault.after:
                return self._answer_fault(fault, name, place)
            answer = carry_out(_SERVICES[prefix], name, document, place)
        except Refused as refused:
            return self._refuse(refused)
        except Exception as exc:  # noqa: BLE001  a fault of this package is answered as one, and not by silence
            traceback.print_exc(file=sys.stderr)
            return self._refuse(Refused("InternalFailure", f"{type(exc).__name__}: {exc}", 500))
        if fault is not None:
            return self._answer_fault(fault, name, place, lambda: self._send_json(200, answer))
        return self._send_json(200, answer)

    def _invocation(self, endpoint: str, body: bytes, *, streamed: bool) -> None:
        """SageMaker's runtime: REST, the request's members are headers, the body is the container's."""
        name = "InvokeEndpointWithResponseStream" if streamed else "InvokeEndpoint"
        try:
            place = self._place()
            request = invocations.read(name, endpoint, dict(self.headers.items()), body)
            self.plane.record(name, {member: value for member, value in request.items() if member != "Body"})
            fault = self._fault(name, place)
            if fault is not None and not fault.after:
                return self._answer_fault(fault, name, place)
            validation.refuse(validation.operation("sagemaker-runtime", name).input_shape, request, "ValidationError")
            headers, chunks = invocations.invoke(request, place, streamed=streamed)
            if fault is not None and (fault.code or fault.drop):
                b"".join(chunks)
                return self._answer_fault(fault, name, place)
            if fault is not None:
                self.plane.closing.wait(fault.hang)
            if streamed:
                self._send_stream(headers, chunks)
            else:
                self._send(200, b"".join(chunks), headers)
        except Refused as refused:
            self._refuse(refused, rest=True)

    def _place(self) -> Place:
        """The account and the region of the request's credential. Raises Refused for a request that is not signed."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            raise Refused("MissingAuthenticationTokenException", "Missing Authentication Token", 403)
        found = _CREDENTIAL.match(authorization)
        if found is None:
            raise Refused("IncompleteSignatureException", "Authorization header requires 'Credential' parameter.", 403)
        key, region, _ = found.groups()
        return self.plane.place(key if re.fullmatch(r"\d{12}", key) else self.plane.account, region)

    def _fault(self, name: str, place: Place) -> Fault | None:
        fault = self.plane.faults.take(name)
        if fault is not None and not fault.after and fault.hang and not (fault.code or fault.drop):
            self.plane.closing.wait(fault.hang)  # late, but otherwise as it would be
            return None
        return fault

    def _answer_fault(self, fault: Fault, name: str, place: Place, answer: Any = None) -> None:
        """Instead of the answer: late, nothing, or an error; `answer` sends the real one where the fault has only a delay."""
        self.plane.closing.wait(fault.hang)
        if fault.drop:
            self.close_connection = True
            return
        store = place.store
        named = next((each for each, operations in OPERATIONS.items() if name in operations), "sagemaker")
        service = "servicequotas" if named == "service-quotas" else named  # as IAM spells it
        where = f"{store.region}:{store.account}"
        refusal = fault.refusal(
            user=f"arn:aws:iam::{store.account}:user/trainer", action=f"{service}:{name}", resource=f"arn:aws:{service}:{where}:*"
        )
        if refusal is not None:
            self._refuse(refusal, rest=name.startswith("Invoke"))
        elif answer is not None:
            answer()

    def _control(self, document: Any) -> None:
        """What only tests ask for: health, faults, interruptions, quotas."""
        _, _, verb, *rest = urlsplit(self.path).path.split("/")
        plane = self.plane
        if not isinstance(document, dict):
            raise ValueError("the body must be a JSON object")
        if verb == "health":
            return self._send_json(200, {"status": "ok", "aws_url": plane.aws_url, "runner": plane.runner})
        if verb == "faults":
            if self.command == "DELETE":
                plane.faults.clear()
            elif self.command == "POST":
                plane.fault(**document)
            return self._send_json(200, {"faults": [asdict(each) for each in plane.faults.waiting()]})
        if verb == "interrupt" and rest and self.command == "POST":
            try:
                plane.interrupt(rest[0])
            except LookupError as exc:
                return self._send_json(404, {"message": str(exc)})
            return self._send_json(200, {})
        if verb == "quotas" and self.command == "POST":
            for name, value in document.items():
                if type(value) not in (int, float):
                    raise ValueError(f"{name}: {value!r} is no number")
                plane.set_quota(name, value)
            return self._send_json(200, {})
        return self._send_json(404, {"message": f"{self.command} {self.path} is nothing that this control plane has"})

    def _refuse(self, refused: Refused, *, rest: bool = False) -> None:
        if rest:
            members = {"message": refused.message, "Message": refused.message, **refused.members}
            return self._send(
                refused.status, json.dumps(members).encode(), {"Content-Type": "application/json", "x-amzn-errortype": refused.code}
            )
        return self._send_json(refused.status, {"__type": refused.code, "message": refused.message, **refused.members})

    def _send_json(self, status: int, document: Any) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": _JSON})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {**(headers or {}), "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_stream(self, headers: Mapping[str, str], chunks: Iterator[bytes]) -> None:
        """Each chunk as soon as it is there."""
        self._head(200, {**headers, "Transfer-Encoding": "chunked"})
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
