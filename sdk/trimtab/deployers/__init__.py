"""Where an endpoint can be. A deployer's module is imported when the deployer is asked for, not before."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from trimtab.deployers.base import Deployer
from trimtab.errors import BackendUnavailable, SpecError
from trimtab.spec import refuse_unknown

DEPLOYERS = {
    "process": ("trimtab.deployers.process:ProcessDeployer", "pip install 'trimtab[serve]'"),
    "docker": ("trimtab.deployers.docker:DockerDeployer", "pip install 'trimtab[docker]'"),
    "sagemaker": ("trimtab.deployers.sagemaker:SageMakerDeployer", "pip install 'trimtab[aws]'"),
}


def deployer_class(name: str) -> type[Any]:
    """Raises SpecError for a name that is no backend's, with the nearest right one, BackendUnavailable with the remedy."""
    if name not in DEPLOYERS:
        near = difflib.get_close_matches(name, DEPLOYERS, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(DEPLOYERS)
        raise SpecError(f"no endpoint can be started on {name!r}; {hint}")
    target, remedy = DEPLOYERS[name]
    module, _, attribute = target.partition(":")
    try:
        kind: type[Any] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("trimtab"):
            raise  # our own mistake, not a missing dependency
        raise BackendUnavailable(f"endpoints on {name} need {exc.name}:  {remedy}") from exc
    return kind


def settings_of(name: str) -> list[str]:
    """The names of a deployer's settings."""
    return list(inspect.signature(deployer_class(name)).parameters)


def load_deployer(name: str, settings: Mapping[str, Any] | None = None) -> Deployer:
    """A deployer; `settings` are its constructor's by name, such as memory="8g".

    Raises SpecError for an unknown name of either kind or a wrong value, BackendUnavailable with the remedy.
    """
    kind = deployer_class(name)
    given = dict(settings or {})
    refuse_unknown(given, inspect.signature(kind).parameters)
    deployer: Deployer = kind(**given)
    return deployer
