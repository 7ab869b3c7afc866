"""What AWS and the way to it refuse, in our words: what happened, and what to type next.

`refusal` is pure and knows botocore's errors by name and code, so that it needs no botocore; `asking` puts it at the border.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from trimtab.errors import BackendError, BackendUnavailable, TrimtabError
from trimtab.secrets import redact

BOTO3_REMEDY = "AWS needs boto3:  pip install 'trimtab[aws]'"

_LOG_IN = (
    "give credentials with  aws configure   (or  aws sso login , or the variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
    "AWS_SESSION_TOKEN; another profile with AWS_PROFILE), check them with  aws sts get-caller-identity , then repeat the command"
)
_RENEW = (
    "renew them with  aws sso login   (--profile NAME if you use one; or set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
    "AWS_SESSION_TOKEN), then repeat the command"
)
_REACH = (
    "check the network, the region, a proxy (HTTPS_PROXY) and AWS_ENDPOINT_URL, for example with  aws sts get-caller-identity , "
    "then repeat the command"
)
_LATER = "wait a minute and repeat the command"
_KEY = "check the key with  aws kms describe-key --key-id KEY   and that its policy lets you use it, or leave the KMS key out"

# an operation of S3 whose permission has another name
_S3_ACTIONS = {
    "HeadBucket": "s3:ListBucket", "ListObjects": "s3:ListBucket", "ListObjectsV2": "s3:ListBucket", "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject", "GetObjectAttributes": "s3:GetObject", "PutObject": "s3:PutObject", "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject", "UploadPartCopy": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "AbortMultipartUpload": "s3:AbortMultipartUpload", "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject", "CreateBucket": "s3:CreateBucket", "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts", "PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
}  # fmt: skip

THROTTLED = frozenset(
    "Throttling ThrottlingException ThrottledException RequestThrottledException RequestThrottled TooManyRequestsException "
    "RequestLimitExceeded BandwidthLimitExceeded SlowDown EC2ThrottledException ProvisionedThroughputExceededException 429 509".split()
)
_DENIED = frozenset(
    "AccessDenied AccessDeniedException UnauthorizedOperation AuthorizationError NotAuthorized AllAccessDisabled 403".split()
)
_EXPIRED = frozenset(
    "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired SSOTokenLoadError UnauthorizedSSOTokenError "
    "TokenRetrievalError SSOError LoginError NoAuthTokenError".split()
)
_NO_CREDENTIALS = frozenset(
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError MetadataRetrievalError InvalidClientTokenId "
    "UnrecognizedClientException InvalidAccessKeyId InvalidToken AuthFailure MissingAuthenticationToken "
    "MissingAuthenticationTokenException OptInRequired IncompleteSignature RefreshWithMFAUnsupportedError UnknownCredentialError".split()
)
_SILENT = frozenset(
    "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError ResponseStreamingError IncompleteReadError "
    "ConnectionError HTTPClientError OSError".split()
)
_INTERNAL = frozenset(
    "InternalError InternalFailure InternalServerError InternalServerException InternalServiceError InternalServiceException "
    "ServiceUnavailable ServiceUnavailableException ServiceUnavailableError RequestTimeout RequestTimeoutException RequestAbortedException "
    "500 502 503 504".split()
)
_ELSEWHERE = frozenset(
    "PermanentRedirect TemporaryRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
    "InvalidLocationConstraint 301 307".split()
)


class _Fact(NamedTuple):
    """An error, as the remedies see it."""

    said: str
    action: str | None
    error: dict[str, Any]
    headers: dict[str, str]


def error_code(exc: BaseException) -> str:
    """The code that AWS gave, such as `ResourceInUse` or, for an answer without a body, `404`; else the name of the error's class."""
    if (error := _response(exc).get("Error")) is not None:
        return str(error.get("Code") or _response(exc).get("ResponseMetadata", {}).get("HTTPStatusCode") or "Unknown")
    return type(exc).__name__


