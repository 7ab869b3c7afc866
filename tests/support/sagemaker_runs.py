"""Clients of the sagemaker backend for tests, against this session's own AWS, and jobs for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contract.backend_contract import until
from trimtab.aws import lives
from trimtab.backends.sagemaker import SageMakerBackend

REGISTRY = "000000000000.dkr.ecr.us-east-1.amazonaws.com"
ROLE = "SageMakerExecutionRole"


@pytest.fixture(scope="session")
def image(xeon_image: str) -> str:
    """The Xeon image as a training job names it."""
    return f"{REGISTRY}/{xeon_image}"


@pytest.fixture
def place(amazon, image, tmp_path) -> Iterator[SageMakerBackend]:
    """A client of its own."""
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2)
    yield backend
    backend.aws.close()


@pytest.fixture
def quick(amazon, script_image, tmp_path, monkeypatch) -> Iterator[SageMakerBackend]:
    """For what is about a job's beginning and not its work: its image finds no script in its channels, and ends at once."""
    monkeypatch.setattr(lives, "SETTLING", 0.5)  # no last word will come
    backend = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/{script_image}", home=tmp_path / "home", poll_seconds=0.2)
    yield backend
    backend.aws.close()


@pytest.fixture
def no_fault_stays(control_plane) -> Iterator[None]:
    yield
    control_plane.faults.clear()


@pytest.fixture
def six_steps(small_job, staged):
    """The small job, staged."""
    return small_job.model_copy(update={"train": staged.train})


@pytest.fixture
def sixty_steps(six_steps):
    """Sixty steps, with a checkpoint every 5."""
    train = six_steps.train.model_copy(update={"max_steps": 60, "epochs": 60, "save_every_steps": 5})
    return six_steps.model_copy(update={"train": train})


def until_step(backend, handle, number):
    def there() -> bool:
        status = backend.status(handle)
        assert not status.done, status.reason
        return status.step is not None and status.step.step >= number

    until(there, f"step {number} of {handle}")
