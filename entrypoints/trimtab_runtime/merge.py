"""An adapter folded into the weights of its base model: a plain Hugging Face folder that needs neither PEFT nor NF4.

Channel `model` (the base), `adapters/tuned` (the artifact) and channel `merge` (request.json) -> `model/`.

    request.json    {"onto": "original" | "dequantised"}

A weight W [out, in] becomes  W + s B A, with s = alpha / r or alpha / sqrt(r) as the adapter says, and with DoRA (arXiv:2402.09353) each
of its rows gets the length that was learned for it; all in fp32, rounded once to the type in which the base stores it. `original`: W is the
base's own. `dequantised`: W went through NF4 and back, as did the weights that a qlora adapter was trained on (Dettmers et al. 2023,
arXiv:2305.14314); merged onto the others, it is not the model that was trained.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trimtab.counting import counted
from trimtab.errors import SpecError, StagingError, WeightsError
from trimtab.layout import JobDir
from trimtab_runtime import adapter_config, artifact, manifest
from trimtab_runtime.choices import cpu_flags, pick_dtype
from trimtab_runtime.shards import read_header, rewrite

Onto = Literal["original", "dequantised"]

TUNED = "tuned"  # the folder of `adapters/` with the artifact

_LAYER = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector)")
_INDEX = "model.safetensors.index.json"
_NEEDED = {"config.json", _INDEX, *artifact.TOKENIZER_FILES, *artifact.SPELLINGS}


@dataclass(frozen=True)
class Adapter:
    """B [out, r] and A [r, in] of each adapted layer, by its name in the model, the scale of each product, and DoRA's magnitudes [out]."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    magnitudes: dict[str, Tensor]

    def merged(self, layer: str, weight: Tensor, nf4: torch.dtype | None = None) -> Tensor:
        """The layer's weight [out, in] with the adapter in it, in the type of `weight`; first to NF4 and back where `nf4` says in which
        type the quantised layer computes. Raises WeightsError for other shapes than the adapter's, and for what is not finite."""
        start = weight
        if nf4 is not None:
            from trimtab_runtime.methods.qlora import dequantised_nf4

            start = dequantised_nf4(weight.to(nf4))
        found = start.float()
        if layer in self.factors:
            b, a = self.factors[layer]
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                shape = f"{b.shape[0]} x {a.shape[1]}"
                raise WeightsError(f"the adapter's {layer} is {shape}, the base model's {tuple(weight.shape)}: it belongs to another model")
            found = torch.addmm(found, b.float(), a.float(), alpha=self.scales[layer])
            if layer in self.magnitudes:
                found.mul_(self.gain(layer, found)[:, None])
        rounded = found.to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise WeightsError(
                f"{layer} is not finite once it is merged: the run diverged, or {weight.dtype} is too narrow; train it again"
            )
        return rounded

    def gain(self, layer: str, whole: Tensor) -> Tensor:
        """With DoRA: by how much [out] the rows of W + s B A (`whole`, fp32) become longer."""
        return self.magnitudes[layer].float() / torch.linalg.vector_norm(whole, dim=1)


def read_adapter(folder: Path) -> Adapter:
    """Raises SpecError, naming the setting, for an adapter that is more than a product of two matrices beside a weight, or DoRA."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = adapter_config.read_settings(folder)
    if why := adapter_config.refusal(settings):
        raise SpecError(f"an adapter with {why} cannot be merged in this version: serve it beside its base model (merge=False)")
    scaling = adapter_config.scaling(settings)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{folder.name} holds no readable adapter ({exc}): copy the artifact there again") from exc
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise SpecError(f"the adapter holds {name}, which cannot be merged: serve it beside its base model (merge=False)")
        found.setdefault(match[1], {})[match[2] or match[3]] = tensor
    wanted = {"A", "B", *(["magnitude"] if adapter_config.is_directed(settings) else [])}
    if odd := sorted(layer for layer, parts in found.items() if set(parts) != wanted):
        there = " and ".join(sorted(found[odd[0]]))
        raise WeightsError(f"the adapter holds {there} of {odd[0]}, and not {' and '.join(sorted(wanted))}: copy the artifact there again")
    scales = {layer: scaling.scale(layer, parts["A"].shape[0]) for layer, parts in found.items()}
    magnitudes = {layer: parts["magnitude"] for layer, parts in found.items() if "magnitude" in parts}
    return Adapter({layer: (parts["B"], parts["A"]) for layer, parts in found.items()}, scales, magnitudes)


def merge(job: JobDir, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Write the merged model into `job.model`, trimtab.json last. `progress` counts megabytes.

    Raises StagingError for a request that cannot be read and a disk that is full, SpecError for an adapter that is not merged in this
    version, WeightsError for one that does not fit the base model.
    """
    file = job.channel("merge") / "request.json"
    try:
        onto = json.loads(file.read_text(encoding="utf-8"))["onto"]
        if onto not in get_args(Onto):
            raise ValueError(f"onto is {onto!r}")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StagingError(f"{file} holds no readable request ({exc}): write it as merge.py describes") from exc
    merge_folders(job.channel("model"), job.adapters / TUNED, job.model, onto, say, progress)


