"""The sagemaker backend keeps the contract, on a SageMaker that really runs the image; and what is its own: lives, limits, lost answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from contract.backend_contract import PATIENCE, BackendContract, _interrupt, finish, until
from support.faulty_proxy import FaultyProxy, cut_answer, lost_answer
from trimtab.aws import lives, session
from trimtab.aws.channels import plan_channel
from trimtab.aws.submission import Submission
from trimtab.aws.upload import Sent, upload
from trimtab.backends.base import Listable, Preflight, Priced, Removable, Reporting, Resumable, RunHandle, RunState, Uploading
from trimtab.backends.process import ProcessBackend
from trimtab.backends.sagemaker import SageMakerBackend
from trimtab.errors import BackendError, BackendUnavailable, RunFailed, SpecError
from trimtab.events import Checkpoint, Phase, Step
from trimtab.job import Job
from trimtab.plan import Work
from trimtab.run import Run
from trimtab.staging import stage

REGISTRY = "000000000000.dkr.ecr.us-east-1.amazonaws.com"
ROLE = "SageMakerExecutionRole"


@pytest.fixture(scope="module")
def image(xeon_image) -> str:
    return f"{REGISTRY}/{xeon_image}"


@pytest.fixture
def place(amazon, image, tmp_path) -> Iterator[SageMakerBackend]:
    """A client of its own."""
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2)
    yield backend
    backend.aws.close()


@pytest.fixture
def quick(amazon, script_image, tmp_path, monkeypatch) -> Iterator[SageMakerBackend]:
    """For what is about a job's beginning and not its work: its image finds no script in its channels, and ends at once."""
    monkeypatch.setattr(lives, "SETTLING", 0.5)  # no last word will come
    backend = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/{script_image}", home=tmp_path / "home", poll_seconds=0.2)
    yield backend
    backend.aws.close()


@pytest.fixture(autouse=True)
def _no_fault_stays(control_plane) -> Iterator[None]:
    yield
    control_plane.faults.clear()


