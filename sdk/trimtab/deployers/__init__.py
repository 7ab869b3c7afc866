"""Where an endpoint can be. A deployer's module is imported when the deployer is asked for, not before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.deployers.base import Deployer
from trimtab.registry import Registry

DEPLOYERS = {
    "process": ("trimtab.deployers.process:ProcessDeployer", "pip install 'trimtab[serve]'"),
    "docker": ("trimtab.deployers.docker:DockerDeployer", "pip install 'trimtab[docker]'"),
    "sagemaker": ("trimtab.deployers.sagemaker:SageMakerDeployer", "pip install 'trimtab[aws]'"),
}
_registry = Registry(DEPLOYERS, "no endpoint can be started on {}", "endpoints on {} need")

settings_of = _registry.settings


def load_deployer(name: str, settings: Mapping[str, Any] | None = None) -> Deployer:
    """A deployer; `settings` are its constructor's by name, such as memory="8g".

    Raises SpecError for an unknown name of either kind or a wrong value, BackendUnavailable with the remedy.
    """
    deployer: Deployer = _registry.load(name, settings)
    return deployer
