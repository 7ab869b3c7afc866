"""What the control plane knows: jobs, models, endpoint configurations, endpoints, tags. In memory only: it ends with the process.

A `Store` is one account's state in one region. Runners are given its `TrainingJob`s and `Endpoint`s and tell them what happens; requests
read them at the same time, so every change and every look at more than one field holds the object's lock.
"""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from control_plane.quotas import Quotas

Request = dict[str, Any]
ACCOUNT = "000000000000"  # of credentials that name none, as in LocalStack
JobStatus = Literal["InProgress", "Completed", "Failed", "Stopping", "Stopped", "Deleting"]

SPOT_SHARE = 0.3  # of a spot job's seconds are billed; SageMaker's own share moves with the market, up to 90 % off (its user guide)
MESSAGES = {  # what SageMaker says with each secondary status (StatusMessage), as its SDK prints it
    "Starting": "Starting the training job",
    "Pending": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Interrupted": "Training job interrupted because the managed spot training instances were interrupted",
    "Restarting": "Restarting the training job",
    "Uploading": "Uploading generated training model",
    "Stopping": "Stopping the training job",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided",
    "MaxWaitTimeExceeded": "Training job wait time exceeded MaxWaitTimeInSeconds provided",
}
_OWN_FAULT = ("AlgorithmError", "ClientError")  # failures after which the instances are as good as before, and are kept
_ON_INSTANCES = ("Downloading", "Training", "Uploading")  # the statuses in which a job's instances are there, and paid for


