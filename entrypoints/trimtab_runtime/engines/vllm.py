"""vLLM as an engine, its GPU and its CPU build: token ids in and out, in this one process, without its server and its key."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import EndpointError, WeightsError
from trimtab.estimate import ModelFacts
from trimtab.spec import ServeSpec
from trimtab_runtime.choices import Choice
from trimtab_runtime.engines import Emit, Facts, Reason, Request, check
from trimtab_runtime.engines.adapters import FILES
from trimtab_runtime.engines.machine import cache_bytes, free_memory, processors
from trimtab_runtime.engines.tree import Tree, read_json

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, as vLLM takes them
_GAUGE = "vllm:kv_cache_usage_perc"


class VllmEngine:
    """Continuous batching by vLLM. `load` makes one."""

    def __init__(self, engine: Any, facts: Facts, adapters: Mapping[str, Any], stop_ids: frozenset[int]) -> None:
        """`adapters` are vLLM's LoRARequests by name."""
        self.facts, self._engine, self._adapters, self._stop_ids = facts, engine, dict(adapters), stop_ids
        self._running: set[int] = set()

    @classmethod
    def load(cls, tree: Tree, spec: ServeSpec, dtype: Choice, device: str = "xeon", reasons: Sequence[str] = ()) -> VllmEngine:
        """Load a model and its adapters. Raises WeightsError for what vLLM cannot load, EndpointError where memory does not suffice."""
        weights = sum(file.stat().st_size for file in tree.model.glob("*.safetensors"))
        context = _context(tree, spec)
        free = max(0, free_memory() - 2 * weights)
        most = spec.max_running * context * token_bytes(tree.config, dtype.value)
        cache, why = cache_bytes(spec.cache_gb, free, most) if device == "xeon" or spec.cache_gb else (None, "what vLLM finds free")
        os.environ.update(environment(device, processors()))
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest

        present = _gpus() if device == "gpu" else 0
        gpus = gpus_used(tree.config, present)
        compiler = device == "gpu" or bool(shutil.which("g++"))
        arguments = engine_arguments(tree, spec, dtype.value, context, cache, compiler=compiler, gpus=gpus)
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, OSError, KeyError) as exc:
            raise WeightsError(f"vLLM does not load {tree.model}: {exc}. Choose  --engine auto") from exc
        adapters = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(tree.adapters.items(), start=1)}
        try:
            for adapter in adapters.values():
                engine.add_lora(adapter)
        except ValueError as exc:
            raise WeightsError(f"vLLM does not load the adapter {adapter.lora_name}: {exc}. Choose  --engine auto") from exc
        said = [*reasons, f"dtype {dtype.value}: {dtype.reason}"]
        said.append(f"cache {cache / 1e9:.2f} GB: {why}" if cache else f"cache: {why}")
        if present > 1:
            said.append(f"{gpus} of {present} GPUs: " + ("all" if gpus == present else "as many as its heads can be split over"))
        if arguments["enforce_eager"]:
            said.append("nothing is compiled: " + ("adapters are not" if adapters else "there is no C++ compiler here"))
        return cls(
            engine, Facts(tree.names, context, f"vllm {importlib.metadata.version(_package())}", tuple(said)), adapters, tree.stop_ids()
        )

    def add(self, request: Request) -> None:
        """Take a request in. Raises EndpointError for one that does not fit these facts."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check(request, self.facts)
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop_token_ids=sorted(self._stop_ids),
            ignore_eos=True,  # its own idea of an end, which for a config without one is a default of its family's
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        try:
            self._engine.add_request(
                str(request.id), {"prompt_token_ids": request.ids}, params, lora_request=self._adapters.get(request.model)
            )
        except ValueError as exc:
            raise EndpointError(f"vLLM refuses the request: {exc}") from exc
        self._running.add(request.id)

    def cancel(self, id: int) -> None:
        """Drop a request and free what it holds."""
        if id in self._running:
            self._running.remove(id)
            self._engine.abort_request([str(id)])

    def step(self, emit: Emit) -> bool:
        """One step of vLLM's scheduler."""
        if not self._engine.has_unfinished_requests():
            return False
        for output in self._engine.step():
            id = int(output.request_id)
            if id not in self._running:
                continue
            new, reason = fresh(list(output.outputs[0].token_ids), output.outputs[0].finish_reason, self._stop_ids)
            if reason is not None:
                self._running.remove(id)
            if new or reason is not None:
                emit(id, new, reason)
        return True

    def usage(self) -> float:
        """What vLLM's own gauge says."""
        if not self._running:
            return 0.0
        return float(next((one.value for one in self._engine.get_metrics() if one.name == _GAUGE), 0.0))


