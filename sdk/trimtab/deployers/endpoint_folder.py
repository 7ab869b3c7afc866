"""An endpoint's folder on this machine, `home/endpoints/<id>`: the tree that its server works in, and beside that

    record.json   what was asked for, where it answers and with which key; for its owner's eyes alone, as the whole folder is
    client.lock   locked while that client lives that waits for its first answer, or with which it ends: the kernel takes the lock back
    log.txt       what it printed

A folder appears whole, by a rename. One that its client left behind is taken away by whoever deploys or lists next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.deployers.base import EndpointHandle
from trimtab.errors import EndpointError
from trimtab.layout import JobDir
from trimtab.serving import Serving

RECORD, LOG = "record.json", "log.txt"

_CLIENT = "client.lock"
_STALE = 5.0  # seconds after which a half-made folder that nobody holds has no maker any more

_held: dict[Path, BinaryIO] = {}  # the clients' locks that this process has


class Record(BaseModel):
    """What is noted of an endpoint. `answered` tells that it did once; `pid` or `container` is where it runs."""

    model_config = ConfigDict(frozen=True)

    handle: str
    title: str
    created: datetime
    expires: datetime | None
    detach: bool
    host: str
    api_key: str | None
    request: dict[str, Any]
    answered: bool = False
    url: str = ""
    pid: int | None = None
    container: str = ""

    @classmethod
    def of(cls, handle: EndpointHandle, serving: Serving, request: dict[str, Any], *, host: str, key: str | None, detach: bool) -> Record:
        now, ttl = datetime.now(UTC), serving.spec.ttl_minutes
        expires = None if ttl is None else now + timedelta(minutes=ttl)
        return cls(
            handle=str(handle),
            title=serving.title,
            created=now,
            expires=expires,
            detach=detach,
            host=host,
            api_key=key,
            request=request,
        )

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires


def new_key() -> str:
    """A key of 256 random bits, as text."""
    return secrets.token_urlsafe(32)


def make(folder: Path, record: Record, serving: Serving) -> JobDir:
    """A new endpoint's folder: the files to serve as links, the key, the record. This process is its client from now on.

    Raises OSError, also where the folder is there already; then nothing of it stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    making = folder.parent / f".{folder.name}.{os.getpid()}"
    making.mkdir(mode=0o700)
    client = (making / _CLIENT).open("ab")
    try:
        fcntl.flock(client, fcntl.LOCK_EX | fcntl.LOCK_NB)
        job = JobDir(making)
        job.api_key.parent.mkdir(parents=True)
        job.endpoint.parent.mkdir(parents=True)
        if record.api_key is not None:
            _write_private(job.api_key, record.api_key)
        for name, path in serving.files.items():
            link = making / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        (making / LOG).touch(mode=0o600)
        write(making, record)
        making.rename(folder)
    except BaseException:  # Ctrl-C too
        client.close()
        shutil.rmtree(making, ignore_errors=True)
        raise
    _held[folder] = client
    return JobDir(folder)


def let_go(folder: Path) -> None:
    """This process is not its client any more."""
    if client := _held.pop(folder, None):
        client.close()


def has_client(folder: Path) -> bool:
    """Whether the client lives that waits for it, or with which it ends."""
    return locked(folder / _CLIENT)


def locked(path: Path) -> bool:
    """Whether some process holds the lock of this file; False where there is no file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def abandoned(folder: Path, record: Record) -> bool:
    """Whether its client is gone that should have ended it, or brought it up."""
    return not (record.detach and record.answered) and not has_client(folder)


def read(folder: Path) -> Record | None:
    """The record of the endpoint in a folder; None where there is none, or none that this user may read."""
    file = folder / RECORD
    try:
        return Record.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except ValidationError as exc:
        raise EndpointError(f"{file} is damaged ({exc}): end what it belongs to, and remove the folder {folder}") from exc


def write(folder: Path, record: Record) -> None:
    """Whole or not at all."""
    temporary = folder / f".{RECORD}.{os.getpid()}"
    _write_private(temporary, record.model_dump_json(indent=1))
    temporary.replace(folder / RECORD)


def remove(folder: Path) -> None:
    """The folder and all that is in it; the links' files stay. Raises EndpointError where that is not possible."""
    let_go(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)  # something was just being written there
    if folder.exists():
        raise EndpointError(f"{folder} cannot be removed: mend that, and remove it by hand")


def folders(home: Path) -> Iterator[tuple[Path, Record]]:
    """Every endpoint's folder under `home`, of any backend, but those that are `damaged`.

    What a client that was killed left half-made is removed.
    """
    place = home / "endpoints"
    for entry in sorted(place.iterdir()) if place.is_dir() else []:
        if entry.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
                if time.time() - entry.stat().st_mtime > _STALE and not has_client(entry):
                    shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(EndpointError):  # one damaged record is no other endpoint's trouble
                if record := read(entry):
                    yield entry, record


def damaged(home: Path) -> Iterator[tuple[Path, str]]:
    """Folders whose record cannot be understood, and what to do."""
    for entry in sorted((home / "endpoints").glob("[!.]*")):
        try:
            read(entry)
        except EndpointError as exc:
            yield entry, str(exc)


def said(job: JobDir) -> dict[str, Any]:
    """What the server says of itself since it answered: url, pid, models, engine; nothing while it does not."""
    try:
        found = json.loads(job.endpoint.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # it writes it whole, but a container's disk may be full
        return {}
    return found if isinstance(found, dict) else {}


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
