"""Endpoints of Amazon SageMaker. Model, configuration, endpoint and inference component have the endpoint's id as their name.

s3://BUCKET/PREFIX/models/<digest>/    what is served, by content; shared by all endpoints, and left behind by their end
tags on all four                       what is served, by whom, how it is asked, when it ends
home/sagemaker/<id>.log                what the endpoint's guardian does, while it does it (aws/guardian.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trimtab.aws import account, containers, endpoint_life, hosting_instances, jumpstart
from trimtab.aws import hosting_request as hosting
from trimtab.aws.asked import ROLE_VARIABLE
from trimtab.aws.containers import Container
from trimtab.aws.endpoint_life import Creation, Standing
from trimtab.aws.guardian import Charge, Guardian
from trimtab.aws.hosting_request import HostingSettings
from trimtab.aws.hosting_standing import records
from trimtab.aws.instances import find
from trimtab.aws.invoking import SageMakerTransport
from trimtab.aws.models_in_s3 import PlannedModel, plan_model
from trimtab.aws.place import S3Place, default_bucket, parse_uri
from trimtab.aws.request import number
from trimtab.aws.session import Aws
from trimtab.aws.upload import upload
from trimtab.deployers.base import EndpointHandle, EndpointRecord, EndpointState
from trimtab.errors import BackendUnavailable, EndpointError, SpecError, TrimtabError
from trimtab.estimate import ModelFacts
from trimtab.events import Choice, Event, Phase, Progress
from trimtab.images.plan import tag_of
from trimtab.plan import Finding
from trimtab.serving import TUNED, Serving
from trimtab.spec import ServeSpec

PROVISION = 1800.0  # seconds that SageMaker may take to find the machines, beside download and start
SOON = 20.0  # seconds that an interrupted client waits for the end; then its guardian does
LONG = 3 * 3600.0  # seconds that an end may take: what is being created cannot be deleted before
YOUNG = timedelta(minutes=15)  # models and configurations may have no endpoint yet
_TRIMTAB = "trimtab.json"  # of a merged model

_guardians: dict[str, Guardian] = {}  # of endpoints that end with this process, by their ids


class SageMakerDeployer:
    """Endpoints of Amazon SageMaker. Every setting may be a text, as `--backend-option` gives it.

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

    # before anything is there

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
        bodies, chosen, planned = self._rendered(serving, id)
        return {
            "handle": str(EndpointHandle(self.name, id)),
            "requests": bodies,
            "choices": [f"{choice.value}: {choice.reason}" if choice.value else choice.reason for choice in chosen],
            "upload": None if planned is None else {"to": planned.uri(self.place), "bytes": planned.bytes, "files": planned.files},
            "usd_per_hour": self._usd(bodies),
        }

    def _rendered(self, serving: Serving, id: str) -> tuple[dict[str, dict[str, Any]], list[Choice], PlannedModel | None]:
        settings = replace(self.settings, role=self._role)
        if serving.adapters or serving.base is not None:
            raise SpecError(
                "SageMaker gives a container one folder, and adapters beside their base are two: leave  merge=False  and  adapters  out, "
                "or serve them with  --backend docker"
            )
        if settings.jumpstart is not None:
            granted, chosen, planned = self._of_hub(serving, self._hub_model)
            names = [settings.jumpstart]
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
            ttl_minutes=serving.spec.ttl_minutes,
        )
        if settings.volume_kms_key and granted.gpus:
            raise SpecError(f"{granted.instance} has disks of its own, which its hardware encrypts: leave volume_kms_key out")
        bodies = hosting.requests(settings, id, granted, tagged)
        hosting.refuse(bodies)
        return bodies, chosen, planned

    def _planned(self, serving: Serving, show: Callable[[int], None] = lambda read: None) -> PlannedModel:
        assert serving.model is not None
        files = {name.removeprefix("model/"): path for name, path in serving.files.items() if name.startswith("model/")}
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
            containers.environment(settings.container, serving.spec, name, one.gpus),
            containers.ami_of(settings.container),
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

    def findings(self, serving: Serving) -> list[Finding]:
        """What the account has and lacks for it: role, permissions, bucket, image, quota, as far as AWS tells."""
        bodies, _, _ = self._rendered(serving, "trim-ep-00000000")
        variant, uri = bodies["CreateEndpointConfig"]["ProductionVariants"][0], self.settings.model_uri or serving.uri or None
        needs = account.Needs(
            role=self._role,
            bucket=self.place.bucket,
            prefix=self.place.prefix,
            image=bodies["CreateModel"]["PrimaryContainer"]["Image"],
            instance=find(variant["InstanceType"]),
            count=self.settings.bounds[1],
            makes_bucket=self.bucket is None,
            kms_key=self.kms_key,
            volume_kms_key=self.settings.volume_kms_key,
            subnets=bool(self.settings.subnets),
            model_uri=uri,
            endpoint="component" if self.settings.to_zero else "variant" if self.settings.scales else "fixed",
        )
        return account.survey(self.aws, needs)

    # an endpoint's life

    def start(
        self,
        serving: Serving,
        id: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        detach: bool = False,
        ready_timeout: float | None = None,
        show: Callable[[Event], None] = lambda event: None,
    ) -> EndpointHandle:
        """Create it and return when it is in service. Whatever goes wrong, Ctrl-C too, leaves nothing but the model in S3.

        What SageMaker will not delete yet is left to a guardian, a process that does it as soon as that can be.
        """
        if api_key is not None:
            raise EndpointError("SageMaker checks who asks by IAM, and an endpoint has no key: leave api_key out")
        bodies, chosen, planned = self._rendered(serving, id)
        for choice in chosen:
            show(choice)
        if planned is not None:
            whole = max(1, planned.bytes // 10**6)
            upload(
                [planned],
                self.aws.client("s3"),
                planned.place(self.place),
                lambda done, of: show(Progress(name="upload, MB", done=done // 10**6, of=whole)),
            )
        variant = bodies["CreateEndpointConfig"]["ProductionVariants"][0]
        patience = PROVISION + sum(variant[name] for name in variant if name.endswith("TimeoutInSeconds"))
        until = time.monotonic() + (patience if ready_timeout is None else ready_timeout)
        ttl = serving.spec.ttl_minutes
        guardian = _guardians[id] = Guardian(
            Charge(id, self.aws.region, self.profile, None if ttl is None else time.time() + ttl * 60, str(self._log(id)))
        )
        creation = Creation(self.aws, id, bodies)
        try:
            for operation in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint"):
                creation.send(operation)
            self._await("endpoint", id, until, show)
            if "CreateInferenceComponent" in bodies:
                creation.send("CreateInferenceComponent")
                self._await("component", id, until, show)
            creation.scale()
        except BaseException:  # Ctrl-C too
            self._take_back(id, creation)
            raise
        if detach:
            del _guardians[id]
            guardian.keep()
        return EndpointHandle(self.name, id)

    def _await(self, what: str, id: str, until: float, show: Callable[[Event], None]) -> None:
        """Wait until it is in service. Raises EndpointError with its reason and its last lines."""
        look = endpoint_life.look if what == "endpoint" else endpoint_life.look_at_component
        told: list[tuple[str, int]] = []

        def tell(standing: Standing, seconds: float) -> None:
            now = (standing.status, int(seconds // 30))
            if now not in told:
                told.append(now)
                show(Phase(name="sagemaker", at=time.time(), detail=f"{what} {id}: {standing.status}, {seconds:,.0f} s"))

        try:
            standing = endpoint_life.wait(lambda: look(self.aws, id), until, self.poll_seconds, tell)
        except TimeoutError as exc:
            raise EndpointError(
                f"{id} was still {exc} when its time was over, and is taken back: give it longer with a larger ready_timeout"
            ) from exc
        if standing is None:
            raise EndpointError(f"{id} was deleted by another while it was created: deploy again")
        if standing.status != "InService":
            raise EndpointError(endpoint_life.failure(self.aws, id, standing))

    def _take_back(self, id: str, creation: Creation) -> None:
        """Leave nothing: at once where SageMaker allows it, else by the guardian, which goes on when this process ends."""
        guardian = _guardians.pop(id)
        if not creation.made:
            guardian.done()
            return
        try:
            endpoint_life.remove(self.aws, id, SOON, min(self.poll_seconds, 2.0))
        except (TrimtabError, TimeoutError):
            guardian.leave()
        else:
            guardian.done()

    def transport(self, handle: EndpointHandle) -> SageMakerTransport:
        tags = self._tags(handle)
        return SageMakerTransport(
            self.aws,
            handle.id,
            container=tags.get(hosting.CONTAINER_TAG, "trimtab"),
            models=tags.get(hosting.MODELS_TAG, "base").split(),
            component=tags.get(hosting.SCALES_TAG) == "component",
        )

    def look(self, handle: EndpointHandle) -> EndpointRecord:
        self._refuse_other(handle)
        found = records(self.aws, handle.id)
        if not found:
            raise self._absent(handle)
        return found[0]

    def logs(self, handle: EndpointHandle) -> Iterator[str]:
        self.look(handle)
        return endpoint_life.lines(self.aws, handle.id)

    def end(self, handle: EndpointHandle) -> None:
        """Delete it, its configuration and its model, and what scales it; waits until it is gone. What lies in S3 stays."""
        self._refuse_other(handle)
        try:
            endpoint_life.remove(self.aws, handle.id, LONG, min(self.poll_seconds, 2.0))
        except TimeoutError as exc:
            raise EndpointError(f"{handle} is still {exc} after {LONG / 3600:g} hours: repeat  trimtab close {handle}") from exc
        if guardian := _guardians.pop(handle.id, None):
            guardian.done()

    def endpoints(self) -> list[EndpointRecord]:
        """Those of the account in the region, of any machine, and what is left of others."""
        return records(self.aws)

    def close_expired(self) -> list[EndpointRecord]:
        """End every endpoint whose time is over, and remove what is left of others; what that was."""
        now, over = datetime.now(UTC), []
        for record in self.endpoints():
            left = record.state is EndpointState.ENDED and record.orphan and record.created < now - YOUNG
            if left or (record.expires is not None and record.expires < now):
                over.append(record)
        for record in over:
            self.end(record.handle)
        return over

    def _tags(self, handle: EndpointHandle) -> dict[str, str]:
        self._refuse_other(handle)
        try:
            return endpoint_life.tags_of(self.aws, f"{endpoint_life.arn_prefix(self.aws)}:endpoint/{handle.id}")
        except EndpointError as exc:
            raise (self._absent(handle) if endpoint_life.is_absent(exc) else exc) from exc

    def _absent(self, handle: EndpointHandle) -> EndpointError:
        return EndpointError(f"there is no endpoint {handle} in {self.aws.region}: see  trimtab endpoints --backend sagemaker")

    def _refuse_other(self, handle: EndpointHandle) -> None:
        if handle.backend != self.name:
            raise EndpointError(f"{handle} is not an endpoint of SageMaker: see which there are with  trimtab endpoints")

    def _log(self, id: str) -> Path:
        return self.home / "sagemaker" / f"{id}.log"


def _facts(serving: Serving) -> tuple[ModelFacts | None, int | None]:
    """Sizes and longest context, from the model's own configuration where it is on this machine."""
    path = serving.files.get("model/config.json")
    if path is None or not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        return None, None
    context = config.get("max_position_embeddings")
    return ModelFacts.from_config(config), context if isinstance(context, int) else None
