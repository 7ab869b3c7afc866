"""A request against AWS's own model of it, before it is sent: everything that is wrong, at once.

botocore's service models carry lengths, sizes, ranges, patterns and lists of values, but botocore checks only types, required members
and minima, one AWS answer names only the first mistake, and by then the data is uploaded. What the model lacks stands in
`_BEYOND_THE_MODEL`, each with its source.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cache
from typing import Any

from trimtab.aws.refusals import needs_boto3
from trimtab.errors import SpecError
from trimtab.secrets import kind_of_token, redact

_SHOWN = 60  # characters of a value in a message
_DAYS_28 = 28 * 24 * 3600
_ACCELERATED = re.compile(r"ml\.(p|g|trn)\d")
# training types whose machines have disks of their own: "Instance store volumes", Amazon EC2 user guide
_OWN_DISKS = re.compile(r"ml\.(g4dn|g5|g6e?|g7e|p3dn|p4de?|p5(en?)?|p6e?-\w+|trn1n?|trn2|r5d)\.")

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "integer": (int,), "long": (int,), "float": (int, float), "double": (int, float),
    "timestamp": (datetime, str, int, float), "blob": (bytes, bytearray, str), "list": (list, tuple), "map": (Mapping,),
    "structure": (Mapping,),
}  # fmt: skip
_WORDS = {
    "string": "text", "boolean": "true or false", "integer": "a whole number", "long": "a whole number", "float": "a number",
    "double": "a number", "list": "a list", "map": "names and values", "structure": "names and values", "timestamp": "a time",
    "blob": "bytes",
}  # fmt: skip


def refuse(operation: str, request: Mapping[str, Any], service: str = "sagemaker") -> None:
    """Raise SpecError that lists every violation of the service's limits in a request of `operation`, such as "CreateTrainingJob".

    Nothing is asked of AWS. Raises BackendUnavailable where boto3 is missing.
    """
    found = violations(operation, request, service)
    if found:
        count = "one thing" if len(found) == 1 else f"{len(found)} things"
        raise SpecError(f"{operation} would be refused for {count}: " + "; ".join(found) + ". Change the values and run it again.")


def violations(operation: str, request: Mapping[str, Any], service: str = "sagemaker") -> list[str]:
    """What `refuse` would list, each as "path: what is wrong, what is allowed". Values that look like secrets are not shown."""
    shape = _model(service).operation_model(operation).input_shape
    found = [] if shape is None else list(_walk(shape, request, ""))
    if service == "sagemaker" and operation == "CreateTrainingJob" and not found:
        found += [text for rule in _BEYOND_THE_MODEL for text in rule(request)]
    return found


def refuse_secrets(request: Mapping[str, Any]) -> None:
    """Raise SpecError for each text of a request, names included, that looks like an access token. The text itself is not shown."""
    found = [f"{path} holds what looks like a secret ({kind})" for path, kind in _secrets(request, "")]
    if found:
        raise SpecError(
            "; ".join(found) + ". What a request holds can be read by everybody who may describe the job: take it out; a token for the "
            "model hub belongs into HF_TOKEN on this machine, from which it never leaves"
        )


@cache
def _model(service: str) -> Any:
    with needs_boto3():
        from botocore.loaders import Loader
        from botocore.model import ServiceModel

    return ServiceModel(Loader().load_service_model(service, "service-2"), service)


def _walk(shape: Any, given: object, path: str) -> Iterator[str]:
    """Every violation in a value of a botocore shape."""
    kind, limits = shape.type_name, shape.metadata
    name = path or shape.name
    if not isinstance(given, _PYTHON_TYPES[kind]) or (isinstance(given, bool) and kind != "boolean"):
        yield f"{name}: {_shown(given)} is not {_WORDS[kind]}"
        return
    value: Any = given
    if kind == "structure":
        yield from _walk_structure(shape, value, path)
    elif kind in ("list", "map"):
        yield from _size(name, len(value), limits, "entry", "entries")
        if kind == "list":
            for index, item in enumerate(value):
                yield from _walk(shape.member, item, f"{path}[{index}]")
        else:
            for key, item in value.items():
                yield from _walk(shape.key, key, f"{path}: the name {_shown(key)}")
                yield from _walk(shape.value, item, f"{path}.{_shown(key, quotes=False)}")
    elif kind == "string":
        yield from _walk_string(shape, value, name)
    elif kind == "blob":
        yield from _size(name, len(value), limits, "byte", "bytes")
    elif kind in ("integer", "long", "float", "double"):
        low, high = limits.get("min"), limits.get("max")
        if (low is not None and value < low) or (high is not None and value > high):
            yield f"{name}: {value:,} is out of range; {_range(low, high)} is allowed"


def _walk_structure(shape: Any, value: Mapping[str, Any], path: str) -> Iterator[str]:
    inner = f"{path}." if path else ""
    for member in shape.required_members:
        if value.get(member) is None:
            yield f"{inner}{member}: is missing"
    if getattr(shape, "is_tagged_union", False) and len(value) != 1:
        yield f"{path}: exactly one of {', '.join(shape.members)} is allowed"
    for member, item in value.items():
        if member not in shape.members:
            yield f"{inner}{_shown(member, quotes=False)}: there is no such name here; {_nearest(str(member), list(shape.members))}"
        elif item is not None:
            yield from _walk(shape.members[member], item, f"{inner}{member}")
        elif member not in shape.required_members:
            yield f"{inner}{member}: None is no value; leave it out"


def _walk_string(shape: Any, value: str, name: str) -> Iterator[str]:
    limits = shape.metadata
    if allowed := limits.get("enum"):
        if value not in allowed:
            yield f"{name}: {_shown(value)} is not known; {_nearest(value, allowed)}"
        return
    outside = list(_size(name, len(value), limits, "character", "characters", value))
    yield from outside
    if "pattern" in limits and not outside:  # a text too long is told once, and not searched
        pattern = _pattern(limits["pattern"])
        if pattern is not None and not pattern.fullmatch(value):
            yield f"{name}: {_shown(value)} does not have the form {limits['pattern']}"


def _size(name: str, size: int, limits: Mapping[str, Any], one: str, many: str, value: str | None = None) -> Iterator[str]:
    low, high = limits.get("min"), limits.get("max")
    if (low is not None and size < low) or (high is not None and size > high):
        shown = "" if value is None else f" ({_shown(value)})"
        yield f"{name}: {size:,} {one if size == 1 else many}{shown}; {_range(low, high)} is allowed"


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low:,}"
    return f"{low:,} to {high:,}" if low else f"at most {high:,}"


def _nearest(value: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(value, allowed, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return "allowed are " + ", ".join(allowed[:12]) + (f" and {len(allowed) - 12} more" if len(allowed) > 12 else "")


def _shown(value: object, *, quotes: bool = True) -> str:
    text = redact(str(value))
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 16]}...{text[-12:]}"
    return repr(short) if quotes and isinstance(value, str) else short


# AWS's patterns are Java's: they hold for the whole text, `.` is no line end, \w and \d are ASCII, and \p{..} names a kind of letter.
_NOT_LINE_END = "[^\\n\\r\\u0085\\u2028\\u2029]"
_CLASSES = {"Alnum": "A-Za-z0-9", "Alpha": "A-Za-z", "Digit": "0-9", "ASCII": "\\x00-\\x7f", "Print": "\\x20-\\x7e"}


@cache
def _pattern(java: str) -> re.Pattern[str] | None:
    """AWS's pattern as Python's; None for one that is not understood, which then is not checked."""
    out, in_class, at = [], False, 0
    while at < len(java):
        char = java[at]
        step = 1
        if named := re.compile(r"\\p\{(\w+)\}").match(java, at):
            ranges = _CLASSES.get(named[1]) or _ranges(named[1])
            if not ranges:
                return None
            char, step = ranges if in_class else f"[{ranges}]", len(named[0])
        elif char == "\\":
            char, step = java[at : at + 2], 2
            char = {"\\z": "\\Z"}.get(char, char)
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == ".":
            char = _NOT_LINE_END
        out.append(char)
        at += step
    try:
        return re.compile("".join(out), re.ASCII)
    except re.error:
        return None


@cache
def _ranges(kind: str) -> str:
    """The characters of a general category of Unicode, such as `L`, as the inside of a character class; empty for no category."""
    starts: list[int] = []
    ends: list[int] = []
    for code in range(0x110000):
        if unicodedata.category(chr(code)).startswith(kind):
            if ends and ends[-1] == code - 1:
                ends[-1] = code
            else:
                starts.append(code)
                ends.append(code)
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))


def _secrets(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        named = value.get("Key", value.get("Name"))  # a tag, an environment variable of some services
        if isinstance(named, str) and isinstance(value.get("Value"), str) and (kind := _named_secret(named, value["Value"])):
            yield f"{path}.Value", kind
        for number, (key, item) in enumerate(value.items()):
            if kind := kind_of_token(str(key)):
                yield f"{path or 'the request'}: name number {number + 1}", kind
                key = f"name {number + 1}"
            inner = f"{path}.{key}" if path else str(key)
            if isinstance(item, str) and not kind_of_token(item) and (kind := _named_secret(str(key), item)):
                yield inner, kind
            yield from _secrets(item, inner)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _secrets(item, f"{path}[{index}]")
    elif isinstance(value, (str, bytes)):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        if kind := kind_of_token(text):
            yield path, kind


def _named_secret(name: str, value: str) -> str | None:
    """What a value is that only its name tells, such as AWS_SECRET_ACCESS_KEY's."""
    return None if kind_of_token(value) else kind_of_token(f"{name}={value}")


