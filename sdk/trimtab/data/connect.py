"""Sockets for pages: to an address that was checked, and not for longer than a page may take."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import cast

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

from trimtab.data.addresses import Resolver, checked
from trimtab.errors import DataError


class Deadline:
    """Ends a page's connections when its time is over, wherever it waits: a timeout of a read starts again with every byte."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._lock, self._sockets = threading.Lock(), list[socket.socket]()
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            for sock in self._sockets:
                sock.close()
            self._sockets.clear()

    def left(self) -> float:
        return self._end - time.monotonic()

    def reason(self) -> str | None:
        if self.left() > 0:
            return None
        return f"it took longer than {self._seconds:g} s; raise max_page_seconds (--max-page-seconds) if the page is worth it"

    def check(self) -> None:
        if reason := self.reason():
            raise DataError(reason)

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.append(sock.dup())  # TLS takes the socket over; shutting down the duplicate ends the same connection
        if self.left() <= 0:
            self._cut()

    def _cut(self) -> None:
        with self._lock:
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # already closed by the other side


class Gate:
    """Makes the sockets: the address that is checked is the address that is connected to."""

    def __init__(self, resolver: Resolver, deadline: Deadline, allow_private_hosts: bool) -> None:
        self.resolver, self.deadline, self.allow_private_hosts = resolver, deadline, allow_private_hosts

    def connect(self, connection: HTTPConnection) -> socket.socket:
        host, port = connection.host, connection.port or connection.default_port
        try:
            addresses = checked(host, self.resolver(host, port), allow_private_hosts=self.allow_private_hosts)
        except (OSError, UnicodeError) as exc:
            error = exc if isinstance(exc, socket.gaierror) else socket.gaierror(str(exc))
            raise NameResolutionError(host, connection, error) from exc
        failed: OSError | None = None
        for address in addresses:
            self.deadline.check()
            try:
                sock = create_connection((address, port), cast(float, connection.timeout), None, connection.socket_options)
            except OSError as exc:
                failed = exc
                continue
            self.deadline.watch(sock)
            return sock
        if isinstance(failed, TimeoutError):
            raise ConnectTimeoutError(connection, f"no answer from {host}") from failed
        raise NewConnectionError(connection, f"{failed}") from failed


class ProxyGate(Gate):
    """To a proxy that the user's environment names: its address is the user's choice, the deadline holds."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(gate.resolver, gate.deadline, allow_private_hosts=True)


def use_gate(manager: PoolManager, gate: Gate) -> None:
    """Every pool that `manager` opens makes its sockets through `gate`."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return gate.connect(self)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return gate.connect(self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    manager.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}
