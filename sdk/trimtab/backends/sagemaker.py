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
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from trimtab.artifact import MANIFEST
from trimtab.aws import limits, records
from trimtab.aws import request as requests
from trimtab.aws.asked import Asked
from trimtab.aws.download import download
from trimtab.aws.lives import Life, Lives
from trimtab.aws.logs import jittered, next_wait
from trimtab.aws.place import S3Place, parse_uri
from trimtab.aws.refusals import asking, error_code, is_passing
from trimtab.aws.standing import DONE, standing
from trimtab.aws.submission import Submission
from trimtab.backends.base import RunHandle, RunRecord, RunState, RunStatus
from trimtab.backends.run_folder import refuse_absent
from trimtab.data.sources import public_source
from trimtab.errors import BackendError, RunNotFound
from trimtab.events import Event
from trimtab.layout import MERGED
from trimtab.ledger import Ledger
from trimtab.plan import Work
from trimtab.spec import JobSpec

AWAY = 600.0  # seconds that AWS may be out of reach while a run is followed
POOL = 60.0  # seconds that a warm pool may take to end
PATIENCE = 1800.0  # seconds that a job may take to end: two minutes of grace, then the upload of what it leaves

_T = TypeVar("_T")


class SageMakerBackend(Asked):
    """Jobs on Amazon SageMaker; its settings are those of `Asked`."""

    name = "sagemaker"

    @cached_property
    def _lives(self) -> dict[str, Lives]:
        """Of the runs that were looked at."""
        return {}

    def submit(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str | None = None) -> RunHandle:
        handle = RunHandle(self.name, run_id or f"trim-{uuid.uuid4().hex[:8]}")
        refuse_absent({name: str(path) for name, path in channels.items()})
        request = self.render(spec, channels, handle.id)
        self.upload(spec, channels)
        record = {
            "job": spec.model_copy(update={"data": tuple(map(public_source, spec.data))}).model_dump(mode="json"),
            "created": datetime.now(UTC).isoformat(),
            "request": request,
            "settings": asdict(replace(self.settings, role=self._role)),
            **Work.read(channels).as_json(),
        }
        s3, key = self.aws.client("s3"), self.place.run(handle.id) + "run.json"
        taken = f"there is a run {handle.id} already, and it is another one: run the command again, it takes a new name"
        if not records.make(s3, self.place, key, record):
            raise BackendError(taken)
        submission = Submission(self.aws, request["training_job"], taken)
        try:
            submission.send()
        except BaseException:  # Ctrl-C too
            self._take_back(submission, handle, key)
            raise
        self._lives[handle.id] = Lives(self.aws, handle, known=True)
        return handle

    def resume(self, handle: RunHandle) -> None:
        """Make another training job on the run's checkpoints. What this backend was expressly given takes the place of the run's own."""
        lives = self._of(handle)
        newest = lives.look()
        running = f"{handle} is still running. Watch it:  trimtab logs -f {handle}"
        if newest.described["TrainingJobStatus"] == "Completed":
            raise BackendError(f"{handle} has succeeded, there is nothing to go on with. Ask it something:  trimtab chat {handle}")
        if not newest.done:
            raise BackendError(running)
        number = requests.life_number(handle.id, newest.name) or 1
        request = self.renewed(handle, number + 1, self._record(handle), [life.described for life in lives.all])
        limits.refuse("CreateTrainingJob", request)
        limits.refuse_secrets(request)
        Submission(self.aws, request, running).send()  # the name is taken when another client was quicker
        lives.add(request["TrainingJobName"])

    def _take_back(self, submission: Submission, handle: RunHandle, key: str) -> None:
        """Leave nothing of a run whose handle nobody will see: no job that costs money, no record."""
        match submission.take_back():
            case None:
                print(f"whether {handle} began is not known; if it did, it costs money until  trimtab stop {handle}", file=sys.stderr)
            case False:
                with contextlib.suppress(BackendError):  # what happened first is what is told
                    records.remove(self.aws.client("s3"), self.place, key)

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
                time.sleep(jittered(wait := next_wait(wait, came=False)))

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
            download(s3, uri, folder, owner=place.owner, without=MERGED)
        return folder if uri else None

    def merged_uri(self, handle: RunHandle) -> str:
        """Where in S3 the model lies that needs no base: merged, as the run left it beside its adapter, or of the method full the artifact
        itself; "" where it left none."""
        lives = self._of(handle)
        lives.look()
        for life in reversed(lives.all):
            uri = life.described.get("ModelArtifacts", {}).get("S3ModelArtifacts", "").rstrip("/")
            if uri and life.described["TrainingJobStatus"] in ("Completed", "Stopped"):
                bucket, key = parse_uri(uri)
                s3, place = self.aws.client("s3"), self._place_of(bucket)
                if records.exists(s3, place, f"{key}/{MERGED}/{MANIFEST}"):
                    return f"{uri}/{MERGED}/"
                whole = all(
                    records.exists(s3, place, f"{key}/{name}") for name in ("config.json", MANIFEST)
                )  # an adapter has no config.json
                return f"{uri}/" if whole else ""
        return ""

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
        self._end_pools(lives)
        place, prefix = self._run_place(handle)
        records.delete(self.aws.client("s3"), place, prefix)
        for life in reversed(lives.all):  # the first one last: by it the run is found, should this be cut short
            with asking(f"to delete the training job {life.name}", action="sagemaker:DeleteTrainingJob"):
                self.aws.client("sagemaker").delete_training_job(TrainingJobName=life.name)
        del self._lives[handle.id]
        shutil.rmtree(self.home / "sagemaker" / handle.id, ignore_errors=True)

    def _end_pools(self, lives: Lives) -> None:
        """Give back the instances that jobs have kept warm: a job with such cannot be deleted (API reference, DeleteTrainingJob)."""
        kept = [life.name for life in lives.all if life.described.get("WarmPoolStatus", {}).get("Status") == "Available"]
        client = self.aws.client("sagemaker")
        for name in kept:
            with asking(f"to give back the instances kept by {name}", action="sagemaker:UpdateTrainingJob"):
                client.update_training_job(TrainingJobName=name, ResourceConfig={"KeepAlivePeriodInSeconds": 0})
        until = time.monotonic() + POOL
        for name in kept:
            with asking(f"how {name} stands", action="sagemaker:DescribeTrainingJob"):
                while client.describe_training_job(TrainingJobName=name).get("WarmPoolStatus", {}).get("Status") == "Available":
                    if time.monotonic() >= until:
                        raise BackendError(f"the warm pool of {name} has not ended yet: repeat  trimtab remove {lives.handle}  in a minute")
                    time.sleep(min(self.poll_seconds, 2.0))

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
