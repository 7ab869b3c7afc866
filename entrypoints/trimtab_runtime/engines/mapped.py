"""Tensors in safetensors files, mapped and not read: what is not looked at takes no memory.

Format: huggingface/safetensors, README, "Format": the header's length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import WeightsError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy has no bfloat16: its bits
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Mapped:
    """One tensor: its bits in an array of its shape, and the name of its element type (F32, F16, BF16)."""

    array: NDArray[np.generic]
    dtype: str

    def as_float32(self) -> NDArray[np.float32]:
        """A copy in single precision."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)


def map_file(file: Path) -> dict[str, Mapped]:
    """Every floating-point tensor of a safetensors file by name. Raises WeightsError for a file that is none, or was cut off."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(length))
        content = np.memmap(file, mode="r", dtype=np.uint8, offset=8 + length)
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise WeightsError(f"{file}: {name} is {entry['dtype']}; give weights in float32, float16 or bfloat16")
            begin, end = entry["data_offsets"]
            found[name] = Mapped(content[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"]), entry["dtype"])
    except OSError as exc:
        raise WeightsError(f"{file} cannot be read: {exc}. Copy the model again") from exc
    except (ValueError, KeyError, TypeError, struct.error) as exc:
        raise WeightsError(f"{file} is no whole safetensors file ({exc}): copy the model again") from exc
    return found


def map_folder(folder: Path) -> dict[str, Mapped]:
    """The tensors of a Hugging Face folder, one file or several. Raises WeightsError where there are none in safetensors."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as exc:
            raise WeightsError(f"{folder / INDEX} is damaged ({exc}): copy the model again") from exc
    else:
        names = ["model.safetensors"]
        if not (folder / names[0]).is_file():
            raise WeightsError(f"{folder} has no safetensors weights; only those are loaded: save the model with safe_serialization")
    found: dict[str, Mapped] = {}
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{folder / INDEX} names {name!r}, which is no file of its folder: do not use this model")
        found |= map_file(folder / name)
    return found
