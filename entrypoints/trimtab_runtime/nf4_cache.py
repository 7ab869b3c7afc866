"""Bases in NF4, kept on this machine, so that a model's second run neither reads its original weights nor looks at its inputs again.

In the folder that TRIMTAB_NF4_CACHE names, two kinds of safetensors files, each written aside and renamed when it is whole:

    nf4-<key>.safetensors    the layers' packed weights, by the names that bitsandbytes gives them
    lost-<key>.safetensors   what adapters begin as (methods/qlora.py), which depends on rank, layers and the rows that were looked at

A key is the digest of all that decides the contents. The file's own digest stands in its header, where zeros stood when it was taken.

Entries are a help and no more, so they stay out of a run's way: one process of a run writes them, and only where the disk has room for
them, for all that the run itself is to write, and 1 GB. All entries together take a tenth of the disk at most, the last used first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.layout import NF4_CACHE_VARIABLE as VARIABLE
from trimtab.spec import TrainSpec
from trimtab_runtime.batch import Batch
from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.methods.qlora import BLOCK, Factors, four_bit, library, put

KEPT = 4  # files of each kind, the last used
PAYS_FROM = 1 << 28  # weights in layers; what is smaller is quantised again in a few seconds
_VERSION = 1  # of the quantiser and of what adapters begin as; another one finds no entry of this one
_ZEROS = "0" * 64
_TYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_OLD = 86_400.0  # seconds after which what was not finished is nobody's
_SPARE = 1 << 30  # bytes that are left free on the disk, beside what the run is to write
_SHARE = 10  # of the disk, of which all entries together take one part in so many


class _Damaged(Exception):
    pass


@dataclass(frozen=True)
class Cache:
    """The two entries of one load; None where there is none to be had. `say` gets a line for what a user should know.

    `to_write`: bytes that the run has yet to write itself, whose room is left alone; None where this process is to keep nothing.
    """

    weights: Path | None
    lost: Path | None
    say: Callable[[str], None]
    to_write: int | None = None

    @classmethod
    def of(
        cls,
        spec: TrainSpec,
        folder: Path,
        base: PreTrainedModel,
        dtype: torch.dtype,
        typical: Batch | None,
        targets: Sequence[str],
        say: Callable[[str], None],
        to_write: int | None,
        *,
        pays_from: int | None = None,
    ) -> Cache:
        """For the base in `folder`, without weights yet. Without `typical` nothing that adapters begin as is kept.

        No entry without a folder in TRIMTAB_NF4_CACHE, without a digest of the model in the spec, and for less than `pays_from`
        (default: PAYS_FROM) weights.
        """
        place, layers = os.environ.get(VARIABLE, ""), linear_layers(base)
        size = sum(layer.weight.numel() for layer in layers.values())
        if not place or not spec.model_digest or size < (PAYS_FROM if pays_from is None else pays_from):
            return cls(None, None, say)
        files = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
        shapes = {name: [*layer.weight.shape] for name, layer in layers.items()}
        facts: list[object] = [_VERSION, spec.model_digest, files, BLOCK, str(dtype), shapes]
        weights = Path(place) / f"nf4-{_key(facts)}.safetensors"
        if spec.lora_init != "qera":
            return cls(weights, None, say, to_write)
        rows = b"" if typical is None else typical.tokens.numpy().tobytes() + typical.positions.numpy().tobytes()
        facts += [spec.lora_rank, sorted(targets), hashlib.sha256(rows).hexdigest()]
        return cls(weights, Path(place) / f"lost-{_key(facts)}.safetensors", say, to_write)

    def read(self, base: PreTrainedModel, dtype: torch.dtype) -> dict[str, Factors] | None:
        """Put the entry's packed weights in the place of the base's linear layers, which compute in `dtype` then.

        Returns what adapters begin as (empty where that is nothing); None, and the base as it was, without an entry that is whole.
        """
        if self.weights is None or not self.weights.is_file() or (self.lost is not None and not self.lost.is_file()):
            return None
        began, before = time.monotonic(), linear_layers(base)
        entry = self.lost or self.weights
        try:
            found = _read(self.lost) if self.lost else {}
            lost = {name: (found[f"{name}.lora_B"], found[f"{name}.lora_A"]) for name in {key.rpartition(".")[0] for key in found}}
            entry = self.weights
            packed = _read(entry)
            for name, layer in before.items():
                stats = {key: packed.pop(f"{name}.weight.{key}") for key in _STATS}
                state = library().functional.QuantState.from_dict(stats, torch.device("cpu"))
                put(base, name, four_bit(layer, packed.pop(f"{name}.weight"), state, dtype))
        except (_Damaged, OSError, KeyError, ValueError) as exc:
            for name, layer in before.items():
                put(base, name, layer)
            with contextlib.suppress(OSError):
                entry.unlink()
            self.say(f"NF4 cache: {entry} is not used ({exc or type(exc).__name__}); the base is put into NF4 anew")
            return None
        for path in (self.weights, self.lost):
            if path is not None:
                with contextlib.suppress(OSError):
                    os.utime(path)
        self.say(f"base in NF4 from {self.weights} in {time.monotonic() - began:.1f} s")
        return lost

    def write(self, base: PreTrainedModel, lost: Mapping[str, Factors]) -> None:
        """Keep what was made and is not there: the base's packed weights, and what adapters begin as. Where that cannot be, it is said
        and no more."""
        if self.to_write is None:
            return
        made: dict[Path, dict[str, Tensor]] = {}
        if self.weights is not None:
            made[self.weights] = dict(_packed(base))
        if self.lost is not None:
            made[self.lost] = {f"{name}.lora_{side}": one for name, pair in lost.items() for side, one in zip("BA", pair, strict=True)}
        if made:
            self._keep(next(iter(made)).parent, made, self.to_write)

    def _keep(self, folder: Path, made: Mapping[Path, Mapping[str, Tensor]], to_write: int) -> None:
        sizes = {path: sum(tensor.nbytes for tensor in tensors.values()) for path, tensors in made.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            new, disk = [path for path in made if not path.is_file()], shutil.disk_usage(folder)
            size, limit = sum(sizes.values()), disk.total // _SHARE
            needed = sum(sizes[path] for path in new) + to_write + _SPARE
            if disk.free < needed:
                self.say(
                    f"NF4 cache: {folder} has {disk.free >> 20:,} MB free and {needed >> 20:,} are needed, with what this run is to write; "
                    f"nothing is kept: set {VARIABLE} to a folder on another disk for faster starts"
                )
            elif size > limit:
                self.say(
                    f"NF4 cache: {size >> 20:,} MB are more than a tenth of the disk of {folder} ({limit >> 20:,} MB); nothing is kept: "
                    f"set {VARIABLE} to a folder on a larger disk for faster starts"
                )
            else:
                for path, tensors in made.items():
                    if path in new:
                        _put(path, tensors)
                    else:
                        os.utime(path)  # its other half is new
                _prune(folder, limit)
        except OSError as exc:
            self.say(f"NF4 cache: nothing is kept in {folder} ({exc}): set {VARIABLE} to another folder for faster starts")


_STATS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


def _packed(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, layer in linear_layers(base).items():
        yield f"{name}.weight", layer.weight.data
        for key, value in layer.weight.quant_state.as_dict(packed=True).items():
            yield f"{name}.weight.{key}", value


def _key(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _put(path: Path, tensors: Mapping[str, Tensor]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        _write(part, tensors)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file (its documentation, "Format") whose digest is filled in last. It is not forced to the disk: what a machine that
    loses its power leaves of it is no file of that digest."""
    header: dict[str, object] = {"__metadata__": {"sha256": _ZEROS}}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("xb") as file:
        file.write(head)
        for tensor in tensors.values():
            data = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
            digest.update(data)
            file.write(data)
        file.seek(head.index(_ZEROS.encode()))
        file.write(digest.hexdigest().encode())


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of such a file. Raises _Damaged where its digest is another one."""
    tensors: dict[str, Tensor] = {}
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > size - 8:
            raise _Damaged("it is cut short")
        text = _exactly(file.fileno(), bytearray(count), 8)
        try:
            header = json.loads(bytes(text))
            stated = header.pop("__metadata__")["sha256"]
            digest = hashlib.sha256(length + bytes(text).replace(stated.encode(), _ZEROS.encode(), 1))
            place = 8 + count
            for name, entry in header.items():
                tensor = torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]])
                if not 0 <= tensor.nbytes <= size - place or math.prod(entry["shape"]) != tensor.numel():
                    raise _Damaged("it is cut short")
                if tensor.numel():
                    digest.update(_exactly(file.fileno(), memoryview(tensor.view(-1).view(torch.uint8).numpy()), place))
                place += tensor.nbytes
                tensors[name] = tensor
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as exc:
            raise _Damaged(f"its header is not to be read: {type(exc).__name__}") from exc
    if digest.hexdigest() != stated or place != size:
        raise _Damaged("its contents are not what was written")
    return tensors


def _exactly(file: int, into: bytearray | memoryview, place: int) -> memoryview:
    view, done = memoryview(into), 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], place + done)
        if count == 0:
            raise _Damaged("it is cut short")
        done += count
    return view


def _prune(folder: Path, limit: int) -> None:
    """Remove all but the last used of each kind, and of all of them what goes beyond `limit` bytes."""
    found = []
    for path in folder.glob("*-*.safetensors"):
        with contextlib.suppress(OSError):  # another process removed it
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    kept, taken = Counter[str](), 0
    for _, size, path in sorted(found, reverse=True):
        kind = path.name.partition("-")[0]
        if kept[kind] < KEPT and taken + size <= limit:
            kept[kind], taken = kept[kind] + 1, taken + size
        else:
            path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what writers that died have left."""
    for path in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()


__all__ = ("KEPT", "PAYS_FROM", "VARIABLE", "Cache")
