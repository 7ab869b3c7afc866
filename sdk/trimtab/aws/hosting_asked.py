"""What an endpoint on SageMaker will be, before anything of it is there: place, role, container, machine, times, requests."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trimtab.aws import account, containers, hosting_instances, jumpstart
from trimtab.aws import hosting_request as hosting
from trimtab.aws.asked import ROLE_VARIABLE
from trimtab.aws.containers import Container
from trimtab.aws.hosting_request import HostingSettings
from trimtab.aws.hosting_standing import Facts
from trimtab.aws.instances import find
from trimtab.aws.models_in_s3 import PlannedModel, plan_model
from trimtab.aws.place import S3Place, default_bucket, parse_uri
from trimtab.aws.request import number
from trimtab.aws.session import Aws
from trimtab.deployers.base import EndpointHandle
from trimtab.errors import BackendUnavailable, SpecError
from trimtab.estimate import ModelFacts
from trimtab.events import Choice
from trimtab.images.plan import tag_of
from trimtab.plan import Finding
from trimtab.serving import TUNED, Serving
from trimtab.spec import ServeSpec

LAST_RESORT = 720.0  # minutes after which an endpoint ends that was to end with its client
PROVISION = 1800.0  # seconds that SageMaker may take to find the machines, beside download and start
_TRIMTAB = "trimtab.json"  # of a merged model


class HostingAsked:
    """The half of the sagemaker deployer that comes before an endpoint. Every setting may be a text, as `--backend-option` gives it.

    `role` is the execution role, by ARN or name (default: TRIMTAB_SAGEMAKER_ROLE); `container` one of trimtab (our serve image, in the
    account's own registry as `trimtab image push` puts it), vllm, lmi, tgi (AWS's; tgi is in maintenance mode); `image` another URI for it.
    `instance_type` one of SageMaker's (default: the cheapest that holds the model and answers at a reader's pace), `instances` how many.
    `max_instances`, `min_instances` (0 too), `target_requests` (a minute, for each instance) and `cooldown_seconds` let the number follow
    the load. `model_uri` is a Hugging Face folder in S3 that is served from there, `jumpstart` the id of one of JumpStart's models, whose
    licence `accept_eula=yes` accepts. `download_seconds` and `start_seconds` are what fetching the model and starting the container may
    take (default: by its size), `ami` the machine image. `bucket`, `prefix`, `bucket_owner`, `kms_key`, `volume_kms_key`, `subnets`,
    `security_groups`, `network_isolation`, `tags`, `region`, `profile`, `home` and `poll_seconds` are those of the sagemaker backend.

    Raises SpecError for a setting that is none.
    """

    name = "sagemaker"

    def __init__(
        self,
        role: str | None = None,
        container: str = "trimtab",
        image: str | None = None,
        instance_type: str | None = None,
        instances: int | str = 1,
        min_instances: int | str | None = None,
        max_instances: int | str | None = None,
        target_requests: float | str | None = None,
        cooldown_seconds: int | str | None = None,
        download_seconds: int | str | None = None,
        start_seconds: int | str | None = None,
        ami: str | None = None,
        model_uri: str | None = None,
        jumpstart: str | None = None,
        accept_eula: bool | str | None = None,
        bucket: str | None = None,
        prefix: str = "trimtab",
        bucket_owner: str | None = None,
        kms_key: str | None = None,
        volume_kms_key: str | None = None,
        subnets: str | Sequence[str] | None = None,
        security_groups: str | Sequence[str] | None = None,
        network_isolation: bool | str | None = None,
        tags: str | Mapping[str, str] | None = None,
        region: str | None = None,
        profile: str | None = None,
        home: str | Path | None = None,
        poll_seconds: float | str = 5.0,
    ) -> None:
        here = locals()
        self.settings = HostingSettings.parse(
            {field.name: here[field.name] for field in fields(HostingSettings)} | {"role": role or os.environ.get(ROLE_VARIABLE, "")}
        )
        self.bucket, self.prefix, self.bucket_owner, self.kms_key = bucket, prefix, bucket_owner, kms_key
        self.poll_seconds = number("poll_seconds", poll_seconds)
        self.home = Path(home or os.environ.get("TRIMTAB_HOME") or Path.home() / ".trimtab").expanduser().absolute()
        self.profile = profile
        self.aws = Aws(region, profile)
        self._facts: dict[str, Facts] = {}  # of endpoints that were seen, by their ids

    def check(self, device: str) -> None:
        """Raises BackendUnavailable or SpecError for what cannot be served there, before anything is fetched or merged."""
        _ = self.place, self._role  # region, credentials, the bucket's name
        if device != "gpu" and self.settings.container != "trimtab":
            raise SpecError(f"the container {self.settings.container} needs GPUs: add  --device gpu , or leave  container=...  out")
        if self.settings.instance_type is not None:
            find(self.settings.instance_type)
        if self.settings.model_uri is not None:
            parse_uri(self.settings.model_uri)
        if self.settings.jumpstart is not None:
            _ = self._hub_model

    @cached_property
    def place(self) -> S3Place:
        """Where models lie in S3."""
        owner = self.bucket_owner if self.bucket is not None else self.bucket_owner or self.aws.account
        return S3Place(self.bucket or default_bucket(self.aws.region, self.aws.account), self.prefix, owner, self.kms_key)

    @cached_property
    def _role(self) -> str:
        role = self.settings.role
        if not role:
            raise BackendUnavailable(
                "SageMaker needs a role that it may take on for the endpoint: name it with  --backend-option role=NAME-OR-ARN  "
                f"or  export {ROLE_VARIABLE}=...  ; yours are shown by  aws iam list-roles"
            )
        return role if role.startswith("arn:") else f"arn:{self.aws.partition}:iam::{self.aws.account}:role/{role}"

    @cached_property
    def _hub_model(self) -> jumpstart.HubModel:
        return jumpstart.describe(self.aws, str(self.settings.jumpstart))

    def elsewhere(self, spec: ServeSpec, device: Literal["xeon", "gpu"], title: str = "") -> Serving | None:
        """What is served where the model is not this machine's: `model_uri`, or JumpStart's. None for one that is."""
        title = title or self.settings.jumpstart or self.settings.model_uri or ""
        if not title or (self.settings.jumpstart is None and self.settings.model_uri is None):
            return None
        return Serving(None, None, {}, {}, spec, title, "", 0, device, self.settings.model_uri or "")

    def render(
        self, serving: Serving, id: str, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, detach: bool = False
    ) -> dict[str, Any]:
        """The bodies under `requests`, by operation and in order, and the reasons for what was chosen. Files are read, for their digests.

        Raises SpecError for what SageMaker would refuse, all of it at once.
        """
        bodies, chosen, planned = self.rendered(serving, id, detach=detach)
        return {
            "handle": str(EndpointHandle(self.name, id)),
            "requests": bodies,
            "choices": [f"{choice.value}: {choice.reason}" if choice.value else choice.reason for choice in chosen],
            "upload": None if planned is None else {"to": planned.uri(self.place), "bytes": planned.bytes, "files": planned.files},
            "usd_per_hour": self._usd(bodies),
        }

    def rendered(
        self, serving: Serving, id: str, *, detach: bool = False
    ) -> tuple[dict[str, dict[str, Any]], list[Choice], PlannedModel | None]:
        """The bodies by operation, what was chosen and why, and the model's files where they are this machine's."""
        settings = replace(self.settings, role=self._role)
        if serving.adapters or serving.base is not None:
            raise SpecError(
                "SageMaker gives a container one folder, and adapters beside their base are two: leave  merge=False  and  adapters  out, "
                "or serve them with  --backend docker"
            )
        if settings.jumpstart is not None:
            granted, chosen, planned = self._of_hub(serving, self._hub_model)
            names = [settings.jumpstart]
            if settings.network_isolation is None:
                settings = replace(settings, network_isolation=self._hub_model.isolated)
        else:
            planned = None if serving.uri or serving.model is None else self._planned(serving)
            names = list(dict.fromkeys([TUNED if f"model/{_TRIMTAB}" in serving.files else "base", serving.spec.name or ""]))
            names = [name for name in names if name]
            granted, chosen = self._granted(serving, planned, names[0])
        tagged = hosting.tags(
            settings,
            id,
            title=serving.title,
            models=names,
            owner=platform.node() or "unknown",
            container=granted.container.kind,
            ttl_minutes=self.minutes(serving, detach),
            detach=detach,
        )
        if not detach and serving.spec.ttl_minutes is None:
            limit = f"{LAST_RESORT / 60:g} h"
            chosen = [*chosen, Choice(name="ttl", value=limit, reason="it ends with this process, and then in any case: another with  ttl")]
        if settings.volume_kms_key and granted.gpus:
            raise SpecError(f"{granted.instance} has disks of its own, which its hardware encrypts: leave volume_kms_key out")
        bodies = hosting.requests(settings, id, granted, tagged)
        hosting.refuse(bodies)
        return bodies, chosen, planned

    def _planned(self, serving: Serving, show: Callable[[int], None] = lambda read: None) -> PlannedModel:
        assert serving.model is not None
        files = {name.removeprefix("model/"): path for name, path in serving.files.items() if name.startswith("model/")}
        if serving.foreseen:  # as a dry run finds it
            return PlannedModel("model", serving.digest, len(files), serving.bytes, ())
        return plan_model(files, serving.model, show=show)

    def _granted(self, serving: Serving, planned: PlannedModel | None, name: str) -> tuple[hosting.Allocation, list[Choice]]:
        """Container, machine and place of a model of ours."""
        settings, size = self.settings, planned.bytes if planned else serving.bytes
        if settings.model_uri and not size:
            size = self._bytes_in_s3(settings.model_uri)
        facts, context = _facts(serving)
        need = hosting_instances.demand(size, facts, serving.spec, context)
        chosen = hosting_instances.choose(
            serving.device, need, ask=settings.instance_type, several_gpus=settings.container != "trimtab", region=self.aws.region
        )
        patience = hosting_instances.patience(size)
        patience = replace(
            patience, download=settings.download_seconds or patience.download, health=settings.start_seconds or patience.health
        )
        one = chosen.instance
        container = Container(
            settings.container,
            settings.image or self._image(serving.device),
            containers.environment(settings.container, serving.spec, name, need.gpus(one)),
            containers.ami_of("trimtab-gpu" if one.gpus and settings.container == "trimtab" else settings.container),
        )
        uri = settings.model_uri or serving.uri or (planned.uri(self.place) if planned else "")
        granted = hosting.Allocation(
            container=container,
            instance=one.name,
            gpus=one.gpus,
            vcpus=one.vcpus,
            memory_mb=round(min(need.gib * 1.1, one.memory_gib * 0.8) * 1024),
            patience=patience,
            source=hosting.model_source(uri) if uri else None,
            volume_gb=None if one.gpus else hosting_instances.volume_gb(size),
        )
        choices = [("instance", one.name, chosen.reason), ("patience", "", patience.reason)]
        if serving.foreseen:
            said = "is not merged yet: sizes are its base's, and the name of its place in S3 will be by contents, not by what is merged"
            choices.append(("model", serving.title, said))
        if settings.container == "tgi":
            choices.append(("container", "tgi", "as asked; TGI is in maintenance mode, so prefer vllm for what is new"))
        return granted, [Choice(name=which, value=value, reason=reason) for which, value, reason in choices]

    def _of_hub(self, serving: Serving, found: jumpstart.HubModel) -> tuple[hosting.Allocation, list[Choice], None]:
        """What JumpStart says of its model, but for what is expressly asked."""
        settings = self.settings
        instance = settings.instance_type or found.instance
        if found.supported and instance not in found.supported:
            raise SpecError(f"{found.id} does not run on {instance}: choose one of {', '.join(found.supported[:8])}")
        one = find(instance) if settings.instance_type else None
        with contextlib.suppress(SpecError):  # JumpStart's default may be a type that the table does not have
            one = one or find(instance)
        container = found.container if settings.image is None else replace(found.container, image=settings.image)
        granted = hosting.Allocation(
            container=container,
            instance=instance,
            gpus=one.gpus if one else 1,
            vcpus=one.vcpus if one else 4,
            memory_mb=round((one.memory_gib if one else 16) * 0.8 * 1024),
            patience=hosting_instances.Patience(
                settings.download_seconds or found.download_seconds or hosting_instances.LONGEST,
                settings.start_seconds or found.start_seconds or hosting_instances.LONGEST,
                "as JumpStart says",
            ),
            source=found.accepted(settings.accept_eula),
        )
        return granted, [Choice(name="instance", value=instance, reason=f"JumpStart's own for {found.id} {found.version}")], None

    def _bytes_in_s3(self, uri: str) -> int:
        from trimtab.aws.model import look

        return look(self.aws.client("s3"), uri, self.bucket_owner).bytes

    def _image(self, device: str) -> str:
        if self.settings.container == "trimtab":
            return f"{containers.registry(self.aws.account, self.aws.region)}/{tag_of(device, 'serve')}"
        return containers.aws_image(self.settings.container, self.aws.region)

    def _usd(self, bodies: Mapping[str, Mapping[str, Any]]) -> float | None:
        variant = bodies["CreateEndpointConfig"]["ProductionVariants"][0]
        try:
            return find(variant["InstanceType"], self.aws.region).usd_per_hour * int(variant["InitialInstanceCount"])
        except SpecError:
            return None

    def patience(self, serving: Serving) -> float:
        """Seconds that a start may take: to find machines, and what the download and the container's start may take."""
        return patience_of(self.rendered(serving, "trim-ep-00000000")[0])

    def minutes(self, serving: Serving, detach: bool) -> float | None:
        """When it ends by itself, in minutes; None: never. One that is to end with its client ends even where nothing of that is left."""
        return serving.spec.ttl_minutes or (None if detach else LAST_RESORT)

    def findings(self, serving: Serving) -> list[Finding]:
        """What the account has and lacks for it: role, permissions, bucket, image, quota, as far as AWS tells."""
        return self._lacking(self.rendered(serving, "trim-ep-00000000")[0], serving)

    def _lacking(self, bodies: Mapping[str, Mapping[str, Any]], serving: Serving) -> list[Finding]:
        variant, uri = bodies["CreateEndpointConfig"]["ProductionVariants"][0], self.settings.model_uri or serving.uri or None
        try:
            instance = find(variant["InstanceType"])
        except SpecError:  # JumpStart's own, which the table does not have
            return [Finding("instance", None, f"{variant['InstanceType']} is not in trimtab's table, so nothing was asked about it")]
        needs = account.Needs(
            role=self._role,
            bucket=self.place.bucket,
            prefix=self.place.prefix,
            image=bodies["CreateModel"]["PrimaryContainer"]["Image"],
            instance=instance,
            count=self.settings.bounds[1],
            makes_bucket=self.bucket is None,
            kms_key=self.kms_key,
            volume_kms_key=self.settings.volume_kms_key,
            subnets=bool(self.settings.subnets),
            model_uri=uri,
            endpoint="component" if self.settings.to_zero else "variant" if self.settings.scales else "fixed",
        )
        return account.survey(self.aws, needs)


def patience_of(bodies: Mapping[str, Mapping[str, Any]]) -> float:
    variant = bodies["CreateEndpointConfig"]["ProductionVariants"][0]
    return PROVISION + sum(float(value) for name, value in variant.items() if name.endswith("TimeoutInSeconds"))


def _facts(serving: Serving) -> tuple[ModelFacts | None, int | None]:
    """Sizes and longest context, from the model's own configuration where it is on this machine."""
    path = (serving.foreseen or serving.files).get("model/config.json")
    if path is None or not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        return None, None
    context = config.get("max_position_embeddings")
    return ModelFacts.from_config(config), context if isinstance(context, int) else None
