"""Which engine answers: what was asked for, what is installed, what takes the model; and loading it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Mapping
from typing import Any

from trimtab.errors import EndpointError
from trimtab.layout import DEVICE_VARIABLE, JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.adapter_config import is_directed
from trimtab_runtime.choices import Choice, cpu_flags, pick_dtype
from trimtab_runtime.engines import Engine
from trimtab_runtime.engines.adapters import FILES, MERGE
from trimtab_runtime.engines.adapters import refusal as adapter_refusal
from trimtab_runtime.engines.tree import Tree, architecture, read_json, read_tree

MODULES = {"openvino": ("openvino", "openvino_genai"), "vllm": ("vllm",), "transformers": ("torch", "transformers", "peft")}
BEST = {"xeon": ("openvino", "vllm", "transformers"), "gpu": ("vllm",)}  # those that compute on it, the best first
_WHY = {
    "xeon": "the fastest measured with few clients, and the first to start (benchmarks/README.md)",
    "gpu": "the one that computes on GPUs",
}
_QUANTISES = ("torch", "transformers", "bitsandbytes")  # what puts a base through 4 bits as training did
_REMEDY = {
    "openvino": "pip install 'trimtab[serve]'",
    "vllm": "pip install vllm, or deploy with --backend docker",
    "transformers": "pip install 'trimtab[serve]'",
}


def installed() -> frozenset[str]:
    """Engines whose packages are here. Imports none of them."""
    return frozenset(name for name, modules in MODULES.items() if all(importlib.util.find_spec(module) for module in modules))


def pick_engine(asked: str, present: Collection[str], refusals: Mapping[str, str], device: str) -> Choice:
    """The engine and the reason. `refusals` says by engine why it does not take this model.

    Raises EndpointError where the engine that was asked for is not here, does not compute on the device or does not take the model, and
    where none is left.
    """
    if asked != "auto":
        if asked not in BEST[device]:
            raise EndpointError(f"the engine {asked} computes on processors, not on a GPU: choose --engine auto, or --device xeon")
        if asked not in present:
            raise EndpointError(f"the engine {asked} is not installed here:  {_REMEDY[asked]}  or choose --engine auto")
        if asked in refusals:
            raise EndpointError(f"the engine {asked} does not take this model: {refusals[asked]}. Choose  --engine auto")
        return Choice(asked, "asked for")
    passed = []
    for name in BEST[device]:
        if name not in present:
            passed.append(f"{name} is not installed")
        elif name in refusals:
            passed.append(f"{name} does not take this model ({refusals[name]})")
        else:
            return Choice(name, "; ".join(passed) or _WHY[device])
    absent = [name for name in BEST[device] if name not in present]
    remedy = f"Install one:  {_REMEDY[absent[-1]]}" if absent else "Serve another model"
    raise EndpointError(f"no engine can answer: {'; '.join(passed)}. {remedy}{'; or choose --device xeon' if device == 'gpu' else ''}")


def quantises() -> bool:
    """Whether a base can be put through 4 bits here, which adapters of the method qlora need. The serve images cannot."""
    return all(importlib.util.find_spec(module) for module in _QUANTISES)


def refusals(tree: Tree, spec: ServeSpec, present: Collection[str], *, quantises: bool = True) -> dict[str, str]:
    """Why an engine that is present does not take what is to be served, by engine. `quantises` is as the function of that name tells."""
    found: dict[str, str] = {}
    if "openvino" in present and (why := _openvino_refusal(tree)):
        found["openvino"] = why
    if spec.trust_remote_code and "auto_map" in tree.config:
        found["openvino"] = f"{architecture(tree.config)} is code of its own"
    if directed := [name for name, folder in tree.adapters.items() if is_directed(read_json(folder / FILES[0]))]:
        found["vllm"] = f"{directed[0]} has use_dora = True, which it does not compute: {MERGE}"
    if four_bit := tree.quantised():
        trained = f"{four_bit[0]} was trained on a 4-bit base, which"
        found["vllm"] = f"{trained} it would not be served on: {MERGE}"
        if not quantises:
            lacks = f"{trained} only torch and bitsandbytes make, and they are not installed here: {MERGE}"
            found |= {"openvino": lacks, "transformers": lacks}
    return found


def load(job: JobDir, spec: ServeSpec, environ: Mapping[str, str] = os.environ) -> Engine:
    """Read what lies in the job's folders, choose an engine and load it there.

    Raises WeightsError for a model that is missing, damaged or not to be trusted, EndpointError where no engine can serve it.
    """
    device = "gpu" if environ.get(DEVICE_VARIABLE) == "gpu" else "xeon"
    tree = read_tree(job, trust_remote_code=spec.trust_remote_code)
    present = installed()
    choice = pick_engine(spec.engine, present, refusals(tree, spec, present, quantises=quantises()), device)
    reasons = [f"engine {choice.value}: {choice.reason}"]
    if choice.value == "vllm":
        from trimtab_runtime.engines.vllm import VllmEngine

        return VllmEngine.load(tree, spec, _dtype(tree, spec, device), device, reasons)
    if choice.value == "transformers":
        from trimtab_runtime.engines.transformers import TransformersEngine

        return TransformersEngine.load(tree, spec, _dtype(tree, spec, device), reasons)
    from trimtab_runtime.engines.openvino import OpenVinoEngine

    return OpenVinoEngine.load(tree, spec, _dtype(tree, spec, device), reasons)


def _dtype(tree: Tree, spec: ServeSpec, device: str) -> Choice:
    """What was asked for; else what the adapters were trained in; else bfloat16 where the processor computes in it."""
    if spec.dtype == "auto" and (trained := tree.dtype()):
        return Choice(trained, "what the adapter was trained in")
    return pick_dtype(spec.dtype, cpu_flags() | ({"gpu_bf16"} if device == "gpu" else set()))


def _openvino_refusal(tree: Tree) -> str:
    from trimtab_runtime.engines.families import refusal

    config: dict[str, Any] = tree.config
    if why := refusal(config):
        return why
    return next((why for folder in tree.adapters.values() if (why := adapter_refusal(read_json(folder / FILES[0])))), "")
