"""Turns a channel as it was staged in S3 into the folder that it was.

SageMaker copies the objects that a channel's manifest names under their keys' last parts: large files by their sha256, bundles of small
files by theirs, and an index, `index-<sha256>`, that tells which is what (written by trimtab.aws.channels). Large files are renamed,
which costs nothing; small ones are written out of their bundles. The index goes last, so what is interrupted is done again, from where
it was.

What is compared: the index and every small file with its sha256, large files with their size. Their bytes were compared with their
sha256 before S3 took them and by checksum on every way since, and to read tens of gigabytes again would be paid for in minutes; the rows'
own manifest is compared by the run that reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trimtab.errors import StagingError
from trimtab.layout import JobDir

_INDEX = re.compile(r"index-([0-9a-f]{64})")


def staged(job: JobDir) -> list[Path]:
    """The channels that are as they were in S3. One that is a link is somebody's folder, and left alone."""
    found = {index.parent for index in job.channel("").glob("*/index-*") if _INDEX.fullmatch(index.name)}
    return sorted(channel for channel in found if not channel.is_symlink())


def unfold(channel: Path) -> bool:
    """Make a channel's folder what it was before it was staged; False for a folder without an index, which is left alone.

    Raises StagingError when an object is missing, cut short or not what its digest says, when the index names a place outside of the
    folder, or when the folder cannot be written.
    """
    indexes = [path for path in channel.iterdir() if _INDEX.fullmatch(path.name)]
    if not indexes:
        return False
    if len(indexes) > 1:
        raise StagingError(f"{channel} has {len(indexes)} indexes: give each channel a manifest of its own")
    try:
        files, bundles = _read_index(channel, indexes[0])
        names: dict[str, list[str]] = {}
        for name, (_, sha256) in files.items():
            names.setdefault(sha256, []).append(name)
        for sha256, rows in bundles.items():
            _unpack(channel, sha256, rows)
            if sha256 not in names:
                (channel / sha256).unlink(missing_ok=True)
        for sha256, same in names.items():
            _rename(channel, sha256, files[same[0]][0], same)
        indexes[0].unlink()
    except OSError as exc:
        raise StagingError(
            f"the channel in {channel} cannot be unfolded ({exc}): it must be a folder that can be written, as input mode File makes it"
        ) from exc
    return True


def _read_index(channel: Path, index: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = index.read_bytes()
    if hashlib.sha256(data).hexdigest() != index.name.removeprefix("index-"):
        raise _broken(index, "is not what its digest says")
    listed = json.loads(data)
    if listed.get("format") != 1:
        raise StagingError(f"{index} has format {listed.get('format')}, and this image reads 1: use trimtab and its image in one version")
    for name in (*listed["files"], *(row[0] for rows in listed["bundles"].values() for row in rows)):
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise StagingError(f"{index} names {name!r}, which is no file in {channel}: stage the folder again")
    return listed["files"], listed["bundles"]


def _unpack(channel: Path, sha256: str, rows: list[list[Any]]) -> None:
    """Write the files of a bundle. When it is gone they were written before."""
    bundle = channel / sha256
    if not bundle.exists():
        _refuse_absent(channel, sha256, [(name, size) for name, size, _ in rows])
        return
    with bundle.open("rb") as file:
        for name, size, digest in rows:
            data = file.read(size)
            if hashlib.sha256(data).hexdigest() != digest:
                raise _broken(bundle, f"does not hold {name} as it was")
            _target(channel, name).write_bytes(data)


def _rename(channel: Path, sha256: str, size: int, names: list[str]) -> None:
    """Give a large file its names. When it is gone it has them."""
    source = channel / sha256
    if not source.exists():
        _refuse_absent(channel, sha256, [(name, size) for name in names])
        return
    if source.stat().st_size != size:
        raise _broken(source, f"has {source.stat().st_size} bytes, not {size}")
    for name in names[1:]:
        target = _target(channel, name)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    source.replace(_target(channel, names[0]))


def _refuse_absent(channel: Path, sha256: str, wanted: list[tuple[str, int]]) -> None:
    for name, size in wanted:
        path = channel / name
        if not path.is_file() or path.stat().st_size != size:
            raise _broken(channel / sha256, f"is missing, and with it {name}")


def _target(channel: Path, name: str) -> Path:
    path = channel / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _broken(path: Path, how: str) -> StagingError:
    return StagingError(f"{path} {how}: the channel did not arrive whole. Start the job again; if that repeats, stage its data anew")
