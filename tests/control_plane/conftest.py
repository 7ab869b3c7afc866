"""A control plane that runs nothing: the tests move its jobs, as a runner would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from control_plane import ControlPlane
from support.plane import client


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    with ControlPlane(runner=None) as started:
        yield started


@pytest.fixture
def sagemaker(plane: ControlPlane) -> Iterator[Any]:
    with client(plane) as made:
        yield made
