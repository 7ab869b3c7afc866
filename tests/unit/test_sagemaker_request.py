"""The request for a training job: what is asked for, in the service's own terms, and what is refused before anything is sent."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from trimtab.aws import limits
from trimtab.aws.request import METRICS, Allocation, Settings, life_name, life_number, listing, number, pairs, tags_of, training_job
from trimtab.aws.request import yes_or_no as switch
from trimtab.errors import SpecError
from trimtab.events import Step
from trimtab.spec import JobSpec, TrainSpec

ROLE = "arn:aws:iam::123456789012:role/trimtab"
JOB = JobSpec(train=TrainSpec(model="smollm2-135m-instruct"), data=("notes.txt",), nodes=2)
SOURCE = {"S3DataType": "ManifestFile", "S3Uri": "s3://ours/trimtab/channels/ab.manifest", "S3DataDistributionType": "FullyReplicated"}
PLACE = Allocation(
    image="123456789012.dkr.ecr.eu-west-1.amazonaws.com/trimtab-xeon-train:0.1.0-0123456789ab",
    instance="ml.m7i.4xlarge",
    volume_gb=40,
    max_seconds=7200,
    run_uri="s3://ours/trimtab/runs/trim-7f3a9c21",
    channels={"train": SOURCE, "model": SOURCE},
)


def asked(job: JobSpec = JOB, **settings):
    return training_job(job, "trim-7f3a9c21", Settings(role=ROLE, **settings), PLACE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"spot": True, "max_wait_minutes": 30.0},
        {"keep_alive_minutes": 15.0, "tags": {"team": "search"}},
        {"subnets": ("subnet-0abc",), "security_groups": ("sg-0abc",), "kms_key": "alias/ours", "volume_kms_key": "alias/disks"},
        {"encrypt_traffic": True, "network_isolation": False},
    ],
)
def test_the_services_own_model_has_nothing_against_it(settings):
    request = asked(**settings)
    limits.refuse("CreateTrainingJob", request)
    limits.refuse_secrets(request)
    assert json.loads(json.dumps(request)) == request


def test_it_asks_for_what_a_run_needs_and_for_no_network():
    request = asked()
    assert request["EnableNetworkIsolation"]
    assert request["OutputDataConfig"] == {"S3OutputPath": f"{PLACE.run_uri}/output", "CompressionType": "NONE"}
    assert request["CheckpointConfig"] == {"S3Uri": f"{PLACE.run_uri}/checkpoints", "LocalPath": "/opt/ml/checkpoints"}
    assert request["ResourceConfig"] == {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 2, "VolumeSizeInGB": 40}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200}
    assert {channel["ChannelName"] for channel in request["InputDataConfig"]} == {"train", "model"}
    assert TrainSpec.from_hyperparameters(request["HyperParameters"]) == JOB.train


def test_metrics_are_found_in_the_line_of_a_step_and_nowhere_in_its_event():
    values = {"loss": 2.5, "epoch": 0.5, "lr": 3e-4, "grad_norm": 1.25, "tokens_per_second": 503.0, "memory_mb": 1834}
    step = Step(step=3, of=90, seconds_left=60, **values)
    definitions = {each["Name"]: each["Regex"] for each in asked()["AlgorithmSpecification"]["MetricDefinitions"]}
    assert definitions.keys() == {f"train:{name}" for name in METRICS}
    for name in METRICS:
        found = re.findall(definitions[f"train:{name}"], step.line())
        assert [float(value) for value in found] == [values[name]]
        assert not re.findall(definitions[f"train:{name}"], step.model_dump_json())


def test_spot_jobs_wait_for_instances_beyond_their_running_time():
    assert asked(spot=True)["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 10800}
    assert asked(spot=True, max_wait_minutes=1.5)["StoppingCondition"]["MaxWaitTimeInSeconds"] == 7290


def test_settings_given_to_a_resume_take_the_place_of_the_runs_own():
    noted = json.loads(
        json.dumps(asdict(Settings(role=ROLE, spot=True, subnets=("subnet-1",), security_groups=("sg-1",), tags={"a": "b"})))
    )
    assert Settings.anew(noted, Settings(role=""), ()) == Settings(
        role=ROLE, spot=True, subnets=("subnet-1",), security_groups=("sg-1",), tags={"a": "b"}
    )
    given = {"spot": "no", "instance_type": "ml.r7i.8xlarge"}
    assert Settings.anew(noted, Settings.parse(given), given).spot is False
    second = training_job(JOB, "trim-7f3a9c21", Settings.anew(noted, Settings.parse(given), given), PLACE, 2)
    assert second["TrainingJobName"] == "trim-7f3a9c21-2"
    assert "MaxWaitTimeInSeconds" not in second["StoppingCondition"]


def test_lives_are_told_by_their_names():
    assert [life_number("trim-7f3a9c21", life_name("trim-7f3a9c21", count)) for count in (1, 2, 13)] == [1, 2, 13]
    for other in ("trim-7f3a9c2", "trim-7f3a9c21-1", "trim-7f3a9c21-02", "trim-7f3a9c21-2-2", "x-trim-7f3a9c21"):
        assert life_number("trim-7f3a9c21", other) is None


def test_what_a_tag_may_not_hold_becomes_an_underscore():
    assert tags_of({"trimtab-model": "/home/größer 家/a'b*c"}) == [{"Key": "trimtab-model", "Value": "/home/größer 家/a_b_c"}]
    assert len(tags_of({"a": "x" * 300})[0]["Value"]) == 256


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"subnets": ("subnet-1",)}, "security_groups"),
        ({"max_wait_minutes": 5.0}, "spot=yes"),
        ({"spot": True, "keep_alive_minutes": 5.0}, "not kept"),
        ({"tags": {"trimtab-run": "x"}}, "trimtab-run is not yours"),
        ({"tags": {"aws:x": "x"}}, "aws:x is not yours"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        Settings(role=ROLE, **settings)


def test_settings_come_as_texts_from_the_command_line():
    assert [switch("spot", text) for text in ("yes", "TRUE", "0", "off")] == [True, True, False, False]
    assert number("volume_gb", "40") == 40
    parsed = Settings.parse({"role": ROLE, "volume_gb": "40", "spot": "yes", "subnets": "a,b", "security_groups": "c", "tags": "team=x"})
    assert parsed == Settings(role=ROLE, volume_gb=40, spot=True, subnets=("a", "b"), security_groups=("c",), tags={"team": "x"})
    assert listing("subnet-1, subnet-2,") == ("subnet-1", "subnet-2")
    assert pairs("tags", "team=search,cost=a=b") == {"team": "search", "cost": "a=b"}
    for wrong in (lambda: switch("spot", "perhaps"), lambda: number("volume_gb", "big"), lambda: number("volume_gb", "-1")):
        with pytest.raises(SpecError, match=r"perhaps|big|-1"):
            wrong()
    with pytest.raises(SpecError, match="tags=team"):
        pairs("tags", "team")


def test_a_token_is_refused_wherever_it_stands():
    token = "hf_" + "a" * 34
    for request in (asked(tags={"owner": token}), {**asked(), "Environment": {"HF_TOKEN": token}}):
        with pytest.raises(SpecError) as caught:
            limits.refuse_secrets(request)
        assert token not in str(caught.value)
