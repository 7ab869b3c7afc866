"""Every operation that the control plane has, by service and name: a request in, an answer out, or Refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from control_plane import operations_components as components
from control_plane import operations_hosting as hosting
from control_plane import operations_hub, operations_search, validation
from control_plane import operations_quotas as quotas
from control_plane import operations_scaling as scaling
from control_plane import operations_tags as tags
from control_plane import operations_training as training
from control_plane.place import Place
from control_plane.refusal import Refused
from control_plane.store import Request

Operation = Callable[[Request, Place], dict[str, Any]]
OPERATIONS: dict[str, dict[str, Operation]] = {
    "sagemaker": {
        "CreateTrainingJob": training.create_training_job,
        "DescribeTrainingJob": training.describe_training_job,
        "ListTrainingJobs": training.list_training_jobs,
        "StopTrainingJob": training.stop_training_job,
        "UpdateTrainingJob": training.update_training_job,
        "DeleteTrainingJob": training.delete_training_job,
        "Search": operations_search.search,
        "AddTags": tags.add_tags,
        "ListTags": tags.list_tags,
        "DeleteTags": tags.delete_tags,
        "CreateModel": hosting.create_model,
        "DescribeModel": hosting.describe_model,
        "DeleteModel": hosting.delete_model,
        "ListModels": hosting.list_models,
        "CreateEndpointConfig": hosting.create_endpoint_config,
        "DescribeEndpointConfig": hosting.describe_endpoint_config,
        "DeleteEndpointConfig": hosting.delete_endpoint_config,
        "ListEndpointConfigs": hosting.list_endpoint_configs,
        "CreateEndpoint": hosting.create_endpoint,
        "DescribeEndpoint": hosting.describe_endpoint,
        "UpdateEndpoint": hosting.update_endpoint,
        "DeleteEndpoint": hosting.delete_endpoint,
        "ListEndpoints": hosting.list_endpoints,
        "CreateInferenceComponent": components.create_inference_component,
        "DescribeInferenceComponent": components.describe_inference_component,
        "UpdateInferenceComponentRuntimeConfig": components.update_inference_component_runtime_config,
        "DeleteInferenceComponent": components.delete_inference_component,
        "ListInferenceComponents": components.list_inference_components,
        "DescribeHubContent": operations_hub.describe_hub_content,
    },
    "application-autoscaling": {
        "RegisterScalableTarget": scaling.register_scalable_target,
        "DescribeScalableTargets": scaling.describe_scalable_targets,
        "DeregisterScalableTarget": scaling.deregister_scalable_target,
        "PutScalingPolicy": scaling.put_scaling_policy,
        "DescribeScalingPolicies": scaling.describe_scaling_policies,
        "DeleteScalingPolicy": scaling.delete_scaling_policy,
    },
    "service-quotas": {
        "GetServiceQuota": quotas.get_service_quota,
        "ListServiceQuotas": quotas.list_service_quotas,
    },
}


def carry_out(service: str, name: str, document: Any, place: Place) -> Any:
    """The answer's JSON document to a request's. Raises Refused.

    An answer that the service's model does not allow is a fault of this package, and an InternalFailure.
    """
    if name not in OPERATIONS[service]:
        raise Refused("UnknownOperationException", f"The operation {name} is not known to this control plane.")
    model = validation.operation(service, name)
    request = validation.read(model.input_shape, document)
    validation.refuse(model.input_shape, request)
    answer = OPERATIONS[service][name](request, place)
    answer = {member: value for member, value in answer.items() if value is not None}
    if model.output_shape is not None and (wrong := list(validation.violations(model.output_shape, answer))):
        raise Refused("InternalFailure", f"the answer to {name} is not what the model of {service} has: {'; '.join(wrong)}", 500)
    return validation.write(answer)
