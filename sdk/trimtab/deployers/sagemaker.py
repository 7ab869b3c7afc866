"""Endpoints of Amazon SageMaker. Model, configuration, endpoint and inference component have the endpoint's id as their name.

s3://BUCKET/PREFIX/models/<digest>/    what is served, by content; shared by all endpoints, and left behind by their end
tags on all four                       what is served, by whom, how it is asked, when it ends
home/sagemaker/<id>.log                what the endpoint's guardian does, while it does it (aws/guardian.py)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from trimtab.aws import endpoint_life, guardian, hosting_standing
from trimtab.aws import hosting_request as hosting
from trimtab.aws.endpoint_life import Creation, Standing
from trimtab.aws.guardian import Charge, Guardian
from trimtab.aws.hosting_asked import HostingAsked, patience_of
from trimtab.aws.hosting_standing import Facts, log_of, records
from trimtab.aws.invoking import SageMakerTransport
from trimtab.aws.upload import upload
from trimtab.deployers.base import EndpointHandle, EndpointRecord
from trimtab.errors import EndpointError, TrimtabError
from trimtab.events import Choice, Event, Phase, Progress
from trimtab.serving import Serving

SOON = 20.0  # seconds that an interrupted client waits for the end; then its guardian does
LONG = 3 * 3600.0  # seconds that an end may take: what is being created cannot be deleted before

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

        What the account lacks is told before anything is sent. What SageMaker will not delete yet is left to a guardian, a process that
        does it as soon as that can be. One that is not detached ends after `LAST_RESORT` minutes where no ttl is given.
        """
        if api_key is not None:
            raise EndpointError("SageMaker checks who asks by IAM, and an endpoint has no key: leave api_key out")
        bodies, chosen, planned = self.rendered(serving, id, detach=detach)
        if lacking := [str(finding) for finding in self._lacking(bodies, serving) if finding.ok is False]:
            raise EndpointError("\n".join(["nothing was sent, because the account lacks:", *(f"  {each}" for each in lacking)]))
        minutes = self.minutes(serving, detach)
        for choice in [*chosen, *(self._short_lived() if minutes else [])]:
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
        limit = None if minutes is None else time.time() + minutes * 60
        charge = Charge(id, self.aws.region, self.profile, limit, str(log_of(self.home, id)), self.settings.scaled, guardian.AGAIN)
        guard = _guardians[id] = Guardian(charge)
        creation = Creation(self.aws, id, bodies)
        try:
            for operation in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint"):
                creation.send(operation)
            self._await("endpoint", id, until, show, creation)
            if "CreateInferenceComponent" in bodies:
                creation.send("CreateInferenceComponent")
                self._await("component", id, until, show, creation)
            creation.scale()
            if detach:
                guard.keep()
                del _guardians[id]
        except BaseException:  # Ctrl-C too
            self._take_back(id, creation)
            raise
        tags = {tag["Key"]: tag["Value"] for tag in bodies["CreateEndpoint"]["Tags"]}
        self._facts[id] = Facts(tags, bodies["CreateEndpointConfig"]["ProductionVariants"][0])
        return EndpointHandle(self.name, id)

    def _short_lived(self) -> list[Choice]:
        """The guardian has the credentials that this process has, and no other may be set in its environment later."""
        found = self.aws.session.get_credentials()
        if found is None or found.method != "env" or not found.token:
            return []
        said = (
            "AWS_SESSION_TOKEN's end by themselves, and from then on nothing here can end the endpoint: use a profile ( aws sso login ), "
            "or end it in time with  trimtab close"
        )
        return [Choice(name="credentials", value="", reason=said)]

    def _await(self, what: str, id: str, until: float, show: Callable[[Event], None], creation: Creation) -> None:
        """Wait until it is in service. Raises EndpointError with its reason and its last lines."""
        asked = endpoint_life.look if what == "endpoint" else endpoint_life.look_at_component
        told: list[tuple[str, int]] = []

        def look() -> Standing | None:
            found = asked(self.aws, id)
            creation.unseen = creation.unseen and found is None
            return found

        def tell(standing: Standing, seconds: float) -> None:
            now = (standing.status, int(seconds // 30))
            if now not in told:
                told.append(now)
                show(Phase(name="sagemaker", at=time.time(), detail=f"{what} {id}: {standing.status}, {seconds:,.0f} s"))

        try:
            appears = time.monotonic() + endpoint_life.APPEARING
            while (standing := endpoint_life.wait(look, until, self.poll_seconds, tell)) is None:
                if not creation.unseen or time.monotonic() > appears:
                    break
                time.sleep(0.2)  # what was created a moment ago may not be known everywhere yet
        except TimeoutError as exc:
            raise EndpointError(
                f"{id} was still {exc} when its time was over, and is taken back: give it longer with a larger ready_timeout"
            ) from exc
        if standing is None:
            raise EndpointError(f"{id} was deleted by another while it was created: deploy again")
        if standing.status != "InService":
            raise EndpointError(endpoint_life.failure(self.aws, id, standing))

    def _take_back(self, id: str, creation: Creation) -> None:
        """Leave nothing: at once where SageMaker allows it, else by the guardian, which goes on when this process ends.

        The guardian looks, too, for what may still appear: what an interrupted request has made, or what was made and not seen yet.
        """
        guard = _guardians.pop(id)
        if not creation.made:
            guard.done()
            return
        try:
            endpoint_life.remove(self.aws, id, SOON, min(self.poll_seconds, 2.0), scales=self.settings.scaled)
        except BaseException as exc:
            guard.leave()
            if not isinstance(exc, (TrimtabError, TimeoutError)):  # a second Ctrl-C
                raise
        else:
            if creation.unseen:
                guard.leave()
            else:
                guard.done()

    def transport(self, handle: EndpointHandle) -> SageMakerTransport:
        tags = self._facts_of(handle).tags
        return SageMakerTransport(
            self.aws,
            handle.id,
            container=tags.get(hosting.CONTAINER_TAG, "trimtab"),
            models=tags.get(hosting.MODELS_TAG, "base").split(),
            component=tags.get(hosting.SCALES_TAG) == "component",
        )

    def look(self, handle: EndpointHandle) -> EndpointRecord:
        """With one question where it was seen before. Failures that pass are borne for half a minute."""
        self._refuse_other(handle)
        standing = endpoint_life.patiently(lambda: endpoint_life.look(self.aws, handle.id), self.poll_seconds)
        if standing is not None:
            facts = self._facts_of(handle)
            if facts.tags.get(hosting.ENDPOINT_TAG) == handle.id:
                return hosting_standing.record(self.aws, self.home, handle.id, facts, standing)
        found = records(self.aws, self.home, handle.id)
        if not found:
            raise self._absent(handle)
        return found[0]

    def logs(self, handle: EndpointHandle) -> Iterator[str]:
        self.look(handle)
        return endpoint_life.lines(self.aws, handle.id)

    def end(self, handle: EndpointHandle) -> None:
        """Delete it, its configuration and its model, and what scales it; waits until it is gone. What lies in S3 stays."""
        self._refuse_other(handle)
        facts = self._facts.get(handle.id)
        scales = None if facts is None else facts.tags.get(hosting.SCALES_TAG, "")
        try:
            endpoint_life.remove(self.aws, handle.id, LONG, min(self.poll_seconds, 2.0), scales=scales)
        except TimeoutError as exc:
            raise EndpointError(f"{handle} is still {exc} after {LONG / 3600:g} hours: repeat  trimtab close {handle}") from exc
        if guard := _guardians.pop(handle.id, None):
            guard.done()
        self._facts.pop(handle.id, None)

    def endpoints(self) -> list[EndpointRecord]:
        """Those of the account in the region, of any machine, and what is left of others."""
        return records(self.aws, self.home)

    def _facts_of(self, handle: EndpointHandle) -> Facts:
        self._refuse_other(handle)
        if (known := self._facts.get(handle.id)) is not None:
            return known
        try:
            found = hosting_standing.facts_of(self.aws, handle.id)
        except EndpointError as exc:
            raise (self._absent(handle) if endpoint_life.is_absent(exc) else exc) from exc
        if found.variant:  # else it could not be asked, and may be the next time
            self._facts[handle.id] = found
        return found

    def _absent(self, handle: EndpointHandle) -> EndpointError:
        return EndpointError(f"there is no endpoint {handle} in {self.aws.region}: see  trimtab endpoints --backend sagemaker")

    def _refuse_other(self, handle: EndpointHandle) -> None:
        if handle.backend != self.name:
            raise EndpointError(f"{handle} is not an endpoint of SageMaker: see which there are with  trimtab endpoints")
