"""A safetensors file rewritten tensor by tensor, in its own layout: never more than one tensor of it is in memory.

Format: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes without holes; offsets count from
there (safetensors documentation, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trimtab.errors import WeightsError

_PIECE = 1 << 24  # bytes copied at once
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDTHS = {  # bytes of a number; types that pack several into a byte are not looked at
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1), **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4), **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}  # fmt: skip

Change = Callable[[str, Tensor], Tensor]
"""A tensor's name and value to its new value, of the same shape and type."""


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor by name, in the order of their bytes. Raises WeightsError for a file that is none."""
    with file.open("rb") as source:
        return _header(source, file)[1]


def tensors_in(data: bytes | mmap.mmap) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by name, in the place where it lies in the contents of a file that is whole."""
    held = bytearray(data) if isinstance(data, bytes) else data  # torch wants what could be written to
    begin = 8 + int.from_bytes(held[:8], "little")
    for name, entry in json.loads(bytes(held[8:begin])).items():
        if name != "__metadata__":
            count = math.prod(entry["shape"])
            place = begin + entry["data_offsets"][0]
            empty = torch.empty(0, dtype=_TYPES[entry["dtype"]])
            found = torch.frombuffer(held, dtype=_TYPES[entry["dtype"]], count=count, offset=place) if count else empty
            yield name, found.reshape(entry["shape"])


def rewrite(source: Path, target: Path, names: frozenset[str], change: Change, wrote: Callable[[int], None] = lambda count: None) -> str:
    """Write `source` again as `target`, with the tensors `names` changed, to disk; its sha256 in hexadecimal.

    `wrote` gets the bytes of each tensor that is done. Raises WeightsError for a file cut short and for a tensor to change that is not
    stored in 32- or 16-bit floating point; OSError as it comes.
    """
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            written.write(data)

        raw, header = _header(read, source)
        put(raw)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            read.seek(len(raw) + begin)
            if name in names:
                weight = _tensor(_exactly(read, end - begin, source), entry, f"{name} in {source.name}")
                put(change(name, weight).contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                for start in range(begin, end, _PIECE):
                    put(_exactly(read, min(_PIECE, end - start), source))
            wrote(end - begin)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _header(source: BinaryIO, file: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The bytes up to the first tensor's, and what they say."""
    try:
        length = source.read(8)
        size = file.stat().st_size
        count = int.from_bytes(length, "little")
        if not 2 <= count <= size - 8:
            raise ValueError("its header is longer than the file")
        text = source.read(count)
        tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        in_order = dict(sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]))
        place = 0
        for name, entry in in_order.items():
            begin, end = entry["data_offsets"]
            if begin != place:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            _check_span(name, entry)
            place = end
        if place != size - 8 - count:
            raise ValueError("its tensors do not end where the file does")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{file.name} is not a whole safetensors file ({exc}): copy the base model there again") from exc
    return length + text, in_order


def _check_span(name: str, entry: dict[str, Any]) -> None:
    """Raises ValueError where a tensor's bytes are not as many as its shape takes: else it would be read from its neighbours'."""
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(f"{name} has the shape {shape} and the offsets {[begin, end]}")
    if dtype in _WIDTHS and end - begin != math.prod(shape) * _WIDTHS[dtype]:
        raise ValueError(f"{name} has {end - begin} bytes, and {shape} of {dtype} takes {math.prod(shape) * _WIDTHS[dtype]}")


def _exactly(source: BinaryIO, count: int, file: Path) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise WeightsError(f"{file.name} ends before its last tensor: copy the base model there again")
    return data


def _tensor(data: bytes, entry: dict[str, Any], name: str) -> Tensor:
    if entry["dtype"] not in _TYPES:
        raise WeightsError(
            f"{name} is stored as {entry['dtype']}, to which nothing can be added: use a copy of the model in bf16, fp16 or fp32"
        )
    if not data:
        return torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]])
    return torch.frombuffer(bytearray(data), dtype=_TYPES[entry["dtype"]]).reshape(entry["shape"])