def _times(request: Mapping[str, Any]) -> Iterator[str]:
    """API reference, StoppingCondition: at most 28 days; MaxWaitTimeInSeconds not below MaxRuntimeInSeconds, and needed for spot."""
    stopping, spot = request.get("StoppingCondition", {}), request.get("EnableManagedSpotTraining", False)
    runtime, wait = stopping.get("MaxRuntimeInSeconds", 86_400), stopping.get("MaxWaitTimeInSeconds")
    if runtime > _DAYS_28:
        yield f"StoppingCondition.MaxRuntimeInSeconds: {runtime:,} is out of range; at most {_DAYS_28:,} (28 days) is allowed"
    if wait is not None and wait < runtime:
        yield f"StoppingCondition.MaxWaitTimeInSeconds: {wait:,} is below MaxRuntimeInSeconds ({runtime:,}), which it includes"
    if spot and wait is None:
        yield "StoppingCondition.MaxWaitTimeInSeconds: is missing; spot training needs it"
    if wait is not None and not spot:
        yield "StoppingCondition.MaxWaitTimeInSeconds: is for spot training only; leave it out"


def _machines(request: Mapping[str, Any]) -> Iterator[str]:
    """Developer guide, Managed warm pools: not with spot. API reference, ResourceConfig: a type with a count, or groups of instances; no
    key for volumes of types with local storage. StoppingCondition: which types a limit of pending time is for."""
    resources = request.get("ResourceConfig", {})
    if resources.get("KeepAlivePeriodInSeconds") and request.get("EnableManagedSpotTraining"):
        yield "ResourceConfig.KeepAlivePeriodInSeconds: machines that are kept warm cannot be spot instances; use one of the two"
    kinds = [group["InstanceType"] for group in (resources, *resources.get("InstanceGroups", [])) if "InstanceType" in group]
    if resources.get("VolumeKmsKeyId") and (own := [kind for kind in kinds if _OWN_DISKS.match(kind)]):
        yield (
            f"ResourceConfig.VolumeKmsKeyId: {own[0]} has disks of its own, which its hardware encrypts, and takes no key for them; leave "
            "volume_kms_key out, or name an instance type without such disks"
        )
    if request.get("StoppingCondition", {}).get("MaxPendingTimeInSeconds") and kinds and not any(map(_ACCELERATED.match, kinds)):
        yield (
            f"StoppingCondition.MaxPendingTimeInSeconds: has no effect on {kinds[0]}, only on types with accelerators; leave "
            "max_pending_minutes out, and end a wait that is too long with  trimtab stop"
        )
    if resources.get("InstanceCount") == 0:
        yield "ResourceConfig.InstanceCount: 0 is out of range; at least 1 is allowed"


