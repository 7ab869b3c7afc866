"""What a run on SageMaker will be, before anything of it is there: place, role, image, machine, limits, request."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from trimtab.aws import account, instances, limits
from trimtab.aws import request as requests
from trimtab.aws.channels import PlannedChannel, plan_channel
from trimtab.aws.forecast import Forecast, forecast
from trimtab.aws.place import S3Place, default_bucket
from trimtab.aws.session import Aws
from trimtab.aws.upload import upload
from trimtab.backends.base import RunHandle
from trimtab.catalog import in_s3
from trimtab.errors import BackendUnavailable
from trimtab.events import Event, Progress
from trimtab.images.plan import tag_of
from trimtab.model_folder import model_bytes
from trimtab.plan import Finding, Foreseen, Work
from trimtab.spec import JobSpec

ROLE_VARIABLE = "TRIMTAB_SAGEMAKER_ROLE"


class Asked:
    """The half of the sagemaker backend that comes before a run. Every setting may be a text, as `--backend-option` gives it.

    `role` is the execution role, by ARN or name (default: TRIMTAB_SAGEMAKER_ROLE); `image` a URI in ECR (default: this version's image in
    the account's own registry, where `trimtab image push` puts it); `instance_type` one of SageMaker's (default: chosen by the job's
    memory and by price); `bucket` (default: trimtab-sagemaker-<region>-<account>, made when absent) and `prefix` where things lie in S3;
    `bucket_owner` the account that must own the bucket; `kms_key` encrypts channels and artifacts in S3 (checkpoints are encrypted as the
    bucket does by default: SageMaker takes no key for them), `volume_kms_key` the disks.
    `spot`, `max_wait_minutes`, `max_pending_minutes`, `keep_alive_minutes`, `subnets`, `security_groups`, `network_isolation`,
    `encrypt_traffic`, `tags` and `volume_gb` are those of CreateTrainingJob; lists have commas between their parts. `region` and
    `profile` are AWS's, by default as its command line finds them; `max_usd` takes the place of the job's own, for a resume. Artifacts are
    fetched into `home` (default: TRIMTAB_HOME, else ~/.trimtab). While a run is watched it is looked at every `poll_seconds`.

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
        spot: bool | str | None = None,
        max_wait_minutes: float | str | None = None,
        max_pending_minutes: float | str | None = None,
        keep_alive_minutes: float | str | None = None,
        subnets: str | Sequence[str] | None = None,
        security_groups: str | Sequence[str] | None = None,
        network_isolation: bool | str | None = None,
        encrypt_traffic: bool | str | None = None,
        tags: str | Mapping[str, str] | None = None,
        region: str | None = None,
        profile: str | None = None,
        max_usd: float | str | None = None,
        home: str | Path | None = None,
        poll_seconds: float | str = 5.0,
    ) -> None:
        here = locals()
        asked = {field.name: here[field.name] for field in fields(requests.Settings)}
        self._given = {name: value for name, value in asked.items() if value is not None}
        self.settings = requests.Settings.parse({"role": os.environ.get(ROLE_VARIABLE, ""), **self._given})
        self.image, self.bucket, self.prefix, self.bucket_owner = image, bucket, prefix, bucket_owner
        self.max_usd = None if max_usd is None else requests.number("max_usd", max_usd)
        self.poll_seconds = requests.number("poll_seconds", poll_seconds)
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()
        self.aws = Aws(region, profile)

    def check(self, spec: JobSpec) -> None:
        """Raises BackendUnavailable or SpecError for a job that cannot run there, before anything is fetched or paid for."""
        _ = self.place, self._role  # region, credentials, the bucket's name
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
        if found := self._role_of():
            return found
        raise BackendUnavailable(
            "SageMaker needs a role that it may take on for the job: name it with  --backend-option role=NAME-OR-ARN  "
            f"or  export {ROLE_VARIABLE}=...  ; yours are shown by  aws iam list-roles"
        )

    def _role_of(self) -> str:
        """The role's ARN; empty where none is named."""
        role = self.settings.role
        return role if not role or role.startswith("arn:") else f"arn:{self.aws.partition}:iam::{self.aws.account}:role/{role}"

    def upload(self, spec: JobSpec, channels: Mapping[str, Path], show: Callable[[Event], None] = lambda event: None) -> None:
        """Bring the channels to S3; what is there already is not sent again.

        Raises StagingError; what arrived until then is kept, so that a repetition sends the rest.
        """

        def reading(read: int) -> None:
            show(Progress(name="hash, MB", done=min(read, whole) // 10**6, of=max(1, whole // 10**6)))

        def sending(done: int, of: int) -> None:
            show(Progress(name="upload, MB", done=done // 10**6, of=max(1, of // 10**6)))

        whole = sum(file.stat().st_size for path in self._sent(spec, channels).values() for file in path.rglob("*") if file.is_file())
        plans = self._plans(spec, channels, reading)
        self.render(spec, channels, "trim-00000000")  # what would be refused is refused before anything is sent
        upload(list(plans.values()), self.aws.client("s3"), self.place, sending)

    def render(self, spec: JobSpec, channels: Mapping[str, Path], run_id: str) -> dict[str, Any]:
        """The body of CreateTrainingJob under `training_job`, and what it was made of. Sends nothing; files are read, for their digests.

        Raises SpecError for what SageMaker would refuse, all of it at once.
        """
        handle = RunHandle(self.name, run_id)
        planned = self._plans(spec, channels)
        found = self._forecast(spec, Work.read(channels))
        spec = spec.limited(found.limits.max_minutes)  # the money may end it before the user's own limit of time
        disk = self.settings.volume_gb
        if disk is None and not found.chosen.instance.gpus:  # those with GPUs have disks of their own
            elsewhere = model_bytes(channels["model"]) if in_s3(spec.train.model) else 0
            weights = elsewhere or planned["model"].bytes
            left = weights if spec.train.keep_merged else 0
            if spec.train.method == "full":  # the model once more, and checkpoints of 12 bytes for each 2 of it; volume_gb takes all twice
                left = weights * (1 + 3 * (spec.train.keep_checkpoints + 1))
            disk = requests.volume_gb(left + elsewhere + sum(plan.bytes for plan in planned.values()))
        where = requests.Allocation(
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
            role=self._role_of(),
            bucket=self.place.bucket,
            prefix=self.place.prefix,
            image=self.image or self._own_image(spec.device),
            instance=instances.find(foreseen.instance or "ml.m7i.4xlarge"),
            count=spec.nodes,
            spot=self.settings.spot,
            warm_pool=self.settings.keep_alive_minutes is not None,
            max_seconds=foreseen.max_seconds or 0,
            makes_bucket=self.bucket is None,
            kms_key=self.settings.kms_key,
            volume_kms_key=self.settings.volume_kms_key,
            subnets=bool(self.settings.subnets),
            model_uri=spec.train.model if in_s3(spec.train.model) else None,
        )
        return account.survey(self.aws, needs)

    def _forecast(
        self, spec: JobSpec, work: Work, settings: requests.Settings | None = None, kind: str | None = None, spent: float = 0.0
    ) -> Forecast:
        settings, limit = settings or self.settings, spec.max_usd if self.max_usd is None else self.max_usd
        return forecast(
            spec,
            work,
            ask=settings.instance_type or kind,
            max_usd=limit,
            spot=settings.spot,
            keep_alive_seconds=round(60 * (settings.keep_alive_minutes or 0)),
            region=self.aws.region,
            spent_usd=spent if limit is not None else 0.0,
        )

    def on(self, instance: str) -> Self:
        """The same place with machines of one type."""
        found = copy.copy(self)
        found.settings = replace(self.settings, instance_type=instance)
        return found

    def _sent(self, spec: JobSpec, channels: Mapping[str, Path]) -> dict[str, Path]:
        """The channels that go to S3; a model that lies there does not."""
        return {name: path for name, path in channels.items() if not (name == "model" and in_s3(spec.train.model))}

    def _plans(
        self, spec: JobSpec, channels: Mapping[str, Path], show: Callable[[int], None] = lambda read: None
    ) -> dict[str, PlannedChannel]:
        """What goes to S3, as the files are now; digests are noted, so that files are read once. `show` gets the bytes that were read."""
        return {name: plan_channel(path, name, show=show) for name, path in self._sent(spec, channels).items()}

    def _own_image(self, device: str) -> str:
        domain = "amazonaws.com.cn" if self.aws.partition == "aws-cn" else "amazonaws.com"
        return f"{self.aws.account}.dkr.ecr.{self.aws.region}.{domain}/{tag_of(device)}"

    def renewed(self, handle: RunHandle, number: int, record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The request of a further life: that of the run's `record`, with what is given anew, and with the time that the money still buys.

        `earlier` are DescribeTrainingJob's answers for the lives before. Raises SpecError when the money is spent.
        """
        was = record["request"]["training_job"]
        spec = JobSpec.model_validate(record["job"])
        settings = requests.Settings.anew(record["settings"], replace(self.settings, role=self._role_of()), self._given)
        found = self._forecast(
            spec, Work.from_json(record), settings, was["ResourceConfig"]["InstanceType"], instances.spent_usd(earlier, self.aws.region)
        )
        granted = requests.Allocation(
            image=self.image or was["AlgorithmSpecification"]["TrainingImage"],
            instance=found.chosen.name,
            volume_gb=settings.volume_gb or was["ResourceConfig"].get("VolumeSizeInGB"),
            max_seconds=found.limits.max_runtime_seconds,
            run_uri=was["OutputDataConfig"]["S3OutputPath"].removesuffix("/output"),
            channels={channel["ChannelName"]: channel["DataSource"]["S3DataSource"] for channel in was["InputDataConfig"]},
        )
        return requests.training_job(spec.limited(found.limits.max_minutes), handle.id, settings, granted, number)
