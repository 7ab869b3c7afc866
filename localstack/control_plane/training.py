"""Runs training jobs for real: channels from S3, a container or process for each instance, logs, checkpoints, time limits, uploads.

A job has a thread. Its life is that of SageMaker's: Starting, Downloading, Training, Uploading, and an end; an interrupted spot job has
several. Wording of statuses and reasons is SageMaker's where it is known from its documentation or from reports of its users.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from control_plane import channels, cloudwatch, outputs
from control_plane.checkpoints import Budget, CheckpointSync
from control_plane.container import Asked, Network
from control_plane.instance import Ended, Instance, StartFailed
from control_plane.layout import INSIDE, Host, Tree, container_environment, hosts_of, local_checkpoints, write_config
from control_plane.objects import TransferFailed
from control_plane.process_place import Process
from control_plane.runner import Runner, log_output
from control_plane.store import TrainingJob

NO_IMAGE = "ClientError: Cannot pull algorithm container. Either the image does not exist or its permissions are incorrect."
NO_MEMORY = "ClientError: Please use an instance type with more memory, or reduce the size of job data processed on an instance."
INTERNAL = "InternalServerError: We encountered an internal error. Please try again."
_POLL = 0.2

Ending = Literal["Completed", "Failed", "Stopped"]
Why = Literal["", "Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Interrupted", "Closed"]


class _Over(Exception):
    """How the job ends."""

    def __init__(self, status: Ending, secondary: str = "", reason: str = "", artifacts: str = "") -> None:
        super().__init__(reason)
        self.status, self.secondary, self.reason, self.artifacts = status, secondary, reason, artifacts


@dataclass(eq=False)
class TrainingRunner(Runner):
    """Runs training jobs, each in a thread."""

    _budgets: dict[str, Budget] = field(default_factory=dict, init=False)

    def start(self, job: TrainingJob) -> None:
        """Returns at once; the job is told what happens."""
        self.begin(_Run(self, job).run, f"job {job.name}")

    def cut_sync(self, job: str, after: int = 0) -> None:
        """A fault: of this life of the job's instances, only `after` more checkpoint files reach S3."""
        self.budget(job).set(after)

    def budget(self, job: str) -> Budget:
        return self._budgets.setdefault(job, Budget())


@dataclass(eq=False)
class _Machine:
    """One instance of a job, with what goes on around it."""

    host: Host
    tree: Tree
    log: cloudwatch.LogStream
    instance: Instance
    sync: CheckpointSync | None
    reader: threading.Thread
    ended: Ended | None = None


