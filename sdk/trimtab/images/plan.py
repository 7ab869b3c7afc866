"""What an image would be if it were built now: everything that its name depends on. Pure but for reading the context's files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab.errors import BackendUnavailable, SpecError
from trimtab.images import context
from trimtab.images.context import TARGETS
from trimtab.spec import SPEC_VERSION

LABEL = "trimtab."  # what our labels begin with
BASE_VARIABLE = "TRIMTAB_BASE_IMAGE"  # a base image for every build, as --base for one

_NOT_CONTENTS = {"BASE", "PIP_FIND_LINKS", "PIP_NO_INDEX"}  # arguments with options of their own


@dataclass(frozen=True)
class Plan:
    """A build to be: device, target, base image, the Dockerfile's other arguments, the context's files."""

    device: str
    target: str
    base: str
    files: Mapping[str, bytes]
    arguments: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str, target: str = "train", base: str | None = None, arguments: Mapping[str, str] | None = None) -> Plan:
        """Raises SpecError for a device, a target or an argument that there is not."""
        if device not in context.DEVICES or target not in TARGETS:
            raise SpecError(
                f"there is no {device} {target} image: devices are {', '.join(context.DEVICES)}, targets are {', '.join(TARGETS)}"
            )
        files = context.context(device, target)
        declared = _arguments(files)
        known = declared.keys() - _NOT_CONTENTS
        if unknown := sorted((arguments or {}).keys() - known):
            raise SpecError(f"the {device} {target} image has no build argument {unknown[0]}; it has {', '.join(sorted(known)) or 'none'}")
        return cls(device, target, base or os.environ.get(BASE_VARIABLE) or declared["BASE"], files, dict(arguments or {}))

    @property
    def usual_base(self) -> str:
        """The base image that the Dockerfile names."""
        return _arguments(self.files)["BASE"]

    @property
    def digest(self) -> str:
        """Of the context and the arguments; its beginning stands in the tag."""
        return context.digest(self.files, {**self.arguments, "BASE": self.base, "target": self.target})

    @property
    def source(self) -> str:
        """Of the context alone: images on different bases share it."""
        return context.digest(self.files)

    @property
    def tag(self) -> str:
        version = context.version().replace("+", "_")  # a tag may not hold a plus
        return f"trimtab-{self.device}-{self.target}:{version}-{self.digest[:12]}"

    def labels(self) -> dict[str, str]:
        return {
            "version": context.version(),
            "spec_version": str(SPEC_VERSION),
            "source": self.source,
            "context": self.digest,
            "device": self.device,
            "target": self.target,
            "base": self.base,
        }


def _arguments(files: Mapping[str, bytes]) -> dict[str, str]:
    """What the Dockerfile can be told, with the defaults, empty where there is none."""
    return {found[1]: found[2] for found in re.finditer(r"^ARG (\w+)=?(\S*)$", files["Dockerfile"].decode(), re.MULTILINE)}


def tag_of(device: str, target: str = "train", *, base: str | None = None, arguments: Mapping[str, str] | None = None) -> str:
    """The name that an image built now would have, such as `trimtab-xeon-train:0.1.0-3f2a9c81d0aa`."""
    return Plan.of(device, target, base, arguments).tag


def build_command(device: str, target: str = "train", *options: str) -> str:
    """What to type to have an image built."""
    return " ".join(["trimtab image build", device, *([] if target == "train" else ["--target", target]), *options])


def refusal(tag: str, labels: Mapping[str, str], architecture: str, machine: str) -> str:
    """Why a job would not run as asked in an image, ending with the next command; empty where it would.

    `labels` are without `LABEL`; `architecture` is the image's and `machine` the engine's, in Docker's words (amd64, arm64).
    """
    again = build_command(labels.get("device", "xeon"), labels.get("target", "train"), "--force")
    if "context" not in labels:
        return f"{tag} was not built by trimtab: it has none of its labels; build one:  {again}"
    if architecture != machine:
        return f"{tag} is for {architecture} and this engine runs {machine}; build it here:  {again}"
    if (version := labels.get("spec_version")) != str(SPEC_VERSION):
        return f"{tag} understands jobs of spec_version {version} and this trimtab writes {SPEC_VERSION}; build it:  {again}"
    named = tag.rpartition("-")[2]
    if re.fullmatch(r"[0-9a-f]{12}", named) and not labels["context"].startswith(named):
        return f"{tag} was moved: it holds what belongs under {labels['context'][:12]}, not what it is named after; build it:  {again}"
    return ""


def missing(device: str, target: str, *, others: bool) -> BackendUnavailable:
    """The error where no image fits; `others` tells that there are some, of other sources."""
    what = (
        f"the {device} {target} images here are of other sources than this trimtab"
        if others
        else f"there is no {device} {target} image here"
    )
    return BackendUnavailable(f"{what}; build it:  {build_command(device, target)}")
