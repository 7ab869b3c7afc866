"""What answers: an endpoint by its address or its handle, and how one is started, listed and ended."""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from trimtab.artifact import Artifact
from trimtab.deployers import load_deployer, settings_of
from trimtab.deployers.base import PREFIX, Deployer, EndpointHandle, EndpointRecord, EndpointState, Remote
from trimtab.errors import EndpointError, SpecError, TrimtabError
from trimtab.events import Event
from trimtab.plan import Finding
from trimtab.serving import Serving, serving
from trimtab.spec import ServeSpec, refuse_unknown
from trimtab.transport import HttpTransport, Transport

_PATIENCE, _RATE = 120.0, 25e6  # seconds to come up in any case, and bytes of a model that are read in one more

_FORM = "the answer is not in the form of OpenAI's interface: check that the address is an endpoint's"


class Endpoint:
    """A server that speaks OpenAI's interface, here or elsewhere.

    `close()` ends an endpoint that has a handle, wherever it runs. The end of a `with` block, or of this process, ends only one that was
    deployed by it and not detached.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        _transport: Transport | None = None,
        _place: _Place | None = None,
    ) -> None:
        """`timeout` is how many seconds an answer may take. Raises EndpointError for an address or a key that is none."""
        self._transport = _transport or HttpTransport(url, api_key)
        self._place = _place
        self.timeout = timeout
        self._end_with_us = None
        if _place is not None and _place.ours:
            self._end_with_us = weakref.finalize(self, _place.deployer.end, _place.handle)  # runs when this process exits, too

    @classmethod
    def attach(cls, handle: str | EndpointHandle, *, timeout: float = 600.0, **settings: Any) -> Endpoint:
        """The endpoint of a handle such as `docker://trim-ep-7f3a9c21`, which another process may have started.

        `settings` are its backend's. Raises EndpointError for a handle without an endpoint, or with one that has ended.
        """
        handle = EndpointHandle.parse(handle)
        deployer = load_deployer(handle.backend, settings)
        found = deployer.look(handle)
        if found.state in (EndpointState.FAILED, EndpointState.ENDED):
            raise EndpointError(f"{handle} has {found.state}: {found.reason}\nRemove what is left of it with:  trimtab close {handle}")
        return cls("", timeout=timeout, _transport=deployer.transport(handle), _place=_Place(deployer, handle, ours=False))

    @property
    def transport(self) -> Transport:
        """The way to it, for questions and answers in the server's own form."""
        return self._transport

    @property
    def url(self) -> str:
        return self._transport.url

    @property
    def api_key(self) -> str | None:
        """What others must send to ask it (`Authorization: Bearer ...`); None where nothing is asked for."""
        return self._transport.api_key

    @property
    def handle(self) -> EndpointHandle | None:
        """Its name for other processes; None for a bare address."""
        return self._place.handle if self._place else None

    def generate(
        self,
        prompt: str,
        *,
        model: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The text that goes on from `prompt`. `model` is one of `models()`, by default the first.

        Temperature 0 takes the likeliest token each time; `top_k` 0 looks at all. Raises EndpointError with the server's own words.
        """
        body = _body(model, max_new_tokens, temperature, top_p, top_k, seed, stop)
        answer = self._transport.ask("/v1/completions", {**body, "prompt": prompt}, timeout=self.timeout)
        return str(_first(answer)["text"])

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The assistant's answer to a question, or to a conversation of {"role": ..., "content": ...}. Otherwise as `generate`."""
        body = _body(model, max_new_tokens, temperature, top_p, top_k, seed, stop)
        answer = self._transport.ask("/v1/chat/completions", {**body, "messages": _talk(messages)}, timeout=self.timeout)
        return str(_first(answer)["message"]["content"])

    def stream(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        chat: bool = True,
        model: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str]:
        """The answer of `chat` in pieces as they come; with `chat=False` the text that goes on from `messages`, as of `generate`.

        Asked with the first piece; closing the iterator, or letting go of it, ends the answer there. Raises as they do, also midway.
        """
        body = _body(model, max_new_tokens, temperature, top_p, top_k, seed, stop) | {"stream": True}
        if chat:
            events = self._transport.stream("/v1/chat/completions", {**body, "messages": _talk(messages)}, timeout=self.timeout)
            return _pieces(events, lambda choice: choice.get("delta", {}).get("content"))
        if not isinstance(messages, str):
            raise EndpointError("only a text can be gone on from: give one text, or leave out chat=False")
        events = self._transport.stream("/v1/completions", {**body, "prompt": messages}, timeout=self.timeout)
        return _pieces(events, lambda choice: choice.get("text"))

    def models(self) -> list[str]:
        """The names that can be asked; the first is the default."""
        listed = self._transport.ask("/v1/models", timeout=self.timeout)
        try:
            return [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError) as exc:
            raise EndpointError(f"{self.url} does not list models as OpenAI's interface does: check the address") from exc

    def ready(self, *, timeout: float = 5.0) -> bool:
        """Whether it answers within so many seconds."""
        return self._transport.ready(timeout=timeout)

    def status(self) -> EndpointRecord:
        """How it stands. Raises EndpointError for a bare address, which is known only by its answers."""
        if self._place is None:
            raise EndpointError(f"{self.url} is known by its address alone: see whether it answers with  ready()")
        return self._place.deployer.look(self._place.handle)

    def logs(self) -> list[str]:
        """The lines that it printed so far. Raises EndpointError for a bare address, whose log is elsewhere."""
        if self._place is None:
            raise EndpointError(f"the log of {self.url} is where it was started: ask with its handle,  Endpoint.attach(HANDLE)")
        return list(self._place.deployer.logs(self._place.handle))

    def close(self) -> None:
        """End the endpoint and remove what belongs to it, wherever it was started. Nothing for one made from an address; quiet again."""
        if self._place is not None:
            self._place.deployer.end(self._place.handle)
        if self._end_with_us is not None:
            self._end_with_us.detach()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._place is not None and self._place.ours:
            self.close()
        else:
            self._transport.close()

    def __repr__(self) -> str:
        return f"Endpoint({str(self.handle or self.url)!r})"

    def _repr_html_(self) -> str:
        from trimtab.notebook import of_endpoint

        return of_endpoint(self)


@dataclass(frozen=True)
class _Place:
    """Where an endpoint runs; `ours` ends with this process."""

    deployer: Deployer
    handle: EndpointHandle
    ours: bool


def deploy(
    artifact: Artifact | str | Path | None = None,
    base_model: str | Path | None = None,
    *,
    backend: str = "process",
    device: Literal["xeon", "gpu"] = "xeon",
    merge: bool = True,
    adapters: Mapping[str, Artifact | str | Path] | None = None,
    trust_remote_code: str = "",
    title: str = "",
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    ttl: float | None = None,
    detach: bool = False,
    ready_timeout: float | None = None,
    show: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Endpoint:
    """Serve an artifact merged onto its base model, a base model alone, or adapters beside their base; as `serving.serving` says.

    Returns when it answers. It ends with `close()`, with the `with` block and with this process however it dies; with `detach` only with
    `close()` (`trimtab close HANDLE`); after `ttl` minutes in any case. Port 0 is any that is free. Where others than this machine can
    reach it, an API key is made unless one is given. `settings` are fields of `ServeSpec` and of the backend's constructor.

    Raises EndpointError with the end of its log when it does not come up in `ready_timeout` seconds (by default by the model's size), and
    what `serving` raises. Whatever goes wrong, nothing stays.
    """
    deployer, wanted = _wanted(
        backend,
        artifact,
        base_model,
        device=device,
        merge=merge,
        adapters=adapters,
        trust_remote_code=trust_remote_code,
        title=title,
        ttl=ttl,
        show=show,
        **settings,
    )
    handle = deployer.start(
        wanted,
        new_id(),
        host=host,
        port=port,
        api_key=api_key,
        detach=detach,
        ready_timeout=_patience(deployer, wanted) if ready_timeout is None else ready_timeout,
        show=show,
    )
    try:
        return Endpoint("", _transport=deployer.transport(handle), _place=_Place(deployer, handle, ours=not detach))
    except BaseException as exc:  # Ctrl-C too: nobody would know of it
        try:
            deployer.end(handle)
        except TrimtabError as left:
            raise EndpointError(
                f"{str(exc) or 'interrupted'}\n{handle} is still there ({left}): end it with  trimtab close {handle}"
            ) from exc
        raise


def deploy_request(
    artifact: Artifact | str | Path | None = None,
    base_model: str | Path | None = None,
    *,
    backend: str = "process",
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    detach: bool = False,
    ready_timeout: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `deploy` with the same arguments would ask of the place, as JSON values without the key. Nothing is merged or started."""
    deployer, wanted = _wanted(backend, artifact, base_model, make=False, **options)
    return deployer.render(wanted, new_id(), host=host, port=port, api_key=api_key, detach=detach)


def deploy_findings(
    artifact: Artifact | str | Path | None = None, base_model: str | Path | None = None, *, backend: str = "process", **options: Any
) -> list[Finding]:
    """What the place has and lacks for `deploy` with the same arguments, as far as it tells; none of a place that has no account.

    What is not there (`ok` False) stops a `deploy` before anything is sent. Nothing is merged or started.
    """
    given = {name: value for name, value in options.items() if name not in ("host", "port", "api_key", "detach", "ready_timeout")}
    deployer, wanted = _wanted(backend, artifact, base_model, make=False, **given)
    return deployer.findings(wanted) if isinstance(deployer, Remote) else []


def endpoints(backend: str, **settings: Any) -> list[EndpointRecord]:
    """The endpoints that a backend knows, newest first, with those that were left behind."""
    return load_deployer(backend, settings).endpoints()


def close(handle: str | EndpointHandle, **settings: Any) -> None:
    """End an endpoint and remove what is left of it. Quiet when it is gone already."""
    handle = EndpointHandle.parse(handle)
    load_deployer(handle.backend, settings).end(handle)


def new_id() -> str:
    """The name of a new endpoint, which no other has."""
    return f"{PREFIX}{uuid.uuid4().hex[:8]}"


def _wanted(
    backend: str,
    artifact: Artifact | str | Path | None,
    base_model: str | Path | None,
    *,
    device: Literal["xeon", "gpu"] = "xeon",
    merge: bool = True,
    adapters: Mapping[str, Artifact | str | Path] | None = None,
    trust_remote_code: str = "",
    title: str = "",
    ttl: float | None = None,
    show: Callable[[Event], None] = lambda event: None,
    make: bool = True,
    **settings: Any,
) -> tuple[Deployer, Serving]:
    """The deployer, which has agreed, and what it is to serve. Settings are told apart by their names."""
    asked = {name: value for name, value in settings.items() if name in ServeSpec.model_fields}
    own = {name: value for name, value in settings.items() if name not in asked}
    refuse_unknown(own, dict.fromkeys([*settings_of(backend), *ServeSpec.model_fields]))
    spec = ServeSpec(**asked | ({} if ttl is None else {"ttl_minutes": ttl}))
    deployer = load_deployer(backend, own)
    deployer.check(device)
    if isinstance(deployer, Remote) and (elsewhere := deployer.elsewhere(spec, device, title)) is not None:
        if artifact is not None or base_model is not None or adapters:
            raise SpecError(f"{elsewhere.title} is served from where it lies: leave the artifact and the base model out, or that setting")
        return deployer, elsewhere
    wanted = serving(
        artifact,
        base_model,
        device=device,
        merge=merge,
        adapters=adapters,
        spec=spec,
        trust_remote_code=trust_remote_code,
        title=title,
        make=make,
        show=show,
    )
    return deployer, wanted


def _patience(deployer: Deployer, wanted: Serving) -> float:
    return deployer.patience(wanted) if isinstance(deployer, Remote) else _PATIENCE + wanted.bytes / _RATE


def _talk(messages: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(message) for message in messages]


def _body(
    model: str | None, max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None, stop: Sequence[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    # top_k is not OpenAI's: a server of that interface alone is not bothered with it unless it is used
    optional = {"model": model, "top_k": top_k or None, "seed": seed, "stop": [stop] if isinstance(stop, str) else list(stop) or None}
    return values | {name: value for name, value in optional.items() if value is not None}


def _pieces(events: Generator[dict[str, Any]], text: Callable[[dict[str, Any]], Any]) -> Generator[str]:
    with contextlib.closing(events):  # whoever stops listening ends the answer at once
        for event in events:
            if piece := text(_first(event)):
                yield str(piece)


def _first(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError) as exc:
        raise EndpointError(_FORM) from exc
    if not isinstance(choice, dict):
        raise EndpointError(_FORM)
    return choice
