"""What AWS and the way to it refuse, in our words: every error that a user meets names what happened and what to type."""

from __future__ import annotations

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore import exceptions
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from trimtab.aws.refusals import asking, error_code, is_passing, refusal
from trimtab.errors import BackendError, BackendUnavailable, StagingError, TrimtabError

ROLE = "arn:aws:sts::111122223333:assumed-role/DataScience/ada"
URL = "https://api.sagemaker.us-east-1.amazonaws.com/"


def answered(
    code: str, message: str = "", operation: str = "CreateTrainingJob", status: int = 400, headers: dict | None = None, **error: str
):
    """An answer of AWS, as botocore raises it."""
    response = {
        "Error": {"Code": code, "Message": message, **error},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers or {}, "RetryAttempts": 0},
    }
    return ClientError(response, operation)


# (the error, the action given, what the message must say, the class at the border)
TABLE = {
    "denied, action and principal named": (
        answered(
            "AccessDeniedException",
            f"User: {ROLE} is not authorized to perform: sagemaker:CreateTrainingJob on resource: "
            "arn:aws:sagemaker:us-east-1:111122223333:training-job/trim-1 because no identity-based policy allows the "
            "sagemaker:CreateTrainingJob action",
        ),
        "other:Action",
        [f"{ROLE} lacks the permission sagemaker:CreateTrainingJob", "training-job/trim-1", "attach a policy"],
        BackendError,
    ),
    "denied, bare": (
        answered("AccessDenied", "Access Denied", "PutObject", 403),
        None,
        ["lacks the permission s3:PutObject", "aws sts get-caller-identity"],
        BackendError,
    ),
    "denied, action given": (
        answered("AccessDenied", "no", "GetLogEvents"),
        "logs:GetLogEvents",
        ["permission logs:GetLogEvents"],
        BackendError,
    ),
    "denied, nothing known": (answered("AccessDenied", "no", "Odd"), None, ["ask an administrator to allow"], BackendError),
    "denied, no body": (answered("403", "Forbidden", "HeadObject", 403), None, ["permission s3:GetObject"], BackendError),
    "denied, ec2's word": (
        answered("UnauthorizedOperation", "You are not authorized to perform this operation.", "DescribeSubnets", 403),
        "ec2:DescribeSubnets",
        ["permission ec2:DescribeSubnets"],
        BackendError,
    ),
    "denied by an organisation": (
        answered(
            "AccessDeniedException",
            f"User: {ROLE} is not authorized to perform: sagemaker:CreateTrainingJob on resource: arn:aws:x with an explicit deny in a "
            "service control policy",
        ),
        None,
        ["by the service control policy", "allowing it elsewhere is not enough"],
        BackendError,
    ),
    "role may not be passed": (
        answered(
            "AccessDeniedException",
            f"User: {ROLE} is not authorized to perform: iam:PassRole on resource: arn:aws:iam::111122223333:role/Train because no "
            "identity-based policy allows the iam:PassRole action",
        ),
        "sagemaker:CreateTrainingJob",
        ["iam:PassRole on arn:aws:iam::111122223333:role/Train", ROLE],
        BackendError,
    ),
    "key may not be used": (
        answered(
            "AccessDenied", f"User: {ROLE} is not authorized to perform: kms:GenerateDataKey on resource: arn:aws:kms:x", "PutObject", 403
        ),
        None,
        ["lacks the permission kms:GenerateDataKey", "aws kms describe-key"],
        BackendError,
    ),
    "key disabled": (
        answered("KMS.DisabledException", "arn:aws:kms:x is disabled.", "PutObject"),
        None,
        ["aws kms describe-key"],
        BackendError,
    ),
    "token expired": (answered("ExpiredTokenException", "expired"), None, ["aws sso login", "AWS_SESSION_TOKEN"], BackendUnavailable),
    "token expired, s3": (answered("ExpiredToken", "expired", "UploadPart"), None, ["aws sso login"], BackendUnavailable),
    "sso expired": (exceptions.UnauthorizedSSOTokenError(), None, ["aws sso login", "--profile"], BackendUnavailable),
    "sso never": (exceptions.SSOTokenLoadError(error_msg="no token"), None, ["aws sso login"], BackendUnavailable),
    "sso refresh": (exceptions.TokenRetrievalError(provider="sso", error_msg="expired"), None, ["aws sso login"], BackendUnavailable),
    "no credentials": (exceptions.NoCredentialsError(), None, ["aws configure", "AWS_ACCESS_KEY_ID"], BackendUnavailable),
    "half credentials": (
        exceptions.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        None,
        ["missing: AWS_SECRET_ACCESS_KEY", "aws configure"],
        BackendUnavailable,
    ),
    "wrong key id": (
        answered("InvalidClientTokenId", "The security token included in the request is invalid."),
        None,
        ["aws configure"],
        BackendUnavailable,
    ),
    "no profile": (exceptions.ProfileNotFound(profile="work"), None, ["(work)", "aws configure list-profiles"], BackendError),
    "wrong secret": (answered("SignatureDoesNotMatch", "The request signature we"), None, ["aws configure", "date -u"], BackendError),
    "wrong clock": (answered("RequestTimeTooSkewed", "The difference"), None, ["clock", "timedatectl set-ntp true"], BackendError),
    "no bucket": (answered("NoSuchBucket", "no", "PutObject", 404, BucketName="mine"), None, ["aws s3 mb s3://mine"], BackendError),
    "bucket taken": (
        answered("BucketAlreadyExists", "The requested bucket name", "CreateBucket", 409),
        None,
        ["choose another"],
        BackendError,
    ),
    "no object": (answered("NoSuchKey", "The specified key", "GetObject", 404), None, ["aws s3 ls"], BackendError),
    "bucket elsewhere, by header": (
        answered("PermanentRedirect", "The bucket you are", "PutObject", 301, {"x-amz-bucket-region": "eu-west-1"}),
        None,
        ["the bucket is in eu-west-1", "region=eu-west-1"],
        BackendError,
    ),
    "bucket elsewhere, by message": (
        answered(
            "AuthorizationHeaderMalformed", "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'"
        ),
        None,
        ["the bucket is in eu-west-1"],
        BackendError,
    ),
    "bucket elsewhere, no body": (answered("301", "", "HeadBucket", 301), None, ["aws s3api get-bucket-location"], BackendError),
    "bucket elsewhere, on creation": (
        answered("IllegalLocationConstraintException", "The eu-west-1 location constraint is incompatible", "CreateBucket"),
        None,
        ["another region"],
        BackendError,
    ),
    "throttled": (answered("ThrottlingException", "Rate exceeded"), None, ["wait a minute and repeat"], BackendError),
    "throttled, s3": (answered("SlowDown", "Please reduce", "PutObject", 503), None, ["wait a minute and repeat"], BackendError),
    "throttled, ec2": (answered("RequestLimitExceeded", "Request limit exceeded."), None, ["wait a minute and repeat"], BackendError),
    "no quota": (
        answered(
            "ResourceLimitExceeded",
            "The account-level service limit 'ml.g5.12xlarge for training job usage' is 0 Instances, with current utilization of 1 "
            "Instances and a request delta of 2 Instances. Please use AWS Service Quotas to request an increase for this quota.",
        ),
        None,
        ["'ml.g5.12xlarge for training job usage' of the account is 0", "request-service-quota-increase", "--desired-value 3"],
        BackendError,
    ),
    "no quota, unnamed": (answered("ResourceLimitExceeded", "limit"), None, ["aws service-quotas list-service-quotas"], BackendError),
    "no capacity": (answered("CapacityError", "Unable to provision"), None, ["choose another instance type or region"], BackendError),
    "no capacity, ec2": (answered("InsufficientInstanceCapacity", "none"), None, ["another instance type"], BackendError),
    "invalid": (
        answered("ValidationException", "1 validation error detected: Value 'x' at 'trainingJobName' failed"),
        None,
        ["Value 'x' at 'trainingJobName' failed", "change what it names"],
        BackendError,
    ),
    "role not trusted": (
        answered("ValidationException", "Could not assume role arn:aws:iam::1:role/R. Please ensure that the role exists"),
        None,
        ["trust sagemaker.amazonaws.com", "aws iam get-role"],
        BackendError,
    ),
    "parameters": (
        exceptions.ParamValidationError(report='Missing required parameter in input: "RoleArn"'),
        None,
        ['"RoleArn"', "change"],
        BackendError,
    ),
    "name taken": (
        answered("ResourceInUse", "Training job names must be unique within an AWS account"),
        None,
        ["trimtab list"],
        BackendError,
    ),
    "not there": (answered("ResourceNotFound", "Requested resource not found."), None, ["trimtab list"], BackendError),
    "500": (answered("InternalFailure", "oops", status=500), None, ["AWS is in trouble", "repeat the command"], BackendError),
    "503, unknown code": (answered("Odd", "oops", status=503), None, ["repeat the command"], BackendError),
    "not offered": (answered("InternalFailure", "not yet emulated", status=501), None, ["AWS_ENDPOINT_URL_SAGEMAKER"], BackendError),
    "unknown code": (answered("Odd", "what is odd"), None, ["Odd: what is odd", "mend what it names"], BackendError),
    "no connection": (
        exceptions.EndpointConnectionError(endpoint_url=URL),
        None,
        ["does not answer", URL, "HTTPS_PROXY"],
        BackendUnavailable,
    ),
    "connect timeout": (exceptions.ConnectTimeoutError(endpoint_url=URL), None, ["does not answer"], BackendUnavailable),
    "read timeout": (exceptions.ReadTimeoutError(endpoint_url=URL), None, ["does not answer"], BackendUnavailable),
    "cut": (exceptions.ConnectionClosedError(endpoint_url=URL), None, ["does not answer"], BackendUnavailable),
    "cut in a body": (exceptions.ResponseStreamingError(error="IncompleteRead"), None, ["does not answer"], BackendUnavailable),
    "tls": (exceptions.SSLError(endpoint_url=URL, error="self-signed certificate"), None, ["AWS_CA_BUNDLE"], BackendUnavailable),
    "proxy": (exceptions.ProxyConnectionError(proxy_url="http://p:3128"), None, ["HTTPS_PROXY"], BackendUnavailable),
    "a page instead": (
        ResponseParserError("Unable to parse response (no element found), invalid XML received"),
        None,
        ["proxy"],
        BackendUnavailable,
    ),
    "no region": (exceptions.NoRegionError(), None, ["AWS_REGION"], BackendError),
    "odd region": (exceptions.InvalidRegionError(region_name="us east"), None, ["AWS_REGION"], BackendError),
    "damaged": (
        exceptions.FlexibleChecksumError(error_msg="Expected checksum a did not match"),
        None,
        ["changed on its way"],
        BackendError,
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_an_error_says_what_happened_and_what_to_type(case):
    error, action, parts, kind = TABLE[case]
    said = refusal(error, "to start training job trim-1", action)
    assert said.startswith("AWS was asked to start training job trim-1 and ")
    for part in parts:
        assert part in said
    assert "\n" not in said
    with pytest.raises(kind) as caught, asking("to start training job trim-1", action=action):
        raise error
    assert str(caught.value) == said
    assert caught.value.__cause__ is error
    assert type(caught.value) is kind


def test_the_class_asked_for_is_raised_also_for_silence():
    for error in (exceptions.NoCredentialsError(), exceptions.EndpointConnectionError(endpoint_url=URL), answered("AccessDenied")):
        with pytest.raises(StagingError), asking("to copy", error=StagingError):
            raise error
    with pytest.raises(BackendUnavailable), asking("to copy", error=TrimtabError):
        raise exceptions.NoCredentialsError()


def test_what_is_not_of_aws_passes():
    with pytest.raises(FileNotFoundError), asking("to copy"):
        raise FileNotFoundError("x")
    with pytest.raises(KeyError), asking("to copy"):
        raise KeyError("x")


def failing_copy() -> None:
    try:
        raise answered("AccessDenied", "Access Denied", "PutObject", 403)
    except ClientError as inner:
        raise S3UploadFailedError(f"Failed to upload a to b/c: {inner}")  # noqa: B904  as boto3 raises it


def failing_second_attempt() -> None:
    try:
        raise answered("NoSuchBucket")
    except ClientError:
        raise exceptions.EndpointConnectionError(endpoint_url=URL)  # noqa: B904


def test_the_error_inside_a_transfer_is_the_one_that_counts():
    with pytest.raises(BackendError, match="lacks the permission s3:PutObject"), asking("to copy"):
        failing_copy()


def test_an_error_met_while_another_was_looked_after_is_itself():
    with pytest.raises(BackendUnavailable, match="does not answer"), asking("to copy"):
        failing_second_attempt()


def test_no_secret_is_in_a_message():
    secret, token = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY", "hf_" + "aB3" * 11
    error = answered("ValidationException", f"aws_secret_access_key={secret} and {token} at http://ada:{'s3cret'}@proxy:3128/")
    said = refusal(error, f"for {token}", None)
    assert secret not in said
    assert token not in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("error", "code", "passing"),
    [
        (answered("ThrottlingException"), "ThrottlingException", True),
        (answered("Odd", status=502), "Odd", True),
        (answered("", status=404), "404", False),
        (answered("ResourceInUse"), "ResourceInUse", False),
        (answered("AccessDenied", status=403), "AccessDenied", False),
        (exceptions.ReadTimeoutError(endpoint_url=URL), "ReadTimeoutError", True),
        (exceptions.ConnectionClosedError(endpoint_url=URL), "ConnectionClosedError", True),
        (exceptions.NoCredentialsError(), "NoCredentialsError", False),
    ],
)
def test_what_passes_is_told_from_what_stays(error, code, passing):
    assert error_code(error) == code
    assert is_passing(error) is passing
