"""An endpoint of SageMaker, asked by its name: whoever may call it is told by IAM, and there is no key.

Source: InvokeEndpoint and InvokeEndpointWithResponseStream, Amazon SageMaker runtime API reference: bodies up to 6 MB, 60 s for an answer
and 8 minutes for a stream.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trimtab.aws import dialects, endpoint_life
from trimtab.aws.refusals import asking, error_code
from trimtab.aws.session import Aws
from trimtab.errors import EndpointError, TrimtabError
from trimtab.transport import own_words, sent_events, written

LARGEST = 6_291_456  # bytes of a body
_ASLEEP = "no capacity to process this request"
_NOT_READY = (502, 503)  # of a container that is being started again
_PAUSE, _LONG_PAUSE = 1.0, 10.0  # seconds before asking again


class SageMakerTransport:
    """The way to one endpoint. `component` tells that its inference component is asked; `models` are the names it answers to."""

    def __init__(self, aws: Aws, name: str, *, container: str, models: Sequence[str], component: bool = False) -> None:
        self._aws, self._name, self._container, self._models = aws, name, container, list(models)
        self._named = {"EndpointName": name, **({"InferenceComponentName": name} if component else {})}

    @property
    def url(self) -> str:
        return f"{self._client.meta.endpoint_url}/endpoints/{self._name}/invocations"

    @property
    def api_key(self) -> str | None:
        return None

    @property
    def _client(self) -> Any:
        return self._aws.client("sagemaker-runtime")

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        if body is None:
            return self._look(path)
        data = self._data(body)
        with self._errors():
            answer = self._patiently(lambda: self._invoke(data), timeout)
        try:
            return dialects.answered(json.loads(answer), body, self._container)
        except ValueError as exc:
            raise EndpointError(
                f"{self._name} answered something that is not JSON: does its container speak as {self._container}?"
            ) from exc

    def stream(self, path: str, body: Mapping[str, Any], *, timeout: float) -> Iterator[dict[str, Any]]:
        data = self._data({**body, "stream": True})
        with self._errors():
            answer = self._patiently(lambda: self._open(data), timeout)
            with contextlib.closing(answer):
                pieces = (event["PayloadPart"]["Bytes"] for event in answer if "PayloadPart" in event)
                for given in sent_events(dialects.event_lines(pieces)):
                    if (found := dialects.event(given, body, self._container)) is not None:
                        yield found

    def ready(self, *, timeout: float) -> bool:
        """Whether it is in service, which SageMaker tells by pinging the container; one that is asleep is."""
        try:
            standing = endpoint_life.look(self._aws, self._name)
        except TrimtabError:
            return False
        return standing is not None and standing.status in ("InService", "Updating")

    def close(self) -> None:
        """The connections are the client's, which other endpoints use too."""

    def __repr__(self) -> str:
        return f"SageMakerTransport({self._name!r})"

    def _look(self, path: str) -> Any:
        if path == "/v1/models":  # SageMaker hands on nothing but invocations
            return {"object": "list", "data": [{"id": name, "object": "model"} for name in self._models]}
        raise EndpointError(f"SageMaker hands on nothing but questions, not {path}: what it measures is in CloudWatch, under AWS/SageMaker")

    def _data(self, body: Mapping[str, Any]) -> bytes:
        """Raises EndpointError for a model that is not there, and a body that is too long to be sent."""
        wanted = body.get("model")
        if self._container != "trimtab" and wanted is not None and wanted not in self._models:
            raise EndpointError(f"there is no model {wanted!r} here; ask for one of: {', '.join(self._models)}")
        data = written(dialects.asked(body, self._container))
        if len(data) > LARGEST:
            raise EndpointError(f"the question has {len(data):,} bytes, and SageMaker takes 6 MB: shorten it")
        return data

    def _invoke(self, data: bytes) -> bytes:
        answer = self._client.invoke_endpoint(**self._named, Body=data, ContentType="application/json", Accept="application/json")
        with contextlib.closing(answer["Body"]) as stream:
            found: bytes = stream.read()
        return found

    def _open(self, data: bytes) -> Any:
        return self._client.invoke_endpoint_with_response_stream(
            **self._named, Body=data, ContentType="application/json", Accept="text/event-stream"
        )["Body"]

    def _patiently(self, ask: Callable[[], Any], timeout: float) -> Any:
        """What `ask` answers. One that has no instance wakes up by being asked, which takes minutes; one that is started again, seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return ask()
            except self._client.exceptions.ClientError as exc:
                pause = _pause(exc)
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
            time.sleep(pause)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from botocore.eventstream import ParserError
        from botocore.exceptions import ClientError, EventStreamError
        from urllib3.exceptions import HTTPError

        try:
            with asking(f"to ask {self._name}", action="sagemaker:InvokeEndpoint", error=EndpointError):
                yield
        except (HTTPError, ParserError) as exc:  # botocore lets them through from within a stream
            raise EndpointError(f"{self._name} broke off its answer ({type(exc).__name__}): check the network and ask again") from exc
        except EndpointError as exc:
            cause = exc.__cause__
            if isinstance(cause, EventStreamError):
                said = own_words(str(cause.response.get("Error", {}).get("Message", cause)).encode())
                raise EndpointError(f"{self._name} broke off its answer: {said}. Ask again; see  trimtab endpoints") from cause
            if not isinstance(cause, ClientError):
                raise
            raise EndpointError(self._refusal(cause) or str(exc)) from cause

    def _refusal(self, exc: Any) -> str:
        """The container's own words, or what SageMaker's mean; empty for what `asking` says well."""
        code, said = error_code(exc), str(exc)
        if code == "ModelError":
            status, words = exc.response.get("OriginalStatusCode", 0), exc.response.get("OriginalMessage", "")
            if not status:
                return f"{self._name} did not answer: {words or said}. Ask for fewer new tokens, or stream; SageMaker waits for 60 s"
            return f"{self._name} answered {status}: {own_words(words.encode())}"
        if code in ("ValidationError", "ValidationException") and _ASLEEP in said:
            return (
                f"{self._name} had no instance and was not woken in time: that takes minutes; ask again, or give Endpoint a longer timeout"
            )
        if code in ("ValidationError", "ValidationException") and "not found" in said:
            return f"nothing answers as sagemaker://{self._name}: it was closed, or is not in service yet; see  trimtab endpoints"
        return ""


def _pause(exc: Any) -> float | None:
    """Seconds until it is worth asking again; None for an answer that stands."""
    if _ASLEEP in str(exc):
        return _LONG_PAUSE
    if error_code(exc) == "ModelNotReadyException":
        return _PAUSE
    return _PAUSE if error_code(exc) == "ModelError" and exc.response.get("OriginalStatusCode") in _NOT_READY else None
