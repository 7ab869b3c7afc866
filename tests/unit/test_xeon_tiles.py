"""Attention by AMX where there is no AMX: its instructions are computed in plain C++, and all around them is as it is on a Xeon."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `trimtab_xeon` is a build that emulates tiles."""
    folder = tmp_path_factory.mktemp("emulated")
    command = [sys.executable, ROOT / "entrypoints" / "trimtab_xeon" / "build.py", "--emulate-tiles", "--wheel", folder]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode == 3:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""  # no warning of the compiler
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    best = subprocess.run(
        [sys.executable, "-c", "import trimtab_xeon; print(trimtab_xeon.best())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    if best.stdout.strip() != "amx":
        pytest.skip("this processor has no AVX-512, without which nothing computes what is around the tiles")
    return environment


def test_attention_by_tiles_passes_the_tests_of_all_paths(emulated: dict[str, str]) -> None:
    tests = ["tests/unit/test_attention_paths.py", "-k", "amx", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=emulated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) on amx, 0 on avx512", done.stdout)
    assert int(passed) > 50
    assert "skipped" not in done.stdout


def test_an_emulation_is_never_installed() -> None:
    build = [sys.executable, ROOT / "entrypoints" / "trimtab_xeon" / "build.py", "--emulate-tiles"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "say --wheel FOLDER" in done.stderr
