"""A model's folder as plain objects in S3, named by its content: what a serving container reads as `/opt/ml/model`.

    BUCKET/PREFIX/models/<digest>/config.json, model.safetensors, ...     the Hugging Face layout, as it is
    BUCKET/PREFIX/models/<digest>.json                                    names, sizes and digests; written after all of them

SageMaker copies what is under the prefix, and the containers of others read nothing but that layout: so no bundles, and the manifest
stands beside the prefix and not in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.aws.channels import Content, PlannedChannel
from trimtab.aws.digests import Digests
from trimtab.aws.place import S3Place
from trimtab.cache import cache_dir
from trimtab.errors import StagingError
from trimtab.model_folder import FileFact, digest_of


@dataclass(frozen=True)
class _File(Content):
    """A file that keeps its own name."""

    digest: str = ""

    @property
    def sha256(self) -> str:
        return self.digest


@dataclass(frozen=True)
class _ModelPlace(S3Place):
    """Where one model's files lie, for what sends them."""

    model: str = ""

    @property
    def content(self) -> str:
        return f"{self.store}/models/{self.model}/"

    def channel(self, digest: str) -> str:
        return f"{self.store}/models/{digest}.json"


@dataclass(frozen=True)
class PlannedModel(PlannedChannel):
    """A model's files; `digest` names them by names and contents."""

    def manifest(self, place: S3Place) -> str:
        return json.dumps({content.name: {"size": content.size, "sha256": content.sha256} for content in self.objects}, indent=1)

    def place(self, place: S3Place) -> S3Place:
        """Where the files go to in a bucket."""
        return _ModelPlace(place.bucket, place.prefix, place.owner, place.kms_key, model=self.digest)

    def uri(self, place: S3Place) -> str:
        """The prefix that a serving container reads."""
        return place.uri(self.place(place).content)


def plan_model(
    files: Mapping[str, Path], folder: Path, *, cache: Path | None = None, show: Callable[[int], None] = lambda read: None
) -> PlannedModel:
    """Read `files`, by their names in `/opt/ml/model`; digests are noted as those of the model's `folder`. `show` gets bytes read.

    Raises StagingError for a file that cannot be read or is changing.
    """
    digests = Digests(folder, cache or cache_dir(), show)
    try:
        sources = digests.of_all(files)
    except OSError as exc:
        raise StagingError(f"{exc.filename or folder} cannot be read ({exc.strerror or exc}): mend that and repeat the command") from exc
    digests.keep()
    digest = digest_of({name: FileFact(source.stamp.size, source.sha256) for name, source in sources.items()})
    objects = tuple(_File(name, source.stamp.size, (source,), digest=source.sha256) for name, source in sorted(sources.items()))
    return PlannedModel("model", digest, len(objects), sum(content.size for content in objects), objects)
