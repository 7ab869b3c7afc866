"""What the control plane answers instead of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """An error answer: the service's `code`, its `message`, the HTTP `status`, further members of the error's shape."""

    def __init__(self, code: str, message: str, status: int = 400, members: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status, self.members = code, message, status, dict(members or {})


def invalid(message: str) -> Refused:
    """SageMaker's ValidationException, which it also answers for what does not exist."""
    return Refused("ValidationException", message)
