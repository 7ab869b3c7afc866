"""Every IAM action that a run or an endpoint needs, on which resource: of whoever asks for it, and of the role that it runs as. Pure.

Source: "How to use SageMaker AI execution roles" (CreateTrainingJob and CreateModel: execution role permissions), "Auto scaling
prerequisites" and "Amazon SageMaker AI API permissions", SageMaker AI developer guide; for S3 the operations that upload.py, download.py,
bucket.py and records.py use.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from trimtab.aws.place import parse_uri

if TYPE_CHECKING:
    from trimtab.aws.account import Needs

SERVICE = "sagemaker.amazonaws.com"
SCALING = "sagemaker.application-autoscaling.amazonaws.com"
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
    """Of whoever plans, submits, follows, stops, resumes and removes the run; or deploys, asks and closes the endpoint."""
    makes = ("s3:CreateBucket", "s3:PutBucketPublicAccessBlock", "s3:PutLifecycleConfiguration") if needs.makes_bucket else ()
    bucket = ("s3:ListBucket", "s3:ListBucketMultipartUploads", *makes)
    objects = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
    job = ("CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "UpdateTrainingJob", "DeleteTrainingJob", "AddTags", "ListTags")
    logs = where.arn("logs", f"log-group:/aws/sagemaker/{'Endpoints/trim-ep-00000000' if needs.endpoint else 'TrainingJobs'}")
    own = [
        Group(where.arn("sagemaker", "training-job/trim-00000000"), tuple(f"sagemaker:{name}" for name in job)),
        Group("*", ("sagemaker:ListTrainingJobs", "sagemaker:Search")),
    ]
    groups = [
        *(_endpoint(where, needs.endpoint) if needs.endpoint else own),
        Group(where.s3(needs.bucket), bucket),
        Group(where.s3(f"{needs.bucket}/{needs.prefix}/{'models' if needs.endpoint else 'content'}/x"), objects),
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
    """Of the role in whose name SageMaker runs the job, or the endpoint, which only reads."""
    logs = where.arn("logs", f"log-group:/aws/sagemaker/{'Endpoints/trim-ep-00000000' if needs.endpoint else 'TrainingJobs'}")
    writes = () if needs.endpoint else ("s3:PutObject", "s3:DeleteObject")
    groups = [
        Group(where.s3(needs.bucket), ("s3:ListBucket",)),
        Group(where.s3(f"{needs.bucket}/{needs.prefix}/x"), ("s3:GetObject", *writes)),
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


def _endpoint(where: Where, scales: str) -> list[Group]:
    """What an endpoint consists of; `scales` is fixed, variant or component. Application Auto Scaling's first target of an account makes
    its service-linked role; its policies make alarms in the caller's name."""
    id = "trim-ep-00000000"
    verbs = ("Create{}", "Describe{}", "Delete{}")
    groups = [
        Group(
            where.arn("sagemaker", f"{kind}/{id}"),
            (*(f"sagemaker:{verb.format(name)}" for verb in verbs), "sagemaker:AddTags", "sagemaker:ListTags"),
        )
        for kind, name in (("model", "Model"), ("endpoint-config", "EndpointConfig"), ("endpoint", "Endpoint"))
    ]
    groups.append(Group(where.arn("sagemaker", f"endpoint/{id}"), ("sagemaker:InvokeEndpoint",)))
    groups.append(Group("*", ("sagemaker:ListEndpoints", "sagemaker:ListEndpointConfigs", "sagemaker:ListModels")))
    if scales == "fixed":
        return groups
    scaling = ("RegisterScalableTarget", "DeregisterScalableTarget", "PutScalingPolicy")
    groups.append(Group("*", tuple(f"application-autoscaling:{name}" for name in scaling)))
    alarms = ("cloudwatch:PutMetricAlarm", "cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms")
    groups += [Group("*", alarms), Group("*", ("iam:CreateServiceLinkedRole",), (("iam:AWSServiceName", SCALING),))]
    if scales == "component":
        changes = ("Create", "Describe", "Delete")
        component = where.arn("sagemaker", f"inference-component/{id}")
        groups.append(Group(component, (*(f"sagemaker:{verb}InferenceComponent" for verb in changes), "sagemaker:InvokeEndpoint")))
    else:
        groups.append(Group(where.arn("sagemaker", f"endpoint/{id}"), ("sagemaker:UpdateEndpointWeightsAndCapacities",)))
    return groups


def of_hub(where: Where) -> Group:
    """Of whoever deploys a model of JumpStart."""
    return Group(
        f"arn:{where.partition}:sagemaker:{where.region}:aws:hub-content/SageMakerPublicHub/Model/x", ("sagemaker:DescribeHubContent",)
    )


def _model(where: Where, needs: Needs) -> list[Group]:
    """A base model that lies in S3 is read by both."""
    if needs.model_uri is None:
        return []
    bucket, key = parse_uri(needs.model_uri if needs.model_uri.endswith("/") else f"{needs.model_uri}/")
    return [Group(where.s3(bucket), ("s3:ListBucket",)), Group(where.s3(f"{bucket}/{key}x"), ("s3:GetObject",))]


def _repository(where: Where, image: re.Match[str]) -> str:
    return f"arn:{where.partition}:ecr:{image[2]}:{image[1]}:repository/{image[3]}"
