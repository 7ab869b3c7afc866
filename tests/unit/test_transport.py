"""How the client asks: what it makes of answers, refusals, silences and streams, from servers that say exactly what a test tells them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trimtab.endpoint import Endpoint
from trimtab.errors import EndpointError
from trimtab.transport import HttpTransport, own_words, sent_events

Say = Callable[[int, "bytes | dict[str, Any]", dict[str, str]], None]
ANSWER = {"choices": [{"text": "the lamp", "message": {"content": "the lamp"}}]}


@contextlib.contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler, Say], None]) -> Iterator[str]:
    """The address of a server that answers each request with `answer(request, say)`."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer(self, self.say)

        def say(self, status: int, body: bytes | dict[str, Any], headers: dict[str, str]) -> None:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8080", "ftp://127.0.0.1", "http://", "file:///etc/hosts", "http://h:0", "http://h:99999", "http://[::1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(EndpointError, match=r"give one such as http://127\.0\.0\.1:8080"):
        Endpoint(address)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(EndpointError, match="no address") as refused:
        Endpoint("http://me:open-sesame@127.0.0.1:8080")
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize("key", ["", "a b", "line\nbreak", "schlüssel"])
def test_what_is_no_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(EndpointError, match="an API key is") as refused:
        Endpoint("http://127.0.0.1:8080", api_key=key)
    assert not key or key not in str(refused.value)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    with pytest.raises(EndpointError, match=r"nothing answers at .* deploy it again"):
        endpoint.chat("hello")
    with pytest.raises(EndpointError, match=r"nothing answers at .* deploy it again"):
        next(endpoint.stream("hello"))
    assert not endpoint.ready()


def test_something_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EndpointError, match=r"did not answer within 0\.2 s"):
            Endpoint(url, timeout=0.2).chat("hello")

        def answer(text: bytes) -> None:
            connection = silent.accept()[0]
            connection.recv(65_536)
            connection.sendall(text)
            connection.close()

        silent.accept()[0].close()
        for text, message in (
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "not JSON"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "OpenAI"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "broke off"),
            (b"", "broke off"),
            (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\nbad", "answered 502: bad"),
        ):
            thread = threading.Thread(target=answer, args=(text,))
            thread.start()
            with pytest.raises(EndpointError, match=message):
                Endpoint(url).chat("hello")
            thread.join()


def test_the_key_goes_along_and_to_nowhere_else() -> None:
    keys: list[str | None] = []

    def elsewhere(request: BaseHTTPRequestHandler, say: Say) -> None:
        keys.append("elsewhere")
        say(200, ANSWER, {})

    with serving(elsewhere) as other:

        def answer(request: BaseHTTPRequestHandler, say: Say) -> None:
            keys.append(request.headers["Authorization"])
            say(302, b"over there", {"Location": other})

        with serving(answer) as url, pytest.raises(EndpointError, match="answered 302: over there"):
            Endpoint(url, api_key="brass").chat("a")
    assert keys == ["Bearer brass"]


def test_what_is_asked_is_what_was_said() -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def answer(request: Any, say: Say) -> None:
        asked.append((request.path, request.body))
        say(200, ANSWER, {})

    with serving(answer) as url:
        endpoint = Endpoint(url)
        assert endpoint.generate("The keeper") == "the lamp"
        assert endpoint.chat("Who?", model="base", max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=10, seed=1, stop="x") == "the lamp"
    plain = {"max_tokens": 200, "temperature": 0.0, "top_p": 1.0}
    assert asked[0] == ("/v1/completions", {**plain, "prompt": "The keeper"})
    whole = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "model": "base", "top_k": 10, "seed": 1, "stop": ["x"]}
    assert asked[1] == ("/v1/chat/completions", {**whole, "messages": [{"role": "user", "content": "Who?"}]})


