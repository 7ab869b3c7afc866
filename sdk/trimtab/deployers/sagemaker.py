"""Endpoints of Amazon SageMaker. Model, configuration, endpoint and inference component have the endpoint's id as their name.

s3://BUCKET/PREFIX/models/<digest>/    what is served, by content; shared by all endpoints, and left behind by their end
tags on all four                       what is served, by whom, how it is asked, when it ends
home/sagemaker/<id>.log                what the endpoint's guardian does, while it does it (aws/guardian.py)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trimtab.aws import endpoint_life
from trimtab.aws import hosting_request as hosting
from trimtab.aws.endpoint_life import Creation, Standing
from trimtab.aws.guardian import Charge, Guardian
from trimtab.aws.hosting_asked import HostingAsked, patience_of
from trimtab.aws.hosting_standing import records
from trimtab.aws.invoking import SageMakerTransport
from trimtab.aws.upload import upload
from trimtab.deployers.base import EndpointHandle, EndpointRecord, EndpointState
from trimtab.errors import EndpointError, TrimtabError
from trimtab.events import Event, Phase, Progress
from trimtab.serving import Serving

SOON = 20.0  # seconds that an interrupted client waits for the end; then its guardian does
LONG = 3 * 3600.0  # seconds that an end may take: what is being created cannot be deleted before
YOUNG = timedelta(minutes=15)  # models and configurations may have no endpoint yet

_guardians: dict[str, Guardian] = {}  # of endpoints that end with this process, by their ids


class SageMakerDeployer(HostingAsked):
    """Endpoints of Amazon SageMaker; its settings are those of `HostingAsked`."""

    name = "sagemaker"

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
        bodies, chosen, planned = self.rendered(serving, id)
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
        until = time.monotonic() + (patience_of(bodies) if ready_timeout is None else ready_timeout)
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
