"""What answers: an endpoint by its address, and a server on this machine for a run's artifact."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trimtab.artifact import Artifact
from trimtab.command import inherited, runtime_command, runtime_environment
from trimtab.errors import EndpointError
from trimtab.layout import JobDir

_NEEDED = ("trimtab_runtime", "torch", "transformers", "peft", "tokenizers", "starlette", "uvicorn")
_LOG_TAIL = 20  # lines
_GRACE = 10.0  # seconds from SIGTERM to SIGKILL; whoever closes does not wait for answers
_POLL = 0.05


class Endpoint:
    """A server that speaks OpenAI's interface, here or elsewhere. Closing ends the server if it was started for this object."""

    def __init__(self, url: str, *, timeout: float = 600.0, _server: _Server | None = None) -> None:
        """`timeout` is how many seconds an answer may take. Raises EndpointError for an address that is none."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{url!r} is no address of an endpoint: give one such as http://127.0.0.1:8080")
        self.url = url.rstrip("/")
        self.timeout = timeout
        here = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        # a proxy from the environment would look for this machine's servers on its own
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))
        self._server = _server  # lives as long as this object: without it the process ends

    def generate(
        self,
        prompt: str,
        *,
        model: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The text that goes on from `prompt`. `model` is "tuned" (the default where there is an adapter) or "base".

        Temperature 0 takes the likeliest token each time. Raises EndpointError with the status and the server's own words.
        """
        body = _body(model, max_new_tokens, temperature, top_p, seed, stop)
        answer = self._ask("/v1/completions", {**body, "prompt": prompt})
        return str(_first(answer)["text"])

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The assistant's answer to a question, or to a conversation of {"role": ..., "content": ...}. Otherwise as `generate`."""
        talk = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(message) for message in messages]
        body = _body(model, max_new_tokens, temperature, top_p, seed, stop)
        answer = self._ask("/v1/chat/completions", {**body, "messages": talk})
        return str(_first(answer)["message"]["content"])

    def models(self) -> list[str]:
        """The names that can be asked; the first is the default."""
        listed = self._ask("/v1/models")
        try:
            return [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError) as exc:
            raise EndpointError(f"{self.url} does not list models as OpenAI's interface does: check the address") from exc

    def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether it answers within so many seconds."""
        try:
            with self._opener.open(self.url + "/ping", timeout=timeout):
                return True
        except (OSError, HTTPException):
            return False

    def close(self) -> None:
        """End the server that was started for this object; nothing for an endpoint made from an address."""
        if self._server is not None:
            self._server.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as exc:
            raise EndpointError(f"the request cannot be written as JSON ({exc}): give text and finite numbers") from exc
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as exc:
            with exc:
                raise EndpointError(f"{self.url} answered {exc.code}: {_message(exc.read())}") from exc
        except TimeoutError as exc:
            raise EndpointError(self._too_slow()) from exc
        except urllib.error.URLError as exc:
            if isinstance(exc.reason, TimeoutError):
                raise EndpointError(self._too_slow()) from exc
            raise EndpointError(f"nothing answers at {self.url} ({exc.reason}): deploy it again, or check the address") from exc
        except (OSError, HTTPException) as exc:
            raise EndpointError(f"{self.url} broke off its answer ({type(exc).__name__}): it ended or was closed; deploy it again") from exc
        except ValueError as exc:
            raise EndpointError(f"{self.url} answered something that is not JSON: check that the address is an endpoint's") from exc

    def _too_slow(self) -> str:
        return f"{self.url} did not answer within {self.timeout:g} s: ask for fewer new tokens, or give Endpoint a longer timeout"


def deploy(
    artifact: Artifact | str | Path | None,
    base_model: str | Path,
    *,
    backend: str = "process",
    host: str = "127.0.0.1",
    port: int = 0,
    ready_timeout: float = 120.0,
) -> Endpoint:
    """Serve a base model's folder, and the adapter of `artifact` on it where one is given, in a process of its own.

    Returns when it answers. The process ends with `close()`, with the `with` block, and with this process however it dies.
    Port 0 is any that is free. Raises EndpointError with the end of its log when it does not come up in `ready_timeout` seconds.
    """
    if backend != "process":
        raise EndpointError(f'no endpoint can be started on {backend!r}: leave backend out, or write backend="process"')
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EndpointError(f"answering on this machine needs {', '.join(missing)}:  pip install 'trimtab[serve]'")
    base = Path(base_model).expanduser().absolute()
    if not (base / "config.json").is_file():
        raise EndpointError(f"{base} holds no model: give the base model's Hugging Face folder")
    folder = tempfile.TemporaryDirectory(prefix="trimtab-serve-")
    job = JobDir(Path(folder.name))
    if artifact is not None:
        job.model.symlink_to((artifact if isinstance(artifact, Artifact) else Artifact(artifact)).path)
    job.channel("model").parent.mkdir(parents=True)
    job.channel("model").symlink_to(base)
    server = _Server(folder, job, host, port)
    try:
        url = server.wait(time.monotonic() + ready_timeout, ready_timeout)
    except BaseException:
        server.end()
        raise
    return Endpoint(url, _server=server)


class _Server:
    """The serving process. It ends by SIGTERM, or when the pipe to its standard input closes: with this process, at the latest."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], job: JobDir, host: str, port: int) -> None:
        self._record, self._log = job.events.parent / "endpoint.json", job.root / "log.txt"
        own = {"TRIMTAB_HOST": host, "TRIMTAB_PORT": str(port), "TRIMTAB_UNTIL_STDIN_CLOSES": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                runtime_command(sys.executable, "serve"),
                env=inherited(os.environ) | runtime_environment(job.root) | own,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the client, which then closes
            )
        self.end = weakref.finalize(self, _end, self._process, folder)  # runs when this process exits, too

    def wait(self, deadline: float, seconds: float) -> str:
        """The address, once it answers."""
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EndpointError(f"the server ended with exit code {self._process.returncode} before it answered:\n{self._tail()}")
            if self._record.exists():
                url = str(json.loads(self._record.read_text(encoding="utf-8"))["url"])
                if Endpoint(url).ready():
                    return url
            time.sleep(_POLL)
        raise EndpointError(f"the server did not answer within {seconds:g} s; give a larger ready_timeout. Its log ends:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL:])


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    folder.cleanup()


def _body(
    model: str | None, max_new_tokens: int, temperature: float, top_p: float, seed: int | None, stop: Sequence[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    optional = {"model": model, "seed": seed, "stop": [stop] if isinstance(stop, str) else list(stop) or None}
    return values | {name: value for name, value in optional.items() if value is not None}


def _first(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError) as exc:
        raise EndpointError("the answer is not in the form of OpenAI's interface: check that the address is an endpoint's") from exc
    if not isinstance(choice, dict):
        raise EndpointError("the answer is not in the form of OpenAI's interface: check that the address is an endpoint's")
    return choice


def _message(body: bytes) -> str:
    """The server's own words, from OpenAI's form of an error or whatever it sent."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace") or "nothing more; look at the server's log"