def is_passing(exc: BaseException) -> bool:
    """Whether the same question may be answered later: throttling, a fault of the service or of the network."""
    status = _response(exc).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or bool(_names(exc) & (THROTTLED | _INTERNAL | _SILENT | {"ProxyConnectionError", "ResponseParserError"}))


def refusal(exc: BaseException, what: str, action: str | None) -> str:
    """What happened and what to type next, for an error of botocore, boto3 or s3transfer.

    `what` ends the sentence "AWS was asked ...", such as "to start training job trim-1"; `action` is the IAM action that is needed,
    such as "sagemaker:CreateTrainingJob", for where AWS itself does not name it. No secret is in the text. Pure.
    """
    exc = _cause(exc)
    response = _response(exc)
    error = response.get("Error", {})
    said = " ".join(str(error.get("Message") or exc).split())[:1_000].rstrip(" .")
    code = error_code(exc)
    if response and code not in said:
        said = f"{code}: {said}"
    headers = {str(key).lower(): str(value) for key, value in response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).items()}
    fact = _Fact(said, action or _S3_ACTIONS.get(getattr(exc, "operation_name", "")), error, headers)
    names = _names(exc)
    remedy = next((remedy for group, remedy in _REMEDIES if group & names), None)
    if remedy is None:
        remedy = _LATER if response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 else _mend
    verb = "does not answer" if _is_silence(names) else "and refused" if response else "and it failed"
    subject = f"AWS was asked {what} {'and ' if verb == 'does not answer' else ''}{verb}"
    return redact(f"{subject} ({said}): {remedy if isinstance(remedy, str) else remedy(fact)}")


@contextlib.contextmanager
def asking(what: str, *, action: str | None = None, error: type[TrimtabError] = BackendError) -> Iterator[None]:
    """Raise what boto3 raises inside as `error`, in our words; the original is its `__cause__`.

    No credentials, no boto3 and no answer are BackendUnavailable where `error` allows for it (BackendError). `what` and `action` are
    `refusal`'s.
    """
    with needs_boto3():
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from s3transfer.exceptions import RetriesExceededError
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error, RetriesExceededError, ResponseParserError, ConnectionError, TimeoutError) as exc:
        names = _names(_cause(exc))
        gone = _is_silence(names) or bool(names & (_NO_CREDENTIALS | _EXPIRED))
        kind = BackendUnavailable if gone and issubclass(BackendUnavailable, error) else error
        raise kind(refusal(exc, what, action)) from exc


@contextlib.contextmanager
def needs_boto3() -> Iterator[None]:
    """Turns an import of boto3 or botocore that fails into BackendUnavailable with the remedy."""
    try:
        yield
    except ImportError as exc:
        raise BackendUnavailable(BOTO3_REMEDY) from exc


def _response(exc: BaseException) -> dict[str, Any]:
    response = getattr(exc, "response", None)
    return response if isinstance(response, dict) else {}


def _cause(exc: BaseException) -> BaseException:
    """The error behind one of boto3's transfer libraries, which wrap it."""
    while type(exc).__module__.partition(".")[0] in ("boto3", "s3transfer"):
        inner = getattr(exc, "last_exception", None) or exc.__cause__ or exc.__context__
        if inner is None:
            break
        exc = inner
    return exc


def _names(exc: BaseException) -> set[str]:
    status = _response(exc).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return {error_code(exc), f"HTTP{status}", *(cls.__name__ for cls in type(exc).__mro__)}


def _is_silence(names: set[str]) -> bool:
    return bool(names & (_SILENT | {"SSLError", "ProxyConnectionError", "ResponseParserError"})) and not names & THROTTLED


