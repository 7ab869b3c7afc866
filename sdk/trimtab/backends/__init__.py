"""Where a run can be executed. A backend's module is imported when the backend is asked for, not before."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from trimtab.backends.base import Backend
from trimtab.errors import BackendUnavailable, SpecError
from trimtab.spec import refuse_unknown

BACKENDS = {
    "process": ("trimtab.backends.process:ProcessBackend", "pip install 'trimtab[train]'"),
    "docker": ("trimtab.backends.docker:DockerBackend", "pip install 'trimtab[docker]'"),
    "sagemaker": ("trimtab.backends.sagemaker:SageMakerBackend", "pip install 'trimtab[aws]'"),
}


def check_name(name: str) -> str:
    """The name itself. Raises SpecError for a name that is no backend's, with the nearest right one."""
    if name in BACKENDS:
        return name
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(BACKENDS)
    raise SpecError(f"there is no backend {name!r}; {hint}")


def backend_class(name: str) -> type[Any]:
    """Raises SpecError for a name that is no backend's, BackendUnavailable with the remedy for what is not installed."""
    target, remedy = BACKENDS[check_name(name)]
    module, _, attribute = target.partition(":")
    try:
        kind: type[Any] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("trimtab"):
            raise  # our own mistake, not a missing dependency
        raise BackendUnavailable(f"the {name} backend needs {exc.name}:  {remedy}") from exc
    return kind


def settings_of(name: str) -> list[str]:
    """The names of a backend's settings."""
    return list(inspect.signature(backend_class(name)).parameters)


def load_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """A backend; `options` are its constructor's settings by name, such as memory="8g".

    Raises SpecError for an unknown name of either kind or a wrong value, BackendUnavailable with the remedy.
    """
    kind = backend_class(name)
    given = dict(options or {})
    refuse_unknown(given, inspect.signature(kind).parameters)
    backend: Backend = kind(**given)
    return backend
