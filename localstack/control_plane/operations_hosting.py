"""Models, endpoint configurations and endpoints."""

from __future__ import annotations

import copy
from typing import Any

from control_plane.listing import page, wanted
from control_plane.operations_tags import new_tags
from control_plane.operations_training import refuse_over_quota
from control_plane.place import Place
from control_plane.quotas import quota_name
from control_plane.refusal import Refused, invalid
from control_plane.store import Endpoint, EndpointConfig, Model, Request, Store

Answer = dict[str, Any]
_BUSY = ("Creating", "Updating", "Deleting")
_NO_CAPACITY = (
    "Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error. Please retry using a different ML "
    "instance type or after some time."
)


def create_model(request: Request, place: Place) -> Answer:
    store = place.store
    _refuse_model(request, store.account)
    if place.inputs is not None:
        for each in _containers(request):
            place.inputs.refuse_absent_model(each)
    tags, arn = new_tags(request.get("Tags", [])), store.arn("model", request["ModelName"])
    with store.lock:
        if arn in store.tags:
            raise invalid(f'Cannot create already existing model "{arn}".')
        store.models[request["ModelName"]] = Model(request["ModelName"], arn, request)
        store.tags[arn] = tags
    return {"ModelArn": arn}


def _containers(request: Request) -> list[Request]:
    return request.get("Containers") or ([request["PrimaryContainer"]] if "PrimaryContainer" in request else [])


def _refuse_model(request: Request, account: str) -> None:
    containers = _containers(request)
    if not containers or ("PrimaryContainer" in request and request.get("Containers")):
        raise invalid("You must specify either PrimaryContainer or Containers, but not both.")
    if "ExecutionRoleArn" not in request:
        raise invalid("ExecutionRoleArn is required.")
    if request["ExecutionRoleArn"].split(":")[4] != account:
        raise invalid("Cross-account pass role is not allowed.")
    for each in containers:
        if "ModelPackageName" in each:
            raise invalid("ModelPackageName is not emulated by this control plane.")
        if "Image" not in each:
            raise invalid("Image is required for a container that has no ModelPackageName.")
        if "ModelDataUrl" in each and "ModelDataSource" in each:
            raise invalid("You cannot specify both ModelDataUrl and ModelDataSource.")
        _refuse_source(each.get("ModelDataSource", {}).get("S3DataSource", {}))


def _refuse_source(source: Request) -> None:
    """The rules of S3ModelDataSource in the API reference."""
    for name in ("HubAccessConfig", "ManifestS3Uri", "ManifestEtag"):
        if name in source:
            raise invalid(f"{name} is not emulated by this control plane.")
    if source.get("S3DataType") == "S3Prefix":
        if not source["S3Uri"].endswith("/"):
            raise invalid(f"Invalid S3Uri {source['S3Uri']}: a key name prefix (S3Prefix) must end with a forward slash (/).")
        if source["CompressionType"] == "Gzip":
            raise invalid("CompressionType Gzip needs S3DataType S3Object.")


def describe_model(request: Request, place: Place) -> Answer:
    model = existing_model(request["ModelName"], place.store)
    answer = {name: value for name, value in copy.deepcopy(model.request).items() if name != "Tags"}
    for container in [answer.get("PrimaryContainer"), *answer.get("Containers", [])]:
        if container is not None:
            container.setdefault("Mode", "SingleModel")
            container.setdefault("Environment", {})
    answer.setdefault("EnableNetworkIsolation", False)
    return answer | {"ModelArn": model.arn, "CreationTime": model.created}


def delete_model(request: Request, place: Place) -> Answer:
    """The entry alone; what was made from it stays."""
    with place.store.lock:
        model = existing_model(request["ModelName"], place.store)
        del place.store.models[model.name]
        place.store.tags.pop(model.arn, None)
    return {}


def list_models(request: Request, place: Place) -> Answer:
    with place.store.lock:
        rows = [{"ModelName": each.name, "ModelArn": each.arn, "CreationTime": each.created} for each in place.store.models.values()]
    return _listed(rows, request, "Models", "ModelName")


def create_endpoint_config(request: Request, place: Place) -> Answer:
    store, name = place.store, request["EndpointConfigName"]
    tags, arn = new_tags(request.get("Tags", [])), store.arn("endpoint-config", name)
    variants = request["ProductionVariants"]
    if len({each["VariantName"] for each in variants}) < len(variants):
        raise invalid("Production variant names must be unique within an endpoint configuration.")
    for each in variants:
        _refuse_variant(each)
    without = [each["VariantName"] for each in variants if "ModelName" not in each]
    if without and len(without) < len(variants):
        raise invalid("Variants with a ModelName and variants for inference components cannot be in one endpoint configuration.")
    if without and "ExecutionRoleArn" not in request:
        raise invalid("ExecutionRoleArn is required for an endpoint configuration of inference components.")
    with store.lock:
        for each in variants:
            if "ModelName" in each:
                existing_model(each["ModelName"], store)
        if arn in store.tags:
            raise invalid(f'Cannot create already existing endpoint configuration "{arn}".')
        store.configs[name] = EndpointConfig(name, arn, request)
        store.tags[arn] = tags
    return {"EndpointConfigArn": arn}


