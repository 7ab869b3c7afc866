"""Removes the images that trimtab's earlier versions left behind."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.images.plan import LABEL
from trimtab.images.present import Image, answering, installed, look_up, using

if TYPE_CHECKING:
    from docker import DockerClient


@dataclass(frozen=True)
class Pruned:
    """`removed` (or to be removed), `in_use` with the names of the containers that use each, `freed` bytes of the engine's disk.

    Images share layers, so `freed` may be far below the sum of their sizes; None where nothing was removed or the engine does not tell.
    """

    removed: list[Image]
    in_use: list[tuple[Image, list[str]]]
    freed: int | None


def prune(client: DockerClient | None = None, *, dry_run: bool = False) -> Pruned:
    """Remove our images that are not current, but for those that a container uses, be it running or not.

    Ours are those by label whose tag ends in their own digest, as ours do under any repository, and those that a newer build took the
    tag from. An image of another name with our labels was derived from one of ours: it is somebody's own. `dry_run` only looks.

    Raises BackendUnavailable without an engine.
    """
    errors = importlib.import_module("docker.errors")
    with using(client) as asked:
        old = [image for image in [*installed(asked), *_untagged(asked)] if outdated(image)]
        users = _users(asked)
        in_use = [(image, users[image.id]) for image in old if image.id in users]
        free = [image for image in old if image.id not in users]
        if dry_run or not free:
            return Pruned(free, in_use, None)
        before = _used(asked)
        removed = []
        for image in free:
            with answering(f"to remove {image.tag}"):
                try:
                    asked.api.remove_image(image.tag)
                except errors.NotFound:  # somebody else did it
                    continue
                except errors.APIError as exc:
                    if exc.status_code != 409:
                        raise
                    in_use.append((image, _users(asked).get(image.id, ["an image derived from it"])))  # since we looked
                    continue
            removed.append(image)
        after = _used(asked)
    return Pruned(removed, in_use, None if before is None or after is None else max(before - after, 0))


def outdated(image: Image) -> bool:
    """Whether an image of ours is one to prune: not what would be built now, or without a name any more."""
    if image.tag == image.id:
        return True
    return image.tag.endswith(f"-{image.labels['context'][:12]}") and not image.current


def _untagged(client: DockerClient) -> Iterable[Image]:
    """Our images whose tag a newer build took, under their ids."""
    with answering("for its images"):
        listed = client.api.images(filters={"label": f"{LABEL}context", "dangling": True})
    return [image for facts in listed if (image := look_up(client, facts["Id"])) is not None]


def _users(client: DockerClient) -> dict[str, list[str]]:
    """The names of the containers of each image, by its id."""
    found: dict[str, list[str]] = {}
    with answering("for its containers"):
        listed: list[dict[str, Any]] = client.api.containers(all=True)
    for facts in listed:
        found.setdefault(facts["ImageID"], []).append(facts["Names"][0].removeprefix("/") if facts["Names"] else facts["Id"][:12])
    return found


def _used(client: DockerClient) -> int | None:
    """Bytes that all layers take, each counted once; None where the engine does not tell, as while it tells somebody else."""
    errors = importlib.import_module("docker.errors")
    with answering("what its images take"), contextlib.suppress(errors.APIError):
        size = client.df().get("LayersSize")
        return None if size is None else int(size)
    return None
