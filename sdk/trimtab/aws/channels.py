"""A channel as objects named by content: what would be in S3, found without asking anyone.

A file of `LARGE` bytes or more is an object of its own. Smaller ones are laid end to end in bundles; the bundle that a file goes to
depends on its name and on how many bundles there are (a power of two, by all their bytes together), so a file that changes changes one
bundle. An object's name is the sha256 of its bytes: what is there need not be sent. The index is JSON, names in their order:

    {"format": 1, "files": {name: [bytes, sha256], ...}, "bundles": {sha256 of the bundle: [[name, bytes, sha256], ...], ...}}

It is read by trimtab_runtime.channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trimtab.aws.digests import Digests, Source
from trimtab.aws.place import S3Place
from trimtab.cache import cache_dir
from trimtab.errors import StagingError

LARGE = 1 << 20  # bytes from which on a file is an object of its own
BUNDLE = 16 << 20  # bytes of a bundle, at most and on average; half of it at least, when there is more than one
INDEX = "index-"  # how the index's name begins

_TAKEN = re.compile(rf"(?:{INDEX})?[0-9a-f]{{64}}")  # names of objects, which no file at the top of a channel may have


@dataclass(frozen=True)
class Content:
    """An object: `name` (the sha256 of its bytes, for an index with `INDEX` before it), its size, and its bytes: those of `sources`, one
    after another, or `data`.
    """

    name: str
    size: int
    sources: tuple[Source, ...] = ()
    data: bytes | None = None

    @property
    def sha256(self) -> str:
        return self.name.removeprefix(INDEX)


@dataclass(frozen=True)
class PlannedChannel:
    """A channel of `files` files with together `bytes` bytes. `digest` names it by names and contents; `objects` are what must be in S3
    before its manifest, the index last.
    """

    name: str
    digest: str
    files: int
    bytes: int
    objects: tuple[Content, ...]

    def manifest_uri(self, place: S3Place) -> str:
        """What an S3DataSource of type ManifestFile names."""
        return place.uri(place.channel(self.digest))

    def manifest(self, place: S3Place) -> str:
        """A prefix and the keys under it, as JSON. Source: S3DataSource.S3Uri, Amazon SageMaker API reference."""
        return json.dumps([{"prefix": place.uri(place.content)}, *(content.name for content in self.objects)])


def plan_channel(folder: Path, name: str, *, cache: Path | None = None, show: Callable[[int], None] = lambda read: None) -> PlannedChannel:
    """Read a folder as a channel. Links are followed, to files and to folders; empty folders are left out.

    Digests that the folder's own manifests state, or that were noted in `cache` (by default `cache_dir()`) at an earlier time, are used as
    long as size, time of change and inode stay the same; other files are read, large ones by all cores. What is sent is compared with its
    digest again, unless it was read now. `show` gets the bytes read so far, from any thread.

    Raises StagingError for a folder that is not there or has no file, a file that cannot be read or is none (a pipe, a socket), a file that
    is changing, and a name that could not be a file's name elsewhere.
    """
    digests = Digests(folder, cache or cache_dir(), show)
    objects: dict[str, Content] = {}  # two files with the same bytes are one object
    try:
        found = dict(_files(folder))
        if not found:
            raise StagingError(f"{folder} has no file: name the folder that holds the data")
        large = digests.of_all({name: path for name, (path, size) in found.items() if size >= LARGE})
        for source in large.values():
            objects[source.sha256] = Content(source.sha256, source.stamp.size, (source,))
        bundles = {}
        for names in _together({name: size for name, (_, size) in found.items() if size < LARGE}):
            content, rows = _bundle({name: found[name][0] for name in names}, digests)
            objects[content.name], bundles[content.name] = content, rows
        digests.keep()
    except OSError as exc:
        raise StagingError(f"{exc.filename or folder} cannot be read ({exc.strerror or exc}): mend that and repeat the command") from exc
    files = {name: [source.stamp.size, source.sha256] for name, source in large.items()}
    data = json.dumps({"format": 1, "files": files, "bundles": bundles}, ensure_ascii=False, separators=(",", ":")).encode()
    index = Content(INDEX + hashlib.sha256(data).hexdigest(), len(data), data=data)
    total = sum(size for _, size in found.values())
    return PlannedChannel(name, index.sha256, len(found), total, (*objects.values(), index))


def _bundle(paths: dict[str, Path], digests: Digests) -> tuple[Content, list[list[str | int]]]:
    """Small files end to end, and their rows in the index: name, bytes, sha256."""
    sources = {name: digests.of(name, path, stated=False) for name, path in paths.items()}
    rows: list[list[str | int]] = [[name, source.stamp.size, source.sha256] for name, source in sources.items()]
    sha256 = digests.of_bundle(list(sources.values()))
    return Content(sha256, sum(source.stamp.size for source in sources.values()), tuple(sources.values())), rows


def _together(sizes: dict[str, int]) -> list[list[str]]:
    """The names that share a bundle, each group sorted. Which group a name is in depends on its own hash and the number of groups."""
    count = 1
    while count * BUNDLE < sum(sizes.values()):
        count *= 2
    groups: dict[int, list[str]] = defaultdict(list)
    for name in sorted(sizes):
        groups[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % count].append(name)
    return [groups[number] for number in sorted(groups)]


def _files(folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Name, place and size of every file under a folder, by name; links are followed, and one that leads back above itself is refused."""
    if not folder.is_dir():
        raise StagingError(f"{folder} is not a folder: name the folder that holds the data")
    yield from sorted(_walk(folder, "", ()))


def _walk(folder: Path, above: str, parents: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, tuple[Path, int]]]:
    here = folder.stat()
    if (here.st_dev, here.st_ino) in parents:
        raise StagingError(f"{folder} is a link to a folder that it is in: remove the link and repeat the command")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = above + entry.name
            _refuse_name(name, entry.path)
            try:
                status = entry.stat()
            except FileNotFoundError as exc:
                raise StagingError(f"{entry.path} is a link to nothing: remove it, or put back what it means") from exc
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(Path(entry.path), f"{name}/", (*parents, (here.st_dev, here.st_ino)))
            elif stat.S_ISREG(status.st_mode):
                yield name, (Path(entry.path), status.st_size)
            else:
                raise StagingError(f"{entry.path} is neither a file nor a folder and cannot be sent: take it out of the folder")


def _refuse_name(name: str, path: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        raise StagingError(f"{path!r} has a name that is not UTF-8: rename it and repeat the command") from exc
    if _TAKEN.fullmatch(name):
        raise StagingError(f"{path} has a name that S3 objects of trimtab have: rename it, or put it in a folder of the channel")
    if "\\" in name or any(ord(character) < 32 for character in name):
        raise StagingError(f"{path!r} has a backslash or a control character in its name: rename it and repeat the command")
