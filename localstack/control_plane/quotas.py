"""How many instances an account may use at once, under the names that Service Quotas has for SageMaker.

The names are AWS's; the default figures are this emulator's own (a new account's differ and change): 20 instances of each CPU type for
training, spot training and endpoints, none of an accelerated type, and no warm pools, which is AWS's own default for these.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from typing import Any, Literal

Usage = Literal["training job", "spot training job", "training warm pool", "endpoint"]
USAGES: tuple[Usage, ...] = ("training job", "spot training job", "training warm pool", "endpoint")
SERVICE, SERVICE_NAME = "sagemaker", "Amazon SageMaker"
_CPU = re.compile(r"ml\.(t|m|c|r)\d")
_DEFAULT = 20.0


def quota_name(instance_type: str, usage: Usage) -> str:
    """`ml.m7i.4xlarge for spot training job usage`."""
    return f"{instance_type} for {usage} usage"


def quota_code(name: str) -> str:
    """A code of AWS's form; AWS's own codes are not published as a list, so it is made from the name."""
    return f"L-{hashlib.sha256(name.encode()).hexdigest()[:8].upper()}"


def default_value(name: str) -> float:
    """Instances of a type that an account has when nobody set another number."""
    return _DEFAULT if _CPU.match(name) and "warm pool" not in name else 0.0


@dataclass(frozen=True)
class Quota:
    """One line of the table."""

    name: str
    value: float

    def answer(self, account: str, region: str) -> dict[str, Any]:
        """The ServiceQuota structure of the Service Quotas API."""
        return {
            "ServiceCode": SERVICE,
            "ServiceName": SERVICE_NAME,
            "QuotaArn": f"arn:aws:servicequotas:{region}:{account}:{SERVICE}/{quota_code(self.name)}",
            "QuotaCode": quota_code(self.name),
            "QuotaName": self.name,
            "Value": self.value,
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
            "QuotaAppliedAtLevel": "ACCOUNT",
        }


class Quotas:
    """One account's table in one region. Thread-safe."""

    def __init__(self, account: str, region: str) -> None:
        self.account, self.region = account, region
        self._lock = threading.Lock()
        self._set: dict[str, float] = {}

    def set(self, name: str, value: float) -> None:
        """Sets a quota by its name. Raises ValueError for a name that is none, or a negative value."""
        if re.fullmatch(rf"ml\.[a-z0-9\-]+\.[a-z0-9\-]+ for ({'|'.join(USAGES)}) usage", name) is None:
            raise ValueError(f"{name!r} is no quota's name; they read like 'ml.m7i.4xlarge for spot training job usage'")
        if value < 0:
            raise ValueError(f"{name}: {value} is below 0")
        with self._lock:
            self._set[name] = float(value)

    def get(self, name: str) -> float:
        """The value that holds."""
        with self._lock:
            return self._set.get(name, default_value(name))

    def table(self, training_types: list[str], endpoint_types: list[str]) -> list[Quota]:
        """Every quota, sorted by name; the instance types as botocore's model lists them."""
        names = {quota_name(each, usage) for each in training_types for usage in USAGES if usage != "endpoint"}
        names |= {quota_name(each, "endpoint") for each in endpoint_types}
        with self._lock:
            names |= set(self._set)
        return [Quota(name, self.get(name)) for name in sorted(names)]
