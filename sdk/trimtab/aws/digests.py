"""The sha256 of files, without reading them where it is known: stated beside them by a manifest, or noted when they were read before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import StagingError
from trimtab.model_folder import MANIFEST as MODEL_MANIFEST

_ROWS_MANIFEST = "manifest.json"
_BLOCK = 1 << 20  # bytes read at once
_SETTLED = 2.0  # seconds after a change, until which another one may have the same time on a coarse file system


class Stamp(NamedTuple):
    """What tells that a file is still the same: bytes, time of change in nanoseconds, inode."""

    size: int
    changed: int
    inode: int


@dataclass(frozen=True)
class Source:
    """A file, as it was when its digest was known: stated by a `manifest`, or from a `note` of an earlier time, or read now.

    `sure` tells that it was read now and any later change of it shows in its stamp.
    """

    path: Path
    stamp: Stamp
    sha256: str
    manifest: Path | None = None
    note: Path | None = None
    sure: bool = False


def stamp_of(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def refuse_changed(wanted: str, sources: Sequence[Source], found: str) -> None:
    """Refuse the bytes of files together that have not the digest that names them: one was changed, or what told its digest is wrong.

    Raises StagingError; a note that was wrong is forgotten.
    """
    changed = [source for source in sources if stamp_of(source.path) != source.stamp]
    if changed:
        raise StagingError(f"{changed[0].path} was changed while it was sent: wait until what writes it is done, then repeat the command")
    if found == wanted:
        return
    for source in sources:
        if source.manifest:
            raise StagingError(
                f"{source.path} does not have the contents that {source.manifest} states: it was changed, or the disk fails. Remove the "
                f"folder {source.manifest.parent} and repeat the command, which makes it again"
            )
        if source.note:
            source.note.unlink(missing_ok=True)
    raise StagingError(f"{sources[0].path} has other contents than when it was last read: repeat the command, which reads it again")


class Digests:
    """Digests of the files of one folder, and of its bundles.

    Notes are kept in `cache/digests`, a file for each folder that is replaced whole, so that clients at once do not harm each other: the
    last one's notes stay, and any of them are right. What a manifest states counts when it was written after the file, in the same size.
    """

    def __init__(self, folder: Path, cache: Path, show: Callable[[int], None] = lambda read: None) -> None:
        self._notes = cache / "digests"
        self._note = self._notes / f"channel-{_short(str(folder.absolute()))}.json"
        self._show, self._read, self._lock = show, 0, threading.Lock()
        self._given_up = False
        noted = _object(self._note)
        self._noted, self._bundles = ({**found} if isinstance(found := noted.get(of), dict) else {} for of in ("files", "bundles"))
        self._now: dict[str, Any] = {}
        self._bundles_now: dict[str, str] = {}
        self._manifests: dict[Path, dict[str, Any]] = {}

    def of_all(self, paths: Mapping[str, Path]) -> dict[str, Source]:
        """The files' digests, also as manifests give them; those that must be read are read by all cores. Raises what `of` does."""
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="trimtab-digest") as pool:
            futures = {name: pool.submit(self.of, name, path) for name, path in paths.items()}
            try:
                return {name: future.result() for name, future in futures.items()}
            except BaseException:  # Ctrl-C does not wait for the rest of large files
                self._given_up = True
                pool.shutdown(cancel_futures=True)
                raise

    def of(self, name: str, path: Path, *, stated: bool = True) -> Source:
        """The file's digest, with `stated` also as a manifest gives it.

        Raises StagingError when the file changes while it is read, OSError when it cannot be.
        """
        real = path.resolve()
        stamp = stamp_of(real)
        row = self._noted.get(name)
        if isinstance(row, list) and row[:3] == list(stamp) and _is_digest(row[-1]):
            source = Source(real, stamp, row[-1], note=self._note)
        elif stated and (found := self._stated(real, stamp)):
            return found
        else:
            source = Source(real, stamp, self._sha256(real), sure=_has_settled(stamp))
            if stamp_of(real) != stamp:
                raise StagingError(f"{path} is changing: wait until what writes it is done, then repeat the command")
        if _has_settled(stamp):
            self._now[name] = [*stamp, source.sha256]
        return source

    def of_bundle(self, sources: Sequence[Source]) -> str:
        """The digest of files one after another, which depends on nothing but their digests and sizes."""
        key = _short(json.dumps([[source.stamp.size, source.sha256] for source in sources]))
        sha256 = self._bundles.get(key)
        if not _is_digest(sha256):
            whole = hashlib.sha256()
            for source in sources:
                whole.update(source.path.read_bytes())
            sha256 = whole.hexdigest()
        self._bundles_now[key] = str(sha256)
        return str(sha256)

    def keep(self) -> None:
        """Note what is known of the folder now."""
        written = self._note.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            self._notes.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps({"files": self._now, "bundles": self._bundles_now}), encoding="utf-8")
            written.replace(self._note)

    def _stated(self, real: Path, stamp: Stamp) -> Source | None:
        """What a manifest beside the file says of it, or the note that trimtab.model_folder.local_facts made of a model's folder."""
        for manifest, size in ((_ROWS_MANIFEST, "bytes"), (MODEL_MANIFEST, "size")):
            where = real.parent / manifest
            sha256 = _fact(self._manifest(where), real.name, size, stamp.size)
            if sha256 and where.stat().st_mtime_ns >= stamp.changed:
                return Source(real, stamp, sha256, manifest=where)
        note = self._notes / f"{_short(str(real.parent))}.json"
        stamps = self._manifest(note).get("stamps")
        if isinstance(stamps, dict) and stamps.get(real.name) == list(stamp):
            sha256 = _fact(self._manifest(note), real.name, "size", stamp.size)
            return Source(real, stamp, sha256, note=note) if sha256 else None
        return None

    def _manifest(self, path: Path) -> dict[str, Any]:
        if path not in self._manifests:
            self._manifests[path] = _object(path)
        return self._manifests[path]

    def _sha256(self, path: Path) -> str:
        whole = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while not self._given_up and (block := file.read(_BLOCK)):
                whole.update(block)
                with self._lock:
                    self._read += len(block)
                    self._show(self._read)
        return whole.hexdigest()


def _has_settled(stamp: Stamp) -> bool:
    return time.time() - stamp.changed / 1e9 > _SETTLED


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no readable one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _fact(manifest: dict[str, Any], name: str, size: str, wanted: int) -> str | None:
    """The sha256 that a manifest states for a file of that name and size."""
    files = manifest.get("files")
    fact = files.get(name) if isinstance(files, dict) else None
    if not isinstance(fact, dict) or fact.get(size) != wanted:
        return None
    return fact["sha256"] if _is_digest(fact.get("sha256")) else None


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
