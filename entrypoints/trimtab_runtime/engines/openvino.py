"""The engine on OpenVINO GenAI's continuous batching: paged keys and values, requests join and leave between steps.

The graph is our own (`openvino_graph`), so that a Hugging Face folder loads in seconds and without torch. A set of weights is one
pipeline; adapters trained on those weights share it. Only adapters of the method qlora need a second set, the base as 4-bit
quantisation left it, because that is what they were trained on.
"""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import EndpointError
from trimtab.spec import ServeSpec
from trimtab_runtime.choices import Choice
from trimtab_runtime.engines import Emit, Facts, Reason, Request, check
from trimtab_runtime.engines.adapters import Adapter, read_adapter
from trimtab_runtime.engines.families import Sizes, sliding_window
from trimtab_runtime.engines.four_bit import disk_bytes, round_trip
from trimtab_runtime.engines.machine import cache_bytes, free_memory, processors
from trimtab_runtime.engines.mapped import Mapped, map_folder
from trimtab_runtime.engines.scratch import scratch
from trimtab_runtime.engines.tree import Tree, refuse_small_disk

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # else importing openvino tells Intel of it

import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402
from openvino_genai import GenerationConfig, GenerationStatus  # noqa: E402

from trimtab_runtime.engines.openvino_graph import write  # noqa: E402

BLOCK = 32  # tokens in a block of the cache, fixed by the CPU plugin
_HINTS = {"bfloat16": "bf16", "float32": "f32"}
_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass
class _Set:
    """One set of weights: its pipeline, and which model of its graph each name is."""

    pipeline: Any
    models: dict[str, int]


@dataclass
class _Running:
    handle: Any
    shift: int  # between the graph's token ids and the model's own
    ids: list[int] = field(default_factory=list)


