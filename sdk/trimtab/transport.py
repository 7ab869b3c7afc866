"""How an endpoint is asked: a question and its answer, a question and its answer in pieces, and whether it is there at all."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, Protocol

from trimtab.errors import EndpointError

_DONE = "[DONE]"  # what ends a stream in OpenAI's interface
_KEY = re.compile(r"[\x21-\x7e]+")
_PAUSE = 1.0  # seconds between two tries where the server names none
_WORDS = 500  # characters of an answer that is not in anyone's form


class Transport(Protocol):
    """The way to one endpoint. Paths and bodies are those of the server's HTTP interface (`/v1/completions`, `/v1/chat/completions`).

    `timeout` is how many seconds the endpoint may be silent, time in which it says that it is not ready included. Every question raises
    EndpointError with the endpoint's own words when it refuses or breaks off.
    """

    @property
    def url(self) -> str:
        """Where it answers, for people."""
        ...

    @property
    def api_key(self) -> str | None:
        """What whoever asks must send; None where nothing is asked for, or a platform in front checks."""
        ...

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        """The answer as JSON; without a body it is only looked at (GET)."""
        ...

    def stream(self, path: str, body: Mapping[str, Any], *, timeout: float) -> Generator[dict[str, Any]]:
        """The answer's events as they come. The question is asked with the first; who stops listening ends the answer."""
        ...

    def ready(self, *, timeout: float) -> bool:
        """Whether it answers now, within so many seconds. Raises nothing."""
        ...

    def close(self) -> None:
        """Let go of connections. The endpoint goes on."""
        ...


class HttpTransport:
    """An endpoint at an address. `explain` says why a server of this machine has ended, and "" while it lives."""

    def __init__(self, url: str, api_key: str | None = None, explain: Callable[[], str] = lambda: "") -> None:
        """Raises EndpointError for an address or a key that is none."""
        try:
            parts = urllib.parse.urlsplit(url)
            well = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            well = False
        if not well or parts.username is not None:
            raise EndpointError(f"{_public(url)!r} is no address of an endpoint: give one such as http://127.0.0.1:8080")
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise EndpointError("an API key is letters, digits and signs without blanks: give the one that the endpoint was started with")
        self._url, self._api_key, self._explain = url.rstrip("/"), api_key, explain
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        host = parts.hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        # a proxy from the environment would look for this machine's servers on its own
        self._opener = urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if here else []))

    @property
    def url(self) -> str:
        return self._url

    @property
    def api_key(self) -> str | None:
        return self._api_key

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        with self._errors(timeout), self._open(path, body, timeout) as answer:
            return json.load(answer)

    def stream(self, path: str, body: Mapping[str, Any], *, timeout: float) -> Generator[dict[str, Any]]:
        with self._errors(timeout), self._open(path, body, timeout) as answer:
            yield from sent_events(answer)

    def ready(self, *, timeout: float) -> bool:
        try:
            with self._opener.open(self._url + "/ping", timeout=timeout):
                return True
        except (OSError, HTTPException):
            return False

    def close(self) -> None:
        """Nothing to do: each question has a connection of its own."""

    def __repr__(self) -> str:
        return f"HttpTransport({self._url!r})"

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> HTTPResponse:
        """The answer, opened. While the server says that it is not ready and when to come back (503), it is asked again."""
        request = urllib.request.Request(self._url + path, data=None if body is None else written(body), headers=self._headers)
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                answer: HTTPResponse = self._opener.open(request, timeout=max(left, 0.001))
                return answer
            except urllib.error.HTTPError as exc:
                pause = _pause(exc)
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
                exc.close()
            time.sleep(pause)

    @contextlib.contextmanager
    def _errors(self, timeout: float) -> Iterator[None]:
        """Whatever goes wrong with a question, in our words."""
        slow = f"{self._url} did not answer within {timeout:g} s: ask for fewer new tokens, or give Endpoint a longer timeout"
        try:
            yield
        except urllib.error.HTTPError as exc:
            with exc:
                said = own_words(exc.read())
            if exc.code == 401:
                said += ". Give its key:  Endpoint(url, api_key=...)"
            why = self._death() if exc.code in (502, 503) else ""
            raise EndpointError(f"{self._url} answered {exc.code}: {said}{why}") from exc
        except TimeoutError as exc:
            raise EndpointError(slow) from exc
        except urllib.error.URLError as exc:
            if isinstance(exc.reason, TimeoutError):
                raise EndpointError(slow) from exc
            why = self._death() or ": deploy it again, or check the address"
            raise EndpointError(f"nothing answers at {self._url} ({exc.reason}){why}") from exc
        except (OSError, HTTPException) as exc:
            why = self._death() or ": it ended or was closed; deploy it again"
            raise EndpointError(f"{self._url} broke off its answer ({type(exc).__name__}){why}") from exc
        except ValueError as exc:
            raise EndpointError(f"{self._url} answered something that is not JSON: check that the address is an endpoint's") from exc

    def _death(self) -> str:
        why = self._explain()
        return f"\n{why}" if why else ""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


def written(body: Mapping[str, Any]) -> bytes:
    """The body of a request. Raises EndpointError for what JSON cannot say."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise EndpointError(f"the request cannot be written as JSON ({exc}): give text and finite numbers") from exc


def sent_events(pieces: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events (HTML Living Standard, section 9.2) that comes in pieces of any size.

    Ends at OpenAI's `[DONE]`, or with an event that has TGI's `generated_text`. Raises EndpointError for an event that tells an error,
    and for a stream that ends before it is over.
    """
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            name, _, value = line.decode(errors="replace").rstrip("\r").partition(":")
            if name != "data":
                continue
            if (text := value.strip()) == _DONE:
                return
            event = json.loads(text)
            if not isinstance(event, dict):
                raise ValueError("an event that is no object")
            if "error" in event:
                raise EndpointError(f"the answer was broken off: {own_words(text.encode())}")
            yield event
            if event.get("generated_text") is not None:
                return
    raise EndpointError("the answer was broken off before its end: the server ended or was closed; ask again, or deploy it again")


def own_words(body: bytes) -> str:
    """The server's own words, from OpenAI's form of an error ({"error": {"message"}}), TGI's ({"error"}), or whatever it sent."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:_WORDS].decode(errors="replace").strip() or "nothing more; look at the server's log"


def _pause(answer: urllib.error.HTTPError) -> float | None:
    """How long to wait before asking again, in seconds; None for an answer that stands."""
    after = answer.headers.get("Retry-After")
    if answer.code != 503 or after is None:
        return None
    return max(float(after), 0.1) if after.strip().isdigit() else _PAUSE


def _public(url: str) -> str:
    """An address without a name and a password that may stand in it."""
    return re.sub(r"//[^/]*@", "//...@", url)