@dataclass(eq=False)
class _Run:
    """One job on its way."""

    runner: TrainingRunner
    job: TrainingJob
    on_instances: float = 0.0  # seconds of the lives before this one
    machines: list[_Machine] = field(default_factory=list)
    network: Network | None = None

    def run(self) -> None:
        """The job is told of its end when nothing of it is left here."""
        work = self.runner.work / "jobs" / self.job.name
        try:
            over = self._live(work)
        except _Over as exc:
            over = exc
        except (channels.ChannelRefused, StartFailed) as exc:
            over = _Over("Failed", reason=str(exc))
        except TransferFailed as exc:
            over = _Over("Failed", reason=f"ClientError: Artifact upload failed:{exc}")
        except Exception:  # noqa: BLE001  a job must not stay in progress for ever, whatever went wrong here
            traceback.print_exc(file=sys.stderr)
            over = _Over("Failed", reason=INTERNAL)
        self._remove_machines()
        shutil.rmtree(work, ignore_errors=True)
        self.job.finish(over.status, over.secondary or over.status, failure_reason=over.reason, artifacts_uri=over.artifacts)

    def _live(self, work: Path) -> _Over:
        """How it ended, which may be raised, too."""
        job, request = self.job, self.job.request
        hosts = hosts_of(request["ResourceConfig"])
        if self.runner.runner == "process" and len(hosts) > 1:
            raise _Over("Failed", reason="ClientError: the process runner has one instance: ask for one, or run containers")
        life = 0
        while True:
            life += 1
            self._obtain()
            began = time.monotonic()
            trees = self._prepare(work / f"life-{life}", hosts)
            why = self._train(trees, began)
            self.on_instances += time.monotonic() - began
            if why != "Interrupted":
                break
            self._end_machines(send=True)
            job.move("Interrupted")
            self._remove_machines()
            shutil.rmtree(work / f"life-{life}", ignore_errors=True)
            job.move("Starting")
        if why == "Closed":
            raise _Over("Failed", reason=INTERNAL)
        job.move("Uploading")
        failed = self._failed() if why == "" else None
        self._end_machines(send=True)
        artifacts = outputs.upload(self.runner.objects, request, [each.tree for each in self.machines], work)
        if failed is not None:
            return _Over("Failed", reason=_reason(failed), artifacts=artifacts)
        return _Over("Completed", artifacts=artifacts) if why == "" else _Over("Stopped", why, artifacts=artifacts)

    def _obtain(self) -> None:
        """Instances, once the job's shortage is over. Raises _Over."""
        job, began = self.job, time.monotonic()
        limit = job.request["StoppingCondition"].get("MaxPendingTimeInSeconds")
        job.move("Starting", "Launching requested ML instances")
        while time.time() < job.created.timestamp() + job.shortage:
            self._refuse_to_go_on()
            if limit is not None and time.monotonic() - began >= limit:
                raise _Over("Stopped")
            job.move("Pending", "Insufficient capacity error from EC2 while launching instances, retrying!")
            time.sleep(_POLL)
        self._refuse_to_go_on()
        job.move("Starting", "Preparing the instances for training")

    def _refuse_to_go_on(self) -> None:
        """Raise _Over for a job that is to end, while it has no container."""
        why = self._asked_to_end()
        if why not in ("", "Interrupted"):
            raise _Over("Failed", reason=INTERNAL) if why == "Closed" else _Over("Stopped", why)

    def _prepare(self, folder: Path, hosts: Sequence[Host]) -> list[tuple[Host, Tree]]:
        """Each machine's tree, with its channels. Raises ChannelRefused."""
        request, found = self.job.request, []
        given = request.get("InputDataConfig", [])
        self.job.move("Downloading", "Downloading input data")
        for host in hosts:
            tree = Tree(folder / host.name).make([each["ChannelName"] for each in given])
            write_config(tree, request, host, hosts)
            for each in given:
                self._refuse_to_go_on()
                channels.download(self.runner.objects, each, host, hosts, tree)
            found.append((host, tree))
        return found

    def _train(self, trees: Sequence[tuple[Host, Tree]], began: float) -> Why:
        """Until all machines have ended, or the job is to end; then they have been told to, and had their time. Raises StartFailed."""
        self.job.move("Downloading", "Downloading the training image")
        self.runner.budget(self.job.name).set(None)
        image = self._image()
        if len(trees) > 1:
            isolated, names = self.job.request.get("EnableNetworkIsolation", False), [host.name for host, _ in trees]
            self.network = self.runner.engine.network(self.job.name, names, internal=isolated)
        for host, tree in trees:
            self.machines.append(self._start(host, tree, image))
        self.job.move("Training")
        why: Why = ""
        while not self._all_ended():
            if why := self._asked_to_end(time.monotonic() - began):
                break
            if self._failed() is not None:
                break
            time.sleep(_POLL)
        if why == "Interrupted":
            self.job.interruptions.clear()
        self._shut_down(0.0 if why == "Closed" else self.runner.settings.notice if why == "Interrupted" else self.runner.settings.grace)
        return why

    def _asked_to_end(self, running: float = 0.0) -> Why:
        job, limits = self.job, self.job.request["StoppingCondition"]
        if self.runner.closing.is_set():
            return "Closed"
        if job.stopping.is_set():
            return "Stopped"
        if self.on_instances + running >= limits.get("MaxRuntimeInSeconds", 86_400):
            return "MaxRuntimeExceeded"
        if job.spot and time.time() - job.created.timestamp() >= limits.get("MaxWaitTimeInSeconds", float("inf")):
            return "MaxWaitTimeExceeded"
        return "Interrupted" if job.spot and job.interruptions.is_set() else ""

    def _image(self) -> str:
        if self.runner.runner == "process":
            return ""
        name = self.job.request["AlgorithmSpecification"].get("TrainingImage", "")
        found = self.runner.engine.image(name) if name else None
        if found is None:
            raise _Over("Failed", reason=NO_IMAGE)
        return found

    def _start(self, host: Host, tree: Tree, image: str) -> _Machine:
        """Checkpoints first, then the container, then what goes on around it."""
        job, runner, request = self.job, self.runner, self.job.request
        sync, in_containers = None, runner.runner == "docker"
        if checkpoints := request.get("CheckpointConfig"):
            every, copy = runner.settings.sync_every, in_containers and runner.engine.volumes
            sync = CheckpointSync(runner.objects, checkpoints["S3Uri"], tree.checkpoints, runner.budget(job.name), every=every, copy=copy)
            try:
                sync.fetch()
            except TransferFailed as exc:
                raise _Over("Failed", reason=f"{channels.FAILED}{exc}") from exc
        log = cloudwatch.LogStream(runner.logs, cloudwatch.TRAINING, f"{job.name}/{host.name}-{time.time_ns() // 1_000_000}", job.observe)
        try:
            instance = runner.engine.start(self._asked(host, tree, image)) if in_containers else self._process(tree)
        except StartFailed as exc:
            log.write(f"{exc}\n".encode())
            log.close()
            raise
        machine = _Machine(host, tree, log, instance, sync, log_output(instance.output(), log, host.name))
        if sync is not None:
            sync.start(lambda: instance.pull(tree.checkpoints))
        return machine

    def _asked(self, host: Host, tree: Tree, image: str) -> Asked:
        request, algorithm = self.job.request, self.job.request["AlgorithmSpecification"]
        isolated = request.get("EnableNetworkIsolation", False)
        return Asked(
            name=f"sagemaker-{self.job.name}-{host.name}",
            image=image,
            entrypoint=algorithm.get("ContainerEntrypoint"),
            command=algorithm.get("ContainerArguments") or ([] if algorithm.get("ContainerEntrypoint") else ["train"]),
            environment=container_environment(request, self.job.arn, self.job.region),
            mounts={
                INSIDE / "input": tree.input,
                INSIDE / "model": tree.model,
                INSIDE / "output": tree.output,
                local_checkpoints(request): tree.checkpoints,
            },
            hostname=host.name,
            network=self.network or Network("none" if isolated else "bridge"),
        )

    def _process(self, tree: Tree) -> Process:
        request = self.job.request
        if local_checkpoints(request) != INSIDE / "checkpoints":
            raise StartFailed("ClientError: the process runner has checkpoints in the folder checkpoints alone: leave LocalPath out")
        arguments = request["AlgorithmSpecification"].get("ContainerArguments") or ["train"]
        own = {self.runner.settings.root_variable: str(tree.root)}
        return Process([*self.runner.command, *arguments], container_environment(request, self.job.arn, self.job.region) | own, tree.root)

    def _all_ended(self) -> bool:
        for machine in self.machines:
            machine.ended = machine.ended or machine.instance.poll()
        return all(machine.ended for machine in self.machines)

    def _failed(self) -> _Machine | None:
        """The first machine whose command failed."""
        return next((each for each in self.machines if each.ended is not None and each.ended.exit_code != 0), None)

    def _shut_down(self, grace: float) -> None:
        """SIGTERM to what still runs, and SIGKILL to what runs when `grace` is over, or the runner is closed."""
        if self._all_ended():
            return
        failed = self._failed()
        for machine in self.machines:
            if machine.ended is None:
                machine.instance.terminate()
        until = time.monotonic() + grace
        while not self._all_ended() and time.monotonic() < until and not self.runner.closing.is_set():
            time.sleep(_POLL)
        while not self._all_ended():
            for machine in self.machines:
                if machine.ended is None:
                    machine.instance.kill()  # again and again: an engine that was silent may not have heard it
            time.sleep(_POLL)
        if failed is not None:  # it is to blame, not those that were ended for it
            self.machines.remove(failed)
            self.machines.insert(0, failed)

    def _end_machines(self, *, send: bool) -> None:
        """What goes on around machines that have ended: the last lines, the last checkpoints, what they wrote."""
        for machine in self.machines:
            machine.instance.kill()  # of a process, what it started
            machine.reader.join(30)
            machine.log.close()
            if machine.sync is not None:
                try:
                    machine.sync.close(send=send)
                except (TransferFailed, OSError) as exc:
                    print(f"the last checkpoints of {self.job.name}: {exc}", file=sys.stderr)
                machine.sync = None
            for folder in (machine.tree.model, machine.tree.output):
                machine.instance.pull(folder)
        self.machines.sort(key=lambda each: int(each.host.name.rpartition("-")[2]))

    def _remove_machines(self) -> None:
        for machine in self.machines:
            machine.instance.remove()
            if machine.sync is not None:
                machine.sync.close(send=False)
            machine.reader.join(30)
            machine.log.close()
        self.machines.clear()
        if self.network is not None:
            self.runner.engine.remove_network(self.network.name)
            self.network = None


def _reason(machine: _Machine) -> str:
    assert machine.ended is not None
    if machine.ended.out_of_memory:
        return NO_MEMORY
    return algorithm_error(machine.tree.reason(), machine.ended.exit_code)


def algorithm_error(said: str, exit_code: int) -> str:
    """The FailureReason of a container that failed, at most 1,024 characters: what its failure file says, and the exit code. Pure."""
    end = f", exit code: {exit_code}"
    return f"AlgorithmError: {said.strip()}"[: 1024 - len(end)] + end
