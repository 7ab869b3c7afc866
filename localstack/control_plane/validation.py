"""Requests and answers against botocore's own model of a service, including what botocore itself leaves to the service.

botocore sends a name of 64 characters, or with a space in it; SageMaker refuses it. The model that comes with botocore says so, so
every length, range, pattern and enum in it is checked here, in the words that the service uses.
"""

from __future__ import annotations

import base64
import binascii
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from botocore.loaders import Loader
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StringShape, StructureShape

from control_plane.refusal import Refused

_CLASSES = {"Alnum": r"a-zA-Z0-9", "Alpha": "a-zA-Z", "ASCII": r"\x00-\x7F", "Print": r"\x20-\x7E"}  # java.util.regex.Pattern
_LINE_ENDS = r"\n\r\u0085\u2028\u2029"  # what a dot does not match there
_SURROGATES = re.compile(r"\\u(D[89AB][0-9A-F]{2})\\u(D[C-F][0-9A-F]{2})", re.IGNORECASE)  # one character of Java's in two
_JSON_NAMES = {
    dict: "START_OBJECT",
    list: "START_ARRAY",
    str: "STRING_VALUE",
    bool: "TRUE_VALUE",
    int: "NUMBER_VALUE",
    float: "NUMBER_VALUE",
}
_TYPE_NAMES = {"structure": "Structure", "map": "Map", "list": "List", "string": "String", "boolean": "Boolean", "blob": "Blob"}
_TYPES: dict[str, tuple[type, ...]] = {
    "structure": (dict,), "map": (dict,), "list": (list,), "string": (str,), "boolean": (bool,), "blob": (str,), "character": (str,),
    "integer": (int,), "long": (int,), "float": (int, float), "double": (int, float), "timestamp": (int, float),
}  # fmt: skip


@cache
def service(name: str) -> ServiceModel:
    """botocore's model of a service: `sagemaker`, `sagemaker-runtime`, `service-quotas`."""
    return ServiceModel(Loader().load_service_model(name, "service-2"), name)


@cache
def operation(service_name: str, name: str) -> OperationModel:
    """Raises botocore's OperationNotFoundError."""
    return service(service_name).operation_model(name)


@cache
def enum(service_name: str, shape: str) -> list[str]:
    """The values of an enum."""
    return list(service(service_name).shape_for(shape).metadata["enum"])


def read(shape: Shape, value: Any) -> Any:
    """A JSON value as the shape's Python value: timestamps become datetimes in UTC, blobs bytes; nulls are left out.

    Raises Refused (SerializationException) for a value of another type, or a member that the shape does not have. (The service leaves
    unknown members out without a word; a client that sends one means something by it.)
    """
    wanted = _TYPES[shape.type_name]
    if not any(type(value) is each for each in wanted):  # exactly: True is no number
        found, name = _JSON_NAMES.get(type(value), "VALUE_NULL"), _TYPE_NAMES.get(shape.type_name, shape.type_name.capitalize())
        raise Refused("SerializationException", f"{found} can not be converted to {'an' if name[0] in 'AEIOU' else 'a'} {name}")
    if isinstance(shape, StructureShape):
        if unknown := [name for name in value if name not in shape.members and name != "__type"]:
            raise Refused("SerializationException", f"{shape.name} has no member {', '.join(map(repr, unknown))}")
        return {name: read(shape.members[name], each) for name, each in value.items() if each is not None and name in shape.members}
    if isinstance(shape, MapShape):
        return {name: read(shape.value, each) for name, each in value.items()}
    if isinstance(shape, ListShape):
        return [read(shape.member, each) for each in value]
    if shape.type_name == "timestamp":
        return datetime.fromtimestamp(value, UTC)
    if shape.type_name == "blob":
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as exc:
            raise Refused("SerializationException", "STRING_VALUE can not be converted to a Blob") from exc
    return value


