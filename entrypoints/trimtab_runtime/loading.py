"""A base model put together from its shards, one decoder layer after the other, so that the original weights are never all in memory.

The model is made without weights (on torch's `meta` device; what it computes for itself, such as rotary frequencies, is there). What
stands outside its layers is read first. Then each layer in turn is read, gets the typical rows' hidden states, gives its inputs'
scales to what qlora begins with, and is put into NF4 tensor by tensor, before the next layer's weights take the same place in memory.
The forward is the model's own, of which every layer is filled just before its turn: the scales are those of a whole model.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab.counting import counted
from trimtab.errors import SpecError, WeightsError
from trimtab.families import family_of
from trimtab.spec import TrainSpec
from trimtab_runtime import families
from trimtab_runtime.batch import Batch
from trimtab_runtime.methods.lora import adapted_layers, linear_layers
from trimtab_runtime.methods.qlora import Factors, put, quantised, taken_away, watched
from trimtab_runtime.nf4_cache import Cache
from trimtab_runtime.shards import read_header

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MADE = (".rotary_emb.inv_freq",)  # tensors of old checkpoints that a model computes for itself
_ALIGNED = 64  # bytes: where a tensor begins in memory


class Shards:
    """The tensors of a checkpoint in the Hub's layout: model.safetensors, or the files that model.safetensors.index.json names.

    They are read by system calls and not mapped, so that pages of the files are no part of this process' memory.
    Raises WeightsError for a file that is missing, cut short or none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._open: dict[Path, int] = {}
        for file in _files(folder):
            header = read_header(file)
            first = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self._places |= {name: (file, first + entry["data_offsets"][0], entry) for name, entry in header.items()}

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._places[name][2]["shape"])

    def dtypes(self) -> set[str]:
        return {entry["dtype"] for _, _, entry in self._places.values()}

    def read(self, name: str, into: Tensor) -> Tensor:
        """Fill `into`, contiguous and of the tensor's shape, in its own dtype. Returns it."""
        file, begin, entry = self._places[name]
        stored = _TYPES[entry["dtype"]]
        raw = into if into.dtype is stored else torch.empty(entry["shape"], dtype=stored)
        view = memoryview(raw.view(-1).view(torch.uint8).numpy()) if raw.numel() else memoryview(b"")
        done = 0
        while done < len(view):
            count = os.preadv(self._file(file), [view[done:]], begin + done)
            if count == 0:
                raise WeightsError(f"{file.name} ends before its last tensor: copy the base model there again")
            done += count
        return into if raw is into else into.copy_(raw)

    def expect(self, names: Iterable[str]) -> None:
        """Let the system read these from the disk while something else is done."""
        if hasattr(os, "posix_fadvise"):
            for name in names:
                file, begin, entry = self._places[name]
                size = math.prod(entry["shape"]) * _TYPES[entry["dtype"]].itemsize
                os.posix_fadvise(self._file(file), begin, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]


def _files(folder: Path) -> list[Path]:
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file() or not index.is_file():
        return [one]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightsError(f"{index.name} is not a readable index of shards ({exc}): copy the base model there again") from exc


@dataclass(frozen=True)
class _Plan:
    """A model without weights, and where they are. `layers` are its decoder layers by name; `outside` the tensors of no layer."""

    base: PreTrainedModel
    shards: Shards
    layers: dict[str, nn.Module]
    outside: list[str]