def _denied(fact: _Fact) -> str:
    named = re.search(r"not authorized to perform:? ([a-z0-9-]+:[A-Za-z*]+)", fact.said)
    action = named[1] if named else fact.action
    principal = re.search(r"User: (arn:[^\s]+)", fact.said)
    who = principal[1] if principal else "your user or role (see  aws sts get-caller-identity )"
    if action is None:
        return f"{who} lacks a permission: ask an administrator to allow what is named above, then repeat the command"
    if denial := re.search(r"explicit deny in an? ([\w-]+(?: [\w-]+){0,4} (?:policy|boundary))", fact.said):
        return f"{who} is denied {action} by the {denial[1]}: ask an administrator to lift that; allowing it elsewhere is not enough"
    resource = re.search(r"on resource: \"?([^\s\"]+)", fact.said)
    on = f" on {resource[1]}" if resource else ""
    if action == "iam:PassRole":
        return (
            f"{who} may not hand that role to SageMaker: ask an administrator to allow iam:PassRole{on} to {who}, then repeat the command"
        )
    hint = f"; {_KEY}" if action.startswith("kms:") else ""
    return f"{who} lacks the permission {action}{on}: ask an administrator to attach a policy that allows it, then repeat the command{hint}"


def _other_region(fact: _Fact) -> str:
    region = fact.headers.get("x-amz-bucket-region") or fact.error.get("Region")
    region = region or next(iter(re.findall(r"expecting '([a-z0-9-]+)'", fact.said)), None)
    if region is None:
        return (
            "the bucket is in another region: find it with  aws s3api get-bucket-location --bucket BUCKET , then use that region or a "
            "bucket of this one"
        )
    return f"the bucket is in {region}: use that region with  --backend-option region={region} , or a bucket of the region you use"


def _no_quota(fact: _Fact) -> str:
    name = re.search(r"service limit '([^']+)' is ([\d.]+)", fact.said)
    if name is None:
        return (
            "see your quotas with  aws service-quotas list-service-quotas --service-code sagemaker , ask for more, or wait for other jobs "
            "to end"
        )
    used, more = (re.search(rf"{label} of ([\d.]+)", fact.said) for label in ("current utilization", "request delta"))
    wanted = int(float(used[1]) + float(more[1])) if used and more else "N"
    return (
        f"the quota '{name[1]}' of the account is {name[2]}: find its code with  aws service-quotas list-service-quotas --service-code "
        f"sagemaker --query \"Quotas[?QuotaName=='{name[1]}'].QuotaCode\"  and ask for more with  aws service-quotas "
        f"request-service-quota-increase --service-code sagemaker --quota-code CODE --desired-value {wanted} , or wait for other jobs to "
        "end, or choose another instance type"
    )


def _absent_s3(fact: _Fact) -> str:
    bucket = fact.error.get("BucketName", "BUCKET")
    return f"make the bucket with  aws s3 mb s3://{bucket}   or name another; yours are shown by  aws s3 ls"


def _invalid(fact: _Fact) -> str:
    if "ould not assume role" in fact.said:
        return (
            "the role must exist and trust sagemaker.amazonaws.com: see  aws iam get-role --role-name ROLE   and name another role, or "
            "mend its trust policy, then repeat the command"
        )
    return "change what it names and repeat the command"


def _mend(fact: _Fact) -> str:
    if re.search(r"\bkms\b|\bKMS\b", fact.said):
        return _KEY
    return "mend what it names and repeat the command"


