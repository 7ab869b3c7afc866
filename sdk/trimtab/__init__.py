"""Fine-tune language models on your own pages: a `Job` makes a `Run`, a run leaves an `Artifact`, an `Endpoint` answers.

Names are loaded when they are used, so `import trimtab` is quick and needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.artifact import Artifact
    from trimtab.dry_run import DryRun
    from trimtab.endpoint import Endpoint
    from trimtab.errors import (
        BackendError,
        BackendUnavailable,
        DataError,
        EndpointError,
        LicenceRequired,
        RunFailed,
        RunNotFound,
        SpecError,
        StagingError,
        TrimtabError,
        WaitTimeout,
        WeightsError,
    )
    from trimtab.job import Job
    from trimtab.run import Run
    from trimtab.spec import JobSpec, TrainSpec

__all__ = [
    "Artifact",
    "BackendError",
    "BackendUnavailable",
    "DataError",
    "DryRun",
    "Endpoint",
    "EndpointError",
    "Job",
    "JobSpec",
    "LicenceRequired",
    "Run",
    "RunFailed",
    "RunNotFound",
    "SpecError",
    "StagingError",
    "TrainSpec",
    "TrimtabError",
    "WaitTimeout",
    "WeightsError",
]

_HOME = dict.fromkeys(__all__, "trimtab.errors") | {
    "Artifact": "trimtab.artifact",
    "DryRun": "trimtab.dry_run",
    "Endpoint": "trimtab.endpoint",
    "Job": "trimtab.job",
    "JobSpec": "trimtab.spec",
    "Run": "trimtab.run",
    "TrainSpec": "trimtab.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
