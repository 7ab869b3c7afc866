"""The channels of a job: which objects each machine gets, under which names, and their download.

Source: S3DataSource and Channel in the SageMaker API reference. Names follow what SageMaker does in File mode: a prefix is cut off, of a
prefix that is no folder everything up to its last slash; of a manifest's entries its own prefix.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from control_plane.layout import Host, Tree
from control_plane.objects import Objects, TransferFailed, place_in, split_uri

FAILED = "ClientError: Data download failed:"


class ChannelRefused(Exception):
    """A channel cannot be had; the text is the job's FailureReason."""


def download(objects: Objects, channel: Mapping[str, Any], host: Host, hosts: Sequence[Host], tree: Tree) -> None:
    """One channel's files for one machine. Raises ChannelRefused."""
    name, source = channel["ChannelName"], channel["DataSource"]["S3DataSource"]
    try:
        bucket, found = listed(objects, source)
        mine = share(sorted(found), source, host, hosts)
        wanted = {found[place]: place_in(tree.channel(name), place) for place in mine}
        _refuse_clashes(mine)
        objects.fetch(bucket, wanted)
        if channel.get("CompressionType", "None") == "Gzip":
            for path in wanted.values():
                _unpack(path)
    except (TransferFailed, OSError) as exc:
        raise ChannelRefused(f"{FAILED}{exc}") from exc
    _open_modes(tree.channel(name))


def listed(objects: Objects, source: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The bucket of an S3DataSource, and its objects' keys by the relative path that each gets. Raises TransferFailed."""
    kind, uri = source["S3DataType"], source["S3Uri"]
    bucket, key = split_uri(uri)
    if kind == "S3Prefix":
        found = {relative(each.key, key): each.key for each in objects.find(bucket, key)}
        if not found:
            raise TransferFailed(f"S3 key: {uri} matched no files on s3")
        return bucket, found
    return _manifest(objects, uri, objects.read(bucket, key))


def relative(key: str, prefix: str) -> str:
    """The path under the channel's folder that an object found by a prefix gets. Pure."""
    folder = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    if not key.startswith(folder):  # the prefix is a file's key, or ends within a name
        folder = prefix[: prefix.rfind("/") + 1]
    return key[len(folder) :]


def share(places: Sequence[str], source: Mapping[str, Any], host: Host, hosts: Sequence[Host]) -> list[str]:
    """The part of a channel that a machine gets. Pure."""
    groups = source.get("InstanceGroupNames")
    members = [each for each in hosts if not groups or each.group in groups]
    if host not in members:
        return []
    if source.get("S3DataDistributionType", "FullyReplicated") == "ShardedByS3Key":
        return list(places[members.index(host) :: len(members)])
    return list(places)


def _manifest(objects: Objects, uri: str, text: bytes) -> tuple[str, dict[str, str]]:
    try:
        first, *names = json.loads(text)
        bucket, prefix = split_uri(first["prefix"])
        places = [str(PurePosixPath(name)) for name in names]
    except (ValueError, TypeError, KeyError) as exc:
        raise TransferFailed(f"{uri} is no manifest, a list of a prefix and the names that follow it ({exc})") from exc
    if not places:
        raise TransferFailed(f"the manifest {uri} names no object")
    return bucket, {place: prefix + name for place, name in zip(places, names, strict=True)}


def _refuse_clashes(places: Sequence[str]) -> None:
    """S3 can hold `a` and `a/b`; a file system cannot."""
    taken = set(places)
    for place in places:
        if clash := next((str(parent) for parent in PurePosixPath(place).parents if str(parent) in taken), None):
            raise TransferFailed(f"{clash} is an object and the folder of {place}")


def _unpack(path: Path) -> None:
    """A gzip file in place. Raises TransferFailed for what is none."""
    partly = path.with_name(f"{path.name}.unpacked")
    try:
        with gzip.open(path) as packed, partly.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    except (gzip.BadGzipFile, EOFError) as exc:
        partly.unlink()
        raise TransferFailed(f"{path.name} is not gzip ({exc})") from exc
    partly.replace(path)


def _open_modes(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