def test_a_server_that_is_not_ready_is_waited_for() -> None:
    came: list[float] = []

    def answer(request: BaseHTTPRequestHandler, say: Say) -> None:
        came.append(time.monotonic())
        if len(came) < 3:
            say(503, {"error": {"message": "the engine is starting"}}, {"Retry-After": "0"})
        else:
            say(200, ANSWER, {})

    with serving(answer) as url:
        assert Endpoint(url).generate("a") == "the lamp"
        assert len(came) == 3
        assert came[2] - came[0] >= 0.2, "it is not asked all the time"
        came.clear()
        with pytest.raises(EndpointError, match="answered 503: the engine is starting"):
            Endpoint(url, timeout=0.05).generate("a")


@pytest.mark.parametrize(("status", "headers"), [(503, {}), (429, {"Retry-After": "0"}), (500, {"Retry-After": "0"})])
def test_every_other_refusal_stands(status: int, headers: dict[str, str]) -> None:
    came = []

    def answer(request: BaseHTTPRequestHandler, say: Say) -> None:
        came.append(status)
        say(status, {"error": {"message": "full"}}, headers)

    with serving(answer) as url, pytest.raises(EndpointError, match=f"answered {status}: full"):
        Endpoint(url).generate("a")
    assert came == [status]


def test_a_stream_comes_in_pieces_and_ends_where_nobody_listens() -> None:
    gone = threading.Event()

    def answer(request: BaseHTTPRequestHandler, say: Say) -> None:
        request.send_response(200)
        request.end_headers()
        with contextlib.suppress(OSError):
            for number in range(10_000):
                request.wfile.write(b'data: {"choices": [{"text": "%d "}]}\n\n' % number)
                time.sleep(0.001)
        gone.set()

    with serving(answer) as url:
        pieces = Endpoint(url).stream("The keeper", chat=False)
        assert [next(pieces), next(pieces)] == ["0 ", "1 "]
        pieces.close()
        assert gone.wait(5)


def test_a_stream_that_breaks_off_says_so() -> None:
    def answer(request: BaseHTTPRequestHandler, say: Say) -> None:
        say(200, b'data: {"choices": [{"delta": {"content": "the"}}]}\n\ndata: {"error": {"message": "the engine ended"}}\n\n', {})

    with serving(answer) as url:
        pieces = Endpoint(url).stream("Who?")
        assert next(pieces) == "the"
        with pytest.raises(EndpointError, match="broken off: the engine ended"):
            next(pieces)


def test_only_a_text_is_gone_on_from() -> None:
    with pytest.raises(EndpointError, match="chat=False"):
        Endpoint("http://127.0.0.1:8080").stream([{"role": "user", "content": "a"}], chat=False)


def test_events_may_be_cut_anywhere() -> None:
    text = 'event: x\r\ndata: {"a": "ü"}\r\n\r\n: comment\ndata:{"b":1}\n\ndata: [DONE]\n\ndata: {"c": 2}\n\n'.encode()
    for size in (1, 2, 3, 7, 1000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(sent_events(pieces)) == [{"a": "ü"}, {"b": 1}]
    with pytest.raises(EndpointError, match="before its end"):
        list(sent_events([b'data: {"a": 1}\n\n']))
    assert list(sent_events([b'data:{"generated_text": "whole"}\n\n'])) == [{"generated_text": "whole"}]


def test_the_servers_own_words() -> None:
    assert own_words(b'{"error": {"message": "no"}}') == "no"
    assert own_words(b'{"error": "no", "error_type": "validation"}') == "no"
    assert own_words(b"<html>") == "<html>"
    assert own_words(b"") == "nothing more; look at the server's log"


def test_a_dead_servers_reason_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    transport = HttpTransport(f"http://127.0.0.1:{port}", explain=lambda: "it has ended: out of memory")
    with pytest.raises(EndpointError, match=r"nothing answers at .*\nit has ended: out of memory"):
        transport.ask("/v1/models", timeout=5)