def _names(request: Mapping[str, Any]) -> Iterator[str]:
    """API reference: channel names and tag keys are unique; tag keys that begin with aws: belong to AWS."""
    for path, entries, field in (
        ("InputDataConfig", request.get("InputDataConfig", []), "ChannelName"),
        ("Tags", request.get("Tags", []), "Key"),
    ):
        seen: set[str] = set()
        for index, entry in enumerate(entries):
            if entry[field] in seen:
                yield f"{path}[{index}].{field}: {_shown(entry[field])} is given twice"
            seen.add(entry[field])
    for index, tag in enumerate(request.get("Tags", [])):
        if tag["Key"].lower().startswith("aws:"):
            yield f"Tags[{index}].Key: {_shown(tag['Key'])} begins with aws:, which belongs to AWS"


def _algorithm(request: Mapping[str, Any]) -> Iterator[str]:
    """API reference, AlgorithmSpecification: an image or an algorithm's name, one of the two."""
    algorithm = request.get("AlgorithmSpecification", {})
    if algorithm and ("TrainingImage" in algorithm) == ("AlgorithmName" in algorithm):
        yield "AlgorithmSpecification: exactly one of TrainingImage, AlgorithmName is allowed"


_BEYOND_THE_MODEL: tuple[Callable[[Mapping[str, Any]], Iterator[str]], ...] = (_times, _machines, _names, _algorithm)
