"""A SageMaker control plane for one machine: what unmodified boto3 asks of SageMaker, its runtime and Service Quotas, answered over HTTP.

    with ControlPlane(aws_url="http://127.0.0.1:4566", runner="docker", settings=Settings(grace=5)) as plane:
        boto3.client("sagemaker", endpoint_url=plane.url, ...)

It needs boto3 and docker (the Python packages), and nothing else but Python's own library.
"""

from control_plane.runner import Settings
from control_plane.server import ControlPlane

__all__ = ["ControlPlane", "Settings"]
