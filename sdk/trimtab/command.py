"""How the runtime is started beside the client: its command line and its environment."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from trimtab.errors import BackendUnavailable
from trimtab.layout import DEVICE_VARIABLE, ROOT_VARIABLE

REMEDY = "pip install 'trimtab[train]'"

# What a run gets of the caller's environment. A list of what is let through, not of what is held back, so that no secret passes.
# In a container too: threads, kernels, memory allocation.
TUNING = ("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "ONEDNN_*", "DNNL_*", "MALLOC_*", "GLIBC_TUNABLES")
INHERITED = (
    *TUNING,
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("PYTHONPATH", "PYTHONHASHSEED", "PYTHONWARNINGS", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("TORCH_*", "CUDA_*", "NVIDIA_*"),
)

_NEEDED = ("trimtab_runtime", "torch", "transformers", "peft", "tokenizers")


def runtime_command(python: str, verb: str) -> list[str]:
    """The command line of `prepare`, `generate`, `train` or `serve`. With -P no file of the current folder can pass for a module."""
    return [python, "-P", "-m", "trimtab_runtime", verb]


def runtime_environment(root: Path, *, device: str = "xeon") -> dict[str, str]:
    """The variables that a run gets besides the inherited ones."""
    own = {ROOT_VARIABLE: str(root), DEVICE_VARIABLE: device, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return own | ({"CUDA_VISIBLE_DEVICES": ""} if device == "xeon" else {})


def inherited(environ: Mapping[str, str], patterns: tuple[str, ...] = INHERITED) -> dict[str, str]:
    """The part of the caller's environment that `patterns` let through."""
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def refuse_missing_runtime(python: str) -> None:
    """Raise BackendUnavailable where this Python could not run a job; another Python is asked when it starts."""
    if python != sys.executable:
        return
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"training on this machine needs {', '.join(missing)}:  {REMEDY}")
