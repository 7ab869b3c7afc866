"""Runs in containers of a Docker engine on this machine, in the very image that a cloud would run.

Beside what every run's folder holds (run_folder.py):

    container.json  the container of the run's last life, where that life begins in events and log, and, once it is over, how it ended
    lock            held by the client that starts a container or takes in what an ended one left

A container is found by its labels, by any client. It stays until somebody looked after its end: then its log, exit code and whether
the kernel killed it for memory are put into the run's folder, and the container is removed. So after a look nothing is orphaned, and
what is over can be asked for without an engine. A run on several machines has a container for each (nodes.py).
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from docker import DockerClient

from trimtab import images
from trimtab.backends import nodes, run_folder
from trimtab.backends.base import RunHandle, RunRecord, RunState, RunStatus
from trimtab.backends.container import (
    FOLDER_LABEL,
    Limits,
    choices,
    container_body,
    expected_memory,
    make_nf4,
    out_of_memory,
)
from trimtab.backends.engine import Found, OnEngine
from trimtab.backends.life import Ended, Life, read_life, write_life
from trimtab.backends.run_folder import LocalRuns, again, belongs, read_json, refuse_absent, write_json
from trimtab.cache import nf4_cache
from trimtab.errors import BackendError, BackendUnavailable, RunNotFound, StagingError
from trimtab.events import EventLog
from trimtab.layout import JobDir
from trimtab.progress import sentence
from trimtab.spec import JobSpec

GRACE = run_folder.GRACE
_PATIENCE = 120.0  # seconds that another client may take to start a container or to copy its log
_KILLED = 137  # 128 + SIGKILL


class DockerBackend(OnEngine, LocalRuns):
    """Jobs as containers on this machine. A run's folder is `home/runs/<id>`, mounted at /opt/ml; `home` as for processes.

    `image` is a tag (default: the one that this trimtab would build), `cpus` a list of CPUs such as "0-3,8", `memory` and `shm_size` sizes
    such as "8g" (shared memory: 1g), `network` one of the engine's networks (none: no network at all), `client` an engine (default:
    DOCKER_HOST's, else this machine's). Raises SpecError for a size, a list or a name that is none.
    """

    name = "docker"

    def __init__(
        self,
        home: str | Path | None = None,
        image: str | None = None,
        cpus: str | None = None,
        memory: str | int | None = None,
        shm_size: str | int | None = None,
        network: str | None = None,
        client: DockerClient | None = None,
    ) -> None:
        LocalRuns.__init__(self, home)
        OnEngine.__init__(self, image, Limits.parse(cpus=cpus, memory=memory, shm_size=shm_size, network=network), client)

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable or SpecError for a job that cannot run here, before anything is fetched."""
        run_folder.refuse_remote(spec)
        self.refuse_unable(spec.device)
        self.limits.refuse_network(spec.nodes)
        self._image(spec.device)

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The body of the engine's request, the image that its tag means now, and the folder it works in."""
        handle, folder = RunHandle(self.name, run_id), self.home / "runs" / run_id
        image = self._image(spec.device)
        named = {name: str(path) for name, path in channels.items()}
        info = self.engine.info()
        nf4 = nf4_cache() if spec.device == "xeon" and spec.train.method == "qlora" else None  # others would neither read nor write it

        def body(there: Path) -> dict[str, Any]:
            """What the container of the machine with this folder is asked to be; its labels name the run's."""
            found = container_body(handle, image.id, spec.device, there, named, self.limits, info, nf4)
            return found | {"Labels": found["Labels"] | {FOLDER_LABEL: str(folder)}}

        return {
            "handle": str(handle),
            "folder": str(folder),
            "image": image.tag,
            **(nodes.together(handle, folder, spec.nodes, body) if spec.nodes > 1 else {"container": body(folder)}),
            "channels": named,
            "hyperparameters": spec.train.to_hyperparameters(),
        }

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        handle = RunHandle(self.name, run_id or f"trim-{uuid.uuid4().hex[:8]}")
        refuse_absent({name: str(path) for name, path in channels.items()})
        request = self.render(spec, channels, handle.id)
        folder = Path(request["folder"])
        make_nf4(request["container"])
        try:
            with run_folder.new_folder(folder, request):
                nodes.make_folders(folder, request)
                with self._held(folder):
                    run_folder.write_record(folder, spec, request)
                    self._start(handle, folder, request)
        except BackendError:
            if not self.engine.containers(handle):
                shutil.rmtree(folder, ignore_errors=True)  # it has not begun
            raise
        except OSError as exc:
            raise BackendError(f"the run cannot be started in {folder} ({exc}): set TRIMTAB_HOME to a folder that can be written") from exc
        return handle

    def resume(self, handle: RunHandle) -> None:
        """Start the same request again. The image and limits that this backend was expressly given take the place of the run's own."""
        folder = self._folder(handle)
        record = read_json(folder / "run.json")
        request = self._anew(record["request"])
        refuse_absent(request["channels"])
        make_nf4(request["container"])
        for mount in request["container"]["HostConfig"]["Mounts"]:
            if not Path(mount["Source"]).exists():
                raise StagingError(f"{mount['Source']}, which {handle} reads, is gone: prepare the data again by repeating  trimtab fit")
        running = f"{handle} is still running. Watch it:  trimtab logs -f {handle}"
        status = self.status(handle)
        if status.state is RunState.SUCCEEDED:
            raise BackendError(f"{handle} has succeeded, there is nothing to go on with. Ask it something:  trimtab chat {handle}")
        if not status.done:
            raise BackendError(running)
        try:
            with self._idle(folder):
                write_json(folder / "run.json", {**record, "request": request})
                try:
                    self._start(handle, folder, request)
                except BackendError:
                    write_json(folder / "run.json", record)  # what cannot be started is not what the next resume begins with
                    raise
        except BlockingIOError as exc:  # another client was quicker
            raise BackendError(running) from exc
        except OSError as exc:
            raise BackendError(f"{handle} cannot be started again in {folder} ({exc}): mend that and repeat the command") from exc

    def status(self, handle: RunHandle) -> RunStatus:
        folder = self._folder(handle)
        life = self._look(handle, folder)  # first: what a dead container wrote can no longer change
        ended, told = life.ended, run_folder.said(JobDir(folder), life.events_from)
        if ended is None:
            return run_folder.going(told)
        host, there, ended = nodes.to_blame(folder, ended)
        cause = JobDir(there).cause()
        if ended.oom_killed and ended.exit_code == _KILLED:
            request = read_json(folder / "run.json")["request"]
            limit = request["container"]["HostConfig"].get("Memory", 0)
            cause = out_of_memory(handle, cause, told, limit, expected_memory(request))
        if host != nodes.FIRST:
            cause = f"{host}: {cause or _silence(handle, there, ended)[1]}"
        return run_folder.over(handle, told, cause, lambda: _silence(handle, folder, ended))

    def logs(self, handle: RunHandle, *, follow: bool = False) -> Iterator[str]:
        folder = self._folder(handle)
        found = [run_folder.split(self._log(handle.id, folder, follow))]
        for host, there in nodes.others(folder).items():
            found.append(nodes.prefixed(host, run_folder.split(self._log(nodes.name_of(handle, host), there, follow))))
        return found[0] if len(found) == 1 else nodes.lines(found, follow, lambda: self._look(handle, folder))

    def stop(self, handle: RunHandle) -> None:
        folder = self._folder(handle)
        life = self._look(handle, folder)
        if life.ended is not None:
            return
        (folder / "stop").touch()
        self.engine.stop(life.container, int(GRACE))  # machines agree to stop: the others have ended now, but for one that hangs
        nodes.end_others(self.engine, folder)
        if not run_folder.until(lambda: self._look(handle, folder).ended, 20.0):
            raise BackendError(f"{handle} does not end, not even when killed: look at it with  docker inspect {handle.id}")

    def runs(self) -> list[RunRecord]:
        found = super().runs()
        for container in self.engine.containers():
            if container.ours and not container.running and _left_over(container):
                self.engine.remove(container.id)
        for network in self.engine.networks():
            if network.ours and _left_over(network) and not self.engine.containers(network.handle):
                self.engine.remove_networks(network.handle)
        return found

    def _folders(self) -> dict[RunHandle, Path]:
        """Also of runs whose folders lie under another home, while they have containers."""
        found = super()._folders()
        for container in self.engine.containers():
            if belongs(container.folder, container.handle):
                found.setdefault(container.handle, container.folder)
        return found

    def _folder(self, handle: RunHandle) -> Path:
        try:
            return super()._folder(handle)
        except RunNotFound:
            if handle.backend == self.name:
                for container in self.engine.containers(handle):
                    if belongs(container.folder, handle):
                        return container.folder
            raise

    @contextlib.contextmanager
    def _held(self, folder: Path) -> Iterator[None]:
        """The lock of a run, which holds those of its further machines."""
        with contextlib.ExitStack() as held:
            for place in (folder, *nodes.others(folder).values()):
                held.enter_context(run_folder.lock(place / "lock", _PATIENCE))
            yield

    @contextlib.contextmanager
    def _idle(self, folder: Path) -> Iterator[None]:
        with self._held(folder):
            life = read_life(folder)
            if life is not None and life.ended is None:
                raise BlockingIOError(f"{folder} has a container")
            yield

    def _image(self, device: str) -> images.Image:
        image = self.own_image(device, "train")
        if (made_for := image.labels.get("device", device)) != device:
            raise BackendUnavailable(f"{image.tag} computes on device {made_for}: choose  --device {made_for}, or an image for {device}")
        return image

    def _anew(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request of a run with what this backend was given expressly."""
        image = self._image("gpu" if "DeviceRequests" in request["container"]["HostConfig"] else "xeon") if self.image else None
        self.limits.refuse_network(1 + len(request.get("others", {})))
        given = self.limits.host()
        if "others" in request:
            given.pop("NetworkMode", None)  # they have their own

        def anew(body: dict[str, Any]) -> dict[str, Any]:
            host = body["HostConfig"] | given
            return {**body, "HostConfig": host, "Image": image.id if image else body["Image"]}

        found = {**request, "container": anew(request["container"]), "image": image.tag if image else request["image"]}
        return found | {"others": {host: anew(body) for host, body in request["others"].items()}} if "others" in request else found

    def _start(self, handle: RunHandle, folder: Path, request: Mapping[str, Any]) -> None:
        """A new life of a run whose lock is held. What cannot be started leaves no container."""
        job = JobDir(folder)
        run_folder.begin(job)
        self._clear(handle)
        events = EventLog(job.events)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            for choice in choices(request["image"], request["container"]):
                events.write(choice)
                log.write(f"{sentence(choice)}\n")
        events.close()
        life = Life(events_from=job.events.stat().st_size, log_from=(folder / "log.txt").stat().st_size)
        write_life(folder, life)
        try:
            nodes.begin(self.engine, folder, request)
            life = life.model_copy(update={"container": self.engine.create(handle.id, request["container"])})
            write_life(folder, life)
            self.engine.start(life.container)
            nodes.start_others(self.engine, handle, folder, request)
        except BackendError as exc:
            with contextlib.suppress(BackendError):
                self._clear(handle)  # where that fails, too, the next look finds out
            write_life(folder, life.model_copy(update={"ended": Ended(started=False, error=str(exc), at=_now())}))
            raise

    def _clear(self, handle: RunHandle) -> None:
        for container in self.engine.containers(handle):
            self.engine.remove(container.id)
        self.engine.remove_networks(handle)

    def _look(self, handle: RunHandle, folder: Path) -> Life:
        """The run's newest life; that of several machines is over when all have ended."""
        return nodes.look(self.engine, handle, folder, self._look_at)

    def _look_at(self, name: str, folder: Path) -> Life:
        """A container's newest life. When it has ended, what it left is put into its folder, and it is removed."""
        life = read_life(folder)
        if life is not None and (life.ended is not None or _running(self.engine.inspect(life.container or name))):
            return life
        try:
            with self._held(folder):  # then nobody is just starting it, or taking it in
                life = read_life(folder) or Life()
                if life.ended is not None:
                    return life
                facts = self.engine.inspect(life.container or name)
                if _running(facts):
                    return life
                life = life.model_copy(update={"ended": self._take_in(folder, life, facts)})
                write_life(folder, life)
                if facts is not None:
                    self.engine.remove(facts["Id"])
                return life
        except BlockingIOError as exc:
            raise BackendError(f"another trimtab is busy with {name} for {_PATIENCE:g} s: end it and repeat the command") from exc

    def _take_in(self, folder: Path, life: Life, facts: Mapping[str, Any] | None) -> Ended:
        """Copy an ended container's log; how it ended. Done again from the start when it was cut short."""
        if facts is None:
            return Ended(started=bool(life.container), at=_now())
        state = facts["State"]
        if state["Status"] == "created":
            return Ended(started=False, at=_now())
        with (folder / "log.txt").open("ab") as log:
            log.truncate(life.log_from)
            for part in self.engine.output(facts["Id"], follow=False):
                log.write(part)
        return Ended(exit_code=state["ExitCode"], oom_killed=state["OOMKilled"], at=state["FinishedAt"])

    def _log(self, name: str, folder: Path, follow: bool) -> Iterator[bytes]:
        """The log in pieces: earlier lives from the file, the present one from the engine until somebody takes it in."""
        file, life = folder / "log.txt", self._look_at(name, folder)
        first, sent = life, 0
        if life.ended is None:
            yield from _bytes(file, 0, life.log_from)
        while life.ended is None and life.container == first.container:
            skip = sent
            for part in self.engine.output(life.container, follow=follow):
                fresh, skip = part[skip:], max(0, skip - len(part))
                sent += len(fresh)
                yield fresh
            if not follow:
                return
            life = self._look_at(name, folder)
        begin = 0 if first.ended is not None else first.log_from + sent
        yield from _bytes(file, begin, None if life.container == first.container else life.log_from)


def _left_over(found: Found) -> bool:
    """Whether no look will reach it: its run's folder is gone, or a client died between taking an end in and removing it."""
    life = read_life(found.folder) if belongs(found.folder, found.handle) else None
    return not found.folder.exists() or (life is not None and life.ended is not None)


def _running(facts: Mapping[str, Any] | None) -> bool:
    return facts is not None and bool(facts["State"]["Running"])


def _silence(handle: RunHandle, folder: Path, ended: Ended) -> tuple[RunState, str]:
    """How a run stands that ended without a word."""
    if not ended.started:
        return RunState.FAILED, f"it could not be started: {ended.error}" if ended.error else run_folder.never_started(handle)
    if (folder / "stop").exists():
        how = f": it did not end within {GRACE:g} s of SIGTERM and was killed" if ended.exit_code == _KILLED else ""
        return RunState.STOPPED, f"stopped before it could write a checkpoint{how}; {again(handle)}"
    if ended.exit_code is None:
        return RunState.FAILED, f"its container was removed before its end was seen (docker rm?), and its log with it; {again(handle)}"
    how = "killed by SIGKILL from outside" if ended.exit_code == _KILLED else f"exit code {ended.exit_code}"
    return RunState.FAILED, run_folder.ended_silently(handle, folder, how)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _bytes(file: Path, begin: int, end: int | None) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        opened.seek(begin)
        yield opened.read(-1 if end is None else max(0, end - begin))
