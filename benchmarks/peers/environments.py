"""A virtual environment for each competitor, made when it is first needed, kept in the cache: pinned requirements and CPU torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from trimtab.cache import cache_dir

TORCH = "2.13.0"  # as .ci/setup has it
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class NotInstalled(Exception):
    """Why there is no such environment, in pip's own words."""


def python_of(name: str, say: Callable[[str], None]) -> Path:
    """The interpreter of the environment for peers/NAME.txt. Raises NotInstalled."""
    requirements = Path(__file__).with_name(f"{name}.txt")
    folder = cache_dir() / "benchmarks" / name
    python, mark = folder / "bin" / "python", folder / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes() + TORCH.encode()).hexdigest()
    if python.exists() and mark.exists() and mark.read_text(encoding="ascii") == wanted:
        return python
    say(f"{name}: making its environment in {folder} (once; minutes)")
    _call(sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps")
    try:  # what pip is set up to find first: a plain "torch" of the index would be a CUDA build of several GB
        _call(*pip, "--no-index", f"torch=={TORCH}")
    except NotInstalled:
        _call(*pip, "--index-url", CPU_INDEX, f"torch=={TORCH}")
    _call(*pip, "-r", str(requirements))
    mark.write_text(wanted, encoding="ascii")
    return python


def _call(*command: str) -> None:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        lines = [line for line in ended.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise NotInstalled(lines[-1] if lines else f"{command[0]} ended with {ended.returncode}")
