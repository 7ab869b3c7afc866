"""Service Quotas, for SageMaker's instances."""

from __future__ import annotations

from typing import Any

from control_plane import validation
from control_plane.listing import page
from control_plane.place import Place
from control_plane.quotas import SERVICE, Quota, quota_code
from control_plane.refusal import Refused
from control_plane.store import Request, Store


def get_service_quota(request: Request, place: Place) -> dict[str, Any]:
    found = [each for each in _table(request, place.store) if quota_code(each.name) == request["QuotaCode"]]
    if not found:
        raise Refused("NoSuchResourceException", "The request failed because the specified service quota does not exist.")
    return {"Quota": found[0].answer(place.store.account, place.store.region)}


def list_service_quotas(request: Request, place: Place) -> dict[str, Any]:
    store = place.store
    rows = [each for each in _table(request, store) if request.get("QuotaCode") in (None, quota_code(each.name))]
    request = {"MaxResults": 100} | request
    shown, token = page(rows, request, lambda row: row.name, lambda row: row.name, descending=False)
    return {"Quotas": [each.answer(store.account, store.region) for each in shown], "NextToken": token}


def _table(request: Request, store: Store) -> list[Quota]:
    if request["ServiceCode"] != SERVICE:
        raise Refused(
            "NoSuchResourceException", f"The request failed because the specified service does not exist: {request['ServiceCode']}"
        )
    training, endpoint = (validation.enum("sagemaker", name) for name in ("TrainingInstanceType", "ProductionVariantInstanceType"))
    return store.quotas.table(training, endpoint)
