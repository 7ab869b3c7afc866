"""What no client should do to an endpoint, and what it does then: its slots are free, and an ordinary request is answered."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from contract.http_contract import counted, wait_until_free
from trimtab.endpoint import Endpoint

ENDLESS = {"prompt": "The keeper", "max_tokens": 4000}


@contextlib.contextmanager
def connected(endpoint: Endpoint, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    parts = urllib.parse.urlsplit(endpoint.url)
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect((str(parts.hostname), parts.port))
        yield client


def head(endpoint: Endpoint, method: str = "POST", path: str = "/v1/completions", **headers: object) -> bytes:
    key = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *(f"{name.replace('_', '-')}: {value}" for name, value in (key | headers).items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def request(endpoint: Endpoint, body: dict[str, Any], path: str = "/v1/completions", **headers: object) -> bytes:
    data = json.dumps(body).encode()
    return head(endpoint, path=path, Content_Length=len(data), **headers) + data


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while block := client.recv(65_536):
            found += block
    return found


def runs(endpoint: Endpoint) -> bool:
    return counted(endpoint)["trimtab_running"] > 0


class RoughClients:
    """Mixed into a contract with its fixture `endpoint`; its port is reached with raw sockets."""

    @pytest.fixture(autouse=True)
    def _unharmed(self, endpoint: Endpoint) -> Iterator[None]:
        yield
        wait_until_free(endpoint)
        assert endpoint.generate("Bread", max_new_tokens=2)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_goes_away_frees_its_slot(self, endpoint: Endpoint, stream: bool) -> None:
        for hard in (False, True):
            before = counted(endpoint)["trimtab_tokens_out_total"]
            with connected(endpoint) as client:
                client.sendall(request(endpoint, ENDLESS | {"stream": stream}))
                while not runs(endpoint):
                    time.sleep(0.01)
                if hard:  # a reset instead of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wait_until_free(endpoint, 60)
            made = counted(endpoint)["trimtab_tokens_out_total"] - before
            assert made < 4000, "its answer was broken off, and not made to its end"

    def test_a_client_that_does_not_read_holds_up_nobody(self, endpoint: Endpoint) -> None:
        with connected(endpoint, receive_buffer=2048) as client:
            client.sendall(request(endpoint, ENDLESS | {"stream": True, "max_tokens": 400}))
            while not runs(endpoint):
                time.sleep(0.01)
            assert endpoint.generate("Bread", max_new_tokens=2)
            wait_until_free(endpoint, 20)  # its answer is made, and lies ready for as long as it may
            assert b"[DONE]" in self._read_until(client, b"[DONE]")

    @staticmethod
    def _read_until(client: socket.socket, mark: bytes) -> bytes:
        found = b""
        while mark not in found and (block := client.recv(65_536)):
            found += block
        return found

    def test_half_a_body_holds_no_slot(self, endpoint: Endpoint) -> None:
        data = json.dumps({"prompt": "The keeper", "max_tokens": 2}).encode()
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Content_Length=len(data)))
            for byte in data[:5]:
                client.sendall(bytes([byte]))
                time.sleep(0.02)
            assert not runs(endpoint)
            assert counted(endpoint)["trimtab_waiting"] == 0
            client.sendall(data[5:])
            assert b"200" in self._read_until(client, b"usage").partition(b"\r\n")[0], "slow is not wrong"
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Content_Length=len(data)) + data[:5])
            client.shutdown(socket.SHUT_WR)
            assert b" 200 " not in all_of(client)
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Content_Length=len(data))[:-7])

    def test_chunks_are_a_body_too(self, endpoint: Endpoint) -> None:
        data = json.dumps({"prompt": "The keeper", "max_tokens": 2}).encode()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:9], data[9:])) + b"0\r\n\r\n"
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Transfer_Encoding="chunked", Connection="close") + chunks)
            assert all_of(client).startswith(b"HTTP/1.1 200 ")
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Transfer_Encoding="chunked", Connection="close") + b"zz\r\n")
            assert all_of(client).startswith(b"HTTP/1.1 400 ")

    def test_requests_in_a_row_are_answered_in_their_order(self, endpoint: Endpoint) -> None:
        bodies = [{"prompt": "The keeper", "max_tokens": size} for size in (5, 1, 3)]
        sent = b"".join(request(endpoint, body) for body in bodies) + request(endpoint, bodies[0], Connection="close")
        with connected(endpoint) as client:
            client.sendall(sent)
            texts = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in all_of(client).split(b"HTTP/1.1 200 ")[1:]]
        assert [text["usage"]["completion_tokens"] for text in texts] == [5, 1, 3, 5]

    @pytest.mark.parametrize(
        "nonsense",
        [
            b"\x00\xff" * 500,
            b"\r\n" * 500 + b"?",
            b"GET\r\n\r\n",
            b"GET /ping HTTP/9.9\r\n\r\n",
            b"GET /ping HTTP/1.1\r\n\r\n",  # no Host
            b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: a\r\nBad name: x\r\n\r\n",
            b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
            b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{",
            b"POST /invocations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ],
    )
    def test_nonsense_is_refused_and_the_connection_closed(self, endpoint: Endpoint, nonsense: bytes) -> None:
        with connected(endpoint) as client:
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            answer = all_of(client)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 50")), answer[:100]
        assert answer.count(b"HTTP/1.1 ") <= 1, "one refusal is enough"

    def test_nonsense_behind_a_request_does_not_spoil_it(self, endpoint: Endpoint) -> None:
        with connected(endpoint) as client:
            client.sendall(request(endpoint, {"prompt": "The keeper", "max_tokens": 30}) + b"\x00nonsense\r\n\r\n")
            answer = all_of(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1 400 ") == 1

    def test_too_much_behind_a_request_is_dropped(self, endpoint: Endpoint) -> None:
        with connected(endpoint) as client, contextlib.suppress(OSError):
            client.sendall(request(endpoint, ENDLESS) + b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n" * 50_000)
            assert b" 200 " not in all_of(client)

    def test_too_many_or_too_long_headers_are_refused(self, endpoint: Endpoint) -> None:
        for bomb in (b"X: y\r\n" * 20_000, b"X: " + b"y" * 100_000 + b"\r\n", b"X: y\r\n" * 1_000_000):
            with connected(endpoint) as client:
                with contextlib.suppress(OSError):
                    client.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n" + bomb)
                answer = all_of(client)
            assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")), answer[:100]

    def test_who_asks_whether_to_send_is_told(self, endpoint: Endpoint) -> None:
        data = json.dumps({"prompt": "The keeper", "max_tokens": 2}).encode()
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Content_Length=len(data), Expect="100-continue"))
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            client.sendall(data)
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        with connected(endpoint) as client:
            client.sendall(head(endpoint, Content_Length=100 << 20, Expect="100-continue"))
            assert all_of(client).startswith(b"HTTP/1.1 413 ")

    def test_old_http_is_answered(self, endpoint: Endpoint) -> None:
        data = json.dumps({"prompt": "The keeper", "max_tokens": 2, "stream": True}).encode()
        with connected(endpoint) as client:
            sent = head(endpoint, Content_Length=len(data)).replace(b"HTTP/1.1", b"HTTP/1.0")
            client.sendall(sent + data)
            answer = all_of(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.partition(b"\r\n\r\n")[2].startswith(b"data: {"), "no chunks for it"
        assert answer.endswith(b"data: [DONE]\n\n")

    def test_many_connections_that_say_nothing(self, endpoint: Endpoint) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(600):
                stack.enter_context(connected(endpoint))
            assert endpoint.generate("Bread", max_new_tokens=2), "who says nothing longest makes room"
