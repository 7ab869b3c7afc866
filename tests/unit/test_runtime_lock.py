"""One process works in a job's folder; a second one is told who does, in words that mean something where they are read."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from trimtab.errors import TrimtabError
from trimtab_runtime.__main__ import _only_one


def test_who_holds_the_folder_here_is_named_by_its_process(tmp_path: Path) -> None:
    with _only_one(tmp_path), pytest.raises(TrimtabError, match=f"by  kill {os.getpid()}$"), _only_one(tmp_path):
        pass
    with _only_one(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "remedy"), [("1 pid:[4026530000] 2026-11-22 10:00:00 UTC\n", "trimtab stop RUN$"), ("", r"fuser .*\.lock$")]
)
def test_a_process_of_a_container_has_another_number_outside(tmp_path: Path, content: str, remedy: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(content)
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TrimtabError, match=remedy), _only_one(tmp_path):
            pass
