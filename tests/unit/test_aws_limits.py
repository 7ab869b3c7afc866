"""A request against AWS's own model: everything that AWS would refuse is found, all at once, before anything is sent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from hypothesis import given
from hypothesis import strategies as st

from trimtab.aws import limits
from trimtab.aws.instances import instances
from trimtab.aws.limits import refuse, refuse_secrets, violations
from trimtab.errors import SpecError

TOKEN = "hf_" + "aBc" * 11 + "d"

GOOD: dict[str, Any] = {
    "TrainingJobName": "trim-7f3a9c21",
    "RoleArn": "arn:aws:iam::111122223333:role/service-role/Train",
    "AlgorithmSpecification": {
        "TrainingImage": "111122223333.dkr.ecr.us-east-1.amazonaws.com/trimtab-xeon-train:0.1.0",
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": "loss", "Regex": "loss=([0-9.eE+-]+)"}],
    },
    "HyperParameters": {"model": '"smollm2-135m"', "learning_rate": "0.0007"},
    "InputDataConfig": [
        {
            "ChannelName": "train",
            "DataSource": {"S3DataSource": {"S3DataType": "ManifestFile", "S3Uri": "s3://b/trimtab/channels/0.manifest"}},
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://b/trimtab/runs/", "CompressionType": "NONE"},
    "ResourceConfig": {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    "CheckpointConfig": {"S3Uri": "s3://b/trimtab/runs/trim-7f3a9c21/checkpoints/"},
    "Environment": {"OMP_NUM_THREADS": "16"},
    "Tags": [{"Key": "trimtab:run", "Value": "Größe 1"}],
    "EnableManagedSpotTraining": False,
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The good request with one place changed; `...` takes it away."""
    request: Any = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    inner = request
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner.setdefault(part, {})
    if value is ...:
        del inner[last]
    elif isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value
    return request


def test_a_good_request_passes():
    refuse("CreateTrainingJob", GOOD)
    refuse_secrets(GOOD)


BAD = [
    ("TrainingJobName", "a" * 64, "TrainingJobName: 64 characters", "1 to 63 is allowed"),
    ("TrainingJobName", "llama2_13b chat", "'llama2_13b chat' does not have the form", "[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"),
    ("TrainingJobName", "-a", "does not have the form", "TrainingJobName"),
    ("TrainingJobName", "a\n", "does not have the form", "TrainingJobName"),
    ("TrainingJobName", 7, "TrainingJobName: 7 is not text", ""),
    ("TrainingJobName", ..., "TrainingJobName: is missing", ""),
    ("RoleArn", "Train", "RoleArn", "allowed"),
    ("RoleArn", "role/Train-that-is-no-arn", "RoleArn", "does not have the form"),
    ("RolArn", "x", "RolArn: there is no such name here", "did you mean RoleArn"),
    (
        "ResourceConfig.InstanceType",
        "ml.m7i.4xlage",
        "ResourceConfig.InstanceType: 'ml.m7i.4xlage' is not known",
        "did you mean ml.m7i.4xlarge",
    ),
    ("ResourceConfig.InstanceType", "zzz", "is not known; allowed are ml.", "more"),
    ("ResourceConfig.InstanceCount", "1", "ResourceConfig.InstanceCount: '1' is not a whole number", ""),
    ("ResourceConfig.InstanceCount", True, "ResourceConfig.InstanceCount: True is not a whole number", ""),
    ("ResourceConfig.InstanceCount", -1, "-1 is out of range", "at least 0"),
    ("ResourceConfig.InstanceCount", 0, "0 is out of range", "at least 1"),
    ("ResourceConfig.KeepAlivePeriodInSeconds", 21_601, "21,601 is out of range", "at most 21,600"),
    ("HyperParameters", {f"k{number}": "1" for number in range(101)}, "HyperParameters: 101 entries", "at most 100"),
    ("HyperParameters.text", "x" * 2_501, "HyperParameters.text: 2,501 characters", "at most 2,500"),
    ("HyperParameters.text", "two\nlines", "HyperParameters.text: 'two\\nlines' does not have the form .*", ""),
    ("HyperParameters.text", "two\rlines", "HyperParameters.text", "does not have the form .*"),
    ("HyperParameters.rank", 8, "HyperParameters.rank: 8 is not text", ""),
    ("HyperParameters." + "k" * 257, "1", "257 characters", "at most 256"),
    ("Environment.X", "x" * 513, "Environment.X: 513 characters", "at most 512"),
    ("Environment", {f"K{number}": "1" for number in range(101)}, "Environment: 101 entries", "at most 100"),
    ("Environment.A-B", "x", "the name 'A-B'", "does not have the form"),
    ("InputDataConfig", [], "InputDataConfig: 0 entries", "1 to 20"),
    ("InputDataConfig", GOOD["InputDataConfig"] * 21, "InputDataConfig: 21 entries", "1 to 20"),
    ("InputDataConfig", GOOD["InputDataConfig"] * 2, "InputDataConfig[1].ChannelName: 'train' is given twice", ""),
    (
        "InputDataConfig.0.DataSource.S3DataSource.S3DataType",
        "Manifest",
        "InputDataConfig[0].DataSource.S3DataSource.S3DataType",
        "ManifestFile",
    ),
    ("InputDataConfig.0.DataSource.S3DataSource.S3Uri", "/data", "'/data' does not have the form", "s3"),
    ("OutputDataConfig.S3OutputPath", None, "OutputDataConfig.S3OutputPath: is missing", ""),
    ("OutputDataConfig.CompressionType", "None", "OutputDataConfig.CompressionType: 'None' is not known", "NONE"),
    ("AlgorithmSpecification.MetricDefinitions", [{"Name": "n", "Regex": "x"}] * 41, "41 entries", "at most 40"),
    (
        "AlgorithmSpecification.MetricDefinitions",
        [{"Name": "n", "Regex": "x" * 501}],
        "MetricDefinitions[0].Regex: 501 characters",
        "1 to 500",
    ),
    ("AlgorithmSpecification.ContainerArguments", ["x" * 257], "ContainerArguments[0]: 257 characters", "256"),
    ("AlgorithmSpecification.TrainingImage", ..., "exactly one of TrainingImage, AlgorithmName", ""),
    ("Tags", [{"Key": f"k{number}", "Value": ""} for number in range(51)], "Tags: 51 entries", "at most 50"),
    ("Tags.0.Key", "a?b", "Tags[0].Key: 'a?b' does not have the form", ""),
    ("Tags.0.Key", "aws:mine", "Tags[0].Key: 'aws:mine' begins with aws:", ""),
    ("Tags", [{"Key": "k", "Value": "1"}, {"Key": "k", "Value": "2"}], "Tags[1].Key: 'k' is given twice", ""),
    ("StoppingCondition.MaxRuntimeInSeconds", 28 * 86_400 + 1, "2,419,201 is out of range", "28 days"),
    ("StoppingCondition.MaxWaitTimeInSeconds", 7_200, "is for spot training only", ""),
    ("EnableManagedSpotTraining", True, "MaxWaitTimeInSeconds: is missing", ""),
    ("EnableManagedSpotTraining", "yes", "EnableManagedSpotTraining: 'yes' is not true or false", ""),
    ("StoppingCondition.MaxPendingTimeInSeconds", 7_200, "has no effect on ml.m7i.4xlarge", "leave max_pending_minutes out"),
    ("VpcConfig", {"SecurityGroupIds": ["sg-1"] * 6, "Subnets": ["subnet-1"]}, "VpcConfig.SecurityGroupIds: 6 entries", "1 to 5"),
    ("HyperParameters", None, "HyperParameters: None is no value", "leave it out"),
]


