"""Inference components: models that are put on an endpoint's instances in copies, none at the least."""

from __future__ import annotations

from typing import Any

from control_plane.listing import page, wanted
from control_plane.operations_hosting import existing_endpoint, existing_model
from control_plane.operations_tags import new_tags
from control_plane.place import Place
from control_plane.refusal import Refused, invalid
from control_plane.store import Component, EndpointConfig, Request, Store

NO_COPIES = (
    "Inference Component has no capacity to process this request. ApplicationAutoScaling may be in-progress (if configured) or try to "
    "increase the capacity by invoking UpdateInferenceComponentRuntimeConfig API."
)


def create_inference_component(request: Request, place: Place) -> dict[str, Any]:
    """Of a model that CreateModel made; several copies are one container."""
    store, name, specification = place.store, request["InferenceComponentName"], request.get("Specification", {})
    if "Specifications" in request or "BaseInferenceComponentName" in specification or "Container" in specification:
        raise invalid("Only components with one Specification that has a ModelName are emulated by this control plane.")
    for needed in ("ModelName", "ComputeResourceRequirements"):
        if needed not in specification:
            raise invalid(f"{needed} is required in the Specification of an inference component.")
    if "RuntimeConfig" not in request or "VariantName" not in request:
        raise invalid("VariantName and RuntimeConfig are required for an inference component that has no base.")
    arn, tags = store.arn("inference-component", name), new_tags(request.get("Tags", []))
    with store.lock:
        endpoint = existing_endpoint(request["EndpointName"], store)
        if endpoint.status != "InService":
            raise invalid(f'Cannot create an inference component on endpoint "{endpoint.arn}", which is {endpoint.status}.')
        variants = [each for each in endpoint.config.variants if each["VariantName"] == request["VariantName"]]
        if not variants or "ModelName" in variants[0]:
            raise invalid(f"Variant {request['VariantName']} of endpoint {endpoint.name} takes no inference components.")
        model = existing_model(specification["ModelName"], store)
        if arn in store.tags:
            raise invalid(f'Cannot create already existing inference component "{arn}".')
        starts = {"VariantName": request["VariantName"], **specification.get("StartupParameters", {})}
        config = EndpointConfig(endpoint.config.name, endpoint.config.arn, {"ProductionVariants": [starts]})
        component = Component(name, arn, config, endpoint, request, model)
        store.components[name] = component
        store.tags[arn] = tags
    _run(component, place)
    return {"InferenceComponentArn": arn}


def _run(component: Component, place: Place) -> None:
    if not component.copies:
        component.move("InService")
    elif place.hosting is not None:
        place.hosting.start(component, component.model, component.config)


def describe_inference_component(request: Request, place: Place) -> dict[str, Any]:
    component = _component(request["InferenceComponentName"], place.store)
    with component.lock:
        return {
            **_summary(component),
            "FailureReason": component.failure_reason or None,
            "Specification": component.request["Specification"],
            "RuntimeConfig": {
                "DesiredCopyCount": component.copies,
                "CurrentCopyCount": component.copies if component.status == "InService" else 0,
            },
        }


def list_inference_components(request: Request, place: Place) -> dict[str, Any]:
    with place.store.lock:
        rows = [_summary(each) for each in place.store.components.values()]
    rows = [row for row in rows if wanted(row, request, "InferenceComponentName", "InferenceComponentStatus")]
    rows = [row for row in rows if request.get("EndpointNameEquals", row["EndpointName"]) == row["EndpointName"]]
    shown, token = page(rows, request, lambda row: row["CreationTime"], lambda row: str(row["InferenceComponentName"]), descending=True)
    return {"InferenceComponents": shown, "NextToken": token}


def _summary(component: Component) -> dict[str, Any]:
    return {
        "InferenceComponentName": component.name,
        "InferenceComponentArn": component.arn,
        "EndpointName": component.endpoint.name,
        "EndpointArn": component.endpoint.arn,
        "VariantName": component.request["VariantName"],
        "CreationTime": component.created,
        "LastModifiedTime": component.modified,
        "InferenceComponentStatus": component.status,
    }


def update_inference_component_runtime_config(request: Request, place: Place) -> dict[str, Any]:
    """Another number of copies: none ends the container, one starts it."""
    component = _component(request["InferenceComponentName"], place.store)
    with component.lock:
        if component.status != "InService":
            raise invalid(f'Cannot update inference component "{component.arn}", which is {component.status}.')
        was, component.copies = component.copies, request["DesiredRuntimeConfig"]["CopyCount"]
        if bool(was) == bool(component.copies):
            return {"InferenceComponentArn": component.arn}
        component.update(component.config)
    if component.copies or place.hosting is None:
        _run(component, place)
    else:
        place.hosting.stop(component, lambda: component.move("InService"))
    return {"InferenceComponentArn": component.arn}


def delete_inference_component(request: Request, place: Place) -> dict[str, Any]:
    store = place.store
    component = _component(request["InferenceComponentName"], store)
    with component.lock:
        if component.status in ("Creating", "Updating", "Deleting"):
            raise invalid(f'Cannot update in-progress inference component "{component.arn}".')
        component.move("Deleting")

    def gone() -> None:
        with store.lock:
            store.components.pop(component.name, None)
            store.tags.pop(component.arn, None)
            store.drop_targets(f"inference-component/{component.name}")

    if place.hosting is None:
        gone()
    else:
        place.hosting.stop(component, gone)
    return {}


def _component(name: str, store: Store) -> Component:
    with store.lock:
        if name not in store.components:
            raise invalid(f'Could not find inference component "{store.arn("inference-component", name)}".')
        return store.components[name]


def serving_component(name: str, endpoint_name: str, store: Store) -> Component:
    """The component that an invocation reaches. Raises Refused (ValidationError) for one that is not there, or has no copy."""
    with store.lock:
        component = store.components.get(name)
    if component is None or component.endpoint.name != endpoint_name:
        raise Refused("ValidationError", f"Inference Component {name} not found on endpoint {endpoint_name}.")
    if component.status != "InService" or not component.copies:  # another number of copies than none changes nothing here
        raise Refused("ValidationError", NO_COPIES)
    return component