# the first group that holds a name of the error, or its code, gives the remedy
_REMEDIES: list[tuple[frozenset[str], str | Callable[[_Fact], str]]] = [
    (
        frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"}),
        "this machine's clock is wrong: set it (timedatectl set-ntp true), then repeat",
    ),
    (
        frozenset({"SignatureDoesNotMatch", "InvalidSignatureException"}),
        "the secret key does not belong to the key id, or this machine's clock is wrong: set both again with  aws configure , compare  "
        "date -u   with a clock, check with  aws sts get-caller-identity , then repeat the command",
    ),
    (_EXPIRED, _RENEW),
    (_NO_CREDENTIALS, _LOG_IN),
    (frozenset({"ProfileNotFound"}), "see your profiles with  aws configure list-profiles , then set AWS_PROFILE to one, or unset it"),
    (frozenset({"ConfigParseError", "ConfigNotFound", "InvalidConfigError"}), "mend the file ~/.aws/config or ~/.aws/credentials"),
    (
        frozenset({"InvalidRegionError", "UnknownRegionError", "NoRegionError", "UnknownEndpointError", "ServiceNotInRegionError"}),
        "name a region with  export AWS_REGION=us-east-1   or  --backend-option region=us-east-1 ; AWS's regions are shown by  "
        "aws account list-regions",
    ),
    (
        frozenset({"ValueError", "InvalidEndpointConfigurationError"}),
        "AWS_ENDPOINT_URL and the endpoint_url of a profile begin with http:// or https:// : correct or unset them",
    ),
    (
        frozenset({"KMSAccessDeniedException", "KMS.AccessDeniedException"}),
        _KEY,
    ),
    (_DENIED, _denied),
    (_ELSEWHERE, _other_region),
    (THROTTLED, "other programs of the account ask as much: wait a minute and repeat the command; what was done so far is kept"),
    (frozenset({"ResourceLimitExceeded", "LimitExceededException", "ServiceQuotaExceededException"}), _no_quota),
    (
        frozenset({"CapacityError", "InsufficientInstanceCapacity", "InsufficientCapacityException"}),
        "AWS has no such machine free in this region now: wait and repeat the command, or choose another instance type or region",
    ),
    (frozenset({"NoSuchBucket"}), _absent_s3),
    (frozenset({"NoSuchKey"}), "see what is there with  aws s3 ls s3://BUCKET/PREFIX/"),
    (frozenset({"404"}), "check the name, see what is there with  aws s3 ls s3://BUCKET/PREFIX/   and repeat the command"),
    (
        frozenset({"BucketAlreadyExists"}),
        "names of buckets are shared by all accounts of AWS: choose another bucket and repeat the command",
    ),
    (
        frozenset({"ResourceInUse", "ResourceInUseException", "ConflictException"}),
        "the name is taken, or what it names is changing: wait for it, or choose another name, and see  trimtab list",
    ),
    (frozenset({"ResourceNotFound", "ResourceNotFoundException"}), "check the name and the region; runs are shown by  trimtab list"),
    (
        frozenset({"HTTP501", "NotImplemented", "UnknownOperationException"}),
        "what answers there does not offer this: unset AWS_ENDPOINT_URL, or give the service's own address with "
        "AWS_ENDPOINT_URL_<SERVICE>, such as AWS_ENDPOINT_URL_SAGEMAKER",
    ),
    (
        frozenset({"FlexibleChecksumError", "ChecksumError", "BadDigest", "XAmzContentChecksumMismatch"}),
        "the data was changed on its way: repeat the command, which sends or fetches it again",
    ),
    (frozenset({"ValidationException", "ValidationError", "ParamValidationError"}), _invalid),
    (
        frozenset({"SSLError"}),
        "the certificate was refused: behind a proxy that opens TLS, name its certificates with  export AWS_CA_BUNDLE=FILE ; check also "
        "that AWS_ENDPOINT_URL begins with the right one of http:// and https://",
    ),
    (
        frozenset({"ProxyConnectionError", "InvalidProxiesConfigError"}),
        "check HTTPS_PROXY and NO_PROXY, or unset them, then repeat the command",
    ),
    (
        frozenset({"ResponseParserError"}),
        "something between here and AWS answered in its place, such as a proxy or a login page: check HTTPS_PROXY, NO_PROXY and "
        "AWS_ENDPOINT_URL, then repeat the command",
    ),
    (_INTERNAL, f"AWS is in trouble: {_LATER}; its state is at https://health.aws.amazon.com/health/status"),
    (_SILENT, _REACH),
]