@pytest.mark.parametrize(("path", "value", "what", "allowed"), BAD, ids=[f"{path}-{index}" for index, (path, *_) in enumerate(BAD)])
def test_what_aws_would_refuse_is_found(path, value, what, allowed):
    with pytest.raises(SpecError) as caught:
        refuse("CreateTrainingJob", changed(path, value))
    assert what in str(caught.value)
    assert allowed in str(caught.value)
    assert str(caught.value).endswith("Change the values and run it again.")
    assert len(violations("CreateTrainingJob", changed(path, value))) == 1


def test_spot_and_warm_machines_exclude_each_other_and_the_wait_includes_the_run():
    request = changed("ResourceConfig.KeepAlivePeriodInSeconds", 600)
    request |= {"EnableManagedSpotTraining": True, "StoppingCondition": {"MaxRuntimeInSeconds": 100, "MaxWaitTimeInSeconds": 99}}
    found = violations("CreateTrainingJob", request)
    assert len(found) == 2
    assert "99 is below MaxRuntimeInSeconds (100)" in found[0]
    assert "cannot be spot instances" in found[1]


def test_everything_is_found_at_once():
    request = copy.deepcopy(GOOD)
    for path, value in [("TrainingJobName", "a b"), ("RoleArn", "x"), ("Extra", 1), ("HyperParameters", {"a": "x" * 3_000, "b": 2})]:
        request[path] = value
    with pytest.raises(SpecError, match="would be refused for 5 things"):
        refuse("CreateTrainingJob", request)


@pytest.mark.parametrize("kind", ["g5.xlarge", "g6.xlarge", "g6e.48xlarge", "p4d.24xlarge", "p4de.24xlarge", "p5.4xlarge", "p5en.48xlarge"])
def test_machines_with_disks_of_their_own_take_no_key_for_them(kind):
    request = changed("ResourceConfig", GOOD["ResourceConfig"] | {"InstanceType": f"ml.{kind}", "VolumeKmsKeyId": "alias/mine"})
    found = violations("CreateTrainingJob", request)
    assert len(found) == 1
    assert f"VolumeKmsKeyId: ml.{kind} has disks of its own" in found[0]
    assert "leave volume_kms_key out" in found[0]
    del request["ResourceConfig"]["VolumeKmsKeyId"]
    refuse("CreateTrainingJob", request)
    request["StoppingCondition"] = {"MaxRuntimeInSeconds": 3600, "MaxPendingTimeInSeconds": 7_200}
    refuse("CreateTrainingJob", request)  # and such types may be waited for


