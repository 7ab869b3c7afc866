"""Sends channels to S3: only what is not there, in parts at once, checked by both sides, its manifest last.

An object is made only when its bytes have the digest that is its name: they are hashed while they are read, unless they were hashed when
the channel was planned and the file's stamp is the same. S3 compares the sha256 of what comes in one request, and the CRC-32 of each part.
So what is there under a digest is whole and right, whoever sent it. Every object is made under the condition that there is none
(If-None-Match), so of two clients that send the same, one makes it.

What a killed client had sent of a large file is found again by S3's own list of unfinished uploads, and each part that is there with the
right checksum is not sent again. Unfinished uploads cost money, so those under our prefix that began more than a day ago are aborted.

Why not boto3's transfer manager: see README.md, "Staging".
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from trimtab.aws.bucket import Stored, find_bucket
from trimtab.aws.channels import Content, PlannedChannel
from trimtab.aws.digests import refuse_changed
from trimtab.aws.place import S3Place
from trimtab.aws.refusals import asking, error_code
from trimtab.errors import StagingError

PART = 16 << 20  # bytes of a part, at least; a file up to that size goes in one request
_PARTS = 10_000  # parts that S3 takes
_WORKERS = 10
_STALE = timedelta(days=1)
_ROUNDS = 4  # times that a file is begun anew when another client ends its upload
_TAKEN = {"PreconditionFailed", "412"}  # another client made the object
_LOST = {"NoSuchUpload", "InvalidPart", "ConditionalRequestConflict", "409"}  # another client ended the upload, or is ending the same


@dataclass(frozen=True)
class Sent:
    """What went over the network: bytes of content and manifests, and objects made. Both are 0 when all was there."""

    bytes: int
    objects: int


def upload(channels: Sequence[PlannedChannel], s3: Any, place: S3Place, show: Callable[[int, int], None] = lambda done, of: None) -> Sent:
    """Make sure that everything of `channels` is in S3. `s3` is a boto3 client; `show` gets bytes that are there, and bytes in all.

    The bucket is made when it is the account's default one and absent. Raises StagingError, which says what to do: no bucket, one of
    another region or account, a missing permission, expired credentials, a service that stays away, a file that changes. What had
    arrived stays.
    """
    objects = {content.name: content for channel in channels for content in channel.objects}
    total = sum(content.size for content in objects.values())
    what = f"to take data into {place.uri(place.content)} (what arrived stays there, and a repeat sends the rest)"
    with asking(what, error=StagingError):
        _sign_headers_only(s3)
        sender = _Sender(s3, place, find_bucket(s3, place), lambda done: show(done, total))
        try:
            sender.send(objects.values())
            for channel in channels:
                sender.finish(channel)
        finally:
            sender.close()
    return sender.sent


def _sign_headers_only(s3: Any) -> None:
    """Have the client sign what is sent without hashing its body once more: each body has a checksum in a header, which is signed.

    boto3 does so by itself over TLS when it computes the checksum, but not when it is given one. On the way to another machine without
    TLS bodies stay signed.
    """
    from botocore.config import Config

    settings = s3.meta.config.merge(Config(s3={**(s3.meta.config.s3 or {}), "payload_signing_enabled": False}))

    def before_sign(request: Any, **_: Any) -> None:
        to = urlsplit(request.url)
        if to.scheme == "https" or to.hostname in ("localhost", "127.0.0.1", "::1"):
            request.context["client_config"] = settings

    for operation in ("PutObject", "UploadPart"):
        s3.meta.events.register(f"before-sign.s3.{operation}", before_sign, unique_id=f"trimtab-{operation}")


class _Sender:
    """Reads large files in the caller's thread, in order; everything is sent from others."""

    def __init__(self, s3: Any, place: S3Place, stored: Stored, show: Callable[[int], None]) -> None:
        self._s3, self._place, self._stored, self._show = s3, place, stored, show
        workers = min(_WORKERS, s3.meta.config.max_pool_connections)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="trimtab-upload")
        self._slots = threading.BoundedSemaphore(workers + 2)  # so much is read ahead, and no more, since it stays in memory
        self._lock = threading.Lock()
        self._futures: list[Future[None]] = []
        self._failure: BaseException | None = None
        self._done = self._bytes = self._objects = 0
        self._lost: list[Content] = []
        self._unfinished: dict[str, str] | None = None

    @property
    def sent(self) -> Sent:
        return Sent(self._bytes, self._objects)

    def send(self, objects: Iterable[Content]) -> None:
        """Send what is not there, and wait until it is."""
        for attempt in range(_ROUNDS):
            for content in objects:
                if self._is_there(content, anew=attempt > 0):
                    self._progress(content.size)
                elif len(content.sources) != 1 or content.size <= PART:
                    self._submit(self._put, content)
                else:
                    self._send_parts(content)
            for future in self._futures:
                future.result()
            self._futures.clear()
            objects, self._lost = self._lost, []
            if not objects:
                return
            self._unfinished = None
            time.sleep(0.2 * attempt)
        raise StagingError(
            f"another client sends the same to {self._place.uri(self._place.content)} and ends our uploads: wait for it, "
            "then repeat the command"
        )

    def finish(self, channel: PlannedChannel) -> None:
        """Write a channel's manifest, after all that it names."""
        key = self._place.channel(channel.digest)
        if self._stored.ask(key) is None:
            self._make(key, channel.manifest(self._place).encode())

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _is_there(self, content: Content, *, anew: bool) -> bool:
        key = self._place.content + content.name
        size = self._stored.ask(key) if anew else self._stored.size(key)
        if size is not None and size != content.size:
            uri = self._place.uri(key)
            raise StagingError(f"{uri} has {size} bytes, not {content.size}: another program wrote it. Remove it:  aws s3 rm {uri}")
        return size is not None

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have it done by a worker as soon as there is room for what it keeps in memory. Raises what failed in one before."""
        self._slots.acquire()
        if self._failure is not None:
            self._slots.release()
            raise self._failure
        future = self._pool.submit(work, *arguments)
        self._futures.append(future)
        future.add_done_callback(self._over)

    def _over(self, future: Future[None]) -> None:
        self._slots.release()
        if not future.cancelled() and (failure := future.exception()):
            self._failure = self._failure or failure

    def _progress(self, arrived: int, *, sent: int = 0, objects: int = 0) -> None:
        with self._lock:
            self._done += arrived
            self._bytes += sent
            self._objects += objects
            if arrived:
                self._show(self._done)

    # objects in one request

    def _put(self, content: Content) -> None:
        self._make(self._place.content + content.name, content.data if content.data is not None else _whole(content))
        self._progress(content.size)

    def _make(self, key: str, data: bytes) -> None:
        """Make an object that is not there; when another client was quicker, that is as good."""
        checksum = _base64(hashlib.sha256(data).digest())
        for attempt in range(_ROUNDS):
            try:
                self._s3.put_object(
                    **self._place.named(), **self._place.encryption(), Key=key, Body=data, IfNoneMatch="*", ChecksumSHA256=checksum
                )
            except self._s3.exceptions.ClientError as exc:
                if error_code(exc) in _TAKEN:
                    return
                if error_code(exc) not in _LOST or attempt + 1 == _ROUNDS:
                    raise
                time.sleep(0.2 * (attempt + 1))  # two are making it: the other may yet fail
            else:
                self._progress(0, sent=len(data), objects=1)
                return

    # objects in parts

    def _send_parts(self, content: Content) -> None:
        source, part = content.sources[0], part_size(content.size)
        parts = self._begin(content)
        whole = hashlib.sha256()
        with source.path.open("rb", buffering=0) as file:
            for number, start in enumerate(range(0, content.size, part), 1):
                data = os.pread(file.fileno(), min(part, content.size - start), start)
                if not source.sure:
                    whole.update(data)
                if parts.arrived(number, data):
                    self._progress(len(data))
                else:
                    parts.open += 1
                    self._submit(self._send_part, parts, number, data)
        try:
            refuse_changed(content.sha256, [source], source.sha256 if source.sure else whole.hexdigest())
        except StagingError:
            self._abort(parts.key, parts.upload_id)
            raise
        self._submit(self._close_part, parts)

    def _begin(self, content: Content) -> _Parts:
        """An upload to send parts to: one that was begun and not ended, or a new one."""
        key = self._place.content + content.name
        if self._unfinished is None:
            self._unfinished = dict(self._list_unfinished())
        upload_id = self._unfinished.get(key)
        there: dict[int, dict[str, Any]] = {}
        if upload_id is None:
            upload_id = self._s3.create_multipart_upload(
                **self._place.named(), **self._place.encryption(), Key=key, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT"
            )["UploadId"]
        else:
            with asking("which parts have arrived", action="s3:ListMultipartUploadParts", error=StagingError):
                pages = self._s3.get_paginator("list_parts").paginate(**self._place.named(), Key=key, UploadId=upload_id)
                there = {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        return _Parts(content, key, upload_id, there)

    def _list_unfinished(self) -> Iterator[tuple[str, str]]:
        """Keys and ids of unfinished uploads of ours, older ones first; those that nobody went on with for a day are aborted."""
        with asking("for unfinished uploads", action="s3:ListBucketMultipartUploads", error=StagingError):
            pages = self._s3.get_paginator("list_multipart_uploads").paginate(**self._place.named(), Prefix=self._place.content)
            found = [upload for page in pages for upload in page.get("Uploads", [])]
        for upload in sorted(found, key=lambda upload: upload["Initiated"]):
            if datetime.now(UTC) - upload["Initiated"] > _STALE:
                self._abort(upload["Key"], upload["UploadId"])
            else:
                yield upload["Key"], upload["UploadId"]

    def _send_part(self, parts: _Parts, number: int, data: bytes) -> None:
        if not parts.lost:
            checksum = crc32_text(zlib.crc32(data))
            try:
                answer = self._s3.upload_part(
                    **self._place.named(), Key=parts.key, UploadId=parts.upload_id, PartNumber=number, Body=data, ChecksumCRC32=checksum
                )
            except self._s3.exceptions.ClientError as exc:
                if error_code(exc) not in _LOST:
                    raise
                parts.lost = True
            else:
                parts.sent[number] = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": checksum}
                self._progress(len(data), sent=len(data))
        self._close_part(parts)

    def _close_part(self, parts: _Parts) -> None:
        """The last one ends the upload: the object is there, or another client has made it, or it is begun anew."""
        with self._lock:
            parts.open -= 1
            if parts.open:
                return
        if not parts.lost:
            try:
                self._s3.complete_multipart_upload(
                    **self._place.named(),
                    Key=parts.key,
                    UploadId=parts.upload_id,
                    MultipartUpload={"Parts": [parts.sent[number] for number in sorted(parts.sent)]},
                    MpuObjectSize=parts.content.size,
                    IfNoneMatch="*",
                )
            except self._s3.exceptions.ClientError as exc:
                if error_code(exc) not in _TAKEN | _LOST:
                    raise
                if error_code(exc) in _TAKEN:
                    self._abort(parts.key, parts.upload_id)
                parts.lost = True
            else:
                self._progress(0, objects=1)
        if parts.lost:
            with self._lock:
                self._done -= parts.content.size  # counted again when it is found to be there, or sent anew
                self._lost.append(parts.content)

    def _abort(self, key: str, upload_id: str) -> None:
        """End an upload and what it holds; that another client did so already is as good."""
        try:
            self._s3.abort_multipart_upload(**self._place.named(), Key=key, UploadId=upload_id)
        except self._s3.exceptions.ClientError as exc:
            if error_code(exc) not in _LOST:
                raise


@dataclass
class _Parts:
    """An upload in parts. `open` counts the parts on their way, and one more until the file is read to its end."""

    content: Content
    key: str
    upload_id: str
    there: dict[int, dict[str, Any]]
    sent: dict[int, dict[str, Any]] = field(default_factory=dict)
    open: int = 1
    lost: bool = False

    def arrived(self, number: int, data: bytes) -> bool:
        """Whether a part with these bytes is there from an earlier time."""
        part = self.there.get(number, {})
        if part.get("Size") != len(data) or part.get("ChecksumCRC32") != crc32_text(zlib.crc32(data)):
            return False
        self.sent[number] = {name: part[name] for name in ("PartNumber", "ETag", "ChecksumCRC32")}
        return True


def part_size(size: int) -> int:
    """Bytes of each part of an object: whole MiB, the same for everybody who sends that object."""
    return max(PART, -(-size // _PARTS >> 20) << 20)


def _whole(content: Content) -> bytes:
    """The bytes of an object that is sent in one request. Raises StagingError when they are not what was planned."""
    pieces = [source.path.read_bytes() for source in content.sources]
    data = b"".join(pieces)
    refuse_changed(content.sha256, content.sources, hashlib.sha256(data).hexdigest())
    return data


def crc32_text(value: int) -> str:
    return _base64(value.to_bytes(4, "big"))


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")