class TestSageMaker(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory, amazon, image):
        home = tmp_path_factory.mktemp("place") / "my runs, größer 家"
        backend = SageMakerBackend(role=ROLE, image=image, home=home, poll_seconds=0.2)
        yield backend
        backend.aws.close()

    @pytest.fixture(autouse=True)
    def _engine(self, client):
        self.engine = client

    def kill(self, backend, handle):
        for container in self.engine.containers.list(filters={"label": "sagemaker.name"}):
            if handle.id in container.labels["sagemaker.name"]:
                container.kill()

    def environment(self, backend):
        return {**os.environ, "TRIMTAB_HOME": str(backend.home)}

    def interrupt_submission(self, monkeypatch):
        monkeypatch.setattr(Submission, "send", _interrupt)

    def left_of(self, backend, run_id):
        found = backend.aws.client("s3").list_objects_v2(Bucket=backend.place.bucket, Prefix=backend.place.run(run_id))
        return [item["Key"] for item in found.get("Contents", [])]

    def test_the_same_job_gives_the_same_tensors_as_a_process(self, backend, pair, job, staged, tmp_path, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS")  # which no client sets for SageMaker's machines
        here = ProcessBackend(tmp_path)
        there = Run(here.submit(job, staged.channels), here)
        there.wait(PATIENCE)
        assert there.artifact() == Run(pair[0], backend).artifact()

    def test_it_tells_what_sagemaker_does_before_the_first_step(self, backend, pair):
        said = [event.detail for event in Run(pair[0], backend).events() if isinstance(event, Phase) and event.name == "sagemaker"]
        names = [detail.partition(":")[0] for detail in said]
        assert [name for name in names if name != "Pending"] == ["Starting", "Downloading", "Training", "Uploading", "Completed"]

    def test_events_are_not_among_the_lines(self, backend, pair):
        assert not [line for line in backend.logs(pair[0]) if line.startswith("{")]

    def test_metrics_are_those_that_the_run_told(self, backend, pair):
        step = Run(pair[0], backend).metrics()[-1]
        described = backend.aws.client("sagemaker").describe_training_job(TrainingJobName=pair[0].id)
        found = {metric["MetricName"]: metric["Value"] for metric in described["FinalMetricDataList"]}
        assert found["train:loss"] == pytest.approx(step.loss, abs=1e-4)
        assert found["train:tokens_per_second"] == pytest.approx(step.tokens_per_second, abs=1)

    def test_what_is_submitted_is_what_was_rendered(self, backend, pair, job, staged, control_plane):
        (sent,) = [
            request for name, request in control_plane.requests if name == "CreateTrainingJob" and request["TrainingJobName"] == pair[0].id
        ]
        rendered = backend.render(job, staged.channels, pair[0].id)["training_job"]
        assert {**sent, "Tags": [tag for tag in sent["Tags"] if tag["Key"] != "trimtab-submission"]} == rendered

    def test_the_same_channels_are_not_sent_again(self, backend, pair, staged):
        plans = [plan_channel(path, name) for name, path in staged.channels.items()]
        assert upload(plans, backend.aws.client("s3"), backend.place) == Sent(0, 0)

    def test_another_machine_finds_it_by_its_tag(self, backend, pair, tmp_path):
        environment = {**self.environment(backend), "TRIMTAB_HOME": str(tmp_path / "elsewhere"), "TRIMTAB_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", "list", "--backend", "sagemaker", "--json"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows = {row["handle"]: row["state"] for row in json.loads(done.stdout)}
        assert [rows[str(handle)] for handle in pair] == ["succeeded", "succeeded"]


def test_it_has_every_ability():
    for ability in (Preflight, Priced, Uploading, Reporting, Resumable, Listable, Removable):
        assert issubclass(SageMakerBackend, ability)


@pytest.fixture
def job(small_job, staged):
    return small_job.model_copy(update={"train": staged.train})


@pytest.fixture
def longer(job):
    """Sixty steps, with a checkpoint every 5."""
    train = job.train.model_copy(update={"max_steps": 60, "epochs": 60, "save_every_steps": 5})
    return job.model_copy(update={"train": train})


def until_step(backend, handle, number):
    def there() -> bool:
        status = backend.status(handle)
        assert not status.done, status.reason
        return status.step is not None and status.step.step >= number

    until(there, f"step {number} of {handle}")


def test_a_spot_run_goes_on_after_it_was_interrupted(amazon, image, longer, staged, tmp_path, control_plane):
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2, spot="yes", max_wait_minutes="30")
    run = Run(backend.submit(longer, staged.channels), backend)
    until_step(backend, run.handle, 12)
    control_plane.interrupt(run.handle.id)
    run.wait(PATIENCE)
    steps = [event.step for event in run.events() if isinstance(event, Step)]
    again = next(place for place in range(1, len(steps)) if steps[place] != steps[place - 1] + 1)
    assert 0 <= steps[again - 1] - steps[again] < 5 + 1  # at most one save interval is repeated
    assert [step.step for step in run.metrics()] == list(range(1, steps[-1] + 1))
    assert run.artifact().manifest["metrics"]["steps"] == steps[-1]
    said = [event.detail.partition(":")[0] for event in run.events() if isinstance(event, Phase) and event.name == "sagemaker"]
    assert "Interrupted" in said
    backend.aws.close()


def test_a_sync_that_broke_off_in_a_checkpoint_makes_the_run_go_on_from_the_one_before(
    amazon, image, longer, staged, tmp_path, control_plane
):
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2, spot=True)
    run = Run(backend.submit(longer, staged.channels), backend)
    until_step(backend, run.handle, 22)
    control_plane.place(control_plane.account, control_plane.region).training.cut_sync(run.handle.id)
    s3, prefix = backend.aws.client("s3"), backend.place.run(run.handle.id) + "checkpoints/"
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=backend.place.bucket, Prefix=prefix)["Contents"]]
    newest = max(key for key in keys if key.endswith("manifest.json")).removesuffix("manifest.json")
    s3.delete_object(Bucket=backend.place.bucket, Key=f"{newest}optimizer.safetensors")  # the sync broke off before it
    control_plane.interrupt(run.handle.id)
    run.wait(PATIENCE)
    assert [line for line in run.logs() if re.match(r"checkpoint step-\d+ is passed over: ", line)]
    assert [line for line in run.logs() if re.match(r"resume: going on after step [1-9]", line)]
    assert [step.step for step in run.metrics()] == list(range(1, run.metrics()[-1].step + 1))
    backend.aws.close()


