"""Clients of one account and region: credentials and endpoints as boto3 finds them, patience as a command line needs it."""

from __future__ import annotations

import os
import threading
from functools import cached_property
from typing import Any

from trimtab.aws.refusals import asking, needs_boto3, refusal
from trimtab.errors import BackendUnavailable

# Seconds that a connection may take and attempts in all; seconds without a byte, by service. With botocore's back-off eight attempts
# outlast half a minute of throttling, and three seconds of refused connections. An answer of a model is neither quick nor free.
_CONNECT_SECONDS = 5
_PATIENCE = {"s3": (60, 8), "sagemaker-runtime": (75, 2)}
_USUAL_PATIENCE = (30, 8)

NO_REGION = (
    "no AWS region is set: give one with  --backend-option region=us-east-1  or  export AWS_REGION=us-east-1  "
    "or keep one with  aws configure set region us-east-1"
)


class Aws:
    """One account and region of AWS. Nothing is asked and boto3 is not imported before the first use.

    `region` defaults to AWS_REGION, AWS_DEFAULT_REGION, then the profile's; `profile` to AWS_PROFILE. A ready `boto3.Session` can be
    given instead of a profile. AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_<SERVICE> are honoured by boto3 itself. Everything raises
    BackendUnavailable with the remedy where boto3, the profile, the region or credentials are missing.
    """

    def __init__(self, region: str | None = None, profile: str | None = None, session: Any = None) -> None:
        self._region, self._profile, self._given = region, profile, session
        self._clients: dict[str, Any] = {}
        self._lock = threading.RLock()  # clients may be shared by threads, making them may not

    @cached_property
    def session(self) -> Any:
        """The boto3 session."""
        if self._given is not None:
            return self._given
        with needs_boto3():
            import boto3
        from botocore.exceptions import BotoCoreError

        try:
            return boto3.Session(profile_name=self._profile)
        except BotoCoreError as exc:  # no such profile, a configuration file that cannot be read
            raise BackendUnavailable(refusal(exc, "to find credentials", None)) from exc

    @cached_property
    def region(self) -> str:
        # boto3 by itself knows AWS_DEFAULT_REGION only; AWS's other tools put AWS_REGION first
        found = self._region or (os.environ.get("AWS_REGION") if self._given is None else None) or self.session.region_name
        if not found:
            raise BackendUnavailable(NO_REGION)
        return str(found)

    @cached_property
    def _caller(self) -> dict[str, str]:
        with asking("who you are", action="sts:GetCallerIdentity"):
            caller: dict[str, str] = self.client("sts").get_caller_identity()
        return caller

    @property
    def account(self) -> str:
        """The account's twelve digits, asked once."""
        return self._caller["Account"]

    @property
    def principal(self) -> str:
        """The ARN of the user or the assumed role that asks."""
        return self._caller["Arn"]

    @property
    def partition(self) -> str:
        """The region's partition, by its name: `aws`, `aws-cn`, `aws-us-gov`, ... Nothing is asked."""
        return str(self.session.get_partition_for_region(self.region))

    def client(self, service: str) -> Any:
        """The boto3 client of a service, one for all threads; the same each time."""
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._new_client(service)
            return self._clients[service]

    def _new_client(self, service: str) -> Any:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        session = self.session
        silence, attempts = _PATIENCE.get(service, _USUAL_PATIENCE)
        configured = session._session.get_config_variable  # what AWS_MAX_ATTEMPTS, AWS_RETRY_MODE or the profile say comes first
        config = Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=silence,
            tcp_keepalive=True,  # routers and NAT gateways forget a connection that is silent for minutes
            max_pool_connections=32,
            retries={
                "total_max_attempts": configured("max_attempts") or attempts,
                "mode": "adaptive" if configured("retry_mode") == "adaptive" else "standard",
            },
            user_agent_extra=_user_agent(),
        )
        try:
            client = session.client(service, region_name=self.region, config=config)
        except (BotoCoreError, ValueError) as exc:  # ValueError: an endpoint that is no URL
            raise BackendUnavailable(refusal(exc, f"for a client of {service}", None)) from exc
        client.meta.events.register("after-call", refuse_page)
        return client

    def close(self) -> None:
        """Close every connection. Clients asked for afterwards are new ones."""
        with self._lock:
            while self._clients:
                self._clients.popitem()[1].close()

    def __enter__(self) -> Aws:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def refuse_page(http_response: Any, **_: Any) -> None:
    """Raise ResponseParserError for a web page in place of an answer: botocore takes one for an empty answer of a JSON service.

    A handler of botocore's event `after-call`.
    """
    from botocore.parsers import ResponseParserError

    kind = http_response.headers.get("content-type", "")
    if http_response.status_code < 300 and kind.startswith("text/html"):
        raise ResponseParserError(f"a web page ({kind}) in place of an answer")


def _user_agent() -> str:
    from importlib.metadata import version

    return f"trimtab/{version('trimtab')}"
