"""A model too small to be of use, in the files that a hub or a folder has, and `resolve` without its lines."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from trimtab.weights import BaseModel, resolve


def ignore(line: str) -> None:
    pass


def quietly(model: str, cache: Path, **options: object) -> BaseModel:
    return resolve(model, cache=cache, say=ignore, **options)  # type: ignore[arg-type]


def tiny_model_files(seed: int = 0) -> dict[str, bytes]:
    """The files of a model too small to be of use, and some that no one should fetch."""
    weights = np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, weights.nbytes]}}).encode()
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    return {
        "config.json": b'{"model_type": "llama", "seed": %d}' % seed,
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "model.safetensors": struct.pack("<Q", len(header)) + header + weights.tobytes(),
        "pytorch_model.bin": b"a pickle" * 1000,
        "modeling_own.py": b"raise SystemExit",
        "onnx/config.json": b"{}",
        "README.md": b"# Tiny",
    }


USED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
