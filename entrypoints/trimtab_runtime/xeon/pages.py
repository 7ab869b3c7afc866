"""Large pages for glibc's heap. The variable that asks for them is read before a program's first line, so the program begins again.

Source: glibc's manual, "Memory Allocation Tunables" (glibc.malloc.hugetlb, since 2.35); the kernel's admin-guide/mm/transhuge.rst.
Imports nothing that takes time: all that is imported before is imported twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COMPUTING = ("generate", "measure", "train", "evaluate", "losses")  # verbs that are worth it


def tunables(mode: str, environ: Mapping[str, str]) -> str | None:
    """What `GLIBC_TUNABLES` should be where the kernel's mode is such as "always [madvise] never"; None: as it is. Pure.

    Where the mode is always the heap has them anyway, where it is never it cannot; another allocator does not read the variable.
    """
    given = environ.get(VARIABLE, "")
    if "[madvise]" not in mode or TUNABLE in given or environ.get("LD_PRELOAD"):
        return None
    return ":".join(filter(None, [given, f"{TUNABLE}=1"]))


def asked(environ: Mapping[str, str]) -> bool:
    """Whether this process was begun with large pages."""
    return f"{TUNABLE}=1" in environ.get(VARIABLE, "")


def begin_again(verbs: Sequence[str]) -> None:
    """Where it is of use, replace this process by itself with large pages: the same number, the same files, the same arguments."""
    if sys.platform != "linux" or verbs[:1] not in [[verb] for verb in COMPUTING]:
        return
    before = os.environ.get(VARIABLE)
    try:
        wanted = tunables(MODE.read_text(encoding="ascii"), os.environ)
        if wanted is not None:
            os.environ[VARIABLE] = wanted
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # no such mode, no such program: it goes on without, and says so
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
