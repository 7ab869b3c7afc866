"""Application Auto Scaling, for endpoints' variants and inference components: targets and policies are kept; nothing is scaled.

Source: Application Auto Scaling API reference; "Automatic scaling of Amazon SageMaker AI models" and "Scale an endpoint to zero instances",
SageMaker AI developer guide. Deleting an endpoint or a component takes its targets with it, as SageMaker's does.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from control_plane.listing import page
from control_plane.operations_hosting import existing_endpoint
from control_plane.place import Place
from control_plane.refusal import Refused, invalid
from control_plane.store import Request, ScalableTarget, Store, TargetKey, now

_KINDS = {
    "sagemaker:variant:DesiredInstanceCount": re.compile(r"endpoint/([^/]+)/variant/([^/]+)"),
    "sagemaker:inference-component:DesiredCopyCount": re.compile(r"inference-component/([^/]+)"),
}
_LINKED = "aws-service-role/sagemaker.application-autoscaling.amazonaws.com/AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"


def register_scalable_target(request: Request, place: Place) -> dict[str, Any]:
    """A target that is there already gets the limits that are given anew."""
    store, key = place.store, _key(request)
    with store.lock:
        _refuse_absent(key, store)
        target = store.targets.get(key)
        if target is None:
            if "MinCapacity" not in request or "MaxCapacity" not in request:
                raise invalid("Both MinCapacity and MaxCapacity are required to register a new scalable target.")
            arn = f"arn:aws:application-autoscaling:{store.region}:{store.account}:scalable-target/{uuid.uuid4().hex[:28]}"
            target = ScalableTarget(arn)
        low, high = request.get("MinCapacity", target.low), request.get("MaxCapacity", target.high)
        if low > high:
            raise invalid("Maximum capacity cannot be less than minimum capacity")
        if low < 1 and key[0].startswith("sagemaker:variant"):
            raise invalid("Minimum capacity of a variant cannot be less than 1: only inference components scale to zero.")
        target.low, target.high = low, high
        store.targets[key] = target
    return {"ScalableTargetARN": target.arn}


def deregister_scalable_target(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        _target(request, place.store)
        del place.store.targets[_key(request)]
    return {}


def describe_scalable_targets(request: Request, place: Place) -> dict[str, Any]:
    store = place.store
    with store.lock:
        rows: list[dict[str, Any]] = [
            {
                "ServiceNamespace": "sagemaker",
                "ResourceId": resource,
                "ScalableDimension": dimension,
                "MinCapacity": target.low,
                "MaxCapacity": target.high,
                "RoleARN": f"arn:aws:iam::{store.account}:role/{_LINKED}",
                "CreationTime": target.created,
                "ScalableTargetARN": target.arn,
            }
            for (dimension, resource), target in store.targets.items()
            if resource in request.get("ResourceIds", [resource]) and request.get("ScalableDimension", dimension) == dimension
        ]
    shown, token = page(rows, {"MaxResults": 50} | request, lambda row: row["CreationTime"], lambda row: row["ResourceId"], descending=True)
    return {"ScalableTargets": shown, "NextToken": token}


def put_scaling_policy(request: Request, place: Place) -> dict[str, Any]:
    """A policy of the same name is replaced. No alarms are made of target tracking."""
    store, kind = place.store, request.get("PolicyType", "StepScaling")
    if f"{kind}PolicyConfiguration" not in request:
        raise invalid(f"{kind}PolicyConfiguration is required for a policy of type {kind}.")
    with store.lock:
        policies = _target(request, store).policies
        old = policies.get(request["PolicyName"], {})
        where = f"resource/sagemaker/{request['ResourceId']}:policyName/{request['PolicyName']}"
        arn = old.get("PolicyARN") or f"arn:aws:autoscaling:{store.region}:{store.account}:scalingPolicy:{uuid.uuid4()}:{where}"
        policies[request["PolicyName"]] = {"PolicyType": kind, **request, "PolicyARN": arn, "CreationTime": old.get("CreationTime", now())}
    return {"PolicyARN": arn, "Alarms": []}


def describe_scaling_policies(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        rows = [
            policy
            for (dimension, resource), target in place.store.targets.items()
            if request.get("ResourceId", resource) == resource and request.get("ScalableDimension", dimension) == dimension
            for policy in target.policies.values()
            if policy["PolicyName"] in request.get("PolicyNames", [policy["PolicyName"]])
        ]
    shown, token = page(rows, {"MaxResults": 10} | request, lambda row: row["CreationTime"], lambda row: row["PolicyARN"], descending=True)
    return {"ScalingPolicies": shown, "NextToken": token}


def delete_scaling_policy(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        policies = _target(request, place.store).policies
        if policies.pop(request["PolicyName"], None) is None:
            raise _absent("scaling policy", request)
    return {}


def _key(request: Request) -> TargetKey:
    if request["ServiceNamespace"] != "sagemaker" or request["ScalableDimension"] not in _KINDS:
        raise invalid("Only variants and inference components of SageMaker are scalable targets of this control plane.")
    return request["ScalableDimension"], request["ResourceId"]


def _target(request: Request, store: Store) -> ScalableTarget:
    if (target := store.targets.get(_key(request))) is None:
        raise _absent("scalable target", request)
    return target


def _absent(what: str, request: Request) -> Refused:
    found = f"resource ID: {request['ResourceId']}, scalable dimension: {request['ScalableDimension']}"
    return Refused("ObjectNotFoundException", f"No {what} found for service namespace: sagemaker, {found}")


def _refuse_absent(key: TargetKey, store: Store) -> None:
    dimension, resource = key
    parts = _KINDS[dimension].fullmatch(resource)
    if parts is None:
        raise invalid(f"Unsupported service namespace, resource type or scalable dimension: {resource}")
    if "component" in dimension:
        if parts[1] not in store.components:
            raise invalid(f'Could not find inference component "{store.arn("inference-component", parts[1])}".')
        return
    variants = [each["VariantName"] for each in existing_endpoint(parts[1], store).config.variants]
    if parts[2] not in variants:
        raise invalid(f"SageMaker endpoint variant not found: {resource}")