class OpenVinoEngine:
    """Answers on this machine's processors. `load` makes one."""

    def __init__(self, facts: Facts, sets: Sequence[_Set], vocabulary: int, stop_ids: frozenset[int]) -> None:
        self.facts = facts
        self._sets, self._vocabulary, self._stop_ids = list(sets), vocabulary, stop_ids
        self._running: dict[int, _Running] = {}
        self._count = 0

    @classmethod
    def load(cls, tree: Tree, spec: ServeSpec, dtype: Choice, reasons: Sequence[str] = ()) -> OpenVinoEngine:
        """Load a model and its adapters, computing in `dtype`; `reasons` are told among the facts' choices.

        Raises WeightsError for a model or an adapter that this engine does not take or that is damaged, and EndpointError where
        disk or memory do not suffice.
        """
        sizes = Sizes.of(tree.config)
        weights = map_folder(tree.model)
        adapters = {name: read_adapter(folder, name) for name, folder in tree.adapters.items()}
        four_bit = [name for name in tree.names if name in tree.quantised()]
        plain = [name for name in tree.names if name not in four_bit]
        choices = [*reasons, f"dtype {dtype.value}: {dtype.reason}"]

        context = min(sizes.context, spec.max_context or sizes.context)
        if (window := sliding_window(tree.config)) and window <= context:
            choices.append(f"context {context:,}: further back the model does not look")
        token = 2 * sizes.layers * sizes.kv_heads * sizes.width * _BYTES[dtype.value]
        taken = 2 * sum(one.array.nbytes for one in weights.values()) * (2 if four_bit and plain else 1)
        budget, why = cache_bytes(spec.cache_gb, max(0, free_memory() - taken), spec.max_running * context * token)
        sets = [group for group in (plain, four_bit) if group]
        blocks = budget // token // BLOCK // len(sets)
        if blocks < 2:
            raise EndpointError(f"{budget / 1e6:.0f} MB for keys and values hold no prompt of this model: give more with  --cache-gb")
        choices.append(f"cache {blocks * BLOCK * len(sets) * token / 1e9:.2f} GB, {blocks * BLOCK * len(sets):,} tokens: {why}")
        if (blocks - 1) * BLOCK < context:
            context = (blocks - 1) * BLOCK
            choices.append(f"context {context:,}: what the cache holds")
        threads = processors()
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks, scheduler.max_num_seqs = blocks, spec.max_running
        scheduler.dynamic_split_fuse = scheduler.enable_prefix_caching = True
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[dtype.value],
            "KV_CACHE_PRECISION": _HINTS[dtype.value],  # else 8 bits, and other answers
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # pinned threads wait for whoever else runs on their processor
            "sampler_num_threads": threads,
        }
        needed = disk_bytes(weights, dtype.value) if four_bit else sum(one.array.nbytes for one in weights.values())
        needed += sum(a.nbytes + b.nbytes for adapter in adapters.values() for a, b in adapter.factors.values())
        loaded = []
        for group in sets:
            with scratch() as folder:
                refuse_small_disk(folder, needed, shutil.disk_usage(folder).free)  # for the largest of them, before the first is loaded
                used: Mapping[str, Mapped] = weights
                if group is four_bit:
                    used = round_trip(weights, dtype.value, folder)
                    choices.append(f"{', '.join(group)}: on the base as 4-bit quantisation left it, which is what was trained on")
                beside = [name for name in group if name in adapters]
                pipeline = _pipeline(tree.config, used, [adapters[name] for name in beside], folder, scheduler, settings)
                loaded.append(_Set(pipeline, {name: beside.index(name) + 1 if name in beside else 0 for name in group}))
        facts = Facts(tree.names, context, f"openvino-genai {genai.__version__}", tuple(choices))
        return cls(facts, loaded, sizes.vocabulary, tree.stop_ids())

    def add(self, request: Request) -> None:
        """Take a request in. Raises EndpointError for one that does not fit these facts."""
        check(request, self.facts)
        if not 0 <= min(request.ids) <= max(request.ids) < self._vocabulary:
            raise EndpointError(f"the prompt has a token beyond the model's {self._vocabulary:,}: use the tokenizer in the model's folder")
        one = next(one for one in self._sets if request.model in one.models)
        shift = one.models[request.model] * self._vocabulary
        self._count += 1
        ids = np.array([request.ids], dtype=np.int64) + shift
        handle = one.pipeline.add_request(self._count, ov.Tensor(ids), self._generation(request, shift))
        self._running[request.id] = _Running(handle, shift)

    def cancel(self, id: int) -> None:
        """Drop a request; what it holds is free after the next step."""
        if running := self._running.pop(id, None):
            running.handle.cancel()

    def step(self, emit: Emit) -> bool:
        """One forward pass of every pipeline that has requests."""
        busy = False
        for one in self._sets:
            if one.pipeline.has_non_finished_requests():
                one.pipeline.step()
                busy = True
        for id, running in list(self._running.items()):
            new, reason = self._read(running)
            if reason is not None:
                del self._running[id]
            if new or reason is not None:
                emit(id, new, reason)
        return busy

    def usage(self) -> float:
        """The fullest pipeline's share."""
        if not self._running:
            return 0.0
        return float(max(one.pipeline.get_metrics().cache_usage for one in self._sets)) / 100

    def _generation(self, request: Request, shift: int) -> Any:
        found = GenerationConfig()
        found.max_new_tokens = request.max_new_tokens
        ends = {one + shift for one in self._stop_ids} or {1 << 40}  # without any, it would look for -1 and refuse that
        found.stop_token_ids = ends
        found.set_eos_token_id(min(ends))
        if request.temperature > 0:
            found.do_sample = True
            found.temperature, found.top_p = request.temperature, request.top_p
            if request.top_k:
                found.top_k = request.top_k
            found.rng_seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        return found

    def _read(self, running: _Running) -> tuple[list[int], Reason | None]:
        """New token ids, and why the answer ended."""
        handle = running.handle
        new: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                new += [token - running.shift for token in output.generated_ids]
        if handle.get_status() == GenerationStatus.RUNNING:
            return new, None
        if new and new[-1] in self._stop_ids:
            return new[:-1], "stop"
        return new, "length"


def _pipeline(
    config: Mapping[str, Any],
    weights: Mapping[str, Mapped],
    adapters: Sequence[Adapter],
    folder: Path,
    scheduler: Any,
    settings: dict[str, Any],
) -> Any:
    """Write the graph into `folder`, which may go afterwards, and load it from there."""
    write(config, weights, folder, adapters)
    tokenizer = genai.Tokenizer(folder)  # there is none: ids go in and come out
    return genai.ContinuousBatchingPipeline(folder, tokenizer, scheduler, "CPU", **settings)