def _refuse_variant(variant: Request) -> None:
    name = variant["VariantName"]
    if "ModelName" not in variant and "ServerlessConfig" in variant:
        raise invalid(f"ModelName is required for the variant {name}: inference components have no ServerlessConfig.")
    if "InstancePools" in variant:
        raise invalid("InstancePools are not emulated by this control plane.")
    instances = "InstanceType" in variant and "InitialInstanceCount" in variant
    if "ServerlessConfig" in variant:
        if "InstanceType" in variant or "InitialInstanceCount" in variant:
            raise invalid(f"The variant {name} cannot have both a ServerlessConfig and instances.")
    elif not instances:
        raise invalid(f"InstanceType and InitialInstanceCount, or a ServerlessConfig, are required for the variant {name}.")


def describe_endpoint_config(request: Request, place: Place) -> Answer:
    config = _config(request["EndpointConfigName"], place.store)
    answer = {name: value for name, value in copy.deepcopy(config.request).items() if name != "Tags"}
    for variant in answer["ProductionVariants"]:
        variant.setdefault("InitialVariantWeight", 1.0)
    answer.setdefault("EnableNetworkIsolation", False)
    return answer | {"EndpointConfigArn": config.arn, "CreationTime": config.created}


def delete_endpoint_config(request: Request, place: Place) -> Answer:
    """Also one in use: SageMaker's reference only warns of it. The endpoint goes on with it, but cannot be updated any more."""
    with place.store.lock:
        config = _config(request["EndpointConfigName"], place.store)
        del place.store.configs[config.name]
        place.store.tags.pop(config.arn, None)
    return {}


def list_endpoint_configs(request: Request, place: Place) -> Answer:
    with place.store.lock:
        configs = list(place.store.configs.values())
    rows = [{"EndpointConfigName": each.name, "EndpointConfigArn": each.arn, "CreationTime": each.created} for each in configs]
    return _listed(rows, request, "EndpointConfigs", "EndpointConfigName")


def create_endpoint(request: Request, place: Place) -> Answer:
    store, name = place.store, request["EndpointName"]
    arn, tags = store.arn("endpoint", name), new_tags(request.get("Tags", []))
    with store.lock:
        config = _config(request["EndpointConfigName"], store)
        if arn in store.tags:
            raise invalid(f'Cannot create already existing endpoint "{arn}".')
        models = _models(config, store)
        _refuse_unserved(config, models)
        _refuse_over_quota(config, store)
        shortage = place.faults.take_capacity(set(_instances(config)))
        endpoint = Endpoint(name, arn, config, account=store.account, region=store.region)
        store.endpoints[name] = endpoint
        store.tags[arn] = tags
    if shortage is not None:
        endpoint.fail(_NO_CAPACITY)
    elif not models:  # it begins empty; inference components bring models
        endpoint.move("InService")
    elif place.hosting is not None:
        place.hosting.start(endpoint, models[0], config)
    return {"EndpointArn": arn}


def describe_endpoint(request: Request, place: Place) -> Answer:
    endpoint = existing_endpoint(request["EndpointName"], place.store)
    with endpoint.lock:
        serving = endpoint.status not in ("Creating", "Failed")
        answer: Answer = {
            "EndpointName": endpoint.name,
            "EndpointArn": endpoint.arn,
            "EndpointConfigName": endpoint.config.name,
            "EndpointStatus": endpoint.status,
            "FailureReason": endpoint.failure_reason or None,
            "CreationTime": endpoint.created,
            "LastModifiedTime": endpoint.modified,
            "ProductionVariants": [_variant(each, place.store) for each in endpoint.config.variants] if serving else None,
        }
        if endpoint.wanted is not None:
            answer["PendingDeploymentSummary"] = {
                "EndpointConfigName": endpoint.wanted.name,
                "StartTime": endpoint.modified,
            }
    return {name: value for name, value in answer.items() if value is not None}


def _variant(variant: Request, store: Store) -> Answer:
    weight = variant.get("InitialVariantWeight", 1.0)
    with store.lock:
        model = store.models.get(variant.get("ModelName", ""))
    images = [{"SpecifiedImage": model.container["Image"], "ResolvedImage": model.container["Image"]}] if model is not None else []
    answer = {"VariantName": variant["VariantName"], "DeployedImages": images, "CurrentWeight": weight, "DesiredWeight": weight}
    count = variant["InitialInstanceCount"]
    if "ManagedInstanceScaling" in variant:
        answer["ManagedInstanceScaling"] = variant["ManagedInstanceScaling"]
    return answer | {"CurrentInstanceCount": count, "DesiredInstanceCount": count}