def environment(device: str, threads: int) -> dict[str, str]:
    """What vLLM reads from the environment: stay offline, tell nobody, one process, threads that are not bound to a processor."""
    found = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if device == "xeon":
        # it would keep one processor for a server of its own, and bound threads wait for whoever else runs on theirs
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        found |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # nor spin while they wait
    return found


def gpus_used(config: Mapping[str, Any], present: int) -> int:
    """On how many of the GPUs present a model is split, as machines are chosen for it (hosting_instances): on all where its heads allow.

    Where config.json does not name them on all, too: vLLM says what it cannot split.
    """
    facts = ModelFacts.from_config(config)
    return facts.gpus_used(present) if facts else max(present, 1)


def _gpus() -> int:
    """GPUs that this process may use; asked without beginning to use one, for vLLM forks."""
    import torch

    return torch.cuda.device_count()


def engine_arguments(
    tree: Tree, spec: ServeSpec, dtype: str, context: int, cache: int | None, *, compiler: bool, gpus: int = 1
) -> dict[str, Any]:
    """vLLM's EngineArgs; `cache` in bytes of all GPUs together. Raises WeightsError for an adapter of a rank beyond those it takes."""
    found: dict[str, Any] = {
        "model": str(tree.model),
        "skip_tokenizer_init": True,
        "trust_remote_code": spec.trust_remote_code,
        "load_format": "safetensors",
        "dtype": dtype,
        "tensor_parallel_size": gpus,
        "max_model_len": context,
        "max_num_seqs": spec.max_running,
        "enable_prefix_caching": True,
        "enforce_eager": bool(tree.adapters) or not compiler,
        "disable_log_stats": False,  # where the cache's usage is said
    }
    if cache is not None:
        found["kv_cache_memory_bytes"] = cache // gpus  # of each
    if tree.adapters:
        rank = max(_rank(tree, name) for name in tree.adapters)
        taken = next((size for size in RANKS if size >= rank), None)
        if taken is None:
            raise WeightsError(f"vLLM takes adapters up to rank {RANKS[-1]}, one here has {rank}: choose  --engine auto")
        found |= {"enable_lora": True, "max_loras": len(tree.adapters), "max_lora_rank": taken}
    return found


def fresh(ids: list[int], finish: str | None, stop_ids: frozenset[int]) -> tuple[list[int], Reason | None]:
    """New token ids without a stop token, and why the answer ended."""
    if finish is None:
        return ids, None
    if finish == "stop":
        return ids[:-1] if ids and ids[-1] in stop_ids else ids, "stop"
    return ids, "length"


def token_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of keys and values for one token, by config.json; of an unusual model a guess that is too high."""
    heads = int(config.get("num_attention_heads", 32))
    width = int(config.get("head_dim") or int(config.get("hidden_size", 4096)) // heads)
    kept = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config.get("num_hidden_layers", 32)) * kept * width * (4 if dtype == "float32" else 2)


def _context(tree: Tree, spec: ServeSpec) -> int:
    own = tree.config.get("max_position_embeddings")
    known = [value for value in (own, spec.max_context) if value]
    if not known:
        raise WeightsError(f"{tree.model / 'config.json'} names no max_position_embeddings: say  --max-context")
    return int(min(known))


def _rank(tree: Tree, name: str) -> int:
    config = read_json(tree.adapters[name] / FILES[0])
    return max([int(config.get("r", 8)), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])


def _package() -> str:
    """The distribution that brings vLLM: its own, or the CPU build's."""
    known = importlib.metadata.packages_distributions().get("vllm") or ["vllm"]
    return known[0]
