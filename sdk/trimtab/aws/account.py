"""What an account lacks for a job, asked of AWS before anything is sent: identity, role, permissions, bucket, image, quotas.

Each answer is a `Finding`; what may not be asked, or is not answered, is not known, which stops nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from urllib.parse import unquote

from trimtab.aws.instances import Instance
from trimtab.aws.permissions import IN_ECR, SERVICE, Group, Where, of_caller, of_role
from trimtab.aws.refusals import asking, error_code
from trimtab.aws.session import Aws
from trimtab.errors import TrimtabError
from trimtab.plan import Finding

_PATIENCE, _ATTEMPTS = 15, 2  # seconds and attempts for a question that the job does not depend on
_MOST_JOBS, _MOST_PAGES = 100, 50  # running jobs that are looked at for the instances that they take; pages of all jobs to find them
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": SERVICE}, "Action": "sts:AssumeRole"}],
}


@dataclass(frozen=True)
class Needs:
    """What a job asks of the account. `role` is an ARN, empty where none is named, `image` a name that SageMaker pulls, `prefix` that of
    the bucket's keys; `makes_bucket` tells that a bucket that is not there is made, `max_seconds` the job's hard stop. `kms_key` is for
    what lies in S3 and `volume_kms_key` for disks: ARN, id or alias. `subnets` tells that the job runs in some of the account's own,
    `model_uri` where the base model lies in S3, if it does. `endpoint` tells that it is not a job but an endpoint, and how its number of
    instances follows the load: fixed, variant, component (to zero)."""

    role: str
    bucket: str
    prefix: str
    image: str
    instance: Instance
    count: int = 1
    spot: bool = False
    warm_pool: bool = False
    max_seconds: int = 0
    makes_bucket: bool = False
    kms_key: str | None = None
    volume_kms_key: str | None = None
    subnets: bool = False
    model_uri: str | None = None
    endpoint: Literal["", "fixed", "variant", "component"] = ""


def survey(aws: Aws, needs: Needs) -> list[Finding]:
    """Every finding, in the order in which a job would meet them. Raises nothing: where AWS cannot be asked, the finding says so.

    Without credentials nothing else is asked.
    """
    found = _asked("identity", lambda: [Finding("identity", True, f"{aws.principal} in {aws.region}")], unknown=False)
    if found[0].ok is not True:
        return found
    with contextlib.closing(_Account(aws)) as account:
        found += _asked("role", lambda: _role(account, needs))
        found += _asked("permissions", lambda: _permissions(account, needs))
        if any(finding.name == "role" and finding.ok for finding in found):
            found += _asked("permissions of the role", lambda: _permissions_of_role(account, needs))
        found += _asked("bucket", lambda: _bucket(account, needs))
        if needs.kms_key and not needs.endpoint:
            found += _asked("encryption of checkpoints", lambda: _encryption(account, needs))
        found += _asked("image", lambda: _image(account, needs))
        found += _asked("quota", lambda: _quotas(account, needs))
    return found


class _Account:
    """The account's clients, with less patience than those that a job depends on."""

    def __init__(self, aws: Aws) -> None:
        self.aws, self._clients = aws, dict[tuple[str, str], Any]()

    def client(self, service: str, region: str | None = None) -> Any:
        from botocore.config import Config

        key = (service, region or self.aws.region)
        if key not in self._clients:
            config = Config(connect_timeout=5, read_timeout=_PATIENCE, retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"})
            self._clients[key] = self.aws.session.client(service, region_name=key[1], config=config)
        return self._clients[key]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


def _asked(name: str, ask: Callable[[], list[Finding]], *, unknown: bool = True) -> list[Finding]:
    """The answers, or the one finding that the question was not answered."""
    try:
        return ask()
    except TrimtabError as exc:
        return [Finding(name, None, f"could not be asked: {exc}") if unknown else Finding(name, False, str(exc))]


@contextlib.contextmanager
def _unless(*codes: str) -> Iterator[list[str]]:
    """Inside, an error of AWS with one of these codes is an answer: the list then holds it."""
    from botocore.exceptions import ClientError

    met: list[str] = []
    try:
        yield met
    except ClientError as exc:
        if error_code(exc) not in codes:
            raise
        met.append(error_code(exc))


def _role(account: _Account, needs: Needs) -> list[Finding]:
    if not needs.role:
        remedy = "name one of  aws iam list-roles  with  --backend-option role=NAME-OR-ARN"
        return [Finding("role", False, "SageMaker needs a role that it may take on for the job, and none is named", remedy)]
    match = re.fullmatch(r"arn:[\w-]+:iam::(\d{12}):role/(?:.*/)?([\w+=,.@-]+)", needs.role)
    if match is None:
        remedy = "give its ARN, such as arn:aws:iam::123456789012:role/trimtab, with  --backend-option role=ARN"
        return [Finding("role", False, f"{needs.role!r} is not a role's ARN", remedy)]
    if match[1] != account.aws.account:
        return [Finding("role", None, f"{needs.role} is another account's, which alone can tell")]
    with asking(f"for the role {match[2]}", action="iam:GetRole"), _unless("NoSuchEntity") as absent:
        role = account.client("iam").get_role(RoleName=match[2])["Role"]
    if absent:
        remedy = f"aws iam create-role --role-name {match[2]} --assume-role-policy-document '{json.dumps(_TRUST)}'"
        return [Finding("role", False, f"{needs.role} does not exist", f"{remedy}  and give it policies, or name another")]
    if not _trusts(role["AssumeRolePolicyDocument"]):
        remedy = f"aws iam update-assume-role-policy --role-name {match[2]} --policy-document '{json.dumps(_TRUST)}'"
        return [Finding("role", False, f"{needs.role} does not trust {SERVICE}, so SageMaker cannot take it on", remedy)]
    return [Finding("role", True, f"{role['Arn']} trusts {SERVICE}")]


def _trusts(document: Any) -> bool:
    """Whether a trust policy lets SageMaker take the role on. botocore hands it over as a mapping, or as text that is still quoted."""
    policy = json.loads(unquote(document)) if isinstance(document, str) else document
    for statement in _many(policy.get("Statement", [])):
        services = _many(statement.get("Principal", {}).get("Service", [])) if isinstance(statement.get("Principal"), dict) else []
        if statement.get("Effect") == "Allow" and SERVICE in services and "sts:AssumeRole" in _many(statement.get("Action", [])):
            return True
    return False


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _permissions(account: _Account, needs: Needs) -> list[Finding]:
    """What the one who asks may do."""
    aws = account.aws
    if re.fullmatch(r"arn:[\w-]+:iam::\d{12}:root", aws.principal):
        return [Finding("permissions", True, "the account's root user may do everything")]
    return _simulated(account, _policy_source(account), of_caller(_where(aws), needs), "permission")


def _permissions_of_role(account: _Account, needs: Needs) -> list[Finding]:
    """What the job may do in its role's name."""
    return _simulated(account, needs.role, of_role(_where(account.aws), needs), "permission of the role")


def _where(aws: Aws) -> Where:
    return Where(aws.partition, aws.region, aws.account)


def _policy_source(account: _Account) -> str:
    """The user or role whose policies are asked about; a session of a role is none, and does not name its role's path."""
    session = re.fullmatch(r"arn:([\w-]+):sts::(\d{12}):assumed-role/([^/]+)/.+", account.aws.principal)
    if session is None:
        return account.aws.principal
    with asking(f"for the role {session[3]}", action="iam:GetRole"), _unless("NoSuchEntity"):
        return str(account.client("iam").get_role(RoleName=session[3])["Role"]["Arn"])
    return f"arn:{session[1]}:iam::{session[2]}:role/{session[3]}"


def _simulated(account: _Account, who: str, groups: Iterable[Group], name: str) -> list[Finding]:
    """A finding for each action that IAM would allow, one for those of a resource that it would not, and one for all that it leaves open.

    Conditions on what is only known when it happens may still decide otherwise.
    """
    pages = account.client("iam").get_paginator("simulate_principal_policy")
    found, unknown = [], []
    for group in groups:
        context = [{"ContextKeyName": key, "ContextKeyType": "string", "ContextKeyValues": [value]} for key, value in group.context]
        asked = {"PolicySourceArn": who, "ActionNames": list(group.actions), "ResourceArns": [group.resource], "ContextEntries": context}
        with asking(f"what {who} may do", action="iam:SimulatePrincipalPolicy"):
            results = [result for page in pages.paginate(**asked) for result in page["EvaluationResults"]]
        decided: dict[str, list[str]] = {}
        for result in results:
            decided.setdefault(_decision(result), []).append(result["EvalActionName"])
        found += [Finding(f"{name} {action}", True, f"allowed on {group.resource}") for action in decided.pop("allowed", [])]
        unknown += decided.pop("unknown", [])
        found += [_denied(f"{name} {', '.join(actions)}", actions, decision, group.resource, who) for decision, actions in decided.items()]
    if unknown:
        said = "what answers for IAM denies and names no statement"
        found.append(Finding(f"{name} {', '.join(dict.fromkeys(unknown))}", None, said))
    return found


def _decision(result: dict[str, Any]) -> str:
    """IAM names what denies: a statement, or a policy of the organisation or boundary. Imitations that cannot decide name nothing."""
    named = ("MatchedStatements", "OrganizationsDecisionDetail", "PermissionsBoundaryDecisionDetail", "EvalDecisionDetails")
    decision = str(result["EvalDecision"])
    return "unknown" if decision == "explicitDeny" and not any(result.get(name) for name in named) else decision


def _denied(name: str, actions: list[str], decision: str, resource: str, who: str) -> Finding:
    statement = json.dumps({"Effect": "Allow", "Action": actions, "Resource": resource})
    if decision == "explicitDeny":
        return Finding(name, False, f"denied by a policy of {who}", f"ask an administrator to lift that, and for the statement {statement}")
    return Finding(name, False, f"not allowed by any policy of {who}", f"ask an administrator for the statement {statement}")


def _bucket(account: _Account, needs: Needs) -> list[Finding]:
    with asking(f"for the bucket {needs.bucket}", action="s3:ListBucket"), _unless("404", "NoSuchBucket") as absent:
        answer = account.aws.client("s3").head_bucket(Bucket=needs.bucket)
    if absent and needs.makes_bucket:
        return [Finding("bucket", True, f"{needs.bucket} is made when the job is sent")]
    if absent:
        remedy = f"aws s3 mb s3://{needs.bucket} --region {account.aws.region}   or name another with  --backend-option bucket=NAME"
        return [Finding("bucket", False, f"{needs.bucket} does not exist", remedy)]
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", account.aws.region)
    if region != account.aws.region:
        said = f"{needs.bucket} is in {region} and the job would be in {account.aws.region}, which reads no other region's buckets"
        return [Finding("bucket", False, said, f"use that region with  --backend-option region={region}   or a bucket of this one")]
    return [Finding("bucket", True, f"{needs.bucket} in {region}")]


def _encryption(account: _Account, needs: Needs) -> list[Finding]:
    """SageMaker writes checkpoints without naming a key (CheckpointConfig takes none), so the bucket's own setting decides."""
    name, key, absent_codes = "encryption of checkpoints", needs.kms_key or "", ("NoSuchBucket", "404")
    rule = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
    setting = json.dumps({"Rules": [{"ApplyServerSideEncryptionByDefault": rule, "BucketKeyEnabled": True}]})
    remedy = f"aws s3api put-bucket-encryption --bucket {needs.bucket} --server-side-encryption-configuration '{setting}'"
    unset_codes = ("ServerSideEncryptionConfigurationNotFoundError",)
    with (
        asking(f"how {needs.bucket} encrypts", action="s3:GetEncryptionConfiguration"),
        _unless(*absent_codes, *unset_codes) as unset,
    ):
        rules = account.aws.client("s3").get_bucket_encryption(Bucket=needs.bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    if unset and unset[0] in absent_codes:
        remedy = f"aws s3 mb s3://{needs.bucket} --region {account.aws.region} && {remedy}"
        return [Finding(name, False, f"{needs.bucket} does not exist yet, and would be made without {key} for checkpoints", remedy)]
    now = rules[0].get("ApplyServerSideEncryptionByDefault", {}) if not unset and rules else {}
    algorithm, used = now.get("SSEAlgorithm", "AES256"), now.get("KMSMasterKeyID", "S3's own key")
    if not algorithm.startswith("aws:kms"):
        said = f"{needs.bucket} encrypts with {algorithm}, and SageMaker takes no key for checkpoints, so they would not be under {key}"
        return [Finding(name, False, said, remedy)]
    if used.rpartition("/")[2] == key.rpartition("/")[2]:
        return [Finding(name, True, f"{needs.bucket} encrypts with {used}")]
    if "alias/" in used or "alias/" in key:
        return [Finding(name, None, f"{needs.bucket} encrypts with {used}; whether {key} is the same key is not known")]
    return [Finding(name, False, f"{needs.bucket} encrypts with {used}, so checkpoints would not be under {key}", remedy)]


def _image(account: _Account, needs: Needs) -> list[Finding]:
    match = IN_ECR.fullmatch(needs.image)
    if match is None:
        return [Finding("image", None, f"{needs.image} is not in Amazon ECR, so nobody can be asked whether it is there")]
    owner, region, repository, tag, digest = match.groups()
    named = {"imageDigest": digest} if digest else {"imageTag": tag or "latest"}
    absent_codes = ("ImageNotFoundException", "RepositoryNotFoundException")
    with asking(f"for the image {needs.image}", action="ecr:DescribeImages"), _unless(*absent_codes) as absent:
        account.client("ecr", region).describe_images(registryId=owner, repositoryName=repository, imageIds=[named])
    if not absent:
        return [Finding("image", True, needs.image)]
    make = f"aws ecr create-repository --repository-name {repository} --region {region}   and then  " if "Repository" in absent[0] else ""
    registry = needs.image.removesuffix(f"@{digest}").rsplit(":", 1)[0] if tag or digest else needs.image
    kind = "gpu" if needs.instance.gpus else "xeon"
    return [
        Finding(
            "image",
            False,
            f"{needs.image} is not there",
            f"{make}trimtab image push {kind} {registry}{' --target serve' if needs.endpoint else ''}",
        )
    ]


def _quotas(account: _Account, needs: Needs) -> list[Finding]:
    """The quotas that a job of this type and number meets; values are instances, or seconds for the longest run."""
    usage = "endpoint" if needs.endpoint else "spot training job" if needs.spot else "training job"
    wanted = {f"{needs.instance.name} for {usage} usage": needs.count}
    if needs.warm_pool:
        wanted[f"{needs.instance.name} for training warm pool usage"] = needs.count
    longest = "Longest run time for a training job" if not needs.endpoint else next(iter(wanted))
    found: dict[str, dict[str, Any]] = {}
    pages = account.client("service-quotas").get_paginator("list_service_quotas")
    with asking("for the quotas of SageMaker", action="servicequotas:ListServiceQuotas"):
        for page in pages.paginate(ServiceCode="sagemaker", PaginationConfig={"PageSize": 100}):
            found |= {quota["QuotaName"]: quota for quota in page["Quotas"] if quota["QuotaName"] in (*wanted, longest)}
            if found.keys() >= {*wanted, longest}:
                break
    findings = [_enough(account, name, found.get(name), count, needs) for name, count in wanted.items()]
    if not needs.endpoint and (quota := found.get(longest)) and quota["Value"] < needs.max_seconds:
        said = f"{quota['Value']:,.0f} s, and the job may run {needs.max_seconds:,} s: lower max_minutes, or"
        findings.append(Finding(f"quota {longest}", False, said, _more(quota, needs.max_seconds)))
    return findings


def _enough(account: _Account, name: str, quota: dict[str, Any] | None, count: int, needs: Needs) -> Finding:
    if quota is None:
        return Finding(f"quota {name}", None, "AWS lists no such quota in this region: the type may not be offered there")
    value = int(quota["Value"])
    if value < count:
        said = f"{value}, and the {'endpoint' if needs.endpoint else 'job'} takes {count}"
        return Finding(f"quota {name}", False, said, f"{_more(quota, count)} , or name another instance type")
    if "warm pool" in name or needs.endpoint:
        return Finding(f"quota {name}", True, f"{value}, the {'endpoint' if needs.endpoint else 'job'} takes {count}")
    try:
        used, all_seen = _used(account, needs)
    except TrimtabError:
        return Finding(f"quota {name}", True, f"{value}, the job takes {count}; how many are used could not be asked")
    if used + count > value:
        return Finding(
            f"quota {name}",
            False,
            f"{value}, of which {used} are used, and the job takes {count}",
            "wait for:  trimtab list --backend sagemaker",
        )
    least = "" if all_seen else "at least "
    return Finding(f"quota {name}", True, f"{value}, of which {least}{used} are used; the job takes {count}")


def _used(account: _Account, needs: Needs) -> tuple[int, bool]:
    """Instances of the type that jobs of the same kind take now, and whether all jobs were looked at.

    Without MaxResults: with it ListTrainingJobs filters only so many of the newest jobs of any status (API reference).
    """
    sagemaker, used = account.client("sagemaker"), 0
    pages = sagemaker.get_paginator("list_training_jobs")
    with asking("for the training jobs that run", action="sagemaker:ListTrainingJobs"):
        names: list[str] = []
        all_seen = True
        for status in ("InProgress", "Stopping"):
            found = list(islice(pages.paginate(StatusEquals=status), _MOST_PAGES))
            names += [summary["TrainingJobName"] for page in found for summary in page["TrainingJobSummaries"]]
            all_seen = all_seen and "NextToken" not in found[-1]
        for name in names[:_MOST_JOBS]:
            job = sagemaker.describe_training_job(TrainingJobName=name)
            resources = job["ResourceConfig"]
            if resources.get("InstanceType") == needs.instance.name and bool(job.get("EnableManagedSpotTraining")) == needs.spot:
                used += resources["InstanceCount"]
    return used, all_seen and len(names) <= _MOST_JOBS


def _more(quota: dict[str, Any], wanted: int) -> str:
    return (
        "aws service-quotas request-service-quota-increase --service-code sagemaker "
        f"--quota-code {quota['QuotaCode']} --desired-value {wanted}"
    )
