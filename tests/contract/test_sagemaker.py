"""The sagemaker backend keeps the contract, on a SageMaker that really runs the image; and what is its own: lives, limits, models in S3."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from contract.backend_contract import PATIENCE, BackendContract, _interrupt
from support.sagemaker_runs import ROLE, until_step
from trimtab.aws.channels import plan_channel
from trimtab.aws.submission import Submission
from trimtab.aws.upload import Sent, upload
from trimtab.backends.base import Listable, Preflight, Priced, Removable, Reporting, Resumable, RunHandle, RunState, Uploading
from trimtab.backends.process import ProcessBackend
from trimtab.backends.sagemaker import SageMakerBackend
from trimtab.errors import SpecError
from trimtab.events import Checkpoint, Phase, Step
from trimtab.plan import Work
from trimtab.run import Run
from trimtab.staging import stage

pytestmark = pytest.mark.usefixtures("no_fault_stays")


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


def test_a_spot_run_goes_on_after_it_was_interrupted(amazon, image, sixty_steps, staged, tmp_path, control_plane):
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2, spot="yes", max_wait_minutes="30")
    run = Run(backend.submit(sixty_steps, staged.channels), backend)
    until_step(backend, run.handle, 12)
    control_plane.interrupt(run.handle.id)
    run.wait(PATIENCE)
    steps = [event.step for event in run.events() if isinstance(event, Step)]
    repeated = [before + 1 - step for before, step in itertools.pairwise(steps) if step != before + 1]
    assert len(repeated) <= 1, "none where the checkpoint of the interruption arrived in S3"
    assert all(0 < count <= 5 + 1 for count in repeated), "at most one save interval"
    assert [step.step for step in run.metrics()] == list(range(1, steps[-1] + 1))
    assert run.artifact().manifest["metrics"]["steps"] == steps[-1]
    said = [event.detail.partition(":")[0] for event in run.events() if isinstance(event, Phase) and event.name == "sagemaker"]
    assert said.count("Starting") == 2
    assert "Interrupted" in said
    backend.aws.close()


def test_a_sync_that_broke_off_in_a_checkpoint_makes_the_run_go_on_from_the_one_before(
    amazon, image, sixty_steps, staged, tmp_path, control_plane
):
    backend = SageMakerBackend(role=ROLE, image=image, home=tmp_path / "home", poll_seconds=0.2, spot=True)
    run = Run(backend.submit(sixty_steps, staged.channels), backend)
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


def test_several_instances_train_together_and_their_lines_are_told_apart(place, six_steps, staged):
    run = Run(place.submit(six_steps.model_copy(update={"nodes": 2}), staged.channels), place)
    run.wait(PATIENCE)
    assert run.artifact().manifest["metrics"]["nodes"] == 2
    lines = list(run.logs())
    assert "[algo-2] done: algo-1 writes the artifact" in lines
    assert [line for line in lines if line.startswith("step=")]


def test_the_services_own_time_limit_leaves_a_checkpoint_and_an_artifact(place, sixty_steps, staged):
    place.upload(sixty_steps, staged.channels)
    train = sixty_steps.train.model_copy(update={"max_steps": None, "epochs": 10_000})
    request = place.render(sixty_steps.model_copy(update={"train": train}), staged.channels, "trim-1d1d1d1d")["training_job"]
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


def test_money_is_a_limit_of_time_that_is_told(place, six_steps, staged):
    request = place.render(six_steps.model_copy(update={"max_usd": 2.0}), staged.channels, "trim-12345678")
    hours = request["training_job"]["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600
    price = place.foresee(six_steps, Work.read(staged.channels))
    assert hours < 2.0 / 0.1
    assert json.loads(request["hyperparameters"]["max_minutes"]) < hours * 60
    assert price.instance == request["training_job"]["ResourceConfig"]["InstanceType"]
    with pytest.raises(SpecError, match="raise max_usd"):
        place.render(six_steps.model_copy(update={"max_usd": 0.001}), staged.channels, "trim-12345678")
