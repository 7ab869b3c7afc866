"""Pushes an image to a registry: with the logins of docker's own configuration, and to Amazon ECR with AWS credentials."""

from __future__ import annotations

import base64
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import BackendError, BackendUnavailable, SpecError
from trimtab.images.building import read
from trimtab.images.context import DEVICES
from trimtab.images.present import check, find, inspect, using

if TYPE_CHECKING:
    from docker import DockerClient

# "Private registry authentication", Amazon ECR user guide
_ECR = re.compile(r"^\d{12}\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.(amazonaws\.com(\.cn)?|on\.aws)/")


@dataclass(frozen=True)
class Pushed:
    """Where an image lies now: `name` is repository and tag; `digest` (sha256:...) names its contents for ever."""

    name: str
    digest: str


def push(
    name: str,
    repository: str,
    target: str = "train",
    *,
    client: DockerClient | None = None,
    say: Callable[[str], None] = print,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> Pushed:
    """Push an image, by its tag or as the current one of a device, under its own tag to `repository`, such as `registry.example.com/us/x`.

    `show` gets the bytes sent and the bytes to send, as far as the engine knows them.

    Raises BackendUnavailable without an engine or the image, BackendError where the registry refuses or does not answer.
    """
    repository = repository.rstrip("/")
    if re.search(r":[^/]*$", repository) or "@" in repository:
        raise SpecError(f"{repository} names a tag: give the repository alone, the tag is the image's own")
    login = ecr_login(repository)
    with using(client) as asked:
        image = find(name, target, asked) if name in DEVICES else inspect(name, asked)
        check(image, asked)
        tag = image.tag.rpartition(":")[2]
        digests: list[str] = []

        def begin() -> Iterator[dict[str, Any]]:
            asked.api.tag(image.id, repository, tag)
            answers = asked.api.push(repository, tag=tag, stream=True, decode=True, auth_config=login)
            return _notice(answers, show, digests.append)

        for line in read(begin, "the push", lambda error: refused(error, repository)):
            say(line)
    if not digests:
        raise BackendError(f"the registry named no digest for {repository}:{tag}: see whether it is there, and push again")
    return Pushed(f"{repository}:{tag}", digests[0])


def _notice(stream: Iterable[dict[str, Any]], show: Callable[[int, int], None], digest: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The answers of a push that are for a person: the bytes of its layers are shown, its digest is kept."""
    sizes: dict[str, tuple[int, int]] = {}
    for answer in stream:
        detail = answer.get("progressDetail") or {}
        if "current" in detail:
            sizes[answer["id"]] = detail["current"], max(detail.get("total", 0), detail["current"])
            show(sum(done for done, _ in sizes.values()), sum(of for _, of in sizes.values()))
        elif found := (answer.get("aux") or {}).get("Digest"):
            digest(found)
        elif "id" not in answer:
            yield answer
        elif answer.get("status") in {"Pushed", "Layer already exists"}:
            yield {"status": f"{answer['id']}: {answer['status']}"}


def refused(error: str, repository: str) -> str:
    """What a failed push is told as, ending with what to do."""
    host = repository.partition("/")[0]
    ecr = _ECR.match(f"{repository}/")
    low = error.lower()
    if ecr and ("does not exist" in low or "name unknown" in low):
        make = f"aws ecr create-repository --region {ecr['region']} --repository-name {repository.partition('/')[2]}"
        return f"{host} has no repository of that name: make it with  {make}  and push again"
    if any(word in low for word in ("unauthorized", "denied", "no basic auth", "authentication required")):
        return f"{host} refused the push ({error.strip()}): log in with  docker login {host}  and push again"
    return f"the image could not be pushed to {host} ({error.strip()}): see that the registry is up and reachable, and push again"


def ecr_login(repository: str) -> dict[str, str] | None:
    """A login of twelve hours to Amazon ECR from the AWS credentials here; None for other registries, whose logins docker keeps.

    Source: GetAuthorizationToken, Amazon ECR API reference. Raises BackendUnavailable without boto3, BackendError when AWS refuses.
    """
    found = _ECR.match(f"{repository}/")
    if found is None:
        return None
    try:
        boto3 = importlib.import_module("boto3")
        exceptions = importlib.import_module("botocore.exceptions")
    except ImportError as exc:
        raise BackendUnavailable("a push to Amazon ECR needs boto3:  pip install 'trimtab[aws]'") from exc
    try:
        answer = boto3.session.Session().client("ecr", region_name=found["region"]).get_authorization_token()
    except (exceptions.BotoCoreError, exceptions.ClientError) as exc:
        remedy = "see that  aws sts get-caller-identity  works and that you may call ecr:GetAuthorizationToken, and push again"
        raise BackendError(f"AWS gave no login to ECR ({exc}): {remedy}") from exc
    user, _, password = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode().partition(":")
    return {"username": user, "password": password}
