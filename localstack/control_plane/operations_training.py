"""Training jobs: creating, describing, listing, stopping, updating, deleting."""

from __future__ import annotations

import copy
from typing import Any

from control_plane import validation
from control_plane.faults import CAPACITY
from control_plane.listing import page, wanted
from control_plane.operations_tags import new_tags
from control_plane.place import Place
from control_plane.quotas import Usage, quota_name
from control_plane.refusal import Refused, invalid
from control_plane.store import Request, Store, TrainingJob, WarmPool, now
from control_plane.training_rules import instances, refuse_contradictions

Answer = dict[str, Any]
_POOL_MATCH = ("RoleArn", "VpcConfig", "EnableInterContainerTrafficEncryption", "EnableNetworkIsolation")  # what a job must share
_POOL_MATCH_RESOURCES = ("InstanceType", "InstanceCount", "VolumeSizeInGB", "VolumeKmsKeyId")  # to take another's warm pool
_NO_INSTANCES = (
    "The account-level service limit '{name}' is {limit:.0f} Instances, with current utilization of {used} Instances and a request delta of"
    " {delta} Instances. Please use AWS Service Quotas to request an increase for this quota. If AWS Service Quotas is not available,"
    " contact AWS support to request an increase for this quota."
)


def create_training_job(request: Request, place: Place) -> Answer:
    """Starts a job, or ends it at once where its instances are not to be had (a capacity fault)."""
    store = place.store
    refuse_contradictions(request, store.account)
    tags = new_tags(request.get("Tags", []))
    if place.inputs is not None:
        place.inputs.refuse_empty(request)
    with store.lock:
        if (arn := store.arn("training-job", request["TrainingJobName"])) in store.tags:
            raise Refused(
                "ResourceInUse",
                "Training job names must be unique within an AWS account and region, and a training job with this name already exists"
                f" ({arn})",
            )
        pool = _matching_pool(request, store)
        _refuse_over_quota(request, store, pool)
        granted = _has_room_for_pool(request, store, pool)
        job = store.add_job(request, tags)
        job.pool_granted = granted
        if pool is not None and pool.warm_pool is not None:
            pool.warm_pool.reused_by, pool.warm_pool.ended = job.name, now()
    shortage = place.faults.take_capacity(set(instances(request)))
    if shortage is not None and not shortage.hang:
        job.finish("Failed", failure_reason=CAPACITY)
        return {"TrainingJobArn": job.arn}
    job.shortage = shortage.hang if shortage is not None else 0.0
    if place.training is not None:
        place.training.start(job)
    return {"TrainingJobArn": job.arn}


def describe_training_job(request: Request, place: Place) -> Answer:
    return description(_find(request, place.store))


def stop_training_job(request: Request, place: Place) -> Answer:
    job = _find(request, place.store)
    with job.lock:
        if job.status != "InProgress":
            raise invalid(f"The request was rejected because the training job is in status {job.status}.")
        job.stop()
    return {}


def update_training_job(request: Request, place: Place) -> Answer:
    """Only how long the warm pool is kept can be changed here."""
    job = _find(request, place.store)
    if set(request) != {"TrainingJobName", "ResourceConfig"}:
        raise invalid("This control plane updates ResourceConfig.KeepAlivePeriodInSeconds of a training job, and nothing else.")
    seconds = request["ResourceConfig"]["KeepAlivePeriodInSeconds"]
    with job.lock:
        pool, at = job.warm_pool, now()
        if not job.keep_alive or (pool is not None and pool.status(at) != "Available"):
            raise invalid(f"The training job {job.name} has no warm pool that could be updated.")
        if pool is not None and seconds < (at - pool.since).total_seconds():
            pool.ended = at
        job.keep_alive, job.modified = seconds, at
        if pool is not None:
            pool.keep_alive = seconds
    return {"TrainingJobArn": job.arn}


