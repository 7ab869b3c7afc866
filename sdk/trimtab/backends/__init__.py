"""Where a run can be executed. A backend's module is imported when the backend is asked for, not before."""

from __future__ import annotations

import difflib
import importlib

from trimtab.backends.base import Backend
from trimtab.errors import BackendUnavailable, SpecError

BACKENDS = {
    "process": ("trimtab.backends.process:ProcessBackend", "pip install 'trimtab[train]'"),
}


def check_name(name: str) -> str:
    """The name itself. Raises SpecError for a name that is no backend's, with the nearest right one."""
    if name in BACKENDS:
        return name
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(BACKENDS)
    raise SpecError(f"there is no backend {name!r}; {hint}")


def load_backend(name: str) -> Backend:
    """A backend with its default settings. Raises SpecError for an unknown name, BackendUnavailable with the remedy."""
    target, remedy = BACKENDS[check_name(name)]
    module, _, attribute = target.partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("trimtab"):
            raise  # our own mistake, not a missing dependency
        raise BackendUnavailable(f"the {name} backend needs {exc.name}:  {remedy}") from exc
    return backend
