"""What a job leaves in S3: the model, and what else it wrote, packed or as it is.

    S3OutputPath/<job>/output/model.tar.gz      or, with CompressionType NONE,  .../output/model/...
    S3OutputPath/<job>/output/output.tar.gz     or                              .../output/data/...

Of several instances the files are put together; where two wrote the same name, the lower-numbered one's counts.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from control_plane.layout import Tree
from control_plane.objects import Objects, split_uri


def upload(objects: Objects, request: Mapping[str, Any], trees: Sequence[Tree], work: Path) -> str:
    """Uploads, and says where the model is; empty where there is none, as SageMaker uploads no empty folder. Raises TransferFailed."""
    roots = [each.root for each in trees]
    wanted = request["OutputDataConfig"]
    bucket, prefix = split_uri(wanted["S3OutputPath"])
    place = "/".join(part for part in (prefix.strip("/"), request["TrainingJobName"], "output") if part)
    key = wanted.get("KmsKeyId", "")
    model, other = together(roots, "model"), together(roots, "output/data")
    if wanted.get("CompressionType") == "NONE":
        for name, files in (("model", model), ("data", other)):
            objects.send(bucket, {f"{place}/{name}/{path}": file for path, file in files.items()}, key)
        return f"s3://{bucket}/{place}/model/" if model else ""
    for name, files in (("model.tar.gz", model), ("output.tar.gz", other)):
        if files:
            objects.send(bucket, {f"{place}/{name}": pack(files, work / name)}, key)
    return f"s3://{bucket}/{place}/model.tar.gz" if model else ""


def together(roots: Sequence[Path], place: str) -> dict[str, Path]:
    """The files of one folder in several trees, by relative path. A link to a file counts as that file where it lies in the same folder.

    Other links do not count, also where one stands in the folder's own place: what a container links to is not what lies under that name
    here.
    """
    found: dict[str, Path] = {}
    for root in roots:
        folder = root.resolve() / place
        if folder.resolve() != folder:
            continue
        for top, _, names in os.walk(folder):
            for path in (Path(top) / name for name in names):
                if path.is_file() and path.resolve().is_relative_to(folder):
                    found.setdefault(path.relative_to(folder).as_posix(), path)
    return dict(sorted(found.items()))


def pack(files: Mapping[str, Path], archive: Path) -> Path:
    """A tar.gz of files by their names in it."""
    with tarfile.open(archive, "w:gz", compresslevel=1, dereference=True) as tar:
        for name, path in files.items():
            tar.add(path, name, recursive=False)
    return archive
