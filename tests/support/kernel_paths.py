"""Tests that are run on every path of the compiled kernels: parametrised by `path`: amx, avx512, portable and off.

Where a path cannot be taken they are skipped with what is missing; the summary counts each path's tests, so none is lost unseen.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import pytest

NAMES = ("amx", "avx512", "portable", "off")  # as in trimtab_runtime/xeon/kernels.py, which is not imported for tests that need no torch


@functools.cache
def missing(path: str) -> str | None:
    """Why this machine cannot take the path; None where it can."""
    if path == "off":
        return None
    try:
        best = import_module("trimtab_xeon").best()
    except (ImportError, AttributeError, OSError) as exc:
        return f"trimtab-xeon is not built here ({exc}): .venv/bin/python entrypoints/trimtab_xeon/build.py"
    return f"this processor has no {path}" if NAMES.index(path) < NAMES.index(best) else None


def _path_of(item: pytest.Item) -> str | None:
    found = getattr(getattr(item, "callspec", None), "params", {}).get("path")
    return found if found in NAMES else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = _path_of(item)
        if path is not None:
            item.user_properties.append(("kernels", path))
            if reason := missing(path):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {outcome: dict.fromkeys(NAMES, 0) for outcome in ("passed", "skipped")}
    for outcome, of_paths in counts.items():
        for report in terminalreporter.stats.get(outcome, []):
            for name, path in getattr(report, "user_properties", []):
                if name == "kernels":
                    of_paths[path] += 1
    if any(any(of_paths.values()) for of_paths in counts.values()):
        told = []
        for path in NAMES:
            skipped = counts["skipped"][path]
            told.append(f"{counts['passed'][path]} on {path}" + (f" ({skipped} skipped)" if skipped else ""))
        terminalreporter.write_line(f"tests of the kernels that passed: {', '.join(told)}")
