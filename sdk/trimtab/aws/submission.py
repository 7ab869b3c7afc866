"""A training job that is created once, however often its request has to be sent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from trimtab.aws.refusals import asking, error_code, is_passing
from trimtab.aws.request import SUBMISSION_TAG, tags_of
from trimtab.aws.session import Aws
from trimtab.errors import BackendError


class Submission:
    """One wish to create the job of `request`. CreateTrainingJob has no token of the client's, but names are unique: a tag tells whose job
    it is that has the name. `taken` is said when it is another's."""

    def __init__(self, aws: Aws, request: Mapping[str, Any], taken: str) -> None:
        self._client = aws.client("sagemaker")
        self._tag = {"Key": SUBMISSION_TAG, "Value": uuid.uuid4().hex}
        self._request = {**request, "Tags": [*request["Tags"], *tags_of({self._tag["Key"]: self._tag["Value"]})]}
        self._name, self._taken = request["TrainingJobName"], taken

    def send(self) -> None:
        """Raises BackendError when the job is not there afterwards, or nobody can say whether it is."""
        try:
            with asking(f"to create the training job {self._name}", action="sagemaker:CreateTrainingJob"):
                self._client.create_training_job(**self._request)
        except BackendError as exc:
            in_use = error_code(exc.__cause__ or exc) == "ResourceInUse"
            if not (in_use or is_passing(exc.__cause__ or exc)):
                raise
            if self.arrived():  # only the answer was lost
                return
            raise (BackendError(self._taken) if in_use else exc) from exc

    def arrived(self) -> bool:
        """Whether this very job is there. Raises BackendError when AWS does not say."""
        try:
            with asking(f"whether {self._name} was created", action="sagemaker:DescribeTrainingJob"):
                arn = self._client.describe_training_job(TrainingJobName=self._name)["TrainingJobArn"]
                pages = self._client.get_paginator("list_tags").paginate(ResourceArn=arn)
                return any(self._tag in page["Tags"] for page in pages)
        except BackendError as exc:
            if not is_passing(exc.__cause__ or exc):
                return False
            raise BackendError(f"{exc}. Whether the job began is not known: look with  trimtab status sagemaker://{self._name}") from exc

    def take_back(self) -> bool:
        """Stop the job if it is there, because nobody will see its handle; whether it was."""
        if not self.arrived():
            return False
        with asking(f"to stop {self._name}", action="sagemaker:StopTrainingJob"):
            self._client.stop_training_job(TrainingJobName=self._name)
        return True
