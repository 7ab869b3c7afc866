"""A base model that stays in S3, because it is too large for the client: only its configuration and its tokenizer are fetched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trimtab.aws.place import parse_uri
from trimtab.aws.refusals import asking
from trimtab.aws.session import Aws
from trimtab.errors import WeightsError
from trimtab.model_folder import FileFact, Manifest, chosen, digest_of, lacking

SCHEME = "s3://"
_WEIGHTS = ".safetensors"
_LARGEST = 64 << 20  # bytes of a tokenizer's or configuration's file; others are not theirs


def listing(s3: Any, uri: str) -> dict[str, FileFact]:
    """The files of a model under a prefix. A fact's digest is the object's ETag, which changes with its bytes.

    Raises WeightsError for a prefix that holds no model, BackendError's refusals as WeightsError.
    """
    bucket, prefix = parse_uri(uri if uri.endswith("/") else f"{uri}/")
    with asking(f"what is in {uri}", action="s3:ListBucket", error=WeightsError):
        pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    found = {item["Key"].removeprefix(prefix): item for page in pages for item in page.get("Contents", [])}
    names = chosen(name for name in found if "/" not in name)
    if lack := lacking(names):
        raise WeightsError(f"{uri} cannot be used: {lack}.")
    return {name: FileFact(found[name]["Size"], found[name]["ETag"].strip('"')) for name in names}


def small_files(aws: Aws, uri: str, folder: Path) -> Manifest:
    """Fetch all but the weights of the model at `uri` into the empty `folder`; the manifest of what was fetched.

    Raises WeightsError when the weights' index names shards that are not there, or a file is too large to be what it is named.
    """
    s3 = aws.client("s3")
    facts = listing(s3, uri)
    bucket, prefix = parse_uri(uri if uri.endswith("/") else f"{uri}/")
    fetched = {}
    for name, fact in facts.items():
        if name.endswith(_WEIGHTS):
            continue
        if fact.size > _LARGEST:
            raise WeightsError(f"{uri}{name} has {fact.size:,} bytes, too many for a configuration or a tokenizer: take it out of there")
        with asking(f"for {uri}{name}", action="s3:GetObject", error=WeightsError):
            data = s3.get_object(Bucket=bucket, Key=prefix + name, IfMatch=f'"{fact.sha256}"')["Body"].read()
        (folder / name).write_bytes(data)
        fetched[name] = FileFact(len(data), hashlib.sha256(data).hexdigest())
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in facts:
        absent = sorted(set(json.loads(index.read_bytes())["weight_map"].values()) - facts.keys())
        if absent:
            raise WeightsError(f"{uri} lacks {', '.join(absent)}, which its index names. Copy the whole model there again.")
    return Manifest(f"the model in {uri}, whose weights stay there", None, digest_of(facts), fetched)
