"""Runs as training jobs of Amazon SageMaker, in the same image that runs here; everything that stays of them is in S3.

    s3://BUCKET/PREFIX/content/, channels/      what the channels hold, by content; shared by all runs
    s3://BUCKET/PREFIX/runs/<run id>/
        run.json        what was asked for, the exact request, the account of the data's tokens; there before the job is
        checkpoints/    synced both ways while a job runs
        output/<job>/output/model/      the artifact of a life

A run is found by its tag and its name by any client, on any machine. A training job cannot be started twice, so a resume makes another
one, `<run id>-2`, on the same checkpoints: the run's next life.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from trimtab.artifact import MANIFEST
from trimtab.aws import account, instances, limits, records
from trimtab.aws import request as requests
from trimtab.aws.channels import PlannedChannel, plan_channel
from trimtab.aws.download import download
from trimtab.aws.forecast import Forecast, forecast
from trimtab.aws.lives import Life, Lives
from trimtab.aws.logs import jittered, next_wait
from trimtab.aws.place import S3Place, default_bucket, parse_uri
from trimtab.aws.refusals import asking, error_code, is_passing
from trimtab.aws.session import Aws
from trimtab.aws.standing import DONE, standing
from trimtab.aws.submission import Submission
from trimtab.aws.upload import upload
from trimtab.backends.base import RunHandle, RunRecord, RunState, RunStatus
from trimtab.backends.run_folder import refuse_absent
from trimtab.catalog import in_s3
from trimtab.data.sources import public_source
from trimtab.errors import BackendError, RunNotFound, SpecError
from trimtab.events import Event, Progress
from trimtab.images.plan import tag_of
from trimtab.ledger import Ledger
from trimtab.plan import Finding, Foreseen, Work
from trimtab.spec import JobSpec

ROLE_VARIABLE = "TRIMTAB_SAGEMAKER_ROLE"
AWAY = 600.0  # seconds that AWS may be out of reach while a run is followed
PATIENCE = 1800.0  # seconds that a job may take to end: two minutes of grace, then the upload of what it leaves

_T = TypeVar("_T")


class SageMakerBackend:
    """Jobs on Amazon SageMaker. Every setting may be a text, as `--backend-option` gives it.

    `role` is the execution role, by ARN or name (default: TRIMTAB_SAGEMAKER_ROLE); `image` a URI in ECR (default: this version's image in
    the account's own registry, where `trimtab image push` puts it); `instance_type` one of SageMaker's (default: chosen by the job's
    memory and by price); `bucket` (default: trimtab-sagemaker-<region>-<account>, made when absent) and `prefix` where things lie in S3;
    `bucket_owner` the account that must own the bucket; `kms_key` and `volume_kms_key` encrypt what is in S3 and on the disks.
    `spot`, `max_wait_minutes`, `max_pending_minutes`, `keep_alive_minutes`, `subnets`, `security_groups`, `network_isolation`,
    `encrypt_traffic`, `tags` and `volume_gb` are those of CreateTrainingJob; lists have commas between their parts. `region` and
    `profile` are AWS's, by default as its command line finds them. Artifacts are fetched into `home` (default: TRIMTAB_HOME, else
    ~/.trimtab). While a run is watched it is looked at every `poll_seconds`.

    Raises SpecError for a setting that is none.
    """

    name = "sagemaker"

    def __init__(
        self,
        role: str | None = None,
        image: str | None = None,
        instance_type: str | None = None,
        volume_gb: float | str | None = None,
        bucket: str | None = None,
        prefix: str = "trimtab",
        bucket_owner: str | None = None,
        kms_key: str | None = None,
        volume_kms_key: str | None = None,
        spot: bool | str = False,
        max_wait_minutes: float | str | None = None,
        max_pending_minutes: float | str | None = None,
        keep_alive_minutes: float | str | None = None,
        subnets: str | Sequence[str] = (),
        security_groups: str | Sequence[str] = (),
        network_isolation: bool | str = True,
        encrypt_traffic: bool | str = False,
        tags: str | Mapping[str, str] = "",
        region: str | None = None,
        profile: str | None = None,
        home: str | Path | None = None,
        poll_seconds: float | str = 5.0,
    ) -> None:
        size = requests.number("volume_gb", volume_gb)
        self.settings = requests.Settings(
            role=role or os.environ.get(ROLE_VARIABLE, ""),
            instance_type=instance_type,
            volume_gb=None if size is None else round(size),
            spot=requests.yes_or_no("spot", spot),
            max_wait_minutes=requests.number("max_wait_minutes", max_wait_minutes),
            max_pending_minutes=requests.number("max_pending_minutes", max_pending_minutes),
            keep_alive_minutes=requests.number("keep_alive_minutes", keep_alive_minutes),
            subnets=requests.listing(subnets),
            security_groups=requests.listing(security_groups),
            kms_key=kms_key,
            volume_kms_key=volume_kms_key,
            network_isolation=requests.yes_or_no("network_isolation", network_isolation),
            encrypt_traffic=requests.yes_or_no("encrypt_traffic", encrypt_traffic),
            tags=requests.pairs("tags", tags),
        )
        self.image, self.bucket, self.prefix, self.bucket_owner = image, bucket, prefix, bucket_owner
        self.poll_seconds = requests.number("poll_seconds", poll_seconds) or 5.0
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()
        self.aws = Aws(region, profile)
        self._lives: dict[str, Lives] = {}
        self._planned: dict[Path, PlannedChannel] = {}

    # before the run

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable or SpecError for a job that cannot run there, before anything is fetched or paid for."""
        _ = self.place, self._role  # region, credentials, bucket's name
        if self.settings.instance_type is not None:
            instances.choose(spec, None, ask=self.settings.instance_type)

    @cached_property
    def place(self) -> S3Place:
        """Where things lie in S3."""
        if self.bucket is not None:
            return S3Place(self.bucket, self.prefix, self.bucket_owner, self.settings.kms_key)
        own = default_bucket(self.aws.region, self.aws.account)
        return S3Place(own, self.prefix, self.bucket_owner or self.aws.account, self.settings.kms_key)

    @cached_property
    def _role(self) -> str:
        role = self.settings.role
        if not role:
            raise SpecError(
                "SageMaker needs a role that it may take on for the job: name it with  --backend-option role=NAME-OR-ARN  "
                f"or  export {ROLE_VARIABLE}=...  ; yours are shown by  aws iam list-roles"
            )
        return role if role.startswith("arn:") else f"arn:{self.aws.partition}:iam::{self.aws.account}:role/{role}"

    def upload(self, spec: JobSpec, channels: Mapping[str, Path], show: Callable[[Event], None] = lambda event: None) -> None:
        """Bring the channels to S3; what is there already is not sent again.

        Raises StagingError; what arrived until then is kept, so that a repetition sends the rest.
        """

        def tell(done: int, of: int) -> None:
            show(Progress(name="upload, MB", done=done // 10**6, of=max(1, of // 10**6)))

        upload(list(self._plans(spec, channels).values()), self.aws.client("s3"), self.place, tell)

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The body of CreateTrainingJob under `training_job`, and what it was made of. Sends nothing; files are read, for their digests.

        Raises SpecError for what SageMaker would refuse, all of it at once.
        """
        handle = RunHandle(self.name, run_id)
        planned = self._plans(spec, channels)
        found = self._forecast(spec, Work.read(channels))
        if found.limits.max_minutes is not None:  # the money may end it before the user's own limit of time
            spec = spec.model_copy(update={"train": spec.train.model_copy(update={"max_minutes": found.limits.max_minutes})})
        disk = self.settings.volume_gb
        if disk is None and not found.chosen.instance.gpus:  # those with GPUs have disks of their own
            disk = requests.volume_gb(sum(plan.bytes for plan in planned.values()))
        where = requests.Place(
            image=self.image or self._own_image(spec.device),
            instance=found.chosen.name,
            volume_gb=disk,
            max_seconds=found.limits.max_runtime_seconds,
            run_uri=self.place.uri(self.place.run(run_id)).rstrip("/"),
            channels={
                name: requests.manifest_source(planned[name].manifest_uri(self.place))
                if name in planned
                else requests.prefix_source(spec.train.model)
                for name in channels
            },
        )
        job = requests.training_job(spec, run_id, replace(self.settings, role=self._role), where)
        limits.refuse("CreateTrainingJob", job)
        limits.refuse_secrets(job)
        return {
            "handle": str(handle),
            "training_job": job,
            "channels": {name: str(path) for name, path in channels.items()},
            "hyperparameters": job["HyperParameters"],
        }

    def foresee(self, spec: JobSpec, work: Work) -> Foreseen:
        """Machine, memory, time and price, by the table; nothing is asked of AWS."""
        return self._forecast(spec, work).foreseen

    def findings(self, spec: JobSpec, foreseen: Foreseen) -> list[Finding]:
        """Role, permissions, bucket, image and quotas, as far as AWS tells."""
        needs = account.Needs(
            role=self._role,
            bucket=self.place.bucket,
            prefix=self.place.prefix,
            image=self.image or self._own_image(spec.device),
            instance=instances.find(foreseen.instance or "ml.m7i.4xlarge"),
            count=spec.nodes,
            spot=self.settings.spot,
            warm_pool=self.settings.keep_alive_minutes is not None,
            max_seconds=foreseen.max_seconds or 0,
            makes_bucket=self.bucket is None,
            kms_keys=tuple(key for key in (self.settings.kms_key, self.settings.volume_kms_key) if key),
        )
        return account.survey(self.aws, needs)

    def _forecast(self, spec: JobSpec, work: Work) -> Forecast:
        return forecast(
            spec,
            work,
            ask=self.settings.instance_type,
            max_usd=spec.max_usd,
            spot=self.settings.spot,
            keep_alive_seconds=round(60 * (self.settings.keep_alive_minutes or 0)),
        )

    def _plans(self, spec: JobSpec, channels: Mapping[str, Path]) -> dict[str, PlannedChannel]:
        """The channels that are sent; a model that lies in S3 is not."""
        for name, path in channels.items():
            if path not in self._planned and not (name == "model" and in_s3(spec.train.model)):
                self._planned[path] = plan_channel(path, name)
        return {name: self._planned[path] for name, path in channels.items() if path in self._planned}

    def _own_image(self, device: str) -> str:
        domain = "amazonaws.com.cn" if self.aws.partition == "aws-cn" else "amazonaws.com"
        return f"{self.aws.account}.dkr.ecr.{self.aws.region}.{domain}/{tag_of(device)}"

    # the run

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        handle = RunHandle(self.name, run_id or f"trim-{uuid.uuid4().hex[:8]}")
        refuse_absent({name: str(path) for name, path in channels.items()})
        self._planned.clear()  # files may have changed since
        request = self.render(spec, channels, handle.id)
        self.upload(spec, channels)
        record = {
            "job": spec.model_copy(update={"data": tuple(map(public_source, spec.data))}).model_dump(mode="json"),
            "created": datetime.now(UTC).isoformat(),
            "request": request,
            "ledger": Work.read(channels).ledger.model_dump(mode="json"),
        }
        s3, key = self.aws.client("s3"), self.place.run(handle.id) + "run.json"
        taken = f"there is a run {handle.id} already, and it is another one: run the command again, it takes a new name"
        if not records.make(s3, self.place, key, record):
            raise BackendError(taken)
        submission = Submission(self.aws, request["training_job"], taken)
        try:
            submission.send()
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(BackendError):  # what happened first is what is told
                if not submission.take_back():
                    records.delete(s3, self.place, self.place.run(handle.id))
            raise
        self._lives[handle.id] = Lives(self.aws, handle, known=True)
        return handle

    def resume(self, handle: RunHandle) -> None:
        """Make another training job on the run's checkpoints. What this backend was expressly given takes the place of the run's own."""
        newest = self._of(handle).look()
        running = f"{handle} is still running. Watch it:  trimtab logs -f {handle}"
        if newest.described["TrainingJobStatus"] == "Completed":
            raise BackendError(f"{handle} has succeeded, there is nothing to go on with. Ask it something:  trimtab chat {handle}")
        if not newest.done:
            raise BackendError(running)
        number = requests.life_number(handle.id, newest.name) or 1
        was = self._record(handle)["request"]["training_job"]
        request = requests.next_life(was, requests.life_name(handle.id, number + 1), self.settings, self.image)
        limits.refuse("CreateTrainingJob", request)
        limits.refuse_secrets(request)
        Submission(self.aws, request, running).send()  # the name is taken when another client was quicker

    def status(self, handle: RunHandle) -> RunStatus:
        lives = self._of(handle)
        self._patiently(lives, lives.read)
        return standing(handle, lives.all[-1].described, lives.all[-1].events)

    def _patiently(self, lives: Lives, ask: Callable[[], _T]) -> _T:
        """What `ask` returns. Of a run that is known to be there, and so is followed, a network that is away for minutes is waited for."""
        wait, deadline = 0.0, time.monotonic() + (AWAY if lives.known else 0.0)
        while True:
            try:
                return ask()
            except BackendError as exc:
                if exc.__cause__ is None or not is_passing(exc.__cause__) or time.monotonic() >= deadline:
                    raise
                time.sleep(jittered(wait := next_wait(wait, came=False, failed=False)))

    def logs(self, handle: RunHandle, *, follow: bool = False) -> Iterator[str]:
        lives = self._of(handle)
        lives.look()
        return self._lines(lives, follow)

    def _lines(self, lives: Lives, follow: bool) -> Iterator[str]:
        shown: dict[str, int] = {}
        while True:
            done = self._patiently(lives, lives.look).done  # asked before reading: what was written until the end is read
            self._patiently(lives, partial(lives.read, settle=done))
            new = [line for life in lives.all for line in life.lines[shown.get(life.name, 0) :]]
            shown = {life.name: len(life.lines) for life in lives.all}
            yield from new
            if done or not follow:
                return
            time.sleep(self.poll_seconds)

    def stop(self, handle: RunHandle) -> None:
        newest = self._of(handle).look()
        if newest.done:
            return
        client = self.aws.client("sagemaker")
        try:
            with asking(f"to stop {newest.name}", action="sagemaker:StopTrainingJob"):
                client.stop_training_job(TrainingJobName=newest.name)
        except BackendError as exc:
            if error_code(exc.__cause__ or exc) != "ValidationException" or not self._of(handle).look().done:  # it ended meanwhile
                raise
        deadline = time.monotonic() + PATIENCE
        while not self._of(handle).look().done:
            if time.monotonic() >= deadline:
                raise BackendError(f"{handle} is still stopping after {PATIENCE / 60:g} minutes: look again with  trimtab status {handle}")
            time.sleep(min(self.poll_seconds, 2.0))

    def artifact(self, handle: RunHandle) -> Path:
        lives = self._of(handle)
        lives.look()
        for life in reversed(lives.all):
            if life.described["TrainingJobStatus"] in ("Completed", "Stopped") and (folder := self._fetched(handle, life)):
                return folder
        state = self.status(handle).state
        remedy = f"trimtab resume {handle}" if state in (RunState.FAILED, RunState.STOPPED) else f"trimtab logs -f {handle}"
        raise BackendError(f"{handle} has left no artifact, it is {state}:  {remedy}")

    def _fetched(self, handle: RunHandle, life: Life) -> Path | None:
        """The artifact of a life on this machine, fetched the first time; None where it left none."""
        folder = self.home / "sagemaker" / handle.id / life.name / "model"
        uri = life.described.get("ModelArtifacts", {}).get("S3ModelArtifacts", "")
        if uri and not (folder / MANIFEST).is_file():
            bucket, key = parse_uri(uri)
            place, s3 = self._place_of(bucket), self.aws.client("s3")
            if not records.exists(s3, place, f"{key.rstrip('/')}/{MANIFEST}"):  # it is written last
                return None
            download(s3, uri, folder, owner=place.owner)
        return folder if uri else None

    # abilities

    def events(self, handle: RunHandle, start: int = 0) -> tuple[list[Event], int]:
        lives = self._of(handle)
        found = self._patiently(lives, lives.read)
        return found[start:], len(found)

    def ledger(self, handle: RunHandle) -> Ledger:
        return Ledger.model_validate(self._record(handle)["ledger"])

    def runs(self) -> list[RunRecord]:
        """Every run of the account in the region, of any machine. Source: Search, Amazon SageMaker API reference."""
        wanted = {"Filters": [{"Name": f"Tags.{requests.RUN_TAG}", "Operator": "Exists"}]}
        pages = self.aws.client("sagemaker").get_paginator("search")
        newest: dict[str, dict[str, Any]] = {}
        first: dict[str, datetime] = {}
        with asking("for your runs", action="sagemaker:Search"):
            for page in pages.paginate(Resource="TrainingJob", SearchExpression=wanted, SortBy="CreationTime", SortOrder="Ascending"):
                for result in page["Results"]:
                    job = result["TrainingJob"]
                    run_id = next(tag["Value"] for tag in job["Tags"] if tag["Key"] == requests.RUN_TAG)
                    if requests.life_number(run_id, job["TrainingJobName"]):
                        first.setdefault(run_id, job["CreationTime"])
                        newest[run_id] = job
        found = []
        for run_id, job in newest.items():
            handle = RunHandle(self.name, run_id)
            known = self._lives.get(run_id)
            status = (
                self.status(handle)
                if job["TrainingJobStatus"] not in DONE
                else standing(handle, job, known.all[-1].events if known and known.all else ())
            )
            found.append(RunRecord(handle, first[run_id], json.loads(job["HyperParameters"]["model"]), status))
        return sorted(found, key=lambda run: run.created, reverse=True)

    def remove(self, handle: RunHandle) -> None:
        """Delete a done run: its training jobs and all that it has in S3 but the data, which other runs may share."""
        lives = self._of(handle)
        if not lives.look().done:
            raise BackendError(f"{handle} is still running. End it first:  trimtab stop {handle}")
        place, prefix = self._run_place(handle)
        records.delete(self.aws.client("s3"), place, prefix)
        for life in reversed(lives.all):  # the first one last: by it the run is found, should this be cut short
            with asking(f"to delete the training job {life.name}", action="sagemaker:DeleteTrainingJob"):
                self.aws.client("sagemaker").delete_training_job(TrainingJobName=life.name)
        del self._lives[handle.id]
        shutil.rmtree(self.home / "sagemaker" / handle.id, ignore_errors=True)

    def _of(self, handle: RunHandle) -> Lives:
        if handle.backend != self.name:
            raise RunNotFound(f"{handle} is not a run of SageMaker; see which there are:  trimtab list --backend sagemaker")
        return self._lives.setdefault(handle.id, Lives(self.aws, handle))

    def _run_place(self, handle: RunHandle) -> tuple[S3Place, str]:
        """Where the run lies in S3 by its own account, whatever this client's settings are; the prefix ends with a slash."""
        lives = self._of(handle)
        lives.look()
        bucket, key = parse_uri(lives.all[0].described["OutputDataConfig"]["S3OutputPath"])
        return self._place_of(bucket), key.removesuffix("output")

    def _place_of(self, bucket: str) -> S3Place:
        """A bucket that a training job names, which may be another one than this client's settings name."""
        return S3Place(bucket, owner=self.place.owner if bucket == self.place.bucket else self.bucket_owner)

    def _record(self, handle: RunHandle) -> Any:
        place, prefix = self._run_place(handle)
        return records.read(self.aws.client("s3"), place, f"{prefix}run.json")