def open_base(
    folder: Path,
    spec: TrainSpec,
    dtype: torch.dtype,
    typical: Batch | None,
    *,
    say: Callable[[str], None] = lambda line: None,
    to_write: int | None = None,
) -> tuple[PreTrainedModel, dict[str, Factors] | None] | str:
    """The base in `folder`, computing in `dtype`, and for qlora, whose layers are in NF4 then, what that took away (methods/qlora.py).
    Its NF4 is kept for later runs where `to_write`, bytes that this one will write itself, have room beside it; not where that is None.

    Instead of that, why it is to be loaded as a whole. Raises SpecError for tensors that are missing, too many or of another shape,
    and for files that are none; KeyError, ValueError and OSError for a configuration that cannot be read.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        shards = Shards(folder)
        try:
            plan = _plan(folder, config, shards, dtype)
            if isinstance(plan, str):
                return plan
            return plan.base, _fill(plan, spec, dtype, typical, say, to_write)
        finally:
            shards.close()
    except WeightsError as exc:
        raise SpecError(f"the base model in {folder} does not load: {exc}") from exc


def _plan(folder: Path, config: Any, shards: Shards, dtype: torch.dtype) -> _Plan | str:
    from transformers.conversion_mapping import get_model_conversion_mapping

    named = config.to_dict()
    if family_of(named) is None:
        return f"type {config.model_type} is tried out as a whole first"
    base = _without_weights(config, dtype, families.implementation(named))
    if get_model_conversion_mapping(base, add_legacy=False):
        return f"transformers converts the tensors of type {config.model_type}"
    tied = set(base.all_tied_weights_keys)
    wanted = set(base.state_dict()) - tied
    found = {name for name in shards.names if not name.endswith(_MADE)}
    missing, more = sorted(wanted - found), sorted(found - wanted)
    if (missing and more) or tied & found:
        return f"its tensors have other names than those of {type(base).__name__}"
    for what, names in (("lacks", missing), ("has, and a " + type(base).__name__ + " does not,", more)):
        if names:
            many = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SpecError(
                f"the base model in {folder} does not load: it {what} {', '.join(names[:3])}{many}: copy the model there again, or correct "
                "its config.json"
            )
    for name, tensor in base.state_dict().items():
        if name in wanted and shards.shape(name) != tuple(tensor.shape):
            raise SpecError(
                f"the base model in {folder} does not load: {name} has the shape {list(shards.shape(name))}, config.json asks for "
                f"{list(tensor.shape)}: copy the model there again"
            )
    if others := shards.dtypes() - set(_TYPES):
        return f"tensors are stored as {', '.join(sorted(others))}"
    prefix, stack = next((name, part) for name, part in base.named_modules() if isinstance(part, nn.ModuleList))
    layers = {f"{prefix}.{number}": layer for number, layer in enumerate(stack)}
    outside = [name for name in wanted if not name.startswith(f"{prefix}.")]
    if any(not name.startswith(f"{prefix}.") for name in linear_layers(base)):
        return f"type {config.model_type} has linear layers outside its decoder's"
    return _Plan(base, shards, layers, outside)


def _without_weights(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention
        )
    base.config.use_cache = False  # keys and values of the typical rows would be kept in all layers
    return base.eval()


def _fill(
    plan: _Plan, spec: TrainSpec, dtype: torch.dtype, typical: Batch | None, say: Callable[[str], None], to_write: int | None
) -> dict[str, Factors] | None:
    """Give the model its weights."""
    base = plan.base
    for name in plan.outside:
        _read(plan, name)
    base.tie_weights()
    if spec.method != "qlora":
        for layer in plan.layers:
            for name in _tensors(base, layer):
                _read(plan, name)
        return None

    targets = adapted_layers(base, spec.lora_targets)
    rank = spec.lora_rank if spec.lora_init == "qera" else 0
    cache = Cache.of(spec, plan.shards.folder, base, dtype, typical if rank else None, targets, say, to_write)
    if (lost := cache.read(base, dtype)) is not None:
        for layer in plan.layers:
            for name in _tensors(base, layer):
                if _own(base, name)[2].is_meta:
                    _read(plan, name)
        return lost
    began = time.monotonic()
    lost = {}
    turns = _Turns(plan, dtype, rank, frozenset(targets), lost)
    if typical is not None and rank:
        with turns.as_they_come(), torch.no_grad():
            base.get_decoder()(**typical.inputs(families.mask_dtype(base)))  # type: ignore[no-untyped-call]
    else:
        for layer in plan.layers:
            turns.begin(layer)
            turns.end(layer, {})
    say(f"base read and put into NF4 layer by layer: {counted(len(plan.layers), 'layer')} in {time.monotonic() - began:.1f} s")
    cache.write(base, lost)
    return lost


class _Turns:
    """What happens to a layer before and after it computes. The matrices of all lie, in turn, in one place in memory."""

    def __init__(self, plan: _Plan, dtype: torch.dtype, rank: int, restored: frozenset[str], lost: dict[str, Factors]) -> None:
        self._plan, self._dtype, self._rank, self._restored, self._lost = plan, dtype, rank, restored, lost
        self._linear = {layer: _linear_of(plan.base, layer) for layer in plan.layers}
        size = max(sum(_room(part.weight, dtype) for part in linear.values()) for linear in self._linear.values())
        self._place = torch.empty(size, dtype=dtype)
        self._names = list(plan.layers)

    def begin(self, layer: str) -> None:
        used, matrices = 0, {f"{name}.weight": part for name, part in self._linear[layer].items()}
        for name in _tensors(self._plan.base, layer):
            if name in matrices:
                shape = matrices[name].weight.shape
                into = self._place[used : used + shape.numel()].view(shape)
                used += _room(matrices[name].weight, self._dtype)
                _read(self._plan, name, into)
            else:
                _read(self._plan, name)
        place = self._names.index(layer) + 1
        for following in self._names[place : place + 1]:
            self._plan.shards.expect(_tensors(self._plan.base, following))

    def end(self, layer: str, scales: Mapping[str, Tensor]) -> None:
        for name, part in self._linear.pop(layer).items():
            small = quantised(part, self._dtype)
            if self._rank and name in self._restored:
                self._lost[name] = taken_away(part.weight.data, small, self._rank, scales.get(name))
            put(self._plan.base, name, small)

    @contextmanager
    def as_they_come(self) -> Iterator[None]:
        """While it is open, a forward of the model fills each layer, and puts it into NF4 when it has computed."""
        hooks = []
        for name, layer in self._plan.layers.items():
            watching = watched(self._linear[name])
            scales: dict[str, dict[str, Tensor]] = {}

            def before(*_: Any, name: str = name, watching: Any = watching, scales: Any = scales) -> None:
                self.begin(name)
                scales[name] = watching.__enter__()

            def after(*_: Any, name: str = name, watching: Any = watching, scales: Any = scales) -> None:
                watching.__exit__(None, None, None)
                self.end(name, scales[name])

            hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _tensors(base: PreTrainedModel, layer: str) -> list[str]:
    """Names of a layer's tensors that a checkpoint holds, in its modules' order."""
    return [f"{layer}.{name}" for name in base.get_submodule(layer).state_dict() if not _is_of_nf4(name)]


def _is_of_nf4(name: str) -> bool:
    return ".weight." in name  # absmax and the like, beside the packed weight


def _linear_of(base: PreTrainedModel, layer: str) -> dict[str, nn.Linear]:
    return {f"{layer}.{name}": part for name, part in base.get_submodule(layer).named_modules() if isinstance(part, nn.Linear)}


def _room(weight: Tensor, dtype: torch.dtype) -> int:
    """Numbers that a matrix takes, with those up to where the next may begin."""
    step = _ALIGNED // dtype.itemsize
    return -(-weight.numel() // step) * step


def _read(plan: _Plan, name: str, into: Tensor | None = None) -> None:
    """Let the checkpoint's tensor be the model's of that name, in the dtype that the model asks for."""
    module, child, own = _own(plan.base, name)
    tensor = plan.shards.read(name, torch.empty(own.shape, dtype=own.dtype) if into is None else into)
    if isinstance(own, nn.Parameter):
        setattr(module, child, nn.Parameter(tensor, requires_grad=False))
    else:
        own.copy_(tensor)


def _own(base: PreTrainedModel, name: str) -> tuple[nn.Module, str, Tensor]:
    """The model's tensor of that name: its module, its name there, and itself."""
    parent, _, child = name.rpartition(".")
    module = base.get_submodule(parent)
    return module, child, getattr(module, child)
