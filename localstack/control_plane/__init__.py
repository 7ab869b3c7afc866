"""A SageMaker control plane for one machine: what unmodified boto3 asks of SageMaker, its runtime and Service Quotas, answered over HTTP.

    with ControlPlane(aws_url="http://127.0.0.1:4566", runner="docker") as plane:
        boto3.client("sagemaker", endpoint_url=plane.url, ...)

Nothing in it imports another package of this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from control_plane.server import ControlPlane

__all__ = ["ControlPlane"]


def __getattr__(name: str) -> Any:
    """The server is loaded when it is asked for, so that a runner can import the store alone."""
    if name != "ControlPlane":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from control_plane.server import ControlPlane

    return ControlPlane
