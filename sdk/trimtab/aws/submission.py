"""A training job that is created once, however often its request has to be sent."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from trimtab.aws.refusals import asking, error_code, is_passing
from trimtab.aws.request import SUBMISSION_TAG, tags_of
from trimtab.aws.session import Aws
from trimtab.errors import BackendError

_APPEARING = 10.0  # seconds in which a job may still appear whose request was sent and not answered


class Submission:
    """One wish to create the job of `request`. CreateTrainingJob has no token of the client's, but names are unique: a tag tells whose job
    it is that has the name. `taken` is said when it is another's."""

    def __init__(self, aws: Aws, request: Mapping[str, Any], taken: str) -> None:
        self._client = aws.client("sagemaker")
        self._tag = {"Key": SUBMISSION_TAG, "Value": uuid.uuid4().hex}
        self._request = {**request, "Tags": [*request["Tags"], *tags_of({self._tag["Key"]: self._tag["Value"]})]}
        self._name, self._taken = request["TrainingJobName"], taken
        self._unclear = False  # whether a request was sent whose outcome nobody told

    def send(self) -> None:
        """Raises BackendError when the job is not there afterwards, or nobody can say whether it is."""
        self._unclear = True
        try:
            with asking(f"to create the training job {self._name}", action="sagemaker:CreateTrainingJob"):
                self._client.create_training_job(**self._request)
        except BackendError as exc:
            in_use = error_code(exc.__cause__ or exc) == "ResourceInUse"
            self._unclear = not in_use and is_passing(exc.__cause__ or exc)
            if not (in_use or self._unclear):
                raise  # it is refused, and not there
            there = self.arrived()
            if there:  # only the answer was lost
                return
            if there is None:
                raise BackendError(
                    f"{exc}. Whether the job began is not known: look with  trimtab status sagemaker://{self._name}"
                ) from exc
            raise (BackendError(self._taken) if in_use else exc) from exc

    def arrived(self) -> bool | None:
        """Whether this very job is there; None when AWS does not say. After a request without an answer it is waited for."""
        until = time.monotonic() + (_APPEARING if self._unclear else 0.0)
        while (there := self._look()) is False and time.monotonic() < until:
            time.sleep(1.0)
        return there

    def take_back(self) -> bool | None:
        """Stop the job if it is there, because nobody will see its handle; whether it was there, None when that or its end is not sure."""
        there = self.arrived()
        if not there:
            return there
        try:
            with asking(f"to stop {self._name}", action="sagemaker:StopTrainingJob"):
                self._client.stop_training_job(TrainingJobName=self._name)
        except BackendError:
            return None
        return True

    def _look(self) -> bool | None:
        try:
            with asking(f"whether {self._name} was created", action="sagemaker:DescribeTrainingJob"):
                arn = self._client.describe_training_job(TrainingJobName=self._name)["TrainingJobArn"]
        except BackendError as exc:
            return False if is_absent(exc) else None
        try:
            with asking(f"for the tags of {self._name}", action="sagemaker:ListTags"):
                return any(self._tag in page["Tags"] for page in self._client.get_paginator("list_tags").paginate(ResourceArn=arn))
        except BackendError:
            return None


def is_absent(exc: BackendError) -> bool:
    """Whether AWS said that there is no such training job (DescribeTrainingJob answers a ValidationException)."""
    code = error_code(exc.__cause__ or exc)
    return code.startswith("ResourceNotFound") or (code == "ValidationException" and "not found" in str(exc.__cause__).lower())
