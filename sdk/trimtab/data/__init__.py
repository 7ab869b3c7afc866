"""Sources to clean documents and training examples: `load` reads web pages, files and datasets, `Document` is one text of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.data.documents import Document, Loaded, Skipped, from_jsonl, load, to_jsonl
    from trimtab.data.examples import Examples
    from trimtab.data.given import as_sources
    from trimtab.data.limits import FetchLimits

__all__ = ["Document", "Examples", "FetchLimits", "Loaded", "Skipped", "as_sources", "from_jsonl", "load", "to_jsonl"]

_HOME = dict.fromkeys(__all__, "trimtab.data.documents") | {
    "Examples": "trimtab.data.examples",
    "FetchLimits": "trimtab.data.limits",
    "as_sources": "trimtab.data.given",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
