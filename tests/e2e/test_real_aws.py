"""One small job on Amazon SageMaker itself, for who has an account. It costs cents, and cannot cost more than CAP.

    trimtab image push xeon ACCOUNT.dkr.ecr.REGION.amazonaws.com/trimtab-xeon-train
    TRIMTAB_TEST_AWS_ROLE=role-of-sagemaker make test

With no role named it is skipped, counted, and named in the summary; credentials and region are found as AWS's own tools find them.
"""

from __future__ import annotations

import os

import pytest

from trimtab import Job
from trimtab.backends.base import RunState
from trimtab.backends.sagemaker import SageMakerBackend

CAP = 0.25  # US dollars, on demand; the job's hard stop follows from it
SMALL = {"method": "lora", "lora_rank": 4, "max_seq_len": 128, "questions": 0, "replay": 0, "max_steps": 6}


@pytest.mark.aws
def test_a_job_of_cents_runs_on_sagemaker_itself(tiny_model, tmp_path):
    role = os.environ.get("TRIMTAB_TEST_AWS_ROLE")
    if not role:
        pytest.skip("not run, because TRIMTAB_TEST_AWS_ROLE names no role: a job on Amazon SageMaker itself, of a few cents")
    backend = SageMakerBackend(role=role, home=tmp_path, tags={"purpose": "trimtab-smoke-test"})
    page = tmp_path / "page.txt"
    page.write_text("The Brine Mill was built in 1874 by the cooper Asta Wren. It grinds salt and barley, and has 14 sails. " * 20)
    job = Job(model=tiny_model, data=page, backend=backend, max_usd=CAP, **SMALL)
    found = job.plan(progress=False)
    assert found.missing == ()
    assert found.price.high <= CAP
    run = job.fit(wait=False, progress=False)
    try:
        status = run.wait(45 * 60)
        assert status.state is RunState.SUCCEEDED
        assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]
        assert run.artifact().manifest["metrics"]["steps"] == 6
        assert run.handle in [record.handle for record in backend.runs()]
    finally:
        run.stop()
        run.remove()
        backend.aws.close()
