"""What goes wrong around a run on SageMaker: lost answers, refusals, cut networks, dead clients. Nothing is submitted twice or lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from contract.backend_contract import PATIENCE, finish
from support.faults import cut_answer, lost_answer
from support.faulty_proxy import FaultyProxy
from support.sagemaker_runs import REGISTRY, ROLE, until_step
from trimtab.aws import session
from trimtab.aws.submission import Submission
from trimtab.backends.base import RunHandle, RunState
from trimtab.backends.sagemaker import SageMakerBackend
from trimtab.errors import BackendError, BackendUnavailable, RunFailed, SpecError
from trimtab.job import Job
from trimtab.run import Run

pytestmark = pytest.mark.usefixtures("no_fault_stays")


@pytest.mark.parametrize(
    "fault",
    [
        {"code": "ThrottlingException", "times": 3},
        {"code": "InternalFailure", "times": 2},
        {"code": "InternalFailure", "after": True},
        {"drop": True, "after": True},
    ],
    ids=["throttled", "500", "500 after it was created", "answer lost"],
)
def test_trouble_while_it_is_created_makes_one_job(quick, six_steps, staged, control_plane, fault):
    control_plane.fault(operation="CreateTrainingJob", **fault)
    handle = quick.submit(six_steps, staged.channels)
    assert finish(quick, handle).done
    assert [name for name in control_plane.store.jobs if handle.id in name] == [handle.id]


def test_what_nobody_can_tell_is_said_and_nothing_is_taken_away(quick, six_steps, staged, control_plane):
    control_plane.fault(operation="CreateTrainingJob", code="InternalFailure", after=True)
    control_plane.fault(operation="ListTags", code="AccessDeniedException", times=-1)
    with pytest.raises(BackendError, match="trimtab status sagemaker://trim-0c0c0c0c"):
        quick.submit(six_steps, staged.channels, "trim-0c0c0c0c")
    control_plane.faults.clear()
    handle = RunHandle("sagemaker", "trim-0c0c0c0c")
    assert finish(quick, handle).done
    assert Run(handle, quick).ledger() == staged.ledger  # the record is there


def test_an_answer_that_does_not_come_is_waited_for_and_asked_for_again(
    amazon, script_image, six_steps, staged, tmp_path, control_plane, monkeypatch
):
    monkeypatch.setattr(session, "_USUAL_PATIENCE", (2, 8))
    backend = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/{script_image}", home=tmp_path / "home", poll_seconds=0.2)
    control_plane.fault(operation="CreateTrainingJob", hang=4.0, after=True)
    handle = backend.submit(six_steps, staged.channels)
    assert finish(backend, handle).done
    assert [name for name in control_plane.store.jobs if handle.id in name] == [handle.id]
    backend.aws.close()


def test_ctrl_c_before_the_handle_is_told_stops_the_job(place, six_steps, staged, monkeypatch, control_plane):
    send = Submission.send

    def interrupted(submission: Submission) -> None:
        send(submission)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Submission, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            place.submit(six_steps, staged.channels, "trim-0d0d0d0d")
    handle = RunHandle("sagemaker", "trim-0d0d0d0d")
    assert finish(place, handle).state is RunState.STOPPED


def test_a_name_that_is_somebody_elses_is_refused_and_theirs_is_left_alone(quick, six_steps, staged, control_plane):
    handle = quick.submit(six_steps, staged.channels)
    other = SageMakerBackend(role=ROLE, image=quick.image, home=quick.home, poll_seconds=0.2)
    with pytest.raises(BackendError, match="another one: run the command again"):
        other.submit(six_steps, staged.channels, handle.id)
    quick.aws.client("sagemaker").create_training_job(**_unlike(quick.render(six_steps, staged.channels, "trim-0b0b0b0b")["training_job"]))
    with pytest.raises(BackendError, match="another one: run the command again"):
        other.submit(six_steps, staged.channels, "trim-0b0b0b0b")  # a job without a record
    assert finish(quick, handle).done
    assert Run(handle, quick).ledger() == staged.ledger
    other.aws.close()


def _unlike(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name != "Tags"}


def test_trouble_while_it_is_followed_is_ridden_out(place, six_steps, staged, control_plane):
    run = Run(place.submit(six_steps, staged.channels), place)
    for fault in ({"code": "ThrottlingException", "times": 4}, {"code": "InternalFailure", "times": 2}, {"drop": True, "times": 2}):
        control_plane.fault(operation="DescribeTrainingJob", **fault)
    assert run.wait(PATIENCE).state is RunState.SUCCEEDED
    assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_credentials_that_expire_while_it_is_followed_say_what_to_type_and_the_run_goes_on(quick, six_steps, staged, control_plane):
    handle = quick.submit(six_steps, staged.channels)
    control_plane.fault(operation="DescribeTrainingJob", code="ExpiredTokenException")
    with pytest.raises(BackendUnavailable, match="aws sso login"):
        quick.status(handle)
    assert finish(quick, handle).done


def test_a_missing_permission_is_named(quick, six_steps, staged, control_plane):
    control_plane.fault(operation="CreateTrainingJob", code="AccessDeniedException")
    with pytest.raises(BackendError, match="lacks the permission sagemaker:CreateTrainingJob"):
        quick.submit(six_steps, staged.channels, "trim-0a0a0a0a")
    assert "Contents" not in quick.aws.client("s3").list_objects_v2(Bucket=quick.place.bucket, Prefix=quick.place.run("trim-0a0a0a0a"))


def test_no_capacity_says_how_to_go_on_elsewhere_and_does(place, six_steps, staged, control_plane):
    control_plane.fault(kind="capacity")
    run = Run(place.submit(six_steps, staged.channels), place)
    with pytest.raises(RunFailed, match="--backend-option instance_type="):
        run.wait(PATIENCE)
    elsewhere = SageMakerBackend(instance_type="ml.c7i.8xlarge", home=place.home, poll_seconds=0.2)
    again = Run(run.handle, elsewhere).resume()
    assert again.wait(PATIENCE).state is RunState.SUCCEEDED
    described = elsewhere.aws.client("sagemaker").describe_training_job(TrainingJobName=f"{run.handle.id}-2")
    assert described["ResourceConfig"]["InstanceType"] == "ml.c7i.8xlarge"
    elsewhere.aws.close()


def test_a_quota_of_zero_names_it(quick, six_steps, staged, control_plane):
    request = quick.render(six_steps, staged.channels, "trim-12345678")["training_job"]
    name = f"{request['ResourceConfig']['InstanceType']} for training job usage"
    before = control_plane.store.quotas.get(name)
    control_plane.set_quota(name, 0)
    try:
        with pytest.raises(BackendError, match=f"the quota '{name}' of the account is 0.*request-service-quota-increase"):
            quick.submit(six_steps, staged.channels)
    finally:
        control_plane.set_quota(name, before)


def test_a_client_that_dies_leaves_a_run_that_others_find(quick, amazon, six_steps, staged):
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from trimtab.backends.sagemaker import SageMakerBackend\nfrom trimtab.spec import JobSpec\n"
        "image, home, six_steps, train, model = sys.argv[1:]\n"
        f"backend = SageMakerBackend(role={ROLE!r}, image=image, home=home)\n"
        "print(backend.submit(JobSpec.model_validate_json(six_steps), {'train': Path(train), 'model': Path(model)}), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    arguments = [quick.image, str(quick.home), six_steps.model_dump_json(), *(str(staged.channels[name]) for name in ("train", "model"))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    handle = RunHandle.parse(done.stdout.strip())
    assert handle in [run.handle for run in quick.runs()]
    assert finish(quick, handle).done


def test_a_resume_has_the_money_that_is_left(place, sixty_steps, staged, control_plane):
    spec = sixty_steps.model_copy(update={"max_usd": 2.0, "train": sixty_steps.train.model_copy(update={"max_steps": 1_000})})
    run = Run(place.submit(spec, staged.channels), place)
    until_step(place, run.handle, 6)
    run.stop()
    run.resume()
    control_plane.fault(operation="ListTrainingJobs", code="AccessDeniedException")
    assert not run.status().done  # known without a list, which may be late to tell of it
    control_plane.faults.clear()
    until_step(place, run.handle, run.metrics()[-1].step + 1)
    first, second = (
        place.aws.client("sagemaker").describe_training_job(TrainingJobName=name) for name in (run.handle.id, f"{run.handle.id}-2")
    )
    assert second["StoppingCondition"]["MaxRuntimeInSeconds"] < first["StoppingCondition"]["MaxRuntimeInSeconds"]
    assert float(second["HyperParameters"]["max_minutes"]) < float(first["HyperParameters"]["max_minutes"])
    assert [line for line in run.logs() if line.startswith("resume: going on after step")]
    run.stop()
    with pytest.raises(SpecError, match="raise max_usd"):
        Run(run.handle, SageMakerBackend(home=place.home, max_usd=0.0001)).resume()


def test_a_run_that_keeps_a_warm_pool_is_removed_with_it(amazon, image, six_steps, staged, tmp_path, control_plane):
    backend = SageMakerBackend(
        role=ROLE, image=image, home=tmp_path, poll_seconds=0.2, keep_alive_minutes=30, instance_type="ml.m7i.2xlarge", tags="team=search"
    )
    control_plane.set_quota("ml.m7i.2xlarge for training warm pool usage", 1)
    run = Run(backend.submit(six_steps, staged.channels), backend)
    run.wait(PATIENCE)
    described = backend.aws.client("sagemaker").describe_training_job(TrainingJobName=run.handle.id)
    assert described["WarmPoolStatus"]["Status"] == "Available"
    run.remove()
    assert run.handle not in [record.handle for record in backend.runs()]
    backend.aws.close()


def test_what_would_be_refused_is_refused_before_anything_is_sent_or_made(amazon, image, small_job, tmp_path, monkeypatch, localstack):
    with FaultyProxy(localstack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        for wrong, said in (({"tags": {"a" * 129: "x"}}, "Tags"), ({"tags": f"owner=hf_{'c' * 34}"}, "token"), ({"role": ""}, "role")):
            backend = SageMakerBackend(**{"role": ROLE, "image": image, "home": tmp_path, **wrong})
            job = Job(model=small_job.train.model, data=small_job.data, backend=backend, max_steps=6, method="lora", questions=0, replay=0)
            with pytest.raises((SpecError, BackendUnavailable), match=said):
                job.fit(progress=False)
            backend.aws.close()
        assert not [seen for seen in proxy.seen if seen.method in ("PUT", "POST")]


@pytest.mark.parametrize("where", ["tags", "image"])
def test_a_token_is_refused_before_anything_is_sent(amazon, image, six_steps, staged, where, control_plane):
    token = "hf_" + "b" * 34
    settings = {"image": image, "tags": f"owner={token}"} if where == "tags" else {"image": f"{image}?{token}"}
    backend = SageMakerBackend(role=ROLE, **settings)
    before = len(control_plane.requests)
    with pytest.raises(SpecError) as caught:
        backend.submit(six_steps, staged.channels)
    assert token not in str(caught.value)
    assert len(control_plane.requests) == before
    backend.aws.close()


def test_what_sagemaker_would_refuse_is_refused_at_once_and_all_of_it(amazon, image, six_steps, staged):
    backend = SageMakerBackend(role="arn:aws:iam::1:role/x", image=image, subnets="net 1", security_groups="sg-1", tags={"a" * 129: "x"})
    with pytest.raises(SpecError) as caught:
        backend.render(six_steps, staged.channels, "trim-12345678")
    for wrong in ("RoleArn", "Subnets", "Tags"):
        assert wrong.lower() in str(caught.value).lower()
    backend.aws.close()


def test_without_a_role_or_credentials_nothing_is_fetched(amazon, six_steps, monkeypatch):
    with pytest.raises(BackendUnavailable, match="TRIMTAB_SAGEMAKER_ROLE"):
        SageMakerBackend().check(six_steps)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BackendUnavailable, match="aws configure"):
        SageMakerBackend(role=ROLE).check(six_steps)


def test_a_network_that_is_cut_while_it_is_followed_loses_no_line(amazon, image, six_steps, staged, tmp_path, monkeypatch, localstack):
    with FaultyProxy(localstack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", proxy.url)
        backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2)
        handle = backend.submit(six_steps, staged.channels)
        proxy.fault(cut_answer(40), on="GetLogEvents", times=3, after=1)
        proxy.fault(lost_answer(), on="GetLogEvents", times=2, after=3)
        lines = list(backend.logs(handle, follow=True))
        assert [line.partition(" ")[0] for line in lines if line.startswith("step=")] == [f"step={number}/6" for number in range(1, 7)]
        assert lines == list(Run(handle, backend).logs())
        backend.aws.close()
