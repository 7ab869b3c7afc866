"""Clients of one account and region: where they ask, how patiently, and what they say when something is missing."""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import boto3
import pytest

from trimtab.aws.refusals import asking
from trimtab.aws.session import Aws
from trimtab.errors import BackendError, BackendUnavailable


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without credentials, region and profiles; the function writes its ~/.aws/config."""
    for name in (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return lambda text: (tmp_path / "config").write_text(text)


class Answering:
    """A server on loopback that answers every question with the next of `answers` (the last again and again) and keeps what was asked."""

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        asked = self.asked = []
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append((self.path, dict(self.headers), body))
                status, kind, text = left.pop(0) if len(left) > 1 else left[0]
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Answering:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


CALLER = (
    200,
    "text/xml",
    "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:iam::111122223333:user/ada</Arn><UserId>U</UserId>"
    "<Account>111122223333</Account></GetCallerIdentityResult></GetCallerIdentityResponse>",
)
THROTTLED = (400, "text/xml", "<ErrorResponse><Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error></ErrorResponse>")
BROKEN = (500, "text/xml", "<ErrorResponse><Error><Code>InternalFailure</Code><Message>oops</Message></Error></ErrorResponse>")


@pytest.fixture
def keys(home, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@contextlib.contextmanager
def asking_of(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, str, str]) -> Iterator[tuple[Answering, Aws]]:
    with Answering(*answers) as server, Aws() as aws:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server, aws


def test_the_import_loads_no_boto3():
    code = """
import sys, trimtab.aws.limits, trimtab.aws.logs, trimtab.aws.session
trimtab.aws.session.Aws()
print(*{"boto3", "botocore", "s3transfer"} & {*sys.modules})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_without_boto3_there_is_a_remedy():
    code = """
import sys
sys.modules["boto3"] = None  # as if it were not installed
from trimtab.aws.session import Aws
from trimtab.errors import BackendUnavailable
try:
    Aws(region="us-east-1").client("s3")
except BackendUnavailable as exc:
    print(exc)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "AWS needs boto3:  pip install 'trimtab[aws]'"


def test_the_region_is_the_one_given_then_the_environments_then_the_profiles(home, monkeypatch):
    with pytest.raises(BackendUnavailable, match="export AWS_REGION=us-east-1"):
        Aws().client("s3")
    home("[default]\nregion = eu-south-1\n[profile work]\nregion = eu-north-1\n")
    assert Aws().region == "eu-south-1"
    assert Aws(profile="work").region == "eu-north-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    assert Aws().region == "eu-west-2"
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert Aws().region == "eu-west-1"
    assert Aws("us-west-2").region == "us-west-2"
    given = Aws(session=boto3.Session(region_name="ap-south-1"))
    assert given.region == "ap-south-1"
    with given:
        assert given.client("s3").meta.region_name == "ap-south-1"


@pytest.mark.parametrize(("region", "partition"), [("us-east-1", "aws"), ("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")])
def test_the_partition_is_told_by_the_region(home, region, partition):
    assert Aws(region).partition == partition


def test_a_region_that_cannot_be_one_is_refused(keys):
    with pytest.raises(BackendUnavailable, match="AWS_REGION"):
        Aws("us east 1").client("s3")


def test_no_credentials(home):
    with Aws("us-east-1") as aws, pytest.raises(BackendUnavailable, match="aws configure"):
        _ = aws.account


def test_no_such_profile(home):
    with pytest.raises(BackendUnavailable, match="aws configure list-profiles"):
        Aws(profile="nobody").client("s3")


def test_an_expired_single_sign_on(home):
    home(
        "[default]\nregion = us-east-1\nsso_session = work\nsso_account_id = 111122223333\nsso_role_name = Train\n"
        "[sso-session work]\nsso_region = us-east-1\nsso_start_url = https://example.awsapps.com/start\n"
    )
    with Aws() as aws, pytest.raises(BackendUnavailable, match="aws sso login"):
        _ = aws.account


def test_an_endpoint_that_is_no_url(keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:4566")
    with pytest.raises(BackendUnavailable, match="begin with http://"):
        Aws().client("sts")


def test_who_asks_is_asked_once_and_the_client_is_the_same(keys, monkeypatch):
    with asking_of(monkeypatch, CALLER) as (server, aws):
        assert (aws.account, aws.account, aws.principal) == ("111122223333", "111122223333", "arn:aws:iam::111122223333:user/ada")
        assert len(server.asked) == 1
        assert " trimtab/" in server.asked[0][1]["User-Agent"]
        clients = []
        threads = [threading.Thread(target=lambda: clients.append(aws.client("logs"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(client) for client in clients}) == 1


def test_a_services_own_endpoint_comes_first_and_s3_is_asked_by_path(keys, monkeypatch):
    page = (200, "application/xml", "<ListBucketResult><Name>b</Name></ListBucketResult>")
    with Answering(CALLER) as general, asking_of(monkeypatch, page) as (special, aws):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", special.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", general.url)
        aws.client("s3").list_objects_v2(Bucket="trimtab-us-east-1-111122223333")
        assert aws.account == "111122223333"
        assert [path.partition("?")[0] for path, *_ in special.asked] == ["/trimtab-us-east-1-111122223333"]
        assert len(general.asked) == 1


def test_at_aws_itself_a_bucket_is_a_host(keys):
    with Aws() as aws:
        url = aws.client("s3").generate_presigned_url("get_object", Params={"Bucket": "some-bucket", "Key": "k"})
    assert url.startswith("https://some-bucket.s3.amazonaws.com/k")


@pytest.mark.parametrize("answers", [(THROTTLED, THROTTLED, CALLER), (BROKEN, BROKEN, BROKEN, BROKEN, CALLER)])
def test_throttling_and_faults_are_outlasted(keys, monkeypatch, answers):
    with asking_of(monkeypatch, *answers) as (server, aws):
        assert aws.account == "111122223333"
        assert len(server.asked) == len(answers)


def test_throttling_that_stays_is_told_and_the_users_number_of_attempts_holds(keys, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with asking_of(monkeypatch, THROTTLED) as (server, aws):
        with pytest.raises(BackendError, match="other programs of the account ask as much"):
            _ = aws.account
        assert len(server.asked) == 2


def test_a_page_of_a_proxy_is_told(keys, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    page = (200, "text/html", "<html><body>Please log in<br></body></html>")
    with asking_of(monkeypatch, page) as (_, aws), pytest.raises(BackendUnavailable, match="such as a proxy or a login page"):
        _ = aws.account


def test_a_page_of_a_proxy_is_told_by_a_json_service_too(keys, monkeypatch):
    page = (200, "text/html; charset=utf-8", "<html><body>Please log in<br></body></html>")
    with (
        asking_of(monkeypatch, page) as (_, aws),
        pytest.raises(BackendUnavailable, match="such as a proxy or a login page"),
        asking("for jobs"),
    ):
        aws.client("sagemaker").list_training_jobs()


def test_a_closed_port_is_told_within_seconds(keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    with Aws() as aws, pytest.raises(BackendUnavailable, match="does not answer"), asking("for a list", action="s3:ListBucket"):
        aws.client("s3").list_objects_v2(Bucket="b")
    assert time.monotonic() - begun < 30


def test_closed_clients_are_made_anew(keys, monkeypatch):
    with asking_of(monkeypatch, CALLER) as (_, aws):
        first = aws.client("sts")
        aws.close()
        assert aws.client("sts") is not first
        assert aws.account == "111122223333"
