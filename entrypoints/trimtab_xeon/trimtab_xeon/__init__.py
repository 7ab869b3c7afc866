"""Compiled kernels for training on Xeon processors, as torch operators `torch.ops.trimtab_xeon.*`.

The library uses torch's stable ABI alone, so one build serves every Python and every torch from 2.10 on.
`trimtab_runtime.xeon.kernels` is what calls the operators; each has a plain torch equivalent there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("kernels.so")
PATHS = {"portable": 1, "avx512": 2, "amx": 3}  # as in src/kernel.h


@cache
def load() -> None:
    """Make the operators known to torch. Raises OSError where the library cannot be loaded (torch older than 2.10, another processor)."""
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]


def best() -> str:
    """The best path that this processor runs: `amx`, `avx512` or `portable`."""
    load()
    found: int = torch.ops.trimtab_xeon.best_path()
    return next(name for name, number in PATHS.items() if number == found)


def use(name: str) -> None:
    """Choose the path `amx`, `avx512` or `portable` for all operators from now on. Raises RuntimeError where the processor lacks it."""
    load()
    torch.ops.trimtab_xeon.use_path(PATHS[name])