def test_a_machine_on_volumes_takes_a_key():
    refuse("CreateTrainingJob", changed("ResourceConfig.VolumeKmsKeyId", "alias/mine"))


def test_every_type_with_a_gpu_of_the_table_has_disks_of_its_own():
    assert {name for name in instances() if limits._OWN_DISKS.match(name)} == {name for name, one in instances().items() if one.gpus}


def test_a_long_value_is_shortened_and_a_secret_is_not_shown():
    said = violations("CreateTrainingJob", changed("HyperParameters.text", "x" * 5_000))[0]
    assert len(said) < 200
    said = violations("CreateTrainingJob", changed("TrainingJobName", f"{TOKEN} x"))[0]
    assert TOKEN not in said


def test_a_hostile_name_takes_no_time():
    assert violations("CreateTrainingJob", changed("TrainingJobName", "a-" * 31 + "!"))


def test_other_operations_and_services_have_their_models():
    with pytest.raises(SpecError, match="StopTrainingJob would be refused for one thing: TrainingJobName: is missing"):
        refuse("StopTrainingJob", {})
    refuse("GetCallerIdentity", {}, "sts")
    with pytest.raises(SpecError, match="logGroupName"):
        refuse("DescribeLogStreams", {"logGroupName": "a b"}, "logs")
    with pytest.raises(SpecError, match="Body: 25,000,001 bytes"):
        refuse("InvokeEndpoint", {"EndpointName": "e", "Body": b"x" * 25_000_001}, "sagemaker-runtime")


@pytest.mark.parametrize(
    ("service", "unknown"),
    # what is left has a quantifier on an anchor, surrogates, a range from a class: no engine reads them as they were meant
    [("sagemaker", 3), ("logs", 1), ("sts", 0), ("service-quotas", 0), ("sagemaker-runtime", 0), ("s3", 0)],
)
def test_aws_patterns_are_understood(service, unknown):
    model = limits._model(service)
    patterns = {model.shape_for(name).metadata.get("pattern") for name in model.shape_names} - {None}
    assert sum(limits._pattern(pattern) is None for pattern in patterns) <= unknown


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", ["", "Größe 1", "名前", "a=b/c@d"], ["a?b", "a\tb", "a*"]),
        (r"\p{ASCII}*", ["abc~"], ["é"]),
        (r"\A\S[\p{Print}]*\z", ["a b"], [" a", "a\n", ""]),
        (r"^a.c$", ["abc"], ["a\nc", "a\u2028c", "abc\n", "xabc"]),
        (r"[\w.]+", ["a.b_1"], ["é", "a b"]),
        (r"a\.c", ["a.c"], ["abc"]),
        (r"[.]", ["."], ["a"]),
    ],
)
def test_javas_patterns_are_read_as_java_reads_them(pattern, good, bad):
    compiled = limits._pattern(pattern)
    assert [text for text in good if not compiled.fullmatch(text)] == []
    assert [text for text in bad if compiled.fullmatch(text)] == []


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.sampled_from(["File", "ml.m7i.large"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["S3Uri", "DataSource", "x", "InstanceCount"]), inner, max_size=2)
    ),
    max_leaves=6,
)
SHAPE = ServiceModel(Loader().load_service_model("sagemaker", "service-2"), "sagemaker").operation_model("CreateTrainingJob").input_shape


@given(st.dictionaries(st.sampled_from([*GOOD, "VpcConfig", "Nonsense"]), values, max_size=4))
def test_what_botocore_refuses_is_refused(change):
    request = {**copy.deepcopy(GOOD), **change}
    if ParamValidator().validate(request, SHAPE).has_errors():
        assert violations("CreateTrainingJob", request)


AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("HyperParameters.token", TOKEN, "HyperParameters.token"),
        ("HyperParameters." + TOKEN, "1", "HyperParameters: name number 3"),
        ("Environment.HF_TOKEN", TOKEN, "Environment.HF_TOKEN"),
        ("Environment.AWS_SECRET_ACCESS_KEY", AWS_SECRET, "Environment.AWS_SECRET_ACCESS_KEY"),
        ("Environment.WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567", "Environment.WANDB_API_KEY"),
        ("Tags.0.Value", f"for {TOKEN}", "Tags[0].Value"),
        ("Tags.0", {"Key": "api-key", "Value": "0123456789abcdef01234567"}, "Tags[0].Value"),
        ("AlgorithmSpecification.ContainerArguments", ["--token", TOKEN], "AlgorithmSpecification.ContainerArguments[1]"),
        ("OutputDataConfig.S3OutputPath", f"https://ada:{'s3cret'}@host/", "OutputDataConfig.S3OutputPath"),
    ],
)
def test_a_token_is_refused_wherever_it_is_and_never_shown(path, value, named):
    with pytest.raises(SpecError) as caught:
        refuse_secrets(changed(path, value))
    said = str(caught.value)
    assert said.startswith(f"{named} holds what looks like a secret (")
    assert "HF_TOKEN on this machine" in said
    for secret in (TOKEN, AWS_SECRET, "s3cret", "0123456789abcdef"):
        assert secret not in said
