"""Fetches what lies under a prefix of S3 into a folder: many requests at once, every byte checked, whole or not at all.

It is gathered in a folder beside the wanted one, which is renamed when all is there. What was fetched before an interruption stays there
and is not fetched again; `.fetched` in it notes what is whole. An object that changes meanwhile is noticed by its ETag.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.aws.place import parse_uri
from trimtab.aws.refusals import asking, error_code
from trimtab.errors import StagingError

PIECE = 8 << 20  # bytes that are asked for at once of an object that was not stored in parts
_BLOCK = 1 << 20
_WORKERS = 10
_ATTEMPTS = 5  # for an answer that ends early; boto3 itself repeats only what was not answered
_JOURNAL = ".fetched"


@dataclass(frozen=True)
class Received:
    """What came over the network: bytes, and files made."""

    bytes: int
    files: int


@dataclass(frozen=True)
class _Object:
    key: str
    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class _Piece:
    """What one request fetches of an object; `asked` are its arguments, none for the whole."""

    found: _Object
    asked: tuple[tuple[str, str | int], ...]

    @property
    def note(self) -> str:
        return json.dumps([self.found.key, self.found.etag, self.asked])


def download(
    s3: Any,
    uri: str,
    folder: Path,
    *,
    owner: str | None = None,
    without: str = "",
    show: Callable[[int, int], None] = lambda done, of: None,
) -> Received:
    """Fetch all objects under the prefix `uri` (`s3://BUCKET/PREFIX/`) into `folder`, under their keys without the prefix.

    The folder that `without` names is left where it is.

    A folder that is there already is whole, and nothing is asked. `s3` is a boto3 client, `owner` the account that must own the bucket;
    `show` gets bytes fetched, and bytes in all. Keys that end in "/" and hold nothing (consoles make them for folders) are left out.

    Raises StagingError for a prefix without objects, a key that is no file's name or would lie outside of the folder, an object that
    changes meanwhile or is not what its checksum says, and all that S3 refuses. What was fetched stays for the next time.
    """
    with _gathering(uri, folder) as partial:
        if partial is None:
            return Received(0, 0)
        bucket, prefix = parse_uri(uri)
        prefix = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
        with _Receiver(s3, bucket, owner, partial, show) as receiver:
            found = receiver.under(uri, prefix)
            return receiver.fetch([each for each in found if not (without and each.name.startswith(f"{without}/"))])


@contextmanager
def _gathering(uri: str, folder: Path) -> Iterator[Path | None]:
    """A folder beside the wanted one, renamed at the end; None when the wanted one is there. Others who want the same wait."""
    partial = folder.with_name(f".{folder.name}.{hashlib.sha256(uri.encode()).hexdigest()[:16]}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = partial.with_name(f"{partial.name}.lock")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if folder.is_dir():
                yield None
            else:
                partial.mkdir(exist_ok=True)
                yield partial
                (partial / _JOURNAL).unlink(missing_ok=True)
                partial.rename(folder)
            lock.unlink(missing_ok=True)
    except OSError as exc:
        raise StagingError(f"{uri} cannot be kept in {folder} ({exc}): make room there, or choose another folder") from exc


class _Receiver:
    """Fetches objects into a folder, several pieces at once."""

    def __init__(self, s3: Any, bucket: str, owner: str | None, folder: Path, show: Callable[[int, int], None]) -> None:
        self._s3, self._folder, self._show = s3, folder, show
        self._named = {"Bucket": bucket, **({} if owner is None else {"ExpectedBucketOwner": owner})}
        self._lock = threading.Lock()
        self._done = self._of = self._bytes = 0

    def __enter__(self) -> _Receiver:
        self._pool = ThreadPoolExecutor(min(_WORKERS, self._s3.meta.config.max_pool_connections), thread_name_prefix="trimtab-download")
        self._journal = (self._folder / _JOURNAL).open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._journal.close()

    def under(self, uri: str, prefix: str) -> list[_Object]:
        """The objects under a prefix. Raises StagingError when there is none, or one that cannot be a file."""
        found: dict[str, _Object] = {}
        with asking(f"what is in {uri}", action="s3:ListBucket", error=StagingError):
            for page in self._s3.get_paginator("list_objects_v2").paginate(**self._named, Prefix=prefix):
                for entry in page.get("Contents", []):
                    name = entry["Key"].removeprefix(prefix)
                    if name and not (name.endswith("/") and entry["Size"] == 0):
                        _refuse_name(entry["Key"], name)
                        found[name] = _Object(entry["Key"], name, entry["Size"], entry["ETag"])
        if not found:
            raise StagingError(f"there is nothing in {uri}: see what there is with  aws s3 ls s3://{self._named['Bucket']}/ --recursive")
        for name in found:
            for folder in PurePosixPath(name).parents:
                if str(folder) in found:
                    raise StagingError(f"{uri} holds {folder} and {name}, and the first cannot be a file and a folder: remove one of them")
        return list(found.values())

    def fetch(self, objects: list[_Object]) -> Received:
        """Fetch what is not noted to be there."""
        self._of = sum(found.size for found in objects)
        noted = set((self._folder / _JOURNAL).read_text(encoding="utf-8").splitlines())
        what = f"for {len(objects)} objects of s3://{self._named['Bucket']} (what was fetched stays, and a repeat fetches the rest)"
        with asking(what, action="s3:GetObject", error=StagingError), _unchanged(self._s3):
            fetching = [(found, pieces) for found in objects if (pieces := self._begin(found, noted))]
            futures = [self._pool.submit(self._fetch, piece) for _, pieces in fetching for piece in pieces if piece.note not in noted]
            for future in futures:
                future.result()
            for future in [self._pool.submit(self._check, found, pieces) for found, pieces in fetching]:
                future.result()
        return Received(self._bytes, len(fetching))

    def _begin(self, found: _Object, noted: set[str]) -> list[_Piece]:
        """The pieces of an object, into a file of its size; none when it is whole already."""
        whole, path = _Piece(found, ()), self._folder / found.name
        if not (path.is_file() and path.stat().st_size == found.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(found.size)
            noted -= {note for note in noted if json.loads(note)[0] == found.key}
        if whole.note in noted:
            self._progress(found.size)
            return []
        if found.size <= 2 * PIECE:
            return [whole]
        asked = {**self._named, "Key": found.key, "IfMatch": found.etag}
        if not _stated(self._s3.head_object(**asked, ChecksumMode="ENABLED")):  # then each part may come with its own checksum
            parts = self._s3.head_object(**asked, PartNumber=1).get("PartsCount", 1)
            return [_Piece(found, (("PartNumber", number),)) for number in range(1, parts + 1)]
        starts = range(0, found.size, PIECE)
        return [_Piece(found, (("Range", f"bytes={start}-{min(start + PIECE, found.size) - 1}"),)) for start in starts]

    def _fetch(self, piece: _Piece) -> None:
        """One piece into its file, again when the answer ends early or is not what its checksum says."""
        path, cut_short = self._folder / piece.found.name, _cut_short()
        for attempt in range(_ATTEMPTS):
            time.sleep(0.25 * attempt**2)
            written = 0
            try:
                answer = self._s3.get_object(
                    **self._named, **dict(piece.asked), Key=piece.found.key, IfMatch=piece.found.etag, ChecksumMode="ENABLED"
                )
                with contextlib.closing(answer["Body"]) as body, path.open("r+b", buffering=0) as file:
                    file.seek(_start(answer))
                    while block := body.read(_BLOCK):
                        file.write(block)
                        written += len(block)
                        self._progress(len(block), received=len(block))
            except cut_short:
                self._progress(-written)
                if attempt + 1 == _ATTEMPTS:
                    raise
            else:
                self._note(piece)
                return

    def _check(self, found: _Object, pieces: list[_Piece]) -> None:
        """Compare an object that came in pieces with the checksum of the whole, where S3 has one of a kind that Python computes."""
        whole, path = _Piece(found, ()), self._folder / found.name
        if pieces != [whole]:
            head = self._s3.head_object(**self._named, Key=found.key, IfMatch=found.etag, ChecksumMode="ENABLED")
            if (stated := _stated(head)) and _checksum(path, stated[0]) != stated[1]:
                path.unlink()
                raise StagingError(
                    f"{found.key} came with other bytes than its {stated[0]} says: repeat the command, which fetches it again"
                )
            self._note(whole)

    def _note(self, piece: _Piece) -> None:
        with self._lock:
            self._journal.write(f"{piece.note}\n")
            self._journal.flush()

    def _progress(self, arrived: int, *, received: int = 0) -> None:
        with self._lock:
            self._done += arrived
            self._bytes += received
            self._show(self._done, self._of)


@contextmanager
def _unchanged(s3: Any) -> Iterator[None]:
    """Tells of an object that has another ETag than it had when it was listed."""
    try:
        yield
    except s3.exceptions.ClientError as exc:
        if error_code(exc) not in ("PreconditionFailed", "412"):
            raise
        raise StagingError(
            "an object was changed while it was fetched: wait until what writes it is done, then repeat the command"
        ) from exc


def _cut_short() -> tuple[type[Exception], ...]:
    """What is raised when an answer that has begun does not go on as it should."""
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return IncompleteReadError, ResponseStreamingError, ReadTimeoutError, FlexibleChecksumError, ConnectionError, TimeoutError


def _start(answer: dict[str, Any]) -> int:
    """Where the bytes of an answer begin in their object."""
    place: str = answer.get("ContentRange", "bytes 0-")
    return int(place.removeprefix("bytes ").partition("-")[0])


def _stated(head: dict[str, Any]) -> tuple[str, str] | None:
    """The checksum of a whole object: its kind, and its value as S3 writes it. None when there is only one of other kinds, or of parts."""
    for kind in ("SHA256", "CRC32"):
        value = head.get(f"Checksum{kind}", "-")
        if "-" not in value:
            return kind, value
    etag = head["ETag"].strip('"')
    by_key = head.get("ServerSideEncryption", "AES256") != "AES256"  # then the ETag is not the MD5
    return None if by_key or not re.fullmatch(r"[0-9a-f]{32}", etag) else ("MD5", base64.b64encode(bytes.fromhex(etag)).decode())


def _checksum(path: Path, kind: str) -> str:
    crc, whole = 0, hashlib.new("md5" if kind == "MD5" else "sha256", usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            if kind == "CRC32":
                crc = zlib.crc32(block, crc)
            else:
                whole.update(block)
    return base64.b64encode(crc.to_bytes(4, "big") if kind == "CRC32" else whole.digest()).decode()


def _refuse_name(key: str, name: str) -> None:
    """A name that could lie outside of the folder, or be none."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name or name == _JOURNAL:
        raise StagingError(f"the key {key!r} cannot be the name of a file under a folder: rename the object, then repeat the command")