def now() -> datetime:
    """UTC, to the millisecond, as the service counts."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


@dataclass
class Transition:
    """One stay in a secondary status; `end` is None while it lasts."""

    status: str
    start: datetime
    message: str
    end: datetime | None = None


@dataclass
class Metric:
    """The last value that a metric's expression found in the job's lines."""

    name: str
    value: float
    at: datetime


@dataclass
class WarmPool:
    """The instances that a finished job keeps, for `keep_alive` seconds since `since` (0: it got none), unless a job like it takes them."""

    keep_alive: int
    since: datetime
    reused_by: str = ""
    ended: datetime | None = None

    def status(self, at: datetime) -> str:
        """Available, Terminated or Reused."""
        if self.reused_by:
            return "Reused"
        return "Available" if (at - self.since).total_seconds() < self.keep_alive else "Terminated"

    def kept_seconds(self, at: datetime) -> int:
        """Seconds that the instances were, or have been, kept: they are billed."""
        return min(self.keep_alive, int(((self.ended or at) - self.since).total_seconds()))


class TrainingJob:
    """A training job. Thread-safe; a runner calls `move`, `observe` and, once, `finish`, and looks at `stopping` and `interruptions`.

    `request` is the validated CreateTrainingJob request; it is not changed. Times are aware datetimes in UTC.
    """

    def __init__(self, name: str, arn: str, request: Request, *, account: str, region: str, tags: dict[str, str] | None = None) -> None:
        self.name, self.arn, self.request, self.account, self.region = name, arn, request, account, region
        self.tags: dict[str, str] = dict(tags or {})
        self.lock = threading.RLock()
        self.created = self.modified = now()
        self.status: JobStatus = "InProgress"
        self.transitions = [Transition("Starting", self.created, MESSAGES["Starting"])]
        self.stopping = threading.Event()  # set by StopTrainingJob
        self.interruptions = threading.Event()  # set when the spot instances are taken away; the runner clears it when it acts on it
        self.ended = threading.Event()  # set when the job is over
        self.training_started: datetime | None = None
        self.training_ended: datetime | None = None
        self.training_seconds: int | None = None
        self.billable_seconds: int | None = None
        self.failure_reason = ""
        self.artifacts_uri = ""
        self.shortage = 0.0  # seconds after its creation before which its instances are not to be had
        self.pool_granted = True  # whether the quota has room for its warm pool; else none is kept
        self.warm_pool: WarmPool | None = None
        self.keep_alive: int = request.get("ResourceConfig", {}).get("KeepAlivePeriodInSeconds", 0)
        self.metrics: dict[str, Metric] = {}
        self._expressions = [
            (each["Name"], re.compile(each["Regex"])) for each in request.get("AlgorithmSpecification", {}).get("MetricDefinitions", [])
        ]

    @property
    def secondary(self) -> str:
        """The secondary status."""
        return self.transitions[-1].status

    @property
    def spot(self) -> bool:
        """Whether it runs on instances that can be taken away."""
        return bool(self.request.get("EnableManagedSpotTraining"))

    def move(self, secondary: str, message: str = "") -> None:
        """Enters a secondary status, or says more about the one it is in. `message` by default what SageMaker says with it.

        A job that is being stopped stays in `Stopping` but for `Uploading`; one that is over stays as it is.
        """
        with self.lock:
            if self.ended.is_set() or (self.stopping.is_set() and secondary not in ("Stopping", "Uploading")):
                return
            self._enter(secondary, message)

    def _enter(self, secondary: str, message: str) -> None:
        self.modified, said = now(), message or MESSAGES.get(secondary, "")
        if secondary in _ON_INSTANCES and self.training_started is None:
            self.training_started = self.modified
        last = self.transitions[-1]
        if last.status == secondary:
            last.message = said
            return
        last.end = self.modified
        self.transitions.append(Transition(secondary, self.modified, said))

    def observe(self, line: str, at: datetime | None = None) -> None:
        """A line that the container wrote: the request's metric definitions are looked for in it; the last value found counts."""
        for name, expression in self._expressions:
            found = expression.search(line)
            if found is None or not found.groups():
                continue
            try:
                value = float(found.group(1))
            except (TypeError, ValueError):
                continue
            if math.isfinite(value):
                with self.lock:
                    self.metrics[name] = Metric(name, value, at or now())

    def stop(self) -> None:
        """StopTrainingJob: the runner sees `stopping`, gives the container its time, uploads, and finishes."""
        with self.lock:
            self.status = "Stopping"
            self._enter("Stopping", "")
            self.stopping.set()

    def interrupt(self) -> None:
        """The spot instances are taken away now."""
        self.interruptions.set()

    def finish(
        self,
        status: Literal["Completed", "Failed", "Stopped"],
        secondary: str = "",
        failure_reason: str = "",
        artifacts_uri: str = "",
        training_seconds: int | None = None,
        billable_seconds: int | None = None,
    ) -> None:
        """Ends the job, once; later calls change nothing. `secondary` by default the status itself (else e.g. MaxRuntimeExceeded).

        Seconds by default: what the job spent downloading, training and uploading; a spot job is billed SPOT_SHARE of them.
        """
        with self.lock:
            if self.ended.is_set():
                return
            self._enter(secondary or status, failure_reason if status == "Failed" else "")
            ended = self.transitions[-1].end = self.modified
            self.status, self.failure_reason, self.artifacts_uri = status, failure_reason[:1024], artifacts_uri
            if self.training_started is not None:
                self.training_ended = ended
                on_instances = sum((each.end or ended).timestamp() - each.start.timestamp() for each in self._paid())
                self.training_seconds = max(1, round(on_instances) if training_seconds is None else training_seconds)
                share = SPOT_SHARE if self.spot else 1.0
                self.billable_seconds = max(1, math.ceil(self.training_seconds * share) if billable_seconds is None else billable_seconds)
                if self.keep_alive and (status != "Failed" or failure_reason.startswith(_OWN_FAULT)):
                    self.warm_pool = WarmPool(self.keep_alive if self.pool_granted else 0, ended)
            self.ended.set()

    def _paid(self) -> list[Transition]:
        """The stays in which the instances were the job's; `Stopping` too, once training had begun."""
        return [each for each in self.transitions if each.status in _ON_INSTANCES or (each.status == "Stopping" and self.training_started)]


@dataclass(frozen=True)
class Model:
    """`request` is the validated CreateModel request."""

    name: str
    arn: str
    request: Request
    created: datetime = field(default_factory=now)

    @property
    def container(self) -> Request:
        """The primary container's definition; of several, the first."""
        primary: Request = self.request.get("PrimaryContainer") or self.request["Containers"][0]
        return primary


@dataclass(frozen=True)
class EndpointConfig:
    """`request` is the validated CreateEndpointConfig request."""

    name: str
    arn: str
    request: Request
    created: datetime = field(default_factory=now)

    @property
    def variants(self) -> list[Request]:
        """The production variants."""
        return list(self.request["ProductionVariants"])


