"""What tests share: a tiny real model, data prepared from it, and runs that keep to one thread and to the test's own folders."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

# A shell's background jobs ignore the one, what nohup starts the other, and so would all that the tests start. Handlers are not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

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
    "support.kernel_paths",
]


# These share the Docker engine: some count what is in it, or end it.
ENGINE_FILES = {
    *(f"tests/contract/test_docker{part}.py" for part in ("", "_endpoint", "_faults", "_kills", "_nodes")),
    *("tests/contract/test_sagemaker.py", "tests/contract/test_sagemaker_faults.py"),
    *(f"tests/control_plane/test_{part}.py" for part in ("cloud", "hosting", "lost_engines", "outputs", "training", "training_ends")),
    *(f"tests/e2e/test_{part}.py" for part in ("images", "image_prune", "serve_images", "readme", "sagemaker_sdk")),
    *("tests/unit/test_doctor.py", "tests/unit/test_dry_run.py"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two lanes for `pytest -n 2`: the files of the Docker engine one after the other, begun at once, and all others; no file is split."""
    from xdist.scheduler import LoadFileScheduling

    class Lanes(LoadFileScheduling):  # xdist's own groups do not work with pytest 9.2, whose items have no _nodeid
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engine" if file in ENGINE_FILES else file

    return Lanes(config, log)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument and number: gzip writes the second into them, and two workers must name a test alike."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {item: item.nodeid.partition("::")[0] for item in items}
    for item, file in files.items():
        if file not in ENGINE_FILES and "base_image" in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{file} uses the Docker engine: add it to ENGINE_FILES in tests/conftest.py")
    items.sort(key=lambda item: files[item] not in ENGINE_FILES)


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
