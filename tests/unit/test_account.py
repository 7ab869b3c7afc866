"""What an account lacks for a job: asked of LocalStack and the control plane, and of an IAM and a registry that answer as AWS does."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab.aws
from support.cloud import ControlPlane
from support.iam_judge import ACCOUNT, Judge, role
from trimtab.aws.account import Needs, survey
from trimtab.aws.instances import find
from trimtab.aws.permissions import Where, of_caller, of_hub
from trimtab.aws.session import Aws
from trimtab.plan import Finding

IMAGE = f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/trimtab-xeon-train:0.1.0-abc"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": ["sagemaker.amazonaws.com"]}, "Action": ["sts:AssumeRole"]}],
}


@pytest.fixture(scope="module")
def quotas(localstack: str) -> Iterator[ControlPlane]:
    """SageMaker and Service Quotas, where nothing runs."""
    with ControlPlane(aws_url=localstack, runner=None) as plane:
        yield plane


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge() as found:
        found.policies = {"trainer": [("*", "*", "allowed")], "trimtab": [("*", "*", "allowed")]}
        found.roles = {"trimtab": TRUST}
        found.images = {"trimtab-xeon-train:0.1.0-abc"}
        yield found


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, localstack: str, quotas: ControlPlane, aws: Any) -> Iterator[Aws]:
    """A user without rights of the session's LocalStack, asking LocalStack and the control plane."""
    iam, name = aws("iam"), "trainer"
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", localstack)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", quotas.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", quotas.url)
    with Aws("us-east-1") as found:
        yield found
    iam.delete_access_key(UserName=name, AccessKeyId=key["AccessKeyId"])
    iam.delete_user(UserName=name)


