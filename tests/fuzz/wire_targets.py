"""What comes over the wire to a server, and what a run says of itself: any bytes are a request, an event, or a refusal."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import socket
import threading

from hypothesis import strategies as st

from fuzz.running import Target
from trimtab import events
from trimtab.errors import EndpointError, SpecError
from trimtab.spec import ServeSpec
from trimtab_runtime import bodies
from trimtab_runtime.http import Connection, Incoming, Limits, Server

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
_NAMES = st.sampled_from(
    "inputs parameters messages prompt model stream temperature top_p top_k seed stop stop_sequences max_tokens max_new_tokens n tools "
    "logit_bias response_format stream_options best_of role content type text do_sample return_full_text include_usage".split()
)
_NASTY = st.sampled_from([0, -1, 2**63, 1e308, -0.0, float("nan"), "", "\ud800", "text", [], {}, [""], [{}], True, "a" * 300])
_VALUES = st.recursive(
    _NASTY | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=5),
    max_leaves=12,
)
_BODY = st.binary(max_size=200) | st.dictionaries(_NAMES, _VALUES, max_size=6).map(lambda value: json.dumps(value).encode())


def any_body_is_a_request_or_refused(body: bytes) -> None:
    try:
        values = bodies.decode(body)
    except EndpointError:
        return
    for kind in (bodies.Inputs, bodies.Chat, bodies.Completions):
        try:
            asked = bodies.parse(kind, values)
        except EndpointError:
            continue
        sampling = asked.own if isinstance(asked, bodies.Inputs) else asked
        assert math.isfinite(sampling.drawn_at)
        assert 0 < sampling.share <= 1
        assert all(sampling.stops)
        json.dumps(asked.model_dump(mode="json"), ensure_ascii=False).encode()


class _Echo:
    """A server that answers with the body, in a thread of its own, for as long as the process lives."""

    def __init__(self) -> None:
        self.said: list[str] = []
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.address = listener.getsockname()
        started = threading.Event()

        async def serve() -> None:
            limits = Limits(head_bytes=2_000, body_bytes=5_000, discarded_bytes=20_000, request_seconds=2.0, linger_seconds=0.2)
            await Server(lambda head: None, self.answer, self.said.append, limits).start(listener)
            started.set()
            await asyncio.Event().wait()

        threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
        started.wait()

    async def answer(self, asked: Incoming, client: Connection) -> None:
        client.send(200, asked.body)


_echo = functools.cache(_Echo)


def any_bytes_are_answered_in_http(pieces: list[bytes]) -> None:
    server = _echo()
    answer = b""
    with socket.create_connection(server.address, timeout=10) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
            while found := client.recv(65_536):
                answer += found
        except TimeoutError:
            raise AssertionError("it waits for what does not come") from None
        except OSError:
            pass  # it may hang up on nonsense
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert server.said == []
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwords")
        answer = b""
        while found := client.recv(65_536):
            answer += found
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"words")


def any_line_is_an_event_or_none(line: str) -> None:
    event = events.parse(line)
    if event is not None:
        assert repr(events.parse(json.dumps(event.model_dump(mode="json")))) == repr(event)


def any_text_is_a_serve_spec_or_refused(text: str) -> None:
    try:
        spec = ServeSpec.from_text(text)
    except SpecError:
        return
    assert ServeSpec.from_text(spec.to_text()) == spec
    assert "\n" not in spec.to_text()


_HTTP = st.sampled_from(
    [
        *(b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"Host: a\r\n"),
        *(b"Host: b\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 9999999\r\n", b"5\r\nwords\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n"),
        *(b"\r\n", b"\n", b"words", b"X: " + b"y" * 1_500, b"\0"),
    ]
)
_EVENT_NAMES = (
    "event name at detail done of value reason step epoch loss lr grad_norm tokens_per_second seconds_left memory_mb path state seconds"
)
_EVENTS = st.dictionaries(
    st.sampled_from(_EVENT_NAMES.split()),
    JSON
    | st.sampled_from(["phase", "progress", "choice", "step", "checkpoint", "finished", "succeeded"])
    | st.floats()
    | st.integers(0, 9),
    max_size=14,
)
_STEPS = st.fixed_dictionaries(
    {
        "event": st.just("step"),
        **{name: st.integers(0, 10**9) for name in ("step", "of", "memory_mb")},
        **{name: st.floats() for name in "epoch loss lr grad_norm tokens_per_second seconds_left".split()},
    }
)
_SPEC_NAMES = st.sampled_from([*ServeSpec.model_fields, "nmae", ""])
_SERVE = st.dictionaries(_SPEC_NAMES, JSON | st.integers(0, 100) | st.just(1), max_size=5)

TARGETS = [
    Target("bodies", _BODY, any_body_is_a_request_or_refused),
    Target("http", st.lists(_HTTP | st.binary(max_size=30), max_size=12), any_bytes_are_answered_in_http),
    Target("events", st.text(max_size=100) | (_EVENTS | _STEPS).map(json.dumps), any_line_is_an_event_or_none),
    Target("serve spec", st.text(max_size=100) | (_SERVE | JSON).map(json.dumps), any_text_is_a_serve_spec_or_refused),
]
