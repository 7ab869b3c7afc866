"""Runs endpoints for real: the model's data in `/opt/ml/model`, its container started with `serve`, its port reached.

Source: "Custom Inference Code with Hosting Services" (developer guide): port 8080, `GET /ping` answers 200 within 2 s, `POST /invocations`
answers within 60 s; a container that is to end gets SIGTERM, and SIGKILL 30 s later.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import sys
import tarfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control_plane import channels, cloudwatch
from control_plane.container import Asked, Container, Network
from control_plane.instance import Instance, StartFailed
from control_plane.layout import INSIDE, Tree
from control_plane.objects import TransferFailed, place_in, split_uri
from control_plane.process_place import Process
from control_plane.runner import Runner, log_output
from control_plane.store import Endpoint, EndpointConfig, Model

PORT = 8080
GRACE = 30.0  # seconds from SIGTERM to SIGKILL
STARTUP = 480  # seconds until /ping must have answered 200, where the variant says nothing
_PING = 2.0
_POLL = 0.1


@dataclass
class _Serving:
    """What serves an endpoint, one start of it."""

    folder: Path
    instance: Instance
    address: tuple[str, int]
    log: cloudwatch.LogStream
    reader: threading.Thread
    network: Network | None = None


@dataclass(eq=False)
class HostingRunner(Runner):
    """Runs endpoints; each start and each end of one is a thread."""

    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _serving: dict[str, _Serving] = field(default_factory=dict, init=False)

    def start(self, endpoint: Endpoint, model: Model, config: EndpointConfig) -> None:
        """Returns at once; the endpoint is told when it serves, or why not. What served it before goes on until then."""
        version = endpoint.version
        self.begin(lambda: self._start(endpoint, model, config, version), f"endpoint {endpoint.name}")

    def stop(self, endpoint: Endpoint, gone: Callable[[], None]) -> None:
        """Returns at once; `gone` is called when what serves it has ended."""

        def end() -> None:
            with self._lock:
                serving = self._serving.pop(endpoint.name, None)
            if serving is not None:
                self._end(serving)
            gone()

        self.begin(end, f"end of endpoint {endpoint.name}")

    def invoke(self, endpoint_name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], Iterator[bytes]]:
        """What the container answers: status, headers (names in lower case) and its body as it comes; read it to its end, or close it.

        Raises TimeoutError when the container does not answer, or goes on, within 60 s, and ConnectionError when nothing serves it or the
        container breaks off. The iterator raises these, too.
        """
        with self._lock:
            serving = self._serving.get(endpoint_name)
        if serving is None:
            raise ConnectionError(f"nothing serves {endpoint_name}")
        connection = http.client.HTTPConnection(*serving.address, timeout=self.settings.answer)
        try:
            connection.request("POST", "/invocations", body, dict(headers))
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise _broken(exc) from exc

        def pieces() -> Iterator[bytes]:
            try:
                while piece := answer.read1(65_536):
                    yield piece
            except (OSError, http.client.HTTPException) as exc:
                raise _broken(exc) from exc
            finally:
                answer.close()
                connection.close()

        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, pieces()

    def end_rest(self) -> None:
        with self._lock:
            found, self._serving = list(self._serving.values()), {}
        for serving in found:
            self._end(serving, grace=0.0)

    def _start(self, endpoint: Endpoint, model: Model, config: EndpointConfig, version: int) -> None:
        variant = config.variants[0]
        folder = self.work / "endpoints" / f"{endpoint.name}-{version}-{uuid.uuid4().hex[:8]}"
        serving: _Serving | None = None
        try:
            tree = Tree(folder).make()
            self._fetch(model, tree)
            serving = self._run(endpoint, model, variant, tree, version)
            if not self._healthy(endpoint, serving, variant, version):
                name = variant.get("VariantName", "AllTraffic")
                raise StartFailed(
                    f"The primary container for production variant {name} did not pass the ping health check. "
                    "Please check CloudWatch logs for this endpoint."
                )
        except (StartFailed, TransferFailed, channels.ChannelRefused) as exc:
            self._give_up(endpoint, serving, folder, version, str(exc))
        except Exception:  # noqa: BLE001  an endpoint must not stay in creation for ever, whatever went wrong here
            traceback.print_exc(file=sys.stderr)
            self._give_up(endpoint, serving, folder, version, "We encountered an internal error. Please try again.")
        else:
            self._take_over(endpoint, serving, version)

    def _give_up(self, endpoint: Endpoint, serving: _Serving | None, folder: Path, version: int, reason: str) -> None:
        if serving is not None:
            self._end(serving, grace=0.0)
        shutil.rmtree(folder, ignore_errors=True)
        if endpoint.version == version:
            endpoint.fail(reason)

    def _take_over(self, endpoint: Endpoint, serving: _Serving, version: int) -> None:
        with self._lock:
            current = endpoint.version == version and endpoint.status != "Deleting" and not self.closing.is_set()
            old = self._serving.get(endpoint.name)
            if current:
                self._serving[endpoint.name] = serving
        if not current:
            self._end(serving, grace=0.0)
            return
        endpoint.move("InService")
        if old is not None:
            self._end(old)

    def _fetch(self, model: Model, tree: Tree) -> None:
        """The model's data. Raises StartFailed."""
        container = model.container
        source = container.get("ModelDataSource", {}).get("S3DataSource", {})
        uri = source.get("S3Uri") or container.get("ModelDataUrl")
        if not uri:
            return
        packed = source.get("CompressionType", "Gzip") == "Gzip"
        try:
            bucket, key = split_uri(uri)
            if source.get("S3DataType") == "S3Prefix" and not packed:
                found = [each.key for each in self.objects.find(bucket, key, folders=True)]
                if not found:
                    raise TransferFailed("no objects")
                if folders := [each for each in found if each.endswith("/")]:  # as S3's console makes them
                    raise TransferFailed(f"{folders[0]} ends with a slash, which no file's name can")
                self.objects.fetch(bucket, {each: place_in(tree.model, each.removeprefix(key)) for each in found})
                return
            here = tree.root / "model.tar.gz" if packed else tree.model / key.rpartition("/")[2]
            self.objects.fetch(bucket, {key: here})
        except (TransferFailed, OSError) as exc:
            raise StartFailed(
                f'Failed to download model data for container "container_1" from URL: "{uri}". Please ensure that there is an object '
                f"located at the URL and that the role passed to CreateModel has permissions to download the object. ({exc})"
            ) from exc
        if packed:
            try:
                with tarfile.open(here) as tar:
                    tar.extractall(tree.model, filter="data")
            except (tarfile.TarError, OSError) as exc:
                raise StartFailed(
                    f'Failed to extract model data archive for container "container_1" from URL "{uri}". Please ensure that the object '
                    f"located at the URL is a valid tar.gz archive. ({exc})"
                ) from exc
            here.unlink()

    def _run(self, endpoint: Endpoint, model: Model, variant: Mapping[str, Any], tree: Tree, version: int) -> _Serving:
        name = variant.get("VariantName", "AllTraffic")
        environment = {**model.container.get("Environment", {}), "AWS_REGION": endpoint.region}
        log = cloudwatch.LogStream(self.logs, endpoint.log_group, f"{name}/i-{uuid.uuid4().hex[:17]}")
        network: Network | None = None
        try:
            instance: Instance
            if self.runner == "process":
                address = ("127.0.0.1", _free_port())
                own = {self.settings.root_variable: str(tree.root), self.settings.port_variable: str(address[1])}
                instance = Process([*self.command, "serve"], environment | own, tree.root)
            else:
                isolated = model.request.get("EnableNetworkIsolation", False)
                network = self.engine.network(f"{endpoint.name}-{version}", internal=True) if isolated else None
                instance = self._container(endpoint, model, tree, environment, network, version)
                address = _address(instance)
        except StartFailed as exc:
            log.write(f"{exc}\n".encode())
            log.close()
            if network is not None:
                self.engine.remove_network(network.name)
            raise
        return _Serving(tree.root, instance, address, log, log_output(instance.output(), log, endpoint.name), network)

    def _container(
        self, endpoint: Endpoint, model: Model, tree: Tree, environment: Mapping[str, str], network: Network | None, version: int
    ) -> Container:
        name = model.container.get("Image", "")
        image = self.engine.image(name)
        if image is None:
            raise StartFailed(f"The image '{name}' does not exist, or the role passed to CreateModel has no permissions to pull it.")
        return self.engine.start(
            Asked(
                name=f"sagemaker-{endpoint.name}-{version}",
                image=image,
                command=["serve"],
                environment=environment,
                mounts={INSIDE / "model": tree.model},
                network=network or Network("bridge"),
                hostname="model",
                port=PORT,
            )
        )

    def _healthy(self, endpoint: Endpoint, serving: _Serving, variant: Mapping[str, Any], version: int) -> bool:
        """Whether it answers the ping in time; not when it ends, or nobody waits for it any more."""
        until = time.monotonic() + variant.get("ContainerStartupHealthCheckTimeoutInSeconds", STARTUP)
        while time.monotonic() < until:
            if serving.instance.poll() is not None or self.closing.is_set() or endpoint.version != version or endpoint.status == "Deleting":
                return False
            if _ping(serving.address):
                return True
            time.sleep(_POLL)
        return False

    def _end(self, serving: _Serving, grace: float = GRACE) -> None:
        until = time.monotonic() + min(grace, self.settings.grace)
        if grace:
            serving.instance.terminate()
        while serving.instance.poll() is None and time.monotonic() < until and not self.closing.is_set():
            time.sleep(_POLL)
        serving.instance.kill()
        serving.reader.join(30)
        serving.log.close()
        serving.instance.remove()
        if serving.network is not None:
            self.engine.remove_network(serving.network.name)
        shutil.rmtree(serving.folder, ignore_errors=True)


def _broken(exc: Exception) -> OSError:
    if isinstance(exc, TimeoutError):
        return TimeoutError("nothing came in time")
    return ConnectionError(f"the container closed the connection ({exc})")


def _ping(address: tuple[str, int]) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=_PING)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/ping")
            with contextlib.closing(connection.getresponse()) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False


def _address(container: Container) -> tuple[str, int]:
    try:
        return container.address()
    except StartFailed:
        container.remove()
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
