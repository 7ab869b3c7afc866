"""Where a run can be executed. A backend's module is imported when the backend is asked for, not before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.registry import Registry

if TYPE_CHECKING:
    from trimtab.backends.base import Backend

BACKENDS = {
    "process": ("trimtab.backends.process:ProcessBackend", "pip install 'trimtab[train]'"),
    "docker": ("trimtab.backends.docker:DockerBackend", "pip install 'trimtab[docker]'"),
    "sagemaker": ("trimtab.backends.sagemaker:SageMakerBackend", "pip install 'trimtab[aws]'"),
}
_registry = Registry(BACKENDS, "there is no backend {}", "the {} backend needs")

check_name = _registry.check
settings_of = _registry.settings


def load_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """A backend; `options` are its constructor's settings by name, such as memory="8g".

    Raises SpecError for an unknown name of either kind or a wrong value, BackendUnavailable with the remedy.
    """
    backend: Backend = _registry.load(name, options)
    return backend
