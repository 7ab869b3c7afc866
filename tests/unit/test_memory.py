"""A run reports its own memory, not that of whoever started it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from trimtab_runtime.memory import peak_memory_mb

ASK = "from trimtab_runtime.memory import peak_memory_mb; print(peak_memory_mb())"


def test_a_small_process_started_by_a_large_one_is_small():
    held = np.ones(50_000_000)  # 400 MB that this process holds while it starts the other
    child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 100 < held.nbytes // 2**20


def test_it_counts_what_was_held_once():
    code = f"held = bytes(1) * 300_000_000; del held; {ASK}"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 286 <= int(child.stdout) < 400


def test_without_proc_the_kernels_other_account_is_asked(tmp_path):
    (tmp_path / "status").write_text("Name: x\n")
    for absent in (tmp_path / "status", tmp_path / "nothing", Path("/dev/null")):
        assert peak_memory_mb(status=absent) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
