"""What lies in a job's folders to be served: one model, or a base and the adapters beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import EndpointError, SpecError, WeightsError
from trimtab.layout import JobDir
from trimtab_runtime.engines.adapters import FILES
from trimtab_runtime.tokenizer import Tokenizer

MANIFEST = "trimtab.json"  # of an artifact, and of a model that was merged from one
_CLIENT_MANIFEST = "trimtab-weights.json"  # of a base model that the client fetched: what names it
TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class Tree:
    """`model` is a plain Hugging Face folder; `adapters` are artifacts trained on it, by name; `names` in the order of the default."""

    model: Path
    names: tuple[str, ...]
    adapters: dict[str, Path] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    methods: dict[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer: the first adapter's own where it has one."""
        return next((folder for folder in self.adapters.values() if (folder / "tokenizer.json").is_file()), self.model)

    def quantised(self) -> list[str]:
        """Adapters that were trained on a base whose linear layers are 4-bit, and answer as trained only on that."""
        return [name for name in self.adapters if self.methods.get(name) == "qlora"]

    def dtype(self) -> str | None:
        """What the adapters were trained in, where that is one and the same and was said; None for a whole model."""
        found = {_manifest(folder).get("spec", {}).get("dtype") for folder in self.adapters.values()}
        known = found.pop() if len(found) == 1 else None
        return known if known in ("bfloat16", "float32") else None

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of generation_config.json and config.json, and the tokenizer's end."""
        given = [self.config.get("eos_token_id"), read_json(self.model / "generation_config.json").get("eos_token_id")]
        flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
        try:
            flat.append(Tokenizer(self.tokenizer).eos_id)
        except SpecError as exc:
            raise WeightsError(str(exc)) from exc
        size = self.config.get("vocab_size") or 1 << 40
        return frozenset(one for one in flat if isinstance(one, int) and one < size)  # a tokenizer may know more than its model


def read_tree(job: JobDir, *, trust_remote_code: bool = False) -> Tree:
    """What `serve` is to serve: a whole model in `model/`; else the base in channel `model` with its adapters; else it alone.

    An adapter in `model/` is called tuned, those in channel `adapters` by their folders. Raises WeightsError where there is no
    model, an adapter is not whole or belongs to another base, weights are not safetensors, or config.json wants Python code run
    that was not allowed.
    """
    if (job.model / "config.json").is_file():
        tree = Tree(job.model, (TUNED if (job.model / MANIFEST).is_file() else BASE,), config=_config(job.model))
    else:
        adapters = _adapters(job)
        base = job.channel("model")
        if not (base / "config.json").is_file():
            raise WeightsError(f"{base} holds no model: put or link the base model's folder there, or a whole model into {job.model}")
        methods = {name: str(_manifest(folder).get("spec", {}).get("method", "")) for name, folder in adapters.items()}
        tree = Tree(base, (*adapters, BASE), adapters, _config(base), methods)
        for name, folder in adapters.items():
            _refuse_other_base(base, folder, name)
    _refuse_pickles(tree.model)
    if "auto_map" in tree.config and not trust_remote_code:
        raise WeightsError(
            f"{tree.model / 'config.json'} names Python code of its own (auto_map), which is not run: choose a model of a known "
            "architecture, or allow a pinned revision by name with  --trust-remote-code"
        )
    return tree


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file. Raises WeightsError for another content."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{file} is damaged ({exc}): copy the model again") from exc
    if not isinstance(found, dict):
        raise WeightsError(f"{file} is no JSON object: copy the model again")
    return found


def architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names, else its family."""
    return str(next(iter(config.get("architectures") or []), None) or config.get("model_type") or "unknown")


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _manifest(artifact: Path) -> dict[str, Any]:
    return read_json(artifact / MANIFEST)


def _adapters(job: JobDir) -> dict[str, Path]:
    found = {TUNED: job.model} if (job.model / FILES[0]).is_file() else {}
    for folder in sorted(path for path in job.adapters.iterdir() if path.is_dir()) if job.adapters.is_dir() else []:
        if folder.name in (*found, BASE):
            raise WeightsError(f"two models would be called {folder.name!r}: rename {folder}")
        found[folder.name] = folder
    for folder in found.values():
        for name in (MANIFEST, *FILES):
            if not (folder / name).is_file():
                raise WeightsError(f"{folder} holds no {name}: give the model folder of a run that succeeded")
    return found


def _refuse_other_base(base: Path, adapter: Path, name: str) -> None:
    """By the digest of the base's files, where the folder tells it and the artifact does."""
    wanted = _manifest(adapter).get("spec", {})
    files = read_json(base / _CLIENT_MANIFEST).get("files")
    if not wanted.get("model_digest") or not isinstance(files, dict):
        return
    lines = "".join(f"{fact['sha256']}  {file}\n" for file, fact in sorted(files.items()))
    found = hashlib.sha256(lines.encode()).hexdigest()
    if found != wanted["model_digest"]:
        raise WeightsError(
            f"the adapter {name!r} was trained on {wanted.get('model')} with the digest {wanted['model_digest'][:16]}, and {base} holds "
            f"{found[:16]}: put that revision of the base model there, or train the adapter again"
        )


def _refuse_pickles(folder: Path) -> None:
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    there = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "none"
    raise WeightsError(f"{folder} has no safetensors weights, {there}: save the model with  model.save_pretrained(FOLDER)")


def refuse_small_disk(folder: Path, needed: int, free: int) -> None:
    """Raise EndpointError where `needed` bytes do not fit into what is `free` in `folder`."""
    if needed > free:
        raise EndpointError(
            f"loading needs {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: make room there, "
            "or set TMPDIR to a folder on a larger disk"
        )
