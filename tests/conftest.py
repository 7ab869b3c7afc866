"""What tests share: a tiny real model, data prepared from it, and runs that keep to one thread and to the test's own folders."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support.tiny_model import make_tiny_model
from trimtab.spec import JobSpec, TrainSpec
from trimtab.staging import Staged, stage

# Here, before torch is loaded anywhere: OpenMP reads them then. A model this small gains nothing from more threads, and
# where several compute at once on a shared machine, threads that spin take each other's turn.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

settings.register_profile("shared machine", deadline=None)  # a slow moment of the machine is no failure
settings.load_profile("shared machine")

# a shell's background jobs ignore it, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite(
    "contract.backend_contract", "contract.endpoint_contract", "contract.http_contract", "contract.rough_clients"
)

pytest_plugins = [
    "support.disks",
    "support.engine",
    "support.script_runs",
    "support.cloud",
    "support.training_jobs",
    "support.sagemaker_runs",
    "support.log_groups",
    "support.hosting",
]


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two lanes (`pytest -n 2 --dist loadgroup`): one for the files that share the Docker engine, which go first; no file is split."""
    files = {item: item.nodeid.partition("::")[0] for item in items}
    lane = {files[item]: "engine" for item in items if "base_image" in getattr(item, "fixturenames", ())}
    for item, file in files.items():
        item.add_marker(pytest.mark.xdist_group(lane.get(file, file)))
    items.sort(key=lambda item: files[item] not in lane)


PAGES = Path(__file__).parent / "support" / "pages"

SMALL = {"method": "lora", "lora_rank": 4, "dtype": "float32", "max_seq_len": 128, "questions": 0, "replay": 0, "learning_rate": 1e-3}


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TRIMTAB_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with two million parameters."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def small_job(tiny_model: Path) -> JobSpec:
    """A job of a few seconds: 6 optimiser steps on the tiny model."""
    return JobSpec(train=TrainSpec(model=str(tiny_model), max_steps=6, **SMALL), data=(str(PAGES),))


@pytest.fixture(scope="session")
def staged(small_job: JobSpec) -> Staged:
    """The small job's data and model, prepared by the runtime."""
    return stage(small_job, say=lambda line: None)