def test_several_instances_train_together_and_their_lines_are_told_apart(place, job, staged):
    run = Run(place.submit(job.model_copy(update={"nodes": 2}), staged.channels), place)
    run.wait(PATIENCE)
    assert run.artifact().manifest["metrics"]["nodes"] == 2
    lines = list(run.logs())
    assert "[algo-2] done: algo-1 writes the artifact" in lines
    assert [line for line in lines if line.startswith("step=")]


def test_the_services_own_time_limit_leaves_a_checkpoint_and_an_artifact(place, longer, staged):
    place.upload(longer, staged.channels)
    train = longer.train.model_copy(update={"max_steps": None, "epochs": 10_000})
    request = place.render(longer.model_copy(update={"train": train}), staged.channels, "trim-1d1d1d1d")["training_job"]
    request["StoppingCondition"]["MaxRuntimeInSeconds"] = 12
    place.aws.client("sagemaker").create_training_job(**request)
    run = Run(RunHandle("sagemaker", "trim-1d1d1d1d"), place)
    status = run.wait(PATIENCE)
    assert (status.state, "its time limit of 0.2 minutes" in status.reason) == (RunState.STOPPED, True)
    assert run.artifact().manifest["metrics"]["ended_by"].startswith("asked to stop after step")
    assert [event for event in run.events() if isinstance(event, Checkpoint)]


def test_a_model_that_lies_in_s3_is_read_there(place, small_job, tiny_model, tmp_path, amazon):
    s3 = place.aws.client("s3")
    s3.create_bucket(Bucket="models-of-ours")
    for file in tiny_model.iterdir():
        s3.upload_file(str(file), "models-of-ours", f"tiny/{file.name}")
    train = small_job.train.model_copy(update={"model": "s3://models-of-ours/tiny"})
    spec = small_job.model_copy(update={"train": train})
    found = stage(spec, cache=tmp_path / "cache", say=lambda line: None)
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.is_file()]
    spec = spec.model_copy(update={"train": found.train})
    run = Run(place.submit(spec, found.channels), place)
    run.wait(PATIENCE)
    assert run.artifact().spec.model == "s3://models-of-ours/tiny/"
    sent = place.aws.client("sagemaker").describe_training_job(TrainingJobName=run.handle.id)["InputDataConfig"]
    assert [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in sent if channel["ChannelName"] == "model"] == [
        "s3://models-of-ours/tiny/"
    ]
    with pytest.raises(SpecError, match="--backend sagemaker"):
        ProcessBackend().check(spec)
    with pytest.raises(SpecError, match="--replay 0"):
        stage(spec.model_copy(update={"train": spec.train.model_copy(update={"replay": 0.5})}), say=lambda line: None)


