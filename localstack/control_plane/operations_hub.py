"""What JumpStart's public hub says of a model, from a folder of this machine: `<folder>/<model id>.json` is a HubContentDocument."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from control_plane.place import Place
from control_plane.refusal import Refused
from control_plane.store import Request

PUBLIC = "SageMakerPublicHub"


def describe_hub_content(request: Request, place: Place) -> dict[str, Any]:
    """Only models of the public hub, in the one version that is there."""
    hub, name = request["HubName"].rpartition("/")[2], request["HubContentName"]
    path = None if place.hub is None else place.hub / f"{name}.json"
    if hub != PUBLIC or request["HubContentType"] != "Model" or path is None or not path.is_file():
        raise Refused("ResourceNotFound", f"Hub content {request['HubContentType']}/{name} does not exist in hub {hub}.")
    region, version = place.store.region, request.get("HubContentVersion", "1.0.0")
    where = f"arn:aws:sagemaker:{region}:aws"
    return {
        "HubName": PUBLIC,
        "HubArn": f"{where}:hub/{PUBLIC}",
        "HubContentName": name,
        "HubContentArn": f"{where}:hub-content/{PUBLIC}/Model/{name}/{version}",
        "HubContentVersion": version,
        "HubContentType": "Model",
        "DocumentSchemaVersion": "2.3.0",
        "HubContentDocument": path.read_text(encoding="utf-8").strip().replace("\n", ""),
        "HubContentStatus": "Available",
        "CreationTime": datetime.fromtimestamp(int(path.stat().st_mtime), UTC),
    }
