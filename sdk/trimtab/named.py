"""What a person's words name: a run, an artifact's folder, an endpoint, an address, or a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.backends import BACKENDS
from trimtab.backends import settings_of as backend_settings
from trimtab.deployers import settings_of as deployer_settings
from trimtab.deployers.base import PREFIX
from trimtab.events import Event
from trimtab.spec import ServeSpec, refuse_unknown

if TYPE_CHECKING:
    from trimtab.artifact import Artifact
    from trimtab.endpoint import Endpoint


@dataclass(frozen=True)
class Named:
    """`words` as they were given. `backend` is where a run or an endpoint is, "" for what is nowhere or here."""

    kind: Literal["run", "artifact", "endpoint", "address", "model"]
    words: str
    backend: str = ""

    @property
    def settings(self) -> set[str]:
        """Names of the settings with which it is found."""
        if self.kind == "run":
            return set(backend_settings(self.backend))
        return set(deployer_settings(self.backend)) if self.kind == "endpoint" else set()

    def artifact(self, settings: Mapping[str, Any]) -> Artifact | None:
        """What a run left, or a folder holds, checked; None for what is none of them. Raises what attaching to a run raises."""
        from trimtab.artifact import Artifact
        from trimtab.run import Run

        if self.kind == "run":
            return Run.attach(self.words, **own(settings, self.settings)).artifact()
        if self.kind != "artifact":
            return None
        found = Artifact(self.words)
        found.verify()
        return found


def named(words: str) -> Named:
    """By the form of the words, and by what lies in the folder that they name. Nothing else is looked at; a model may not exist."""
    scheme, separator, rest = words.partition("://")
    if scheme in ("http", "https"):
        return Named("address", words)
    if separator and scheme in BACKENDS:
        return Named("endpoint" if rest.startswith(PREFIX) else "run", words, scheme)
    from trimtab.artifact import holds_artifact

    return Named("artifact" if holds_artifact(Path(words).expanduser()) else "model", words)


def own(settings: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that are known there."""
    names = set(known)
    return {name: value for name, value in settings.items() if name in names}


def refuse_foreign(settings: Mapping[str, Any], *known: Iterable[str]) -> None:
    """Raise SpecError for a setting that nobody knows, with the nearest right one."""
    refuse_unknown(settings, dict.fromkeys(name for names in known for name in names))


def deploy_arguments(
    words: str | None, backend: str | None, settings: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `endpoint.deploy` for a run, an artifact's folder or a model; None is what the backend's settings name.

    Without `backend` a run's model is served where it ran, anything else on this machine. A setting goes to the run's backend, to the
    endpoint's, or to both; `options` are further arguments, such as merge=False. Raises SpecError for a setting that neither has, and
    what attaching to a run raises.
    """
    what = named(words) if words else None
    backend = backend or (what.backend if what else "") or "process"
    known = {*deployer_settings(backend), *ServeSpec.model_fields}
    refuse_foreign(settings, known, what.settings if what else ())
    found = own(settings, known) | {"backend": backend}
    if what is None:
        return found
    if what.kind == "run":
        from trimtab.run import Run

        return found | Run.attach(what.words, **own(settings, what.settings)).to_deploy(backend, options)
    artifact = what.artifact(settings)
    return found | ({"base_model": what.words} if artifact is None else {"artifact": artifact, "title": what.words})


def opened(
    words: str, settings: Mapping[str, Any], api_key: str | None = None, show: Callable[[Event], None] = lambda event: None
) -> Endpoint:
    """The endpoint of an address or a handle; for anything else one on this machine, which ends with its `with` block.

    Raises SpecError for a setting that is known nowhere, and what attaching and deploying raise.
    """
    from trimtab.endpoint import Endpoint, deploy

    what = named(words)
    if what.kind == "address":
        return Endpoint(words, api_key=api_key)
    if what.kind == "endpoint":
        refuse_foreign(settings, what.settings)
        return Endpoint.attach(words, **settings)
    return deploy(**deploy_arguments(words, "process", settings), show=show)