def write(value: Any) -> Any:
    """A Python value as JSON 1.1 writes it: datetimes as seconds with three decimals, bytes in base64; None members left out."""
    if isinstance(value, Mapping):
        return {name: write(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [write(each) for each in value]
    if isinstance(value, datetime):
        return round(value.timestamp(), 3)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def refuse(shape: Shape | None, value: Any, code: str = "ValidationException") -> None:
    """Raises Refused with everything that is wrong, counted and joined as the service does."""
    found = list(violations(shape, value)) if shape is not None else []
    if found:
        errors = "error" if len(found) == 1 else "errors"
        raise Refused(code, f"{len(found)} validation {errors} detected: {'; '.join(found)}")


def violations(shape: Shape, value: Any, path: str = "") -> Iterator[str]:
    """Each constraint that a value (as `read` gives it) fails, with the member's path: `inputDataConfig.1.member.channelName`."""
    shown = "Value" if shape.metadata.get("sensitive") else f"Value '{_java(value)}'"
    yield from (f"{shown} at '{path}' failed to satisfy constraint: {each}" for each in constraints(shape, value))
    if isinstance(shape, StructureShape):
        for name in shape.required_members:
            if value.get(name) is None:
                yield f"Value null at '{_below(path, name)}' failed to satisfy constraint: Member must not be null"
        for name, each in value.items():
            if name in shape.members and each is not None:
                yield from violations(shape.members[name], each, _below(path, name))
    elif isinstance(shape, MapShape):
        for part, words in ((shape.key, "Map keys"), (shape.value, "Map value")):
            scalars = value.keys() if part is shape.key else value.values()
            if isinstance(part, (StructureShape, ListShape, MapShape)):
                for name, each in value.items():
                    yield from violations(part, each, f"{path}.{name}.member")
            elif any(list(constraints(part, each)) for each in scalars):
                yield f"{shown} at '{path}' failed to satisfy constraint: {words} must satisfy constraint: [{', '.join(_rules(part))}]"
    elif isinstance(shape, ListShape):
        for at, each in enumerate(value, 1):
            if isinstance(shape.member, (StructureShape, ListShape, MapShape)):
                yield from violations(shape.member, each, f"{path}.{at}.member")
        scalar = not isinstance(shape.member, (StructureShape, ListShape, MapShape))
        if scalar and any(list(constraints(shape.member, each)) for each in value):
            yield f"{shown} at '{path}' failed to satisfy constraint: Member must satisfy constraint: [{', '.join(_rules(shape.member))}]"


def constraints(shape: Shape, value: Any) -> Iterator[str]:
    """The shape's own constraints that a value fails."""
    limits = shape.metadata
    if shape.type_name in ("string", "list", "map", "blob"):
        size, low, high = len(value), limits.get("min"), limits.get("max")
        if high is not None and size > high:
            yield _length("less", high)
        if low is not None and size < low:
            yield _length("greater", low)
    elif shape.type_name in ("integer", "long", "float", "double"):
        low, high = limits.get("min"), limits.get("max")
        if high is not None and value > high:
            yield f"Member must have value less than or equal to {high}"
        if low is not None and value < low:
            yield f"Member must have value greater than or equal to {low}"
    if isinstance(shape, StringShape) and shape.enum and value not in shape.enum:
        yield f"Member must satisfy enum value set: [{', '.join(shape.enum)}]"
    if "pattern" in limits and isinstance(value, str) and expression(limits["pattern"]).fullmatch(value) is None:
        yield f"Member must satisfy regular expression pattern: {limits['pattern']}"


def _rules(shape: Shape) -> Iterator[str]:
    """All of a scalar's constraints, as the service lists them for a member of a map or a list."""
    limits = shape.metadata
    if "max" in limits:
        yield _length("less", limits["max"])
    if "min" in limits:
        yield _length("greater", limits["min"])
    if isinstance(shape, StringShape) and shape.enum:
        yield f"Member must satisfy enum value set: [{', '.join(shape.enum)}]"
    if "pattern" in limits:
        yield f"Member must satisfy regular expression pattern: {limits['pattern']}"


def _length(than: str, limit: int) -> str:
    return f"Member must have length {than} than or equal to {limit}"


def _below(path: str, name: str) -> str:
    name = name[0].lower() + name[1:]
    return f"{path}.{name}" if path else name


def _java(value: Any) -> str:
    """A value as Java prints it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}={_java(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_java(each) for each in value)}]"
    if isinstance(value, bytes):
        return f"java.nio.HeapByteBuffer[pos=0 lim={len(value)} cap={len(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def expression(pattern: str) -> re.Pattern[str]:
    r"""A pattern of the model (java.util.regex's language) as Python's: \p{...} classes, \z, and a dot that stops at every line end."""
    out, at, inside = [], 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and pattern[at + 1 : at + 3] == "p{":
            end = pattern.index("}", at)
            named = _class(pattern[at + 3 : end])
            out.append(named if inside else f"[{named}]")
            at = end + 1
            continue
        if pair := _SURROGATES.match(pattern, at):
            out.append(rf"\U{0x10000 + (int(pair[1], 16) - 0xD800 << 10) + int(pair[2], 16) - 0xDC00:08x}")
            at = pair.end()
            continue
        if char == "\\":
            out.append(r"\Z" if pattern[at + 1] == "z" else pattern[at : at + 2])
            at += 2
            continue
        if char == "[" and not inside:
            inside = True
            start = 2 if pattern[at + 1 : at + 2] == "^" else 1
            out.append(pattern[at : at + start])
            at += start
            continue
        if char == "]" and inside:
            inside = False
        elif char == "." and not inside:
            char = f"[^{_LINE_ENDS}]"
        elif inside and char in "[&|~":
            char = f"\\{char}"  # set operations, which the model's patterns do not use and Python warns of
        out.append(char)
        at += 1
    return re.compile("".join(out), re.ASCII)


@cache
def _class(name: str) -> str:
    r"""The inside of a character class for \p{name}: one of _CLASSES, or a Unicode category such as L or Nd."""
    if name in _CLASSES:
        return _CLASSES[name]
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if not unicodedata.category(chr(code)).startswith(name):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
