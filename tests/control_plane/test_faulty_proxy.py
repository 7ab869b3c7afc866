"""The proxy that these and other tests put before a service asks it once, and once more only where nothing can have been done."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from support.faulty_proxy import FaultyProxy

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Script = list[list[bytes]]


@pytest.fixture
def service() -> Iterator[Callable[[Script], tuple[str, list[bytes]]]]:
    """A service that has, for each connection, what it answers to each request before it closes it; and the requests' bodies."""
    with contextlib.ExitStack() as opened:

        def start(script: Script) -> tuple[str, list[bytes]]:
            listening, bodies = socket.create_server(("127.0.0.1", 0)), []
            listening.settimeout(60)
            opened.enter_context(listening)

            def serve() -> None:
                for answers in [*script, [b""]]:  # one more than should come
                    try:
                        connection, _ = listening.accept()
                    except OSError:  # the test is over
                        return
                    with connection, connection.makefile("rb") as asked:
                        for answer in answers:
                            while asked.readline() != b"\r\n":
                                pass
                            bodies.append(asked.read(4))
                            connection.sendall(answer)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            opened.callback(thread.join, 60)
            opened.callback(listening.shutdown, socket.SHUT_RDWR)
            return f"http://127.0.0.1:{listening.getsockname()[1]}", bodies

        yield start


@pytest.mark.parametrize(
    ("script", "statuses", "asked"),
    [
        ([[ANSWER, ANSWER]], [200, 200], [b"one.", b"two."]),
        ([[ANSWER], [ANSWER]], [200, 200], [b"one.", b"two."]),  # closed while it idled
        ([[ANSWER, b""], [ANSWER]], [200, 200], [b"one.", b"two.", b"two."]),  # closed as the request came
        ([[ANSWER, b"HTTP/1.1 2"]], [200, 0], [b"one.", b"two."]),  # an answer had begun
        ([[b""]], [0], [b"one."]),  # it had not idled: what it did is not known
    ],
)
def test_a_request_is_sent_again_only_where_an_idle_connection_was_closed(
    service: Callable[[Script], tuple[str, list[bytes]]], script: Script, statuses: list[int], asked: list[bytes]
) -> None:
    url, bodies = service(script)
    found = []
    with FaultyProxy(url) as proxy:
        client = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=60)
        with contextlib.closing(client):
            for body in (b"one.", b"two.")[: len(statuses)]:
                try:
                    client.request("POST", "/", body)
                    with client.getresponse() as answer:
                        answer.read()
                        found.append(answer.status)
                except (http.client.HTTPException, OSError):
                    found.append(0)
    assert (found, bodies) == (statuses, asked)
