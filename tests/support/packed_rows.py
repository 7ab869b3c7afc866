"""A row of a few samples, and the hidden states that a model makes of it."""

from __future__ import annotations

import numpy as np
import torch

from trimtab_runtime.batch import Batch
from trimtab_runtime.families import mask_dtype
from trimtab_runtime.rows import Row

LENGTHS = [37, 5, 1, 90, 36]  # longer and shorter than the window of those that have one


def row(tokens: np.ndarray, lengths: list[int]) -> Row:
    none = np.zeros((0, 1), dtype=np.int32)
    return Row(tokens.astype(np.int32), np.ones(len(tokens), bool), lengths, np.full(len(tokens), -1, np.int32), none, none.astype("f2"))


def drawn(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 300, sum(LENGTHS))


def parts() -> list[slice]:
    ends = np.cumsum(LENGTHS)
    return [slice(int(end - length), int(end)) for end, length in zip(ends, LENGTHS, strict=True)]


def states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    base = model.get_base_model()
    with torch.inference_mode():
        return base.get_decoder()(**batch.inputs(mask_dtype(base))).last_hidden_state[0]


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).float().norm(dim=-1) / other.float().norm(dim=-1)).max())
