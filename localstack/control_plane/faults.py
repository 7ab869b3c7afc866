"""What goes wrong on request: answers that are errors, late, or lost on their way, and instances that are not to be had."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from control_plane.refusal import Refused

KINDS = ("answer", "capacity")
CAPACITY = "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance type."
_KNOWN = {  # code -> (HTTP status, message) when the fault says neither; the texts are AWS's
    "ThrottlingException": (400, "Rate exceeded"),
    "ExpiredTokenException": (400, "The security token included in the request is expired"),
    "UnrecognizedClientException": (400, "The security token included in the request is invalid."),
    "AccessDeniedException": (
        400,
        "User: {user} is not authorized to perform: {action} on resource: {resource} because no identity-based policy allows the"
        " {action} action",
    ),
    "InternalFailure": (500, "The request processing has failed because of an unknown error, exception or failure."),
    "ServiceUnavailable": (503, "The request has failed due to a temporary failure of the server."),
}  # fmt: skip


@dataclass
class Fault:
    """One fault, for the next `times` calls of `operation` ("*": any operation), or, of the kind `capacity`, the next training jobs.

    `code`, `status`, `message`: the error answered (no code: no error, e.g. only `hang`). `after`: the operation is carried out first and
    its answer replaced. `drop`: the connection is closed without any answer. `hang`: seconds before the answer; of
    a capacity fault, seconds until the instances are to be had (0: never, the job fails). `instance_type`: of a capacity fault, the only
    type that is not to be had. `times` below 0: until it is cleared.
    """

    operation: str = "*"
    code: str = ""
    status: int = 0
    message: str = ""
    times: int = 1
    after: bool = False
    drop: bool = False
    hang: float = 0.0
    kind: Literal["answer", "capacity"] = "answer"
    instance_type: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "answer" and not (self.code or self.drop or self.hang):
            raise ValueError("a fault needs a code, drop or hang")

    @classmethod
    def read(cls, fault: dict[str, Any]) -> Fault:
        """From the JSON of `POST /_control/faults`. Raises ValueError for a member that is none, or of another type."""
        types = {each.name: type(each.default) for each in fields(cls)}
        for name, value in fault.items():
            if name not in types:
                raise ValueError(f"a fault has no {name!r}; it has {', '.join(types)}")
            if type(value) is not types[name] and not (types[name] is float and type(value) is int):
                raise ValueError(f"{name}={value!r} is no {types[name].__name__}")
        return cls(**fault)

    def refusal(self, *, user: str, action: str, resource: str) -> Refused | None:
        """The error it answers, if it answers one."""
        if not self.code:
            return None
        status, message = _KNOWN.get(self.code, (400, self.code))
        said = self.message or message.format(user=user, action=action, resource=resource)
        return Refused(self.code, said, self.status or status)


class Faults:
    """The faults that are still to come. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def waiting(self) -> list[Fault]:
        """What is still to come."""
        with self._lock:
            return list(self._waiting)

    def take(self, operation: str) -> Fault | None:
        """The fault that a call meets, counted."""
        return self._take(lambda each: each.kind == "answer" and each.operation in ("*", operation))

    def take_capacity(self, instance_types: set[str]) -> Fault | None:
        """The shortage that a job on these types meets, counted."""
        return self._take(lambda each: each.kind == "capacity" and (not each.instance_type or each.instance_type in instance_types))

    def _take(self, meets: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for fault in self._waiting:
                if fault.times != 0 and meets(fault):
                    fault.times -= 1
                    if fault.times == 0:
                        self._waiting.remove(fault)
                    return fault
        return None
