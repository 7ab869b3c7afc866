"""Base models by their JumpStart id: what SageMaker's public hub says of one, as the container and the files that serve it.

Source: DescribeHubContent, Amazon SageMaker API reference; the members of a model's HubContentDocument are those that SageMaker's Python
SDK 3.27 reads (`HubModelDocument`, schema 2.3.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.aws.containers import Container, kind_of_image
from trimtab.aws.refusals import asking, error_code
from trimtab.aws.session import Aws
from trimtab.errors import EndpointError, SpecError

HUB = "SageMakerPublicHub"


@dataclass(frozen=True)
class HubModel:
    """A model of the hub. `source` is an S3DataSource without the EULA's acceptance, None for a container that brings the model.

    `eula` is where its licence can be read; empty where it asks for no acceptance.
    """

    id: str
    version: str
    container: Container
    source: Mapping[str, Any] | None
    instance: str
    supported: tuple[str, ...]
    eula: str
    download_seconds: int | None
    start_seconds: int | None
    isolated: bool

    def accepted(self, accept: bool) -> dict[str, Any] | None:
        """The source to send. Raises SpecError for a licence that was not accepted, with where it is."""
        if self.source is None or not self.eula:
            return None if self.source is None else dict(self.source)
        if not accept:
            raise SpecError(
                f"{self.id} has a licence of its own: read it with  aws s3 cp {self.eula} -  and, if you agree, add  "
                "--backend-option accept_eula=yes"
            )
        return {**self.source, "ModelAccessConfig": {"AcceptEula": True}}


def describe(aws: Aws, id: str) -> HubModel:
    """The newest version of a model. Raises EndpointError for an id that the hub does not have, SpecError for one that cannot be served."""
    with asking(f"for the model {id} of JumpStart", action="sagemaker:DescribeHubContent", error=EndpointError):
        client = aws.client("sagemaker")
        try:
            answer = client.describe_hub_content(HubName=HUB, HubContentType="Model", HubContentName=id)
        except client.exceptions.ClientError as exc:
            if not error_code(exc).startswith("ResourceNotFound"):
                raise
            raise EndpointError(
                f"JumpStart has no model {id!r} in {aws.region}: see  aws sagemaker list-hub-contents --hub-name {HUB} "
                "--hub-content-type Model  for those there are"
            ) from exc
    return read(answer["HubContentName"], answer["HubContentVersion"], answer["HubContentDocument"])


def read(id: str, version: str, document: str) -> HubModel:
    """A model's document. Raises SpecError for one that names no image, or takes a script that we do not send. Pure."""
    try:
        found = json.loads(document)
        image = found["HostingEcrUri"]
    except (ValueError, KeyError, TypeError) as exc:
        raise SpecError(f"JumpStart's model {id} {version} names no container that serves it: choose another model") from exc
    if found.get("HostingUseScriptUri") and found.get("HostingScriptUri") and not found.get("HostingPrepackedArtifactUri"):
        raise SpecError(f"JumpStart's model {id} {version} needs a script beside its weights, which is not sent: choose another model")
    uri = found.get("HostingPrepackedArtifactUri") or found.get("HostingArtifactUri")
    source = None
    if uri:
        kind = found.get("HostingArtifactS3DataType") or ("S3Prefix" if uri.endswith("/") else "S3Object")
        packed = found.get("HostingArtifactCompressionType") or ("None" if kind == "S3Prefix" else "Gzip")
        source = {"S3Uri": uri, "S3DataType": kind, "CompressionType": packed}
    environment = {
        each["Name"]: str(each["Default"])
        for each in found.get("InferenceEnvironmentVariables") or []
        if each.get("Scope") == "container" and each.get("Default") not in (None, "")
    }
    variants = _variants(found, found.get("DefaultInferenceInstanceType") or "")
    image = variants.get("ImageUri") or image
    environment |= {key: str(value) for key, value in (variants.get("Environment") or {}).items()}
    return HubModel(
        id=id,
        version=version,
        container=Container(kind_of_image(image), image, environment, found.get("InferenceAmiVersion") or None),
        source=source,
        instance=found.get("DefaultInferenceInstanceType") or "",
        supported=tuple(found.get("SupportedInferenceInstanceTypes") or ()),
        eula=found.get("HostingEulaUri") or "",
        download_seconds=_seconds(found.get("ModelDataDownloadTimeout")),
        start_seconds=_seconds(found.get("ContainerStartupHealthCheckTimeout")),
        isolated=str(found.get("InferenceEnableNetworkIsolation", False)).lower() == "true",
    )


def _variants(found: Mapping[str, Any], instance: str) -> Mapping[str, Any]:
    """What the document says otherwise for a type, or for its family (`HostingInstanceTypeVariants`)."""
    by = (found.get("HostingInstanceTypeVariants") or {}).get("Variants") or {}
    family = instance.removeprefix("ml.").partition(".")[0]
    merged: dict[str, Any] = {"Environment": {}}
    for name in (family, instance):
        properties = (by.get(name) or {}).get("Properties") or {}
        merged["Environment"] |= properties.get("EnvironmentVariables") or {}
        if str(properties.get("ImageUri", "")).count("/"):
            merged["ImageUri"] = properties["ImageUri"]
    return merged


def _seconds(value: Any) -> int | None:
    try:
        return min(max(int(value), 60), 3600)
    except (TypeError, ValueError):
        return None
