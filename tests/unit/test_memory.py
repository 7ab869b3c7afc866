"""A run reports its own memory, not that of whoever started it, and knows when there was not enough."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import SpecError, StagingError
from trimtab.spec import TrainSpec
from trimtab_runtime import memory
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


@pytest.mark.parametrize(
    ("exc", "short"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)"), True),
        (ImportError("libtorch.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shapes do not match"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (StagingError("another machine failed: out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(exc: Exception, short: bool) -> None:
    assert memory.ran_out(exc) is short
    with pytest.raises(SpecError) as told:
        raise SpecError("the model does not load") from exc
    assert memory.ran_out(told.value) is short


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"method": "lora", "batch_rows": 4, "accumulation": 2, "max_seq_len": 1024},
            ["--batch-rows 1 --accumulation 8 (the same steps)", "--max-seq-len 512", "--method qlora"],
        ),
        ({"method": "qlora", "max_seq_len": 256}, ["a smaller --model"]),
    ],
)
def test_what_takes_less_memory(changed: dict[str, object], said: list[str]) -> None:
    assert memory.smaller(TrainSpec(model="tiny", **changed)) == said
