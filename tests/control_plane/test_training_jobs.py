"""Training jobs by boto3: what is taken, what is refused, what is said of them. The tests are the runner."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control_plane import ControlPlane
from support.plane import ACCOUNT, client, job_request, refused

SPOT = {"EnableManagedSpotTraining": True, "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 120}}
KEEP = {"ResourceConfig": {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 2, "VolumeSizeInGB": 30, "KeepAlivePeriodInSeconds": 600}}


def _s3(name: str, **members: Any) -> dict[str, Any]:
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://bucket/data", **members}}}


def test_a_jobs_life_is_described_as_it_goes(plane: ControlPlane, sagemaker: Any) -> None:
    metrics = [{"Name": "loss", "Regex": r"loss=([-+0-9.naife]+)"}, {"Name": "never", "Regex": "never=(.*)"}]
    algorithm = job_request()["AlgorithmSpecification"] | {"MetricDefinitions": metrics}
    arn = sagemaker.create_training_job(**job_request(AlgorithmSpecification=algorithm, InputDataConfig=[_s3("train")]))["TrainingJobArn"]
    assert arn == f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:training-job/job"
    began = sagemaker.describe_training_job(TrainingJobName="job")
    assert (began["TrainingJobStatus"], began["SecondaryStatus"]) == ("InProgress", "Starting")
    assert "TrainingStartTime" not in began
    assert "FinalMetricDataList" not in began
    assert began["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataDistributionType"] == "FullyReplicated"
    assert not began["EnableManagedSpotTraining"]

    job = plane.store.jobs["job"]
    job.move("Starting", "Launching requested ML instances")
    for status in ("Downloading", "Training"):
        job.move(status)
    for line in ("loss=1.5", "loss=nan", "step 2 loss=0.5 of 9", "loss=inf", "no figure"):
        job.observe(line)
    job.move("Uploading")
    job.finish("Completed", artifacts_uri="s3://bucket/runs/job/output/model.tar.gz")
    job.finish("Failed", failure_reason="too late")

    ended = sagemaker.describe_training_job(TrainingJobName="job")
    assert (ended["TrainingJobStatus"], ended["SecondaryStatus"]) == ("Completed", "Completed")
    moves = ended["SecondaryStatusTransitions"]
    assert [each["Status"] for each in moves] == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    assert moves[0]["StatusMessage"] == "Launching requested ML instances"
    assert [each["EndTime"] for each in moves[:-1]] == [each["StartTime"] for each in moves[1:]]
    assert ended["CreationTime"] <= ended["TrainingStartTime"] <= ended["TrainingEndTime"] == ended["LastModifiedTime"]
    assert ended["TrainingTimeInSeconds"] == ended["BillableTimeInSeconds"] == 1
    assert [(each["MetricName"], each["Value"]) for each in ended["FinalMetricDataList"]] == [("loss", 0.5)]
    assert ended["ModelArtifacts"] == {"S3ModelArtifacts": "s3://bucket/runs/job/output/model.tar.gz"}


def test_uncompressed_output_is_a_prefix(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request(OutputDataConfig={"S3OutputPath": "s3://bucket/runs/", "CompressionType": "NONE"}))
    assert (
        sagemaker.describe_training_job(TrainingJobName="job")["ModelArtifacts"]["S3ModelArtifacts"] == "s3://bucket/runs/job/output/model/"
    )


def test_spot_jobs_are_billed_a_share(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request(**SPOT))
    job = plane.store.jobs["job"]
    job.move("Training")
    job.finish("Completed", training_seconds=500)
    told = sagemaker.describe_training_job(TrainingJobName="job")
    assert (told["TrainingTimeInSeconds"], told["BillableTimeInSeconds"]) == (500, 150)


def test_a_failure_keeps_its_first_1024_characters(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request())
    plane.store.jobs["job"].finish("Failed", failure_reason="AlgorithmError: " + "x" * 2000)
    told = sagemaker.describe_training_job(TrainingJobName="job")
    assert told["SecondaryStatus"] == "Failed"
    assert len(told["FailureReason"]) == 1024
    assert "TrainingTimeInSeconds" not in told  # no instance ever was its own


def test_stopping_goes_through_stopping_and_uploading(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request())
    job = plane.store.jobs["job"]
    job.move("Training")
    sagemaker.stop_training_job(TrainingJobName="job")
    assert job.stopping.is_set()
    assert sagemaker.describe_training_job(TrainingJobName="job")["TrainingJobStatus"] == "Stopping"
    with refused("ValidationException", "The request was rejected because the training job is in status Stopping."):
        sagemaker.stop_training_job(TrainingJobName="job")
    job.move("Training")  # a runner that has not seen it yet
    assert job.secondary == "Stopping"
    job.finish("Stopped")
    with refused("ValidationException", "is in status Stopped."):
        sagemaker.stop_training_job(TrainingJobName="job")
    with refused("ValidationException", "Requested resource not found."):
        sagemaker.stop_training_job(TrainingJobName="another")


def test_a_name_is_taken_in_any_case_until_its_job_is_deleted(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request())
    for name in ("job", "JOB"):
        with refused("ResourceInUse", "a training job with this name already exists"):
            sagemaker.create_training_job(**job_request(name))
    with refused("ResourceInUse", "is in status InProgress"):
        sagemaker.delete_training_job(TrainingJobName="job")
    plane.store.jobs["job"].finish("Completed")
    sagemaker.delete_training_job(TrainingJobName="job")
    with refused("ValidationException", "Requested resource not found."):
        sagemaker.describe_training_job(TrainingJobName="job")
    with refused("ResourceNotFound", "Requested resource not found."):
        sagemaker.delete_training_job(TrainingJobName="job")
    sagemaker.create_training_job(**job_request())


def test_of_many_at_once_one_gets_the_name(plane: ControlPlane) -> None:
    outcomes: list[str] = []

    def create() -> None:
        with client(plane) as own:
            try:
                own.create_training_job(**job_request())
                outcomes.append("created")
            except own.exceptions.ResourceInUse:
                outcomes.append("in use")

    threads = [threading.Thread(target=create) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(outcomes) == ["created"] + ["in use"] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RoleArn": "arn:aws:iam::999999999999:role/trainer"}, "Cross-account pass role is not allowed."),
        ({"RoleArn": "arn:aws:iam::000000000000:user/trainer"}, "at 'roleArn' failed to satisfy constraint"),
        ({"EnableManagedSpotTraining": True}, "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to"),
        ({**SPOT, "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 59}}, "Invalid MaxWaitTimeInSeconds."),
        ({"StoppingCondition": {"MaxRuntimeInSeconds": 28 * 86400 + 1}}, "Invalid MaxRuntimeInSeconds."),
        ({"StoppingCondition": None}, "StoppingCondition is required"),
        ({"ResourceConfig": {"InstanceType": "ml.m5.large"}}, "InstanceType and InstanceCount, or InstanceGroups, are required"),
        ({"ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 0}}, "InstanceCount must be at least 1."),
        ({**SPOT, **KEEP}, "KeepAlivePeriodInSeconds is not supported with EnableManagedSpotTraining."),
        ({"AlgorithmSpecification": {"TrainingInputMode": "File"}}, "either AlgorithmName or TrainingImage"),
        ({"AlgorithmSpecification": {"TrainingInputMode": "File", "AlgorithmName": "mine"}}, 'Could not find algorithm "mine".'),
        ({"InputDataConfig": [_s3("train"), _s3("train")]}, "Channel names must be unique: train"),
        ({"InputDataConfig": [_s3("train", AttributeNames=["a"])]}, "AttributeNames can only be specified for S3DataType"),
        ({"InputDataConfig": [{"ChannelName": "train", "DataSource": {}}]}, "Channel train must have exactly one data source."),
        ({"CheckpointConfig": {"S3Uri": "s3://b/c", "LocalPath": "/opt/ml/model"}}, "/opt/ml/model is reserved by SageMaker"),
        ({"CheckpointConfig": {"S3Uri": "s3://b/c", "LocalPath": "/opt/ml"}}, "it must be an absolute path of a folder of its own"),
        ({"CheckpointConfig": {"S3Uri": "s3://b/c", "LocalPath": "checkpoints"}}, "it must be an absolute path"),
        ({"CheckpointConfig": {"S3Uri": "https://b/c"}}, "it must be an S3 URI"),
        ({"EnableNetworkIsolation": True, "RemoteDebugConfig": {"EnableRemoteDebug": True}}, "cannot be enabled with Enable"),
        ({"Tags": [{"Key": "aws:mine", "Value": "1"}]}, "keys that begin with aws: are reserved"),
        ({"Tags": [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]}, "Duplicate tag keys"),
        ({"MlflowConfig": {"MlflowResourceArn": "arn:aws:sagemaker:us-east-1:000000000000:mlflow-app/a"}}, "MlflowConfig is not emulated"),
    ],
)  # fmt: skip
def test_a_request_that_contradicts_itself_is_refused(plane: ControlPlane, sagemaker: Any, changes: dict[str, Any], message: str) -> None:
    with refused("ValidationException", message):
        sagemaker.create_training_job(**job_request(**changes))
    assert plane.store.jobs == {}
    assert [name for name, _ in plane.requests] == ["CreateTrainingJob"]  # it went out: botocore had nothing against it


def test_instances_are_counted_against_the_quotas(plane: ControlPlane, sagemaker: Any) -> None:
    with refused("ResourceLimitExceeded", "'ml.p4d.24xlarge for training job usage' is 0 Instances", "a request delta of 1 Instances"):
        sagemaker.create_training_job(**job_request(ResourceConfig={"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 1}))
    plane.set_quota("ml.m7i.4xlarge for training job usage", 3)
    two = {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 2, "VolumeSizeInGB": 30}
    sagemaker.create_training_job(**job_request("first", ResourceConfig=two))
    with refused("ResourceLimitExceeded", "is 3 Instances, with current utilization of 2 Instances and a request delta of 2 Instances"):
        sagemaker.create_training_job(**job_request("second", ResourceConfig=two))
    sagemaker.create_training_job(**job_request("spot", ResourceConfig=two, **SPOT))  # counts on its own
    plane.store.jobs["first"].finish("Completed")
    sagemaker.create_training_job(**job_request("second", ResourceConfig=two))


def test_a_warm_pool_is_kept_reused_and_ended(plane: ControlPlane, sagemaker: Any) -> None:
    def pool(name: str) -> dict[str, Any]:
        told: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=name).get("WarmPoolStatus", {})
        return told

    def finish(name: str) -> None:
        plane.store.jobs[name].move("Training")
        plane.store.jobs[name].finish("Completed")

    sagemaker.create_training_job(**job_request("unquoted", **KEEP))
    finish("unquoted")
    assert pool("unquoted") == {"Status": "Terminated", "ResourceRetainedBillableTimeInSeconds": 0}

    plane.set_quota("ml.m7i.4xlarge for training warm pool usage", 2)
    plane.set_quota("ml.m7i.4xlarge for training job usage", 2)
    sagemaker.create_training_job(**job_request("first", **KEEP))
    assert pool("first") == {"Status": "InUse"}
    finish("first")
    assert pool("first")["Status"] == "Available"
    with refused("ResourceInUse", "retains an Available warm pool"):
        sagemaker.delete_training_job(TrainingJobName="first")
    with refused("ResourceLimitExceeded", "current utilization of 2 Instances"):  # a pool counts as training
        sagemaker.create_training_job(**job_request("unlike"))
    sagemaker.create_training_job(**job_request("second", **KEEP))
    reused = pool("first")
    assert (reused["Status"], reused["ReusedByJob"]) == ("Reused", "second")
    assert 0 <= reused["ResourceRetainedBillableTimeInSeconds"] < 180  # what this test took
    finish("second")
    listed = sagemaker.list_training_jobs(WarmPoolStatusEquals="Available")["TrainingJobSummaries"]
    assert [each["TrainingJobName"] for each in listed] == ["second"]
    sagemaker.update_training_job(TrainingJobName="second", ResourceConfig={"KeepAlivePeriodInSeconds": 0})
    assert pool("second")["Status"] == "Terminated"
    with refused("ValidationException", "has no warm pool"):
        sagemaker.update_training_job(TrainingJobName="second", ResourceConfig={"KeepAlivePeriodInSeconds": 60})
    sagemaker.create_training_job(**job_request("unlike"))


def test_lists_are_filtered_ordered_and_paged(plane: ControlPlane, sagemaker: Any) -> None:
    began = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=10)  # before job-7 is made
    for at in range(7):
        sagemaker.create_training_job(**job_request(f"job-{at}"))
    plane.store.jobs["job-3"].finish("Failed", failure_reason="AlgorithmError: x")
    plane.store.jobs["job-0"].finish("Completed")

    def names(**asked: Any) -> list[str]:
        pages = sagemaker.get_paginator("list_training_jobs").paginate(**asked)
        return [each["TrainingJobName"] for page in pages for each in page["TrainingJobSummaries"]]

    oldest_first = [f"job-{at}" for at in range(7)]
    assert names() == oldest_first
    assert names(MaxResults=2, SortOrder="Descending") == oldest_first[::-1]
    assert names(SortBy="Name", SortOrder="Ascending", MaxResults=3) == oldest_first
    assert names(StatusEquals="Failed") == ["job-3"]
    assert names(NameContains="B-5") == ["job-5"]
    assert set(names(SortBy="Status")) == set(oldest_first)
    for at in range(7):  # a minute after each other
        plane.store.jobs[f"job-{at}"].created = began + timedelta(minutes=at)
    assert names(CreationTimeAfter=began + timedelta(minutes=3.5)) == ["job-4", "job-5", "job-6"]
    assert names(CreationTimeBefore=began + timedelta(minutes=3.5)) == ["job-0", "job-1", "job-2", "job-3"]
    changed = plane.store.jobs["job-3"].modified
    plane.store.jobs["job-0"].modified = changed + timedelta(minutes=1)
    assert names(LastModifiedTimeAfter=changed + timedelta(seconds=30)) == ["job-0"]
    assert names(LastModifiedTimeBefore=changed - timedelta(hours=1)) == []
    page = sagemaker.list_training_jobs(MaxResults=3, SortOrder="Descending")
    sagemaker.create_training_job(**job_request("job-7"))  # between two pages
    rest = sagemaker.list_training_jobs(MaxResults=10, SortOrder="Descending", NextToken=page["NextToken"])
    assert [each["TrainingJobName"] for each in rest["TrainingJobSummaries"]] == oldest_first[3::-1]
    for token in ("none", "W10="):
        with refused("ValidationException", "pagination token"):
            sagemaker.list_training_jobs(NextToken=token)


def test_tags_are_added_listed_deleted_and_limited(plane: ControlPlane, sagemaker: Any) -> None:
    arn = sagemaker.create_training_job(**job_request(Tags=[{"Key": "a", "Value": "1"}]))["TrainingJobArn"]
    sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "a", "Value": "2"}, {"Key": "b", "Value": ""}])
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "a", "Value": "2"}, {"Key": "b", "Value": ""}]
    sagemaker.delete_tags(ResourceArn=arn, TagKeys=["a", "absent"])
    assert plane.store.jobs["job"].tags == {"b": ""}
    with refused("ResourceLimitExceeded", "at most 50 tags; this one would have 51"):
        sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": f"k{at}", "Value": ""} for at in range(50)])
    assert len(sagemaker.list_tags(ResourceArn=arn)["Tags"]) == 1
    with refused("ValidationException", "Resource not found"):
        sagemaker.list_tags(ResourceArn=arn + "-2")


def test_search_finds_by_tags_and_by_what_is_described(plane: ControlPlane, sagemaker: Any) -> None:
    for at, team in enumerate(["seeds", "seeds", "roots"]):
        tags = [{"Key": "team", "Value": team}, *([{"Key": "dry", "Value": "yes"}] if at == 1 else [])]
        channels = [_s3("train"), _s3("extra", S3Uri=f"s3://bucket/{at}")]
        sagemaker.create_training_job(**job_request(f"job-{at}", Tags=tags, HyperParameters={"rank": str(at)}, InputDataConfig=channels))
    plane.store.jobs["job-2"].finish("Failed", failure_reason="AlgorithmError: x")

    def found(*filters: dict[str, Any], **more: Any) -> list[str]:
        expression = {"Filters": list(filters)} | more if filters else more
        pages = sagemaker.get_paginator("search").paginate(
            Resource="TrainingJob",
            SortBy="TrainingJobName",
            SortOrder="Ascending",
            PaginationConfig={"PageSize": 2},
            SearchExpression=expression,
        )
        return [each["TrainingJob"]["TrainingJobName"] for page in pages for each in page["Results"]]

    def one(name: str, operator: str, value: str | None = None) -> dict[str, Any]:
        return {"Name": name, "Operator": operator} | ({} if value is None else {"Value": value})

    assert found(one("Tags.team", "Equals", "seeds")) == ["job-0", "job-1"]
    assert found(one("Tags.team", "NotEquals", "seeds")) == ["job-2"]
    assert found(one("Tags.dry", "Exists")) == ["job-1"]
    assert found(one("Tags.dry", "NotExists")) == ["job-0", "job-2"]
    assert found(one("Tags.key", "Equals", "dry")) == ["job-1"]
    assert found(one("TrainingJobName", "Contains", "b-1")) == ["job-1"]
    assert found(one("TrainingJobName", "In", "job-0, job-2")) == ["job-0", "job-2"]
    assert found(one("TrainingJobStatus", "Equals", "Failed")) == ["job-2"]
    assert found(one("HyperParameters.rank", "GreaterThan", "0")) == ["job-1", "job-2"]
    assert found(one("CreationTime", "LessThan", "2001-01-01T00:00:00Z")) == []
    assert found(one("EnableManagedSpotTraining", "Equals", "false")) == ["job-0", "job-1", "job-2"]
    assert found(one("Tags.team", "Equals", "roots"), one("Tags.dry", "Exists"), Operator="Or") == ["job-1", "job-2"]
    uri = one("InputDataConfig.DataSource.S3DataSource.S3Uri", "Contains", "bucket/1")
    nested = [{"NestedPropertyName": "InputDataConfig", "Filters": [one("InputDataConfig.ChannelName", "Equals", "extra"), uri]}]
    assert found(NestedFilters=nested) == ["job-1"]
    told = sagemaker.search(Resource="TrainingJob", MaxResults=1)
    assert told["TotalHits"] == {"Value": 3, "Relation": "EqualTo"}
    assert told["Results"][0]["TrainingJob"]["TrainingJobName"] == "job-2"  # changed last
    with refused("ValidationException", "searches TrainingJob, not Endpoint"):
        sagemaker.search(Resource="Endpoint")
    with refused("ValidationException", "Value must not be specified"):
        found(one("Tags.dry", "Exists", "x"))


def test_accounts_and_regions_know_nothing_of_each_other(plane: ControlPlane, sagemaker: Any) -> None:
    sagemaker.create_training_job(**job_request())
    with client(plane, region="eu-west-1") as elsewhere, refused("ValidationException", "Requested resource not found."):
        elsewhere.describe_training_job(TrainingJobName="job")
    with client(plane, account="111122223333", region="eu-west-1") as another:
        arn = another.create_training_job(**job_request(RoleArn="arn:aws:iam::111122223333:role/r"))["TrainingJobArn"]
    assert arn == "arn:aws:sagemaker:eu-west-1:111122223333:training-job/job"


def test_quotas_are_told_by_service_quotas(plane: ControlPlane) -> None:
    plane.set_quota("ml.g5.2xlarge for spot training job usage", 7)
    with client(plane, "service-quotas") as quotas:
        pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        table = {each["QuotaName"]: each for page in pages for each in page["Quotas"]}
        assert len(table) > 500
        assert table["ml.g5.2xlarge for spot training job usage"]["Value"] == 7
        assert table["ml.g5.2xlarge for training job usage"]["Value"] == 0
        assert table["ml.m7i.4xlarge for endpoint usage"]["Value"] == 20
        assert table["ml.m7i.4xlarge for training warm pool usage"]["Value"] == 0
        code = table["ml.g5.2xlarge for spot training job usage"]["QuotaCode"]
        assert (
            quotas.get_service_quota(ServiceCode="sagemaker", QuotaCode=code)["Quota"] == table["ml.g5.2xlarge for spot training job usage"]
        )
        for service, quota in (("sagemaker", "L-00000000"), ("ec2", code)):
            with refused("NoSuchResourceException"):
                quotas.get_service_quota(ServiceCode=service, QuotaCode=quota)
    with pytest.raises(ValueError, match="is no quota's name"):
        plane.set_quota("ml.g5.2xlarge", 1)
