"""A base model that stays in S3, because it is too large for the client: only its configuration and its tokenizer are fetched."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.aws.bucket import refuse_elsewhere
from trimtab.aws.place import parse_uri
from trimtab.aws.refusals import asking
from trimtab.errors import WeightsError
from trimtab.model_folder import FileFact, Manifest, chosen, digest_of, lacking

_WEIGHTS = ".safetensors"
_LARGEST = 64 << 20  # bytes of a tokenizer's or configuration's file; others are not theirs


@dataclass(frozen=True)
class StoredModel:
    """What lies under the prefix `uri`, which ends with a slash, in a bucket that must be the account `owner`'s (None: anybody's).

    `files` are those of the model; a fact's digest is the object's ETag, which changes with its bytes. `bytes` counts everything under
    the prefix, as a training job copies it.
    """

    uri: str
    owner: str | None
    files: dict[str, FileFact]
    bytes: int

    @property
    def digest(self) -> str:
        return digest_of(self.files)

    def named(self, name: str) -> dict[str, Any]:
        """The arguments of a request for one of the files, in the state in which it was listed."""
        bucket, prefix = parse_uri(self.uri)
        found = {"Bucket": bucket, "Key": prefix + name, "IfMatch": f'"{self.files[name].sha256}"'}
        return found if self.owner is None else {**found, "ExpectedBucketOwner": self.owner}


def look(s3: Any, uri: str, owner: str | None = None) -> StoredModel:
    """The model under a prefix. `s3` is a client of the region where jobs run.

    Raises WeightsError for a prefix that holds no model, and BackendError's refusals as WeightsError; StagingError for a bucket of another
    region, from which a training job cannot read.
    """
    uri = uri if uri.endswith("/") else f"{uri}/"
    bucket, prefix = parse_uri(uri)
    named = {"Bucket": bucket, **({} if owner is None else {"ExpectedBucketOwner": owner})}
    with asking(f"what is in {uri}", action="s3:ListBucket", error=WeightsError):
        pages = list(s3.get_paginator("list_objects_v2").paginate(**named, Prefix=prefix))
    refuse_elsewhere(s3, bucket, pages[0])
    found = {item["Key"].removeprefix(prefix): item for page in pages for item in page.get("Contents", [])}
    names = chosen(name for name in found if "/" not in name)
    if lack := lacking(names):
        raise WeightsError(f"{uri} cannot be used: {lack}.")
    files = {name: FileFact(found[name]["Size"], found[name]["ETag"].strip('"')) for name in names}
    return StoredModel(uri, owner, files, sum(item["Size"] for item in found.values()))


def fetch_small(s3: Any, model: StoredModel, folder: Path) -> Manifest:
    """Fetch all but the weights into the empty `folder`; the manifest of what was fetched.

    Raises WeightsError when the weights' index names shards that are not there, or a file is too large to be what it is named.
    """
    fetched = {}
    for name, fact in model.files.items():
        if name.endswith(_WEIGHTS):
            continue
        if fact.size > _LARGEST:
            raise WeightsError(
                f"{model.uri}{name} has {fact.size:,} bytes, too many for a configuration or a tokenizer: take it out of there"
            )
        with asking(f"for {model.uri}{name}", action="s3:GetObject", error=WeightsError):
            data = s3.get_object(**model.named(name))["Body"].read()
        (folder / name).write_bytes(data)
        fetched[name] = FileFact(len(data), hashlib.sha256(data).hexdigest())
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in model.files:
        try:
            absent = sorted(set(json.loads(index.read_bytes())["weight_map"].values()) - model.files.keys())
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise WeightsError(f"{model.uri}{index.name} is not a readable index of shards. Copy the whole model there again.") from exc
        if absent:
            raise WeightsError(f"{model.uri} lacks {', '.join(absent)}, which its index names. Copy the whole model there again.")
    return Manifest(f"the model in {model.uri}, whose weights stay there", None, model.digest, fetched)
