"""How a run stands, from what SageMaker describes of its training job and from what the run said. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.aws.instances import instead_of
from trimtab.backends.base import RunHandle, RunState, RunStatus
from trimtab.events import Event, Finished, Step

DONE = ("Completed", "Failed", "Stopped")

_STATES = {"Completed": RunState.SUCCEEDED, "Failed": RunState.FAILED, "Stopped": RunState.STOPPED}
_FAILURE = re.compile(
    r"^(?:AlgorithmError|ClientError|InternalServerError): (?P<cause>.*?)(?:,?\s*exit code: (?P<code>-?\d+))?$", re.DOTALL
)
_KILLED = "137"  # 128 + SIGKILL


def standing(handle: RunHandle, described: Mapping[str, Any], events: Sequence[Event]) -> RunStatus:
    """The status of a run; `described` is DescribeTrainingJob's answer for its newest life, `events` what that life said."""
    step = next((event for event in reversed(events) if isinstance(event, Step)), None)
    word = next((event for event in reversed(events) if isinstance(event, Finished)), None)
    progress = step.step / step.of if step else 0.0
    status, secondary = described["TrainingJobStatus"], described.get("SecondaryStatus", "")
    if status not in _STATES:
        training = secondary in ("Training", "Uploading", "Stopping", "Interrupted", "Restarting")
        return RunStatus(
            state=RunState.RUNNING if training else RunState.PENDING,
            reason="" if secondary == "Training" and step else message(described),
            progress=progress,
            eta=step.seconds_left if step and secondary == "Training" else None,
            step=step,
        )
    if status == "Completed":
        return RunStatus(state=RunState.SUCCEEDED, reason=word.reason if word else "", progress=1.0, eta=0.0, step=step)
    reason = _stopped(secondary, handle, described) if status == "Stopped" else failure(handle, described)
    return RunStatus(state=_STATES[status], reason=reason, progress=progress, step=step)


def message(described: Mapping[str, Any]) -> str:
    """What SageMaker says of the training job now, such as `Downloading: Downloading input data`."""
    transitions = described.get("SecondaryStatusTransitions") or []
    said = transitions[-1].get("StatusMessage", "") if transitions else ""
    return ": ".join(part for part in (described.get("SecondaryStatus", ""), said) if part)


def _stopped(secondary: str, handle: RunHandle, described: Mapping[str, Any]) -> str:
    limits = described.get("StoppingCondition", {})
    why = {
        "MaxRuntimeExceeded": f"its time limit of {limits.get('MaxRuntimeInSeconds', 0) / 60:g} minutes was reached",
        "MaxWaitTimeExceeded": f"no spot instance within {limits.get('MaxWaitTimeInSeconds', 0) / 60:g} minutes of waiting and running",
    }.get(secondary, "stopped on request")
    return f"{why}; {_again(handle)}"


def failure(handle: RunHandle, described: Mapping[str, Any]) -> str:
    """SageMaker's failure reason as the run's own cause, and where there is none, what it means; ends with what to type."""
    said, kind = described.get("FailureReason", ""), described.get("ResourceConfig", {}).get("InstanceType", "")
    found = _FAILURE.match(said.strip())
    cause, code = (found["cause"], found["code"]) if found else (said, None)
    cause = cause.partition("\nTraceback (most recent call last)")[0].strip().rstrip(",").strip()
    if "capacityerror" in said.lower() or "insufficient capacity" in said.lower():
        other = instead_of(kind)
        another = f" or on another type with  trimtab resume {handle} --backend-option instance_type={other.name}" if other else ""
        return f"{said.strip()}; no {kind or 'instance of that type'} is free now: try it later with  trimtab resume {handle}{another}"
    if cause and not (code == _KILLED and _bare(cause)):
        return cause
    how = {_KILLED: "killed? out of memory?", None: "SageMaker gave no reason"}.get(code, f"exit code {code}")
    return f"ended without a word ({how}); {_again(handle)}, perhaps on a larger instance:  --backend-option instance_type=..."


def _bare(cause: str) -> bool:
    """Whether a failure's cause says no more than that there was one."""
    return not cause or cause.lower().startswith(("please use an instance type with more memory", "framework error", "executeusers"))


def _again(handle: RunHandle) -> str:
    return f"continue from its newest checkpoint with:  trimtab resume {handle}"
