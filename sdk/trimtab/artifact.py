"""What stays of a run: the adapter, or the whole model, the tokenizer and the manifest that says what they were made of."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.errors import StagingError
from trimtab.spec import TrainSpec

MANIFEST = "trimtab.json"
ADAPTER = "adapter_model.safetensors"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PIECE = 1 << 20  # bytes read at once


def holds_artifact(folder: Path) -> bool:
    """Whether a run left what is in a folder: an adapter, or a model that was trained whole. A merged model is a model like others."""
    if (folder / "adapter_config.json").is_file():
        return True
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(told["spec"]["method"] == "full")
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Artifact:
    """A folder with an adapter, or a whole model, and its manifest. Two artifacts are equal when their tensors' bytes are."""

    def __init__(self, path: str | Path) -> None:
        """Raises StagingError for a folder that holds no artifact."""
        self.path = Path(path).expanduser().absolute()
        if not (self.path / MANIFEST).is_file():
            raise StagingError(f"{self.path} holds no artifact (it has no {MANIFEST}): give the folder that a run left")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """`trimtab.json`: spec, digests of data and base model, versions, ledger, metrics. Raises StagingError if it is no JSON."""
        try:
            value = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise StagingError(f"{self.path / MANIFEST} cannot be read ({exc}): copy the artifact there again") from exc
        if not isinstance(value, dict):
            raise StagingError(f"{self.path / MANIFEST} is not a JSON object: copy the artifact there again")
        return value

    @cached_property
    def spec(self) -> TrainSpec:
        """What the run was asked to train. Raises SpecError for an artifact of another spec_version, StagingError for none at all."""
        values = self.manifest.get("spec")
        if not isinstance(values, dict):
            raise StagingError(f"{self.path / MANIFEST} names no spec: train it again with this version of trimtab")
        return TrainSpec(**values)

    @property
    def is_whole(self) -> bool:
        """Whether it is a model that needs no base, as the method full leaves it; else an adapter."""
        return self.spec.method == "full"

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files with the tensors. Raises StagingError for an index that cannot be read."""
        if not self.is_whole:
            return (self.path / ADAPTER,)
        if not (self.path / INDEX).is_file():
            return (self.path / WHOLE,)
        try:
            names = set(json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StagingError(f"{self.path / INDEX} cannot be read ({exc}): copy the artifact there again") from exc
        return tuple(self.path / name for name in sorted(names))

    @property
    def base_digest(self) -> str:
        """Names the base model that was tuned, and that an adapter belongs to, by its contents."""
        return self.spec.model_digest

    @cached_property
    def digest(self) -> str:
        """sha256 of the tensors: names, types, shapes and bytes, in the order of their names.

        The files' own metadata does not count, nor how many they are. Raises StagingError for a file that is not whole.
        """
        return tensors_digest(*self.weights)

    def verify(self) -> None:
        """Raises StagingError where a file is missing or is not the one that the manifest names."""
        for name, sha256 in self.manifest.get("files", {}).items():
            try:
                with (self.path / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as exc:
                raise StagingError(f"{self.path / name} cannot be read ({exc}): copy the artifact there again") from exc
            if found != sha256:
                raise StagingError(f"{self.path / name} is not the file that the run wrote: copy the artifact there again")

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Artifact) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"

    def _repr_html_(self) -> str:
        from trimtab.notebook import of_artifact

        return of_artifact(self)


def tensors_digest(*files: Path) -> str:
    """sha256 over the tensors of safetensors files, by their names, read a piece at a time and without numpy.

    Format: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes; offsets count from there
    (safetensors documentation, "Format"). Raises StagingError for a file that is missing, cut short or no safetensors.
    """
    digest = hashlib.sha256()
    path = files[0]
    try:
        places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if not 2 <= length <= size - 8:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - length:
                    raise ValueError(f"{name} lies outside the file")
                places[name] = (path, 8 + length + begin, tensor)
        for name in sorted(places):
            path, start, tensor = places[name]
            digest.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            with path.open("rb") as file:
                file.seek(start)
                left = tensor["data_offsets"][1] - tensor["data_offsets"][0]
                while left > 0:
                    digest.update(piece := file.read(min(_PIECE, left)))
                    if not piece:
                        raise ValueError(f"it ends before {name}")
                    left -= len(piece)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise StagingError(f"{path} is not a whole safetensors file ({exc}): copy the artifact there again, or train it again") from exc
    return digest.hexdigest()
