"""What the tests of interruptions share: a run that nothing interrupted, to which interrupted ones are compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.interrupted import OPTIONS
from support.job_tree import make_job, run, train_here
from trimtab.layout import JobDir


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> JobDir:
    """A job that ran to its end; what it was before lies in `before`."""
    job = make_job(tmp_path_factory.mktemp("straight") / "job", tiny_model, **OPTIONS)
    run(job, "prepare")
    shutil.copytree(job.root / "input", job.root / "before" / "input", symlinks=True)
    train_here(job)
    return job
