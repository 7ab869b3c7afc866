"""Sources to clean documents: `load` reads web pages and local files, `Document` is one of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.data.documents import Document, Loaded, Skipped, from_jsonl, load, to_jsonl
    from trimtab.data.limits import FetchLimits

__all__ = ["Document", "FetchLimits", "Loaded", "Skipped", "from_jsonl", "load", "to_jsonl"]

_HOME = dict.fromkeys(__all__, "trimtab.data.documents") | {"FetchLimits": "trimtab.data.limits"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