def merge_folders(
    base: Path, tuned: Path, target: Path, onto: Onto, say: Callable[[str], None], progress: Callable[[int, int], None]
) -> None:
    """Write the model merged from the folders `base` and `tuned` into `target`, which is there, as `merge` does and raises."""
    facts = read_facts(tuned)
    adapter = read_adapter(tuned)
    nf4, quantised = (trained_dtype(facts), quantised_layers(base)) if onto == "dequantised" else (None, set[str]())
    shards = shards_of(base)
    refuse_tied_head(adapter, base)
    owners = layers_by_tensor({name for shard in shards for name in read_header(shard)}, {*adapter.factors, *quantised})
    total = sum(shard.stat().st_size for shard in shards)
    say(f"merge: {len(adapter.factors)} adapted layers onto the {onto} weights")
    done, names = 0, frozenset(owners)

    def wrote(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done >> 20 > before >> 20:
            progress(done >> 20, -(-total >> 20))

    def change(name: str, weight: Tensor) -> Tensor:
        layer = owners[name]
        return adapter.merged(layer, weight, nf4 if layer in quantised else None)

    try:
        (target / artifact.NAME).unlink(missing_ok=True)
        files = _copy_others(base, tuned, target)
        for shard in shards:
            files[shard.name] = rewrite(shard, target / shard.name, names, change, wrote)
        told = {"onto": onto, "adapter": facts.get("files", {}).get("adapter_model.safetensors", "")}
        made = {"merged": told, "versions": artifact.versions(), "files": dict(sorted(files.items()))}
        manifest.write_json(target / artifact.NAME, facts | made)
    except OSError as exc:
        raise StagingError(f"the merged model cannot be written ({exc.strerror or exc}): make room on the disk and try again") from exc
    progress(-(-total >> 20), -(-total >> 20))
    say(f"merge: {total / 1e6:,.0f} MB in {counted(len(shards), 'file')}")


def read_facts(tuned: Path) -> dict[str, Any]:
    """What the artifact's manifest says. Raises WeightsError where it says nothing."""
    try:
        facts: dict[str, Any] = json.loads((tuned / artifact.NAME).read_text(encoding="utf-8"))
        facts.get("spec", {}).get("method")
    except (OSError, ValueError, AttributeError) as exc:
        raise WeightsError(f"{tuned.name} has no readable {artifact.NAME} ({exc}): give the model folder of a run that succeeded") from exc
    return facts


def trained_dtype(facts: dict[str, Any]) -> torch.dtype:
    """The type in which quantised layers compute, by an artifact's manifest: the one it was trained in, else what suits this machine."""
    asked = facts.get("spec", {}).get("dtype", "auto")
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[pick_dtype(asked, cpu_flags()).value]


def shards_of(base: Path) -> list[Path]:
    """The files with the weights. Raises WeightsError where there are none."""
    found = [base / "model.safetensors"]
    if not found[0].is_file() and (base / _INDEX).is_file():
        index = json.loads((base / _INDEX).read_text(encoding="utf-8"))
        found = [base / name for name in sorted(set(index["weight_map"].values()))]
    if missing := [path.name for path in found if not path.is_file()]:
        raise WeightsError(f"the base model lacks {missing[0]}: copy it there again")
    return found


def quantised_layers(base: Path) -> set[str]:
    """The layers that qlora quantises: every linear one but the head. Nothing is loaded for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimtab_runtime.methods.lora import linear_layers

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return set(linear_layers(AutoModelForCausalLM.from_config(config)))


def refuse_tied_head(adapter: Adapter, base: Path) -> None:
    """Raise SpecError for an adapter of a head that is the embeddings once more: merged, it would change those, too."""
    if "lm_head" not in adapter.factors:
        return
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if settings.get("tie_word_embeddings") or not any("lm_head.weight" in read_header(shard) for shard in shards_of(base)):
        raise SpecError(
            "the adapter changes lm_head, which this base model shares with its embeddings (tie_word_embeddings), so that it cannot be "
            'merged: serve it beside its base model with the transformers engine (merge=False, engine="transformers")'
        )


def layers_by_tensor(stored: set[str], layers: Iterable[str]) -> dict[str, str]:
    """The name of the stored weight of each layer, and the layer.

    A checkpoint may have been saved without the model's outermost name, as `layers.0...` instead of `model.layers.0...`.
    Raises WeightsError where a layer has no weight.
    """
    found = {}
    for layer in layers:
        names = (f"{layer}.weight", f"{layer.partition('.')[2]}.weight")
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise WeightsError(f"the base model stores no {layer}.weight, which the adapter needs: it belongs to another model")
        found[name] = layer
    return found


def _copy_others(base: Path, tuned: Path, target: Path) -> dict[str, str]:
    """Configuration and licence of the base, tokenizer and chat template of the artifact where it has them. Returns their digests.

    Nothing else: no weights in another format, which would still be the base's.
    """
    taken = {path.name: path for path in base.iterdir() if path.is_file() and (path.name in _NEEDED or artifact.is_licence(path.name))}
    taken |= {name: tuned / name for name in artifact.TOKENIZER_FILES if (tuned / name).is_file()}
    for name, path in taken.items():
        shutil.copyfile(path, target / name)
    return {name: manifest.file_digest(target / name) for name in taken}