def update_endpoint(request: Request, place: Place) -> Answer:
    store = place.store
    with store.lock:
        endpoint = existing_endpoint(request["EndpointName"], store)
        config = _config(request["EndpointConfigName"], store)
        models = _models(config, store)
        with endpoint.lock:
            if endpoint.status in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.arn}".')
            if endpoint.status == "Failed":
                raise invalid(
                    f'Cannot update failed endpoint "{endpoint.arn}": DeleteEndpoint is the only operation that can be performed on it.'
                )
            _refuse_unserved(config, models)
            if not models:
                raise invalid("An endpoint of inference components is not updated by this control plane.")
            _config(endpoint.config.name, store)  # the one it serves with must still be there, too
            _refuse_over_quota(config, store)
            endpoint.update(config)
    if place.hosting is not None:
        place.hosting.start(endpoint, models[0], config)
    return {"EndpointArn": endpoint.arn}


def delete_endpoint(request: Request, place: Place) -> Answer:
    """The endpoint is `Deleting` until its container is gone; its config and model stay."""
    store = place.store
    with store.lock:
        endpoint = existing_endpoint(request["EndpointName"], store)
        with endpoint.lock:
            if endpoint.status in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.arn}".')
            if held := [each.name for each in store.components.values() if each.endpoint is endpoint]:
                raise invalid(f'Cannot delete endpoint "{endpoint.arn}": it has inference components, such as {held[0]}.')
            endpoint.move("Deleting")

    def gone() -> None:
        with store.lock:
            store.endpoints.pop(endpoint.name, None)
            store.tags.pop(endpoint.arn, None)
            store.drop_targets(f"endpoint/{endpoint.name}")

    if place.hosting is None:
        gone()
    else:
        place.hosting.stop(endpoint, gone)
    return {}


def list_endpoints(request: Request, place: Place) -> Answer:
    with place.store.lock:
        endpoints = list(place.store.endpoints.values())
    rows = [
        {
            "EndpointName": each.name,
            "EndpointArn": each.arn,
            "CreationTime": each.created,
            "LastModifiedTime": each.modified,
            "EndpointStatus": each.status,
        }
        for each in endpoints
    ]
    return _listed(rows, request, "Endpoints", "EndpointName", "EndpointStatus")


def _listed(rows: list[Answer], request: Request, member: str, name: str, status: str = "") -> Answer:
    rows = [each for each in rows if wanted(each, request, name, status)]
    by = {"Name": name, "Status": status}.get(request.get("SortBy", ""), "CreationTime")
    descending = request.get("SortOrder", "Descending") == "Descending"
    shown, token = page(rows, request, lambda row: row[by], lambda row: str(row[name]), descending=descending)
    return {member: shown, "NextToken": token}


def existing_model(name: str, store: Store) -> Model:
    with store.lock:
        if name not in store.models:
            raise invalid(f'Could not find model "{store.arn("model", name)}".')
        return store.models[name]


def _models(config: EndpointConfig, store: Store) -> list[Model]:
    return [existing_model(each["ModelName"], store) for each in config.variants if "ModelName" in each]


def _config(name: str, store: Store) -> EndpointConfig:
    with store.lock:
        if name not in store.configs:
            raise invalid(f'Could not find endpoint configuration "{store.arn("endpoint-config", name)}".')
        return store.configs[name]


def existing_endpoint(name: str, store: Store) -> Endpoint:
    with store.lock:
        if name not in store.endpoints:
            raise invalid(f'Could not find endpoint "{store.arn("endpoint", name)}".')
        return store.endpoints[name]


def _refuse_unserved(config: EndpointConfig, models: list[Model]) -> None:
    """Raises Refused for what can be written down, but not served here."""
    containers = [each for model in models for each in _containers(model.request)]
    unserved = {
        "An endpoint with AsyncInferenceConfig": "AsyncInferenceConfig" in config.request,
        "A variant with ServerlessConfig": any("ServerlessConfig" in each for each in config.variants),
        "A model of several Containers": len(containers) > len(models),
        "A container with Mode MultiModel": any(each.get("Mode") == "MultiModel" for each in containers),
        "A container with AdditionalModelDataSources": any("AdditionalModelDataSources" in each for each in containers),
    }
    if found := [name for name, is_so in unserved.items() if is_so]:
        raise invalid(f"{found[0]} is not served by this control plane.")


def _refuse_over_quota(config: EndpointConfig, store: Store) -> None:
    for instance_type, delta in _instances(config).items():
        taken = sum(
            _instances(each.config).get(instance_type, 0) + (_instances(each.wanted).get(instance_type, 0) if each.wanted else 0)
            for each in store.endpoints.values()
            if each.status != "Failed"
        )
        refuse_over_quota(store, quota_name(instance_type, "endpoint"), taken, delta)


def _instances(config: EndpointConfig) -> dict[str, int]:
    counted: dict[str, int] = {}
    for each in config.variants:
        counted[each["InstanceType"]] = counted.get(each["InstanceType"], 0) + int(each["InitialInstanceCount"])
    return counted


def serving(name: str, store: Store) -> Endpoint:
    """The endpoint that an invocation reaches. Raises Refused (ValidationError) for one that is not there, or not in service."""
    with store.lock:
        endpoint = store.endpoints.get(name)
    if endpoint is None or endpoint.status not in ("InService", "Updating"):
        raise Refused("ValidationError", f"Endpoint {name} of account {store.account} not found.")
    return endpoint