def delete_training_job(request: Request, place: Place) -> Answer:
    """Only a job that is over and keeps no warm pool. Its name is free afterwards."""
    store = place.store
    job = _find(request, store, missing=Refused("ResourceNotFound", "Requested resource not found."))
    with store.lock, job.lock:
        if not job.ended.is_set():
            raise Refused("ResourceInUse", f"The training job is in status {job.status}; only a job that has ended can be deleted.")
        if job.warm_pool is not None and job.warm_pool.status(now()) == "Available":
            raise Refused("ResourceInUse", "The training job retains an Available warm pool; only a job without one can be deleted.")
        store.jobs.pop(job.name, None)
        store.tags.pop(job.arn, None)
    return {}


def list_training_jobs(request: Request, place: Place) -> Answer:
    with place.store.lock:
        jobs = list(place.store.jobs.values())
    first = "StatusEquals" in request and "MaxResults" in request  # then the newest are taken first, and asked for their status afterwards
    filters = {name: value for name, value in request.items() if not (first and name == "StatusEquals")}
    rows = [each for each in map(_summary, jobs) if wanted(each, filters, "TrainingJobName", "TrainingJobStatus")]
    if "WarmPoolStatusEquals" in request:
        rows = [each for each in rows if (each["WarmPoolStatus"] or {}).get("Status") == request["WarmPoolStatusEquals"]]
    if "TrainingPlanArnEquals" in request:
        rows = []  # no job here runs on a training plan
    by = {"Name": "TrainingJobName", "Status": "TrainingJobStatus"}.get(request.get("SortBy", ""), "CreationTime")
    descending = request.get("SortOrder") == "Descending"
    if first:
        shown, token = page(rows, request, lambda row: row["CreationTime"], lambda row: str(row["TrainingJobName"]), descending=True)
        shown = [each for each in shown if each["TrainingJobStatus"] == request["StatusEquals"]]
        shown.sort(key=lambda row: (row[by], row["TrainingJobName"]), reverse=descending)
    else:
        shown, token = page(rows, request, lambda row: row[by], lambda row: str(row["TrainingJobName"]), descending=descending)
    return {"TrainingJobSummaries": shown, "NextToken": token}


def description(job: TrainingJob) -> Answer:
    """What DescribeTrainingJob says of a job: its request with what SageMaker fills in, and what became of it."""
    with job.lock:
        answer = _as_requested(job)
        answer |= {
            "TrainingJobName": job.name,
            "TrainingJobArn": job.arn,
            "ModelArtifacts": {"S3ModelArtifacts": job.artifacts_uri or planned_artifacts(job.request)},
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
            "FailureReason": job.failure_reason or None,
            "CreationTime": job.created,
            "LastModifiedTime": job.modified,
            "TrainingStartTime": job.training_started,
            "TrainingEndTime": job.training_ended,
            "TrainingTimeInSeconds": job.training_seconds,
            "BillableTimeInSeconds": job.billable_seconds,
            "WarmPoolStatus": _warm_pool(job),
            "SecondaryStatusTransitions": [
                {"Status": each.status, "StartTime": each.start, "EndTime": each.end, "StatusMessage": each.message}
                for each in job.transitions
            ],
            "FinalMetricDataList": [
                {"MetricName": each.name, "Value": each.value, "Timestamp": each.at} for each in job.metrics.values()
            ] or None,
        }  # fmt: skip
    return {name: value for name, value in answer.items() if value is not None}


def planned_artifacts(request: Request) -> str:
    """Where a job's model goes: an object, or with CompressionType NONE a prefix."""
    output = request["OutputDataConfig"]
    name = "model/" if output.get("CompressionType") == "NONE" else "model.tar.gz"
    return f"{output['S3OutputPath'].rstrip('/')}/{request['TrainingJobName']}/output/{name}"


def _as_requested(job: TrainingJob) -> Answer:
    """The request's members that the answer repeats, with the service's defaults."""
    shape = validation.operation("sagemaker", "DescribeTrainingJob").output_shape
    answer = copy.deepcopy({name: value for name, value in job.request.items() if name in shape.members})
    for flag in ("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining"):
        answer.setdefault(flag, False)
    answer["AlgorithmSpecification"].setdefault("EnableSageMakerMetricsTimeSeries", False)
    answer["OutputDataConfig"] = {"KmsKeyId": "", "CompressionType": "GZIP"} | answer["OutputDataConfig"]
    answer.setdefault("StoppingCondition", {}).setdefault("MaxRuntimeInSeconds", 86400)
    answer.setdefault("ProfilingStatus", "Disabled")
    for channel in answer.get("InputDataConfig", []):
        channel.setdefault("CompressionType", "None")
        channel.setdefault("RecordWrapperType", "None")
        if s3 := channel["DataSource"].get("S3DataSource"):
            s3.setdefault("S3DataDistributionType", "FullyReplicated")
    if "CheckpointConfig" in answer:
        answer["CheckpointConfig"].setdefault("LocalPath", "/opt/ml/checkpoints")
    if job.keep_alive:
        answer["ResourceConfig"]["KeepAlivePeriodInSeconds"] = job.keep_alive
    return answer