class Endpoint:
    """An endpoint. Thread-safe; a runner calls `move("InService")` or `fail(reason)` once what it was told to start serves, or cannot.

    `config` is what it serves with, `wanted` what it is being updated to (None when it is not). `version` grows with each start, so that
    a runner's late word about an earlier one can be told from the present one's.
    """

    def __init__(self, name: str, arn: str, config: EndpointConfig, *, account: str, region: str) -> None:
        self.name, self.arn, self.account, self.region = name, arn, account, region
        self.lock = threading.RLock()
        self.created = self.modified = now()
        self.status = "Creating"
        self.config = config
        self.wanted: EndpointConfig | None = None
        self.failure_reason = ""
        self.version = 1
        self.settled = threading.Event()  # set while the endpoint is neither being created nor updated

    @property
    def log_group(self) -> str:
        return f"/aws/sagemaker/Endpoints/{self.name}"

    def move(self, status: str) -> None:
        """Enters Creating, Updating, InService, Deleting, ...; `InService` makes `wanted` the config that it serves with."""
        with self.lock:
            self.modified, self.status = now(), status
            if status == "InService" and self.wanted is not None:
                self.config, self.wanted = self.wanted, None
            if status == "InService":
                self.failure_reason = ""
                self.settled.set()
            elif status in ("Creating", "Updating"):
                self.settled.clear()

    def update(self, config: EndpointConfig) -> None:
        """UpdateEndpoint: it goes on serving with the old config until the runner says `InService`."""
        with self.lock:
            self.wanted, self.version = config, self.version + 1
            self.move("Updating")

    def fail(self, reason: str) -> None:
        """A new endpoint is Failed; one that was being updated goes on with its old config, as SageMaker's does, and says why."""
        with self.lock:
            self.modified, self.failure_reason = now(), reason[:1024]
            self.status = "InService" if self.wanted is not None else "Failed"
            self.wanted = None
            self.settled.set()


class Component(Endpoint):
    """An inference component: what runs `model` on the instances of `endpoint`, in `copies` copies.

    `request` is the validated CreateInferenceComponent request.
    """

    def __init__(self, name: str, arn: str, config: EndpointConfig, endpoint: Endpoint, request: Request, model: Model) -> None:
        super().__init__(name, arn, config, account=endpoint.account, region=endpoint.region)
        self.endpoint, self.request, self.model = endpoint, request, model
        self.copies: int = request["RuntimeConfig"]["CopyCount"]

    @property
    def log_group(self) -> str:
        return f"/aws/sagemaker/InferenceComponents/{self.name}"


TargetKey = tuple[str, str]  # a scalable dimension and a resource id


@dataclass
class ScalableTarget:
    """What Application Auto Scaling may scale, between two capacities; its policies by name."""

    arn: str
    low: int = 0
    high: int = 0
    policies: dict[str, Request] = field(default_factory=dict)
    created: datetime = field(default_factory=now)


class Store:
    """One account's state in one region. `lock` guards the dictionaries; the values guard themselves."""

    def __init__(self, account: str = ACCOUNT, region: str = "us-east-1") -> None:
        self.account, self.region = account, region
        self.lock = threading.RLock()
        self.jobs: dict[str, TrainingJob] = {}
        self.models: dict[str, Model] = {}
        self.configs: dict[str, EndpointConfig] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.components: dict[str, Component] = {}
        self.targets: dict[TargetKey, ScalableTarget] = {}
        self.tags: dict[str, dict[str, str]] = {}  # by ARN, for all that exists: names that differ in case alone are taken, too
        self.quotas = Quotas(account, region)

    def arn(self, kind: str, name: str) -> str:
        """`kind` as ARNs spell it: training-job, model, endpoint-config, endpoint. The name is in small letters, as in AWS's ARNs."""
        return f"arn:aws:sagemaker:{self.region}:{self.account}:{kind}/{name.lower()}"

    def drop_targets(self, resource: str) -> None:
        """Scalable targets of what is deleted: `endpoint/NAME` or `inference-component/NAME`."""
        for key in [key for key in self.targets if key[1] == resource or key[1].startswith(f"{resource}/")]:
            del self.targets[key]

    def add_job(self, request: Request, tags: dict[str, str] | None = None) -> TrainingJob:
        """Takes a new job in; its name must be free."""
        name = request["TrainingJobName"]
        job = TrainingJob(name, self.arn("training-job", name), request, account=self.account, region=self.region, tags=tags)
        with self.lock:
            self.jobs[name] = job
            self.tags[job.arn] = job.tags
        return job
