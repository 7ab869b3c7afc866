"""Every IAM action that a run needs, on which resource: of the user or role that asks for it, and of the role that it runs as. Pure.

Source: "How to use SageMaker AI execution roles" (CreateTrainingJob: execution role permissions) and "Amazon SageMaker AI API permissions",
SageMaker AI developer guide; for S3 the operations that upload.py, download.py, bucket.py and records.py use.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from trimtab.aws.place import parse_uri

if TYPE_CHECKING:
    from trimtab.aws.account import Needs

SERVICE = "sagemaker.amazonaws.com"
IN_ECR = re.compile(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)(?::([^@]+))?(?:@(sha256:[0-9a-f]{64}))?")

_NETWORK = (
    "ec2:CreateNetworkInterface", "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission", "ec2:DescribeNetworkInterfaces", "ec2:DescribeVpcs", "ec2:DescribeDhcpOptions",
    "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups",
)  # fmt: skip


class Group(NamedTuple):
    """Actions on one resource, with the context that their policies may ask for."""

    resource: str
    actions: tuple[str, ...]
    context: tuple[tuple[str, str], ...] = ()


class Where(NamedTuple):
    """What an ARN begins with."""

    partition: str
    region: str
    account: str

    def arn(self, service: str, rest: str) -> str:
        return f"arn:{self.partition}:{service}:{self.region}:{self.account}:{rest}"

    def s3(self, rest: str) -> str:
        return f"arn:{self.partition}:s3:::{rest}"

    def key(self, key: str) -> str:
        """Of a KMS key; policies name keys and not their aliases, so an alias is any key."""
        if key.startswith("arn:"):
            return key if ":key/" in key else "*"
        return "*" if key.startswith("alias/") else self.arn("kms", f"key/{key}")


def of_caller(where: Where, needs: Needs) -> list[Group]:
    """Of whoever plans, submits, follows, stops, resumes and removes the run."""
    makes = ("s3:CreateBucket", "s3:PutBucketPublicAccessBlock", "s3:PutLifecycleConfiguration") if needs.makes_bucket else ()
    bucket = ("s3:ListBucket", "s3:ListBucketMultipartUploads", *makes)
    objects = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
    job = ("CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "UpdateTrainingJob", "DeleteTrainingJob", "AddTags", "ListTags")
    logs = where.arn("logs", "log-group:/aws/sagemaker/TrainingJobs")
    groups = [
        Group(where.arn("sagemaker", "training-job/trim-00000000"), tuple(f"sagemaker:{name}" for name in job)),
        Group("*", ("sagemaker:ListTrainingJobs", "sagemaker:Search")),
        Group(where.s3(needs.bucket), bucket),
        Group(where.s3(f"{needs.bucket}/{needs.prefix}/content/x"), objects),
        Group(logs, ("logs:DescribeLogStreams",)),
        Group(f"{logs}:log-stream:x", ("logs:GetLogEvents",)),
    ]
    if needs.role:
        groups.append(Group(needs.role, ("iam:PassRole",), (("iam:PassedToService", SERVICE),)))
    if image := IN_ECR.fullmatch(needs.image):
        groups.append(Group(_repository(where, image), ("ecr:DescribeImages",)))
    if needs.kms_key:
        groups.append(Group(where.key(needs.kms_key), ("kms:GenerateDataKey", "kms:Decrypt")))
    return groups + _model(where, needs)


def of_role(where: Where, needs: Needs) -> list[Group]:
    """Of the role in whose name SageMaker runs the job."""
    logs = where.arn("logs", "log-group:/aws/sagemaker/TrainingJobs")
    groups = [
        Group(where.s3(needs.bucket), ("s3:ListBucket",)),
        Group(where.s3(f"{needs.bucket}/{needs.prefix}/x"), ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")),
        Group(logs, ("logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams")),
        Group(f"{logs}:log-stream:x", ("logs:PutLogEvents",)),
        Group("*", ("cloudwatch:PutMetricData",)),
    ]
    if image := IN_ECR.fullmatch(needs.image):
        pulls = ("ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability")
        groups += [Group(_repository(where, image), pulls), Group("*", ("ecr:GetAuthorizationToken",))]
    if needs.subnets:
        groups.append(Group("*", _NETWORK))
    if needs.kms_key:
        groups.append(Group(where.key(needs.kms_key), ("kms:Encrypt", "kms:GenerateDataKey", "kms:Decrypt")))
    if needs.volume_kms_key:
        groups.append(Group(where.key(needs.volume_kms_key), ("kms:CreateGrant",)))
    return groups + _model(where, needs)


def _model(where: Where, needs: Needs) -> list[Group]:
    """A base model that lies in S3 is read by both."""
    if needs.model_uri is None:
        return []
    bucket, key = parse_uri(needs.model_uri if needs.model_uri.endswith("/") else f"{needs.model_uri}/")
    return [Group(where.s3(bucket), ("s3:ListBucket",)), Group(where.s3(f"{bucket}/{key}x"), ("s3:GetObject",))]


def _repository(where: Where, image: re.Match[str]) -> str:
    return f"arn:{where.partition}:ecr:{image[2]}:{image[1]}:repository/{image[3]}"