def _summary(job: TrainingJob) -> Answer:
    with job.lock:
        return {
            "TrainingJobName": job.name,
            "TrainingJobArn": job.arn,
            "CreationTime": job.created,
            "TrainingEndTime": job.training_ended,
            "LastModifiedTime": job.modified,
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
            "WarmPoolStatus": _warm_pool(job),
        }


def _warm_pool(job: TrainingJob) -> Answer | None:
    pool: WarmPool | None = job.warm_pool
    if pool is None:
        return {"Status": "InUse"} if job.keep_alive and not job.ended.is_set() else None
    at = now()
    answer: Answer = {"Status": pool.status(at), "ResourceRetainedBillableTimeInSeconds": pool.kept_seconds(at)}
    return answer | ({"ReusedByJob": pool.reused_by} if pool.reused_by else {})


def _find(request: Request, store: Store, missing: Refused | None = None) -> TrainingJob:
    with store.lock:
        job = store.jobs.get(request["TrainingJobName"])
    if job is None:
        raise missing or invalid("Requested resource not found.")
    return job


def _matching_pool(request: Request, store: Store) -> TrainingJob | None:
    """The oldest job whose warm pool the request takes: same role, network and instances."""
    for job in store.jobs.values():
        pool, resources = job.warm_pool, job.request["ResourceConfig"]
        alike = all(job.request.get(name) == request.get(name) for name in _POOL_MATCH)
        alike = alike and all(resources.get(name) == request["ResourceConfig"].get(name) for name in _POOL_MATCH_RESOURCES)
        if alike and not request.get("EnableManagedSpotTraining") and pool is not None and pool.status(now()) == "Available":
            return job
    return None


def _refuse_over_quota(request: Request, store: Store, pool: TrainingJob | None) -> None:
    """Raises ResourceLimitExceeded for the first quota that the job would exceed; the instances of `pool`, if it takes one, are its own."""
    usage: Usage = "spot training job" if request.get("EnableManagedSpotTraining") else "training job"
    for instance_type, delta in instances(request).items():
        refuse_over_quota(store, quota_name(instance_type, usage), used(store, instance_type, usage, without=pool), delta)


def _has_room_for_pool(request: Request, store: Store, pool: TrainingJob | None) -> bool:
    """Without room in the quota a job runs, but keeps no warm pool (developer guide, warm pool resource limits)."""
    return all(
        used(store, instance_type, "training warm pool", without=pool) + delta
        <= store.quotas.get(quota_name(instance_type, "training warm pool"))
        for instance_type, delta in instances(request).items()
    )


def used(store: Store, instance_type: str, usage: Usage, without: TrainingJob | None = None) -> int:
    """Instances of a type that training takes now: by jobs that are not over, and by warm pools, which count as training as well."""
    total, at = 0, now()
    for job in store.jobs.values():
        kept = job.warm_pool is not None and job.warm_pool.status(at) == "Available"
        if usage == "training warm pool":
            counts = kept or (bool(job.keep_alive) and job.pool_granted and not job.ended.is_set())
        else:
            counts = job.spot == (usage == "spot training job") and (kept or not job.ended.is_set())
        total += instances(job.request).get(instance_type, 0) if counts and job is not without else 0
    return total


def refuse_over_quota(store: Store, name: str, used: int, delta: int) -> None:
    """Raises ResourceLimitExceeded in the service's words."""
    limit = store.quotas.get(name)
    if used + delta > limit:
        raise Refused("ResourceLimitExceeded", _NO_INSTANCES.format(name=name, limit=limit, used=used, delta=delta))