def test_money_is_a_limit_of_time_that_is_told(place, job, staged):
    request = place.render(job.model_copy(update={"max_usd": 2.0}), staged.channels, "trim-12345678")
    hours = request["training_job"]["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600
    price = place.foresee(job, Work.read(staged.channels))
    assert hours < 2.0 / 0.1
    assert json.loads(request["hyperparameters"]["max_minutes"]) < hours * 60
    assert price.instance == request["training_job"]["ResourceConfig"]["InstanceType"]
    with pytest.raises(SpecError, match="raise max_usd"):
        place.render(job.model_copy(update={"max_usd": 0.001}), staged.channels, "trim-12345678")


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
def test_trouble_while_it_is_created_makes_one_job(quick, job, staged, control_plane, fault):
    control_plane.fault(operation="CreateTrainingJob", **fault)
    handle = quick.submit(job, staged.channels)
    assert finish(quick, handle).done
    assert [name for name in control_plane.store.jobs if handle.id in name] == [handle.id]


def test_what_nobody_can_tell_is_said_and_nothing_is_taken_away(quick, job, staged, control_plane):
    control_plane.fault(operation="CreateTrainingJob", code="InternalFailure", after=True)
    control_plane.fault(operation="ListTags", code="AccessDeniedException", times=-1)
    with pytest.raises(BackendError, match="trimtab status sagemaker://trim-0c0c0c0c"):
        quick.submit(job, staged.channels, "trim-0c0c0c0c")
    control_plane.faults.clear()
    handle = RunHandle("sagemaker", "trim-0c0c0c0c")
    assert finish(quick, handle).done
    assert Run(handle, quick).ledger() == staged.ledger  # the record is there


def test_an_answer_that_does_not_come_is_waited_for_and_asked_for_again(
    amazon, script_image, job, staged, tmp_path, control_plane, monkeypatch
):
    monkeypatch.setattr(session, "_USUAL_PATIENCE", (2, 8))
    backend = SageMakerBackend(role=ROLE, image=f"{REGISTRY}/{script_image}", home=tmp_path / "home", poll_seconds=0.2)
    control_plane.fault(operation="CreateTrainingJob", hang=4.0, after=True)
    handle = backend.submit(job, staged.channels)
    assert finish(backend, handle).done
    assert [name for name in control_plane.store.jobs if handle.id in name] == [handle.id]
    backend.aws.close()


def test_ctrl_c_before_the_handle_is_told_stops_the_job(place, job, staged, monkeypatch, control_plane):
    send = Submission.send

    def interrupted(submission: Submission) -> None:
        send(submission)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Submission, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            place.submit(job, staged.channels, "trim-0d0d0d0d")
    handle = RunHandle("sagemaker", "trim-0d0d0d0d")
    assert finish(place, handle).state is RunState.STOPPED


def test_a_name_that_is_somebody_elses_is_refused_and_theirs_is_left_alone(quick, job, staged, control_plane):
    handle = quick.submit(job, staged.channels)
    other = SageMakerBackend(role=ROLE, image=quick.image, home=quick.home, poll_seconds=0.2)
    with pytest.raises(BackendError, match="another one: run the command again"):
        other.submit(job, staged.channels, handle.id)
    quick.aws.client("sagemaker").create_training_job(**_unlike(quick.render(job, staged.channels, "trim-0b0b0b0b")["training_job"]))
    with pytest.raises(BackendError, match="another one: run the command again"):
        other.submit(job, staged.channels, "trim-0b0b0b0b")  # a job without a record
    assert finish(quick, handle).done
    assert Run(handle, quick).ledger() == staged.ledger
    other.aws.close()


def _unlike(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name != "Tags"}


def test_trouble_while_it_is_followed_is_ridden_out(place, job, staged, control_plane):
    run = Run(place.submit(job, staged.channels), place)
    for fault in ({"code": "ThrottlingException", "times": 4}, {"code": "InternalFailure", "times": 2}, {"drop": True, "times": 2}):
        control_plane.fault(operation="DescribeTrainingJob", **fault)
    assert run.wait(PATIENCE).state is RunState.SUCCEEDED
    assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_credentials_that_expire_while_it_is_followed_say_what_to_type_and_the_run_goes_on(quick, job, staged, control_plane):
    handle = quick.submit(job, staged.channels)
    control_plane.fault(operation="DescribeTrainingJob", code="ExpiredTokenException")
    with pytest.raises(BackendUnavailable, match="aws sso login"):
        quick.status(handle)
    assert finish(quick, handle).done


def test_a_missing_permission_is_named(quick, job, staged, control_plane):
    control_plane.fault(operation="CreateTrainingJob", code="AccessDeniedException")
    with pytest.raises(BackendError, match="lacks the permission sagemaker:CreateTrainingJob"):
        quick.submit(job, staged.channels, "trim-0a0a0a0a")
    assert "Contents" not in quick.aws.client("s3").list_objects_v2(Bucket=quick.place.bucket, Prefix=quick.place.run("trim-0a0a0a0a"))


def test_no_capacity_says_how_to_go_on_elsewhere_and_does(place, job, staged, control_plane):
    control_plane.fault(kind="capacity")
    run = Run(place.submit(job, staged.channels), place)
    with pytest.raises(RunFailed, match="--backend-option instance_type="):
        run.wait(PATIENCE)
    elsewhere = SageMakerBackend(instance_type="ml.c7i.8xlarge", home=place.home, poll_seconds=0.2)
    again = Run(run.handle, elsewhere).resume()
    assert again.wait(PATIENCE).state is RunState.SUCCEEDED
    described = elsewhere.aws.client("sagemaker").describe_training_job(TrainingJobName=f"{run.handle.id}-2")
    assert described["ResourceConfig"]["InstanceType"] == "ml.c7i.8xlarge"
    elsewhere.aws.close()


def test_a_quota_of_zero_names_it(quick, job, staged, control_plane):
    request = quick.render(job, staged.channels, "trim-12345678")["training_job"]
    name = f"{request['ResourceConfig']['InstanceType']} for training job usage"
    before = control_plane.store.quotas.get(name)
    control_plane.set_quota(name, 0)
    try:
        with pytest.raises(BackendError, match=f"the quota '{name}' of the account is 0.*request-service-quota-increase"):
            quick.submit(job, staged.channels)
    finally:
        control_plane.set_quota(name, before)


def test_a_client_that_dies_leaves_a_run_that_others_find(quick, amazon, job, staged):
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from trimtab.backends.sagemaker import SageMakerBackend\nfrom trimtab.spec import JobSpec\n"
        "image, home, job, train, model = sys.argv[1:]\n"
        f"backend = SageMakerBackend(role={ROLE!r}, image=image, home=home)\n"
        "print(backend.submit(JobSpec.model_validate_json(job), {'train': Path(train), 'model': Path(model)}), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    arguments = [quick.image, str(quick.home), job.model_dump_json(), *(str(staged.channels[name]) for name in ("train", "model"))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    handle = RunHandle.parse(done.stdout.strip())
    assert handle in [run.handle for run in quick.runs()]
    assert finish(quick, handle).done


def test_a_resume_has_the_money_that_is_left(place, longer, staged):
    spec = longer.model_copy(update={"max_usd": 2.0, "train": longer.train.model_copy(update={"max_steps": 1_000})})
    run = Run(place.submit(spec, staged.channels), place)
    until_step(place, run.handle, 6)
    run.stop()
    run.resume()
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


def test_a_run_that_keeps_a_warm_pool_is_removed_with_it(amazon, image, job, staged, tmp_path, control_plane):
    backend = SageMakerBackend(
        role=ROLE, image=image, home=tmp_path, poll_seconds=0.2, keep_alive_minutes=30, instance_type="ml.m7i.2xlarge", tags="team=search"
    )
    control_plane.set_quota("ml.m7i.2xlarge for training warm pool usage", 1)
    run = Run(backend.submit(job, staged.channels), backend)
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
def test_a_token_is_refused_before_anything_is_sent(amazon, image, job, staged, where, control_plane):
    token = "hf_" + "b" * 34
    settings = {"image": image, "tags": f"owner={token}"} if where == "tags" else {"image": f"{image}?{token}"}
    backend = SageMakerBackend(role=ROLE, **settings)
    before = len(control_plane.requests)
    with pytest.raises(SpecError) as caught:
        backend.submit(job, staged.channels)
    assert token not in str(caught.value)
    assert len(control_plane.requests) == before
    backend.aws.close()


def test_what_sagemaker_would_refuse_is_refused_at_once_and_all_of_it(amazon, image, job, staged):
    backend = SageMakerBackend(role="arn:aws:iam::1:role/x", image=image, subnets="net 1", security_groups="sg-1", tags={"a" * 129: "x"})
    with pytest.raises(SpecError) as caught:
        backend.render(job, staged.channels, "trim-12345678")
    for wrong in ("RoleArn", "Subnets", "Tags"):
        assert wrong.lower() in str(caught.value).lower()
    backend.aws.close()


def test_without_a_role_or_credentials_nothing_is_fetched(amazon, job, monkeypatch):
    with pytest.raises(BackendUnavailable, match="TRIMTAB_SAGEMAKER_ROLE"):
        SageMakerBackend().check(job)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BackendUnavailable, match="aws configure"):
        SageMakerBackend(role=ROLE).check(job)


def test_a_network_that_is_cut_while_it_is_followed_loses_no_line(amazon, image, job, staged, tmp_path, monkeypatch, localstack):
    with FaultyProxy(localstack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS", proxy.url)
        backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2)
        handle = backend.submit(job, staged.channels)
        proxy.fault(cut_answer(40), on="GetLogEvents", times=3, after=1)
        proxy.fault(lost_answer(), on="GetLogEvents", times=2, after=3)
        lines = list(backend.logs(handle, follow=True))
        assert [line.partition(" ")[0] for line in lines if line.startswith("step=")] == [f"step={number}/6" for number in range(1, 7)]
        assert lines == list(Run(handle, backend).logs())
        backend.aws.close()