@pytest.fixture
def judged(account: Aws, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """The same, with an IAM and a registry that answer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_IAM", judge.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", judge.url)
    return account


def needs(bucket: str, **changes: Any) -> Needs:
    given = {"role": role("trimtab"), "bucket": bucket, "prefix": "trimtab", "image": IMAGE, "instance": find("ml.m7i.4xlarge")}
    return Needs(**(given | changes))


def found(aws: Aws, asked: Needs) -> dict[str, Finding]:
    return {finding.name: finding for finding in survey(aws, asked)}


def test_an_account_with_everything_lacks_nothing(judged, judge, bucket):
    findings = found(judged, needs(bucket))
    assert {name: finding for name, finding in findings.items() if finding.ok is not True} == {}
    assert findings["identity"].detail == f"arn:aws:iam::{ACCOUNT}:user/trainer in us-east-1"
    assert {name.removeprefix("permission ") for name in findings if name.startswith("permission s")} >= {
        "sagemaker:CreateTrainingJob", "sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob", "sagemaker:ListTrainingJobs",
        "sagemaker:Search", "sagemaker:AddTags", "s3:GetObject", "s3:PutObject", "s3:ListBucket",
    }  # fmt: skip
    assert {"permission iam:PassRole", "permission logs:GetLogEvents", "permission ecr:DescribeImages"} <= set(findings)
    assert "permission of the role s3:GetObject" in findings
    assert not [name for name in findings if "kms" in name]
    assert not [name for name in findings if "ec2" in name or "encryption" in name]
    passed = next(asked for asked in judge.asked if "iam:PassRole" in asked.values())
    assert passed["ResourceArns.member.1"] == role("trimtab")
    assert "sagemaker.amazonaws.com" in passed.values()


KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"


def test_what_a_job_has_beside_the_usual_needs_further_permissions(judged, judge, bucket):
    further = {"kms_key": "alias/mine", "volume_kms_key": KEY, "subnets": True, "model_uri": "s3://models/llama"}
    findings = found(judged, needs(bucket, **further))
    assert {"permission kms:GenerateDataKey", "permission kms:Decrypt"} <= set(findings)
    assert "permission kms:CreateGrant" not in findings
    role = {name.removeprefix("permission of the role ") for name in findings if name.startswith("permission of the role ")}
    assert {"kms:Encrypt", "kms:GenerateDataKey", "kms:Decrypt", "kms:CreateGrant", "ec2:CreateNetworkInterfacePermission"} <= role
    asked = {
        (request["ResourceArns.member.1"], request["ActionNames.member.1"]) for request in judge.asked if "ActionNames.member.1" in request
    }
    assert {("arn:aws:s3:::models", "s3:ListBucket"), ("arn:aws:s3:::models/llama/x", "s3:GetObject")} <= asked
    assert (f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{KEY}", "kms:CreateGrant") in asked
    assert ("*", "kms:Encrypt") in asked  # policies do not name aliases


SOURCES = Path(trimtab.aws.__file__).parent


def test_every_permission_that_an_error_names_is_in_the_table(judged, bucket):
    """What the code itself calls when it is refused, but for what only a plan asks, which says so itself."""
    files = [*SOURCES.glob("*.py"), *SOURCES.parent.glob("*/sagemaker.py")]
    named = {action for file in files if file.stem != "account" for action in re.findall(r'action="([\w-]+:\w+)"', file.read_text())}
    where = Where("aws", "us-east-1", ACCOUNT)
    kinds = ("", "fixed", "variant", "component")
    groups = [group for kind in kinds for group in of_caller(where, needs(bucket, makes_bucket=True, endpoint=kind))]
    table = {action for group in [*groups, of_hub(where)] for action in group.actions}
    assert len(named) > 12
    assert named - {"sts:GetCallerIdentity"} <= table


@pytest.mark.parametrize("kind", ["fixed", "variant", "component"])
def test_an_endpoint_needs_permissions_of_its_own(judged, judge, bucket, quotas, kind):
    quotas.set_quota("ml.m7i.4xlarge for endpoint usage", 3)
    findings = found(judged, needs(bucket, endpoint=kind, count=2))
    assert {name: finding for name, finding in findings.items() if finding.ok is not True} == {}
    asked = {name.removeprefix("permission ") for name in findings if name.startswith("permission ")}
    assert {"sagemaker:CreateEndpoint", "sagemaker:InvokeEndpoint", "sagemaker:DeleteModel", "iam:PassRole"} <= asked
    assert not [name for name in findings if "TrainingJob" in name or "of the role s3:PutObject" in name]
    assert ("application-autoscaling:RegisterScalableTarget" in asked) is (kind != "fixed")
    assert ("sagemaker:CreateInferenceComponent" in asked) is (kind == "component")
    assert findings["quota ml.m7i.4xlarge for endpoint usage"].detail == "3, the endpoint takes 2"
    too_many = found(judged, needs(bucket, endpoint=kind, count=4))["quota ml.m7i.4xlarge for endpoint usage"]
    assert (too_many.ok, too_many.detail) == (False, "3, and the endpoint takes 4")


def test_a_denied_action_is_named_with_the_statement_that_allows_it(judged, judge, bucket):
    judge.policies["trainer"] = [
        ("sagemaker:*", "*", "allowed"), ("s3:*", f"arn:aws:s3:::{bucket}*", "allowed"), ("logs:Describe*", "*", "allowed"),
        ("ecr:*", "*", "allowed"), ("sagemaker:StopTrainingJob", "*", "explicitDeny"),
    ]  # fmt: skip
    findings = found(judged, needs(bucket))
    missing = {name: finding for name, finding in findings.items() if finding.ok is False}
    assert set(missing) == {"permission iam:PassRole", "permission sagemaker:StopTrainingJob", "permission logs:GetLogEvents"}
    assert missing["permission sagemaker:StopTrainingJob"].detail.startswith("denied by a policy of arn:aws:iam")
    statement = json.loads(missing["permission iam:PassRole"].remedy.partition("the statement ")[2])
    assert statement == {"Effect": "Allow", "Action": ["iam:PassRole"], "Resource": role("trimtab")}


def test_a_role_that_may_too_little_is_told_apart_from_the_user(judged, judge, bucket):
    judge.policies["trimtab"] = [("s3:GetObject", "*", "allowed")]
    findings = found(judged, needs(bucket))
    assert findings["permission s3:PutObject"].ok is True
    assert findings["permission of the role s3:GetObject"].ok is True
    assert findings["permission of the role s3:PutObject, s3:DeleteObject"].ok is False
    logs = "logs:CreateLogGroup, logs:CreateLogStream, logs:DescribeLogStreams"
    assert findings[f"permission of the role {logs}"].ok is False


@pytest.mark.parametrize(
    ("trust", "ok"),
    [
        (TRUST, True),
        ({"Statement": {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}}, True),
        ({"Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}, False),
        ({"Statement": [{"Effect": "Deny", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}]}, False),
        ({"Statement": [{"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"}]}, False),
    ],
)
def test_a_role_must_trust_sagemaker(judged, judge, bucket, trust, ok):
    judge.roles["trimtab"] = trust
    finding = found(judged, needs(bucket))["role"]
    assert finding.ok is ok
    assert ok or "aws iam update-assume-role-policy --role-name trimtab" in finding.remedy


def test_localstack_is_asked_and_what_it_does_not_have_is_not_known(account, aws, bucket):
    began = time.monotonic()
    findings = found(account, needs(bucket))
    assert findings["role"].ok is False
    assert "aws iam create-role --role-name trimtab --assume-role-policy-document '{" in findings["role"].remedy
    unknown = [finding for name, finding in findings.items() if name.startswith("permission ") and finding.ok is None]
    assert len(unknown) == 1  # its simulator denies without a reason
    assert {"iam:PassRole", "sagemaker:CreateTrainingJob", "s3:PutObject"} <= set(unknown[0].name.removeprefix("permission ").split(", "))
    assert findings["image"].ok is None
    assert findings["image"].detail.startswith("could not be asked: AWS was asked for the image")
    assert findings["bucket"] == Finding("bucket", True, f"{bucket} in us-east-1")
    assert time.monotonic() - began < 20  # a plan does not wait for what nobody can answer
    allowed = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    aws("iam").put_user_policy(UserName="trainer", PolicyName="all", PolicyDocument=json.dumps(allowed))
    aws("iam").create_role(RoleName="trimtab", AssumeRolePolicyDocument=json.dumps(TRUST))
    try:
        findings = found(account, needs(bucket))
        assert findings["role"].ok is True
        assert findings["permissions"].ok is None  # of a user with a policy its simulator fails
    finally:
        aws("iam").delete_user_policy(UserName="trainer", PolicyName="all")
        aws("iam").delete_role(RoleName="trimtab")


def test_a_question_that_fails_is_not_known_and_stops_nothing(judged, judge, bucket):
    judge.broken = True
    findings = found(judged, needs(bucket))
    assert [(name, finding.ok) for name, finding in findings.items() if finding.ok is not True] == [("role", None), ("permissions", None)]
    assert findings["permissions"].detail.startswith("could not be asked: AWS was asked what arn:aws:iam")


@pytest.mark.parametrize(
    ("given", "ok", "said"),
    [("trimtab", False, "is not a role's ARN"), ("arn:aws:iam::999999999999:role/theirs", None, "another account's")],
)
def test_a_role_that_cannot_be_looked_up_says_why(judged, bucket, given, ok, said):
    finding = found(judged, needs(bucket, role=given))["role"]
    assert (finding.ok, said in finding.detail) == (ok, True)


def test_without_a_role_the_rest_is_told_all_the_same(judged, judge, bucket):
    findings = found(judged, needs(bucket, role=""))
    assert [name for name, finding in findings.items() if finding.ok is not True] == ["role"]
    assert "--backend-option role=NAME-OR-ARN" in findings["role"].remedy
    assert "permission iam:PassRole" not in findings
    assert not [name for name in findings if "of the role" in name]
    assert "image" in findings


def test_checkpoints_are_encrypted_by_the_buckets_own_setting(judged, aws, bucket):
    name, s3 = "encryption of checkpoints", aws("s3")
    plain = found(judged, needs(bucket, kms_key=KEY))[name]
    assert (plain.ok, "encrypts with AES256" in plain.detail) == (False, True)
    command = shlex.split(plain.remedy)
    assert command[:5] == ["aws", "s3api", "put-bucket-encryption", "--bucket", bucket]
    s3.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration=json.loads(command[-1]))
    assert found(judged, needs(bucket, kms_key=KEY))[name].ok is True
    assert found(judged, needs(bucket, kms_key=f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{KEY}"))[name].ok is True
    assert found(judged, needs(bucket, kms_key=KEY.replace("1", "2")))[name].ok is False
    assert found(judged, needs(bucket, kms_key="alias/mine"))[name].ok is None
    absent = found(judged, needs("test-no-such-bucket", kms_key=KEY, makes_bucket=True))[name]
    assert absent.ok is False
    assert absent.remedy.startswith("aws s3 mb s3://test-no-such-bucket --region us-east-1 && aws s3api put-bucket-encryption")


def test_a_bucket_is_there_or_made_or_missing_or_elsewhere(judged, aws):
    absent = "test-no-such-bucket"
    finding = found(judged, needs(absent))["bucket"]
    assert (finding.ok, finding.remedy.partition(" --region")[0]) == (False, f"aws s3 mb s3://{absent}")
    made = found(judged, needs(absent, makes_bucket=True))
    assert made["bucket"].ok is True
    assert {"permission s3:CreateBucket", "permission s3:PutBucketPublicAccessBlock", "permission s3:PutLifecycleConfiguration"} <= set(
        made
    )
    aws("s3").create_bucket(Bucket="test-far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    try:
        finding = found(judged, needs("test-far-away"))["bucket"]
    finally:
        aws("s3").delete_bucket(Bucket="test-far-away")
    assert finding.ok is False
    assert "--backend-option region=eu-west-1" in finding.remedy


def test_an_image_is_there_or_pushed_first(judged, judge, bucket):
    gone = found(judged, needs(bucket, image=IMAGE.replace("0.1.0-abc", "0.2.0")))["image"]
    assert gone.ok is False
    assert gone.remedy == f"trimtab image push xeon {IMAGE.rpartition(':')[0]}"
    judge.images.clear()
    assert found(judged, needs(bucket))["image"].remedy.startswith("aws ecr create-repository --repository-name trimtab-xeon-train")
    assert found(judged, needs(bucket, image="registry.example.com/trimtab:1"))["image"].ok is None


def test_quotas_are_held_against_what_the_job_takes(judged, quotas, bucket):
    store = quotas.store
    name = "ml.m7i.4xlarge for {} usage".format
    asked = found(judged, needs(bucket, count=2, warm_pool=True))
    assert asked["quota " + name("training job")].ok is True
    pool = asked["quota " + name("training warm pool")]
    assert (pool.ok, pool.detail) == (False, "0, and the job takes 2")
    assert "request-service-quota-increase --service-code sagemaker --quota-code L-" in pool.remedy
    assert "--desired-value 2" in pool.remedy
    store.quotas.set(name("spot training job"), 1)
    assert found(judged, needs(bucket, count=2, spot=True))["quota " + name("spot training job")].ok is False
    assert found(judged, needs(bucket, spot=True))["quota " + name("spot training job")].ok is True


def test_all_jobs_that_run_count_as_used(judged, quotas, bucket):
    """With MaxResults ListTrainingJobs looks at so many of the newest jobs only, of any status (API reference)."""
    sagemaker, usage = judged.client("sagemaker"), "ml.r7i.large for training job usage"
    quotas.store.quotas.set(usage, 12)
    request = {
        "RoleArn": role("trimtab"), "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        "OutputDataConfig": {"S3OutputPath": f"s3://{bucket}/out"}, "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        "ResourceConfig": {"InstanceType": "ml.r7i.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
    }  # fmt: skip
    for number in range(12):  # more than a page
        sagemaker.create_training_job(TrainingJobName=f"quota-{number}", **request)
    sagemaker.stop_training_job(TrainingJobName="quota-0")  # which has its machine until it has stopped
    quotas.store.jobs["quota-1"].finish("Completed", "Completed")
    began = len(quotas.requests)
    asked = needs(bucket, instance=find("ml.r7i.large"))
    assert found(judged, asked)[f"quota {usage}"].detail == "12, of which 11 are used; the job takes 1"
    assert not [request for _, request in quotas.requests[began:] if "StatusEquals" in request and "MaxResults" in request]
    quotas.store.quotas.set(usage, 11)
    full = found(judged, asked)[f"quota {usage}"]
    assert (full.ok, full.detail) == (False, "11, of which 11 are used, and the job takes 1")


def test_without_credentials_or_a_network_one_finding_says_so(monkeypatch, bucket, localstack):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with contextlib.closing(Aws("us-east-1")) as aws:
        findings = survey(aws, needs(bucket))
    assert [(finding.name, finding.ok) for finding in findings] == [("identity", False)]
    assert "does not answer" in findings[0].detail
