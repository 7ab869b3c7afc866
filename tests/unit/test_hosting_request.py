"""What an endpoint on SageMaker is asked to be, without asking: requests, machines, times, containers, JumpStart's documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.aws import containers, hosting_instances, jumpstart
from trimtab.aws import hosting_request as hosting
from trimtab.aws.hosting_request import HostingSettings
from trimtab.aws.instances import find
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts
from trimtab.spec import ServeSpec

ID = "trim-ep-7f3a9c21"
ROLE = "arn:aws:iam::123456789012:role/server"
LLAMA_13B = ModelFacts(40, 5120, 13824, 40, 40, 128, 32000, False)
HUB = Path(__file__).parents[1] / "support" / "hub" / "meta-textgeneration-llama-2-13b.json"


def bodies(container: str = "trimtab", gpus: int = 0, **given: object) -> dict[str, dict]:
    settings = HostingSettings.parse({"role": ROLE, "container": container, **given})
    granted = hosting.Allocation(
        container=containers.Container(
            container, "123456789012.dkr.ecr.us-east-1.amazonaws.com/a:1", {"A": "1"}, containers.ami_of(container)
        ),
        instance="ml.g5.xlarge" if gpus else "ml.c7i.large",
        gpus=gpus,
        vcpus=4,
        memory_mb=2048,
        patience=hosting_instances.patience(10**9),
        source=hosting.model_source("s3://bucket/trimtab/models/abc"),
        volume_gb=None if gpus else 50,
    )
    tags = hosting.tags(settings, ID, title="llama", models=["tuned"], owner="here", container=container, ttl_minutes=30)
    found = hosting.requests(settings, ID, granted, tags)
    hosting.refuse(found)
    return found


def test_three_requests_in_their_order_by_one_name():
    found = bodies()
    assert list(found) == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
    assert (
        found["CreateModel"]["ModelName"]
        == found["CreateEndpointConfig"]["EndpointConfigName"]
        == found["CreateEndpoint"]["EndpointName"]
        == ID
    )
    assert found["CreateModel"]["EnableNetworkIsolation"] is True
    source = found["CreateModel"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]
    assert source == {"S3Uri": "s3://bucket/trimtab/models/abc/", "S3DataType": "S3Prefix", "CompressionType": "None"}
    (variant,) = found["CreateEndpointConfig"]["ProductionVariants"]
    assert variant == {
        "VariantName": "AllTraffic", "ModelName": ID, "InstanceType": "ml.c7i.large",
        "InitialInstanceCount": 1, "InitialVariantWeight": 1.0,
        "ModelDataDownloadTimeoutInSeconds": 600, "ContainerStartupHealthCheckTimeoutInSeconds": 610, "VolumeSizeInGB": 50,
    }  # fmt: skip
    tags = {tag["Key"]: tag["Value"] for tag in found["CreateEndpoint"]["Tags"]}
    assert tags == {
        "trimtab-endpoint": ID, "trimtab-title": "llama", "trimtab-models": "tuned", "trimtab-owner": "here",
        "trimtab-container": "trimtab", "trimtab-ttl-minutes": "30",
    }  # fmt: skip


def test_a_network_of_ones_own_keys_and_tags_reach_the_requests():
    found = bodies(subnets="subnet-1", security_groups="sg-1,sg-2", volume_kms_key="key-1", network_isolation="no", tags="team=search")
    assert found["CreateModel"]["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1", "sg-2"]}
    assert found["CreateModel"]["EnableNetworkIsolation"] is False
    assert found["CreateEndpointConfig"]["KmsKeyId"] == "key-1"
    assert {"Key": "team", "Value": "search"} in found["CreateEndpoint"]["Tags"]


def test_a_container_for_cuda_13_gets_machines_with_its_driver():
    variant = bodies("vllm", 1)["CreateEndpointConfig"]["ProductionVariants"][0]
    assert variant["InferenceAmiVersion"] == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert "VolumeSizeInGB" not in variant


def test_scaling_to_zero_is_an_inference_component_with_two_policies_and_an_alarm():
    """As AWS documents it: "Scale an endpoint to zero instances", SageMaker AI developer guide."""
    found = bodies("vllm", 1, min_instances="0", max_instances="3", target_requests="10", cooldown_seconds="600")
    (variant,) = found["CreateEndpointConfig"]["ProductionVariants"]
    assert "ModelName" not in variant
    assert variant["ManagedInstanceScaling"] == {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": 3}
    assert found["CreateEndpointConfig"]["ExecutionRoleArn"] == ROLE
    component = found["CreateInferenceComponent"]
    assert component["Specification"]["ModelName"] == ID
    assert component["Specification"]["ComputeResourceRequirements"] == {
        "MinMemoryRequiredInMb": 2048,
        "NumberOfAcceleratorDevicesRequired": 1,
    }
    assert component["RuntimeConfig"] == {"CopyCount": 1}
    target = {
        "ServiceNamespace": "sagemaker", "ResourceId": f"inference-component/{ID}",
        "ScalableDimension": "sagemaker:inference-component:DesiredCopyCount",
    }  # fmt: skip
    assert found["RegisterScalableTarget"] == {**target, "MinCapacity": 0, "MaxCapacity": 3}
    tracking = found["PutScalingPolicy"]["TargetTrackingScalingPolicyConfiguration"]
    assert (tracking["TargetValue"], tracking["ScaleInCooldown"]) == (10, 600)
    step = found["PutScalingPolicy from zero"]
    assert step["StepScalingPolicyConfiguration"]["StepAdjustments"] == [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}]
    alarm = found["PutMetricAlarm"]
    assert (alarm["Namespace"], alarm["MetricName"]) == ("AWS/SageMaker", "NoCapacityInvocationFailures")
    assert alarm["Dimensions"] == [{"Name": "InferenceComponentName", "Value": ID}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"container": "tvm"}, "give one of trimtab, vllm, lmi, tgi"),
        ({"instances": "0"}, "begins with one instance"),
        ({"instances": "3", "max_instances": "2"}, "not between min_instances"),
        ({"instances": "two"}, "instances=two is no number"),
        ({"max_instances": "1.5"}, "give a whole number"),
        ({"min_instances": "-1"}, "give a whole number"),
        ({"target_requests": "0"}, "above zero"),
        ({"subnets": "subnet-1"}, "security_groups"),
        ({"tags": "aws:a=1"}, "not yours to set"),
        ({"network_isolation": "maybe"}, "neither yes nor no"),
        ({"jumpstart": "a", "model_uri": "s3://b/c"}, "not both"),
        ({"accept_eula": "yes"}, "for a model of JumpStart"),
    ],
)
def test_settings_that_are_none_are_refused(given, said):
    with pytest.raises(SpecError, match=said):
        HostingSettings.parse({"role": ROLE, **given})


def test_what_the_service_would_refuse_is_refused():
    variant = {"VariantName": "a", "ContainerStartupHealthCheckTimeoutInSeconds": 20_000}
    with pytest.raises(SpecError, match="3,600"):
        hosting.refuse({"CreateEndpointConfig": {"EndpointConfigName": ID, "ProductionVariants": [variant]}})


def test_a_token_among_the_variables_is_refused():
    container = {"Image": "image", "Environment": {"HF_TOKEN": "hf_" + "aB3" * 12}}
    with pytest.raises(SpecError, match="looks like a secret"):
        hosting.refuse({"CreateModel": {"ModelName": ID, "PrimaryContainer": container, "ExecutionRoleArn": ROLE}})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vllm", {
            "SM_VLLM_MODEL": "/opt/ml/model", "SM_VLLM_SERVED_MODEL_NAME": "tuned", "SM_VLLM_TENSOR_PARALLEL_SIZE": "4",
            "SM_VLLM_MAX_MODEL_LEN": "2048", "SM_VLLM_DTYPE": "bfloat16",
        }),
        ("lmi", {
            "HF_MODEL_ID": "/opt/ml/model", "OPTION_ROLLING_BATCH": "vllm", "OPTION_TENSOR_PARALLEL_DEGREE": "4",
            "OPTION_MAX_MODEL_LEN": "2048", "OPTION_DTYPE": "bf16",
        }),
        ("tgi", {
            "HF_MODEL_ID": "/opt/ml/model", "SM_NUM_GPUS": "4", "MAX_TOTAL_TOKENS": "2048", "MAX_INPUT_TOKENS": "2047", "DTYPE": "bfloat16",
        }),
    ],
)  # fmt: skip
def test_the_same_wish_in_each_containers_variables(kind, expected):
    assert containers.environment(kind, ServeSpec(max_context=2048, dtype="bfloat16"), "tuned", 4) == expected


def test_our_container_is_told_that_a_platform_checks_who_asks():
    found = containers.environment("trimtab", ServeSpec(name="llama", ttl_minutes=5, grace_seconds=100), "tuned", 0)
    spec = ServeSpec.from_text(found["TRIMTAB_SERVE"])
    assert (spec.open, spec.ttl_minutes, spec.grace_seconds, spec.name) == (True, None, 25.0, "llama")


@pytest.mark.parametrize("option", [{"engine": "openvino"}, {"max_waiting": 3}, {"cache_gb": 2}, {"trust_remote_code": True}])
def test_what_a_foreign_container_cannot_be_asked_is_named(option):
    with pytest.raises(SpecError, match=next(iter(option))):
        containers.environment("vllm", ServeSpec(**option), "tuned", 1)


def test_images_come_from_the_registry_of_the_region():
    assert containers.aws_image("lmi", "us-east-1") == "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.38.0-lmi29.0.0-cu130"
    assert containers.aws_image("vllm", "ap-east-1").startswith("871362719292.dkr.ecr.ap-east-1.amazonaws.com/vllm:")
    assert containers.aws_image("tgi", "cn-north-1").startswith("727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/huggingface-pytorch-tgi")
    for kind in ("vllm", "lmi", "tgi"):
        assert containers.kind_of_image(containers.aws_image(kind, "eu-west-1")) == kind
    assert containers.kind_of_image("1.dkr.ecr.us-east-1.amazonaws.com/huggingface-vllm:1") == "vllm"


def test_memory_is_weights_cache_and_server():
    need = hosting_instances.demand(26 * 10**9, LLAMA_13B, ServeSpec(), 4096)
    assert need.weights == pytest.approx(24.2, abs=0.1)
    assert need.cache == pytest.approx(8 * 4096 * 40 * 5120 * 2 * 2 / 2**30)
    assert hosting_instances.demand(10**9, LLAMA_13B, ServeSpec(max_context=512)).context == 512
    assert hosting_instances.demand(10**9, LLAMA_13B, ServeSpec(cache_gb=2)).cache == pytest.approx(2e9 / 2**30)


def test_the_machine_is_the_cheapest_that_holds_it_and_answers_at_a_readers_pace():
    small = hosting_instances.choose("xeon", hosting_instances.demand(270 * 10**6, None, ServeSpec()))
    assert small.instance.name == "ml.c7i.large"
    assert "about $0.11/h (the training price of" in small.reason
    one_b = hosting_instances.choose("xeon", hosting_instances.demand(2200 * 10**6, None, ServeSpec(cache_gb=1)))
    assert hosting_instances.tokens_per_second(one_b.instance, hosting_instances.demand(2200 * 10**6, None, ServeSpec(cache_gb=1))) >= 8
    big = hosting_instances.demand(26 * 10**9, LLAMA_13B, ServeSpec(cache_gb=4), 4096)
    assert hosting_instances.choose("gpu", big).instance.name == "ml.g6e.xlarge"
    huge = hosting_instances.demand(138 * 10**9, None, ServeSpec(cache_gb=4))
    assert hosting_instances.choose("gpu", huge, several_gpus=True).instance.gpus > 1
    with pytest.raises(SpecError, match="the largest type of the table is"):
        hosting_instances.choose("gpu", huge)


@pytest.mark.parametrize(
    ("device", "asked", "said"),
    [
        ("gpu", "ml.c7i.large", "has no GPU"),
        ("xeon", "ml.g5.xlarge", "device xeon does not use"),
        ("xeon", "ml.c7i.large", "too little memory"),
    ],
)
def test_a_machine_that_does_not_do_is_refused_with_one_that_does(device, asked, said):
    with pytest.raises(SpecError, match=f"{said}.*the cheapest that does is ml"):
        hosting_instances.choose(device, hosting_instances.demand(8 * 10**9, None, ServeSpec()), ask=asked)


def test_room_is_counted_on_the_gpus_that_the_model_can_be_split_on():
    """vLLM splits by heads: 14 of them on two GPUs of four, 40 on all."""
    qwen = ModelFacts(24, 896, 4864, 14, 2, 64, 151_936, True)
    assert [qwen.gpus_used(present) for present in (0, 1, 2, 3, 4, 8)] == [1, 1, 2, 2, 2, 2]
    assert [LLAMA_13B.gpus_used(present) for present in (1, 4, 8)] == [1, 4, 8]
    four = find("ml.g6e.12xlarge")
    halved, whole = (hosting_instances.demand(10**9, facts, ServeSpec()) for facts in (qwen, LLAMA_13B))
    assert (halved.gpus(four), whole.gpus(four), halved.gpus(find("ml.c7i.large"))) == (2, 4, 0)
    assert hosting_instances.room_gib(four, whole) == pytest.approx(2 * hosting_instances.room_gib(four, halved))
    with pytest.raises(SpecError, match=r"too little memory: .* on the 2 of 4 GPUs that it can be split on; "):
        hosting_instances.choose("gpu", hosting_instances.demand(120 * 10**9, qwen, ServeSpec()), ask="ml.g6e.12xlarge")


def test_times_are_sized_to_the_model():
    small, large, huge = (hosting_instances.patience(size) for size in (10**8, 10**11, 10**12))
    assert (small.download, small.health) == (600, 601)
    assert (large.download, large.health) == (2000, 1600)
    assert (huge.download, huge.health) == (3600, 3600)
    assert "100.0 GB at 100 MB/s from S3" in large.reason


def test_a_document_of_jumpstart_is_read_as_its_sdk_reads_it():
    found = jumpstart.read("llama", "4.5.0", HUB.read_text())
    assert found.container.kind == "lmi"
    assert found.container.environment == {
        "HF_MODEL_ID": "/opt/ml/model", "OPTION_ROLLING_BATCH": "vllm", "OPTION_TENSOR_PARALLEL_DEGREE": "4",
    }  # fmt: skip
    assert (found.instance, found.download_seconds, found.isolated) == ("ml.g5.12xlarge", 1200, True)
    with pytest.raises(SpecError, match="accept_eula=yes"):
        found.accepted(False)
    assert found.accepted(True)["ModelAccessConfig"] == {"AcceptEula": True}
    document = json.loads(HUB.read_text())
    free = jumpstart.read("free", "1.0.0", json.dumps({**document, "HostingEulaUri": None}))
    assert "ModelAccessConfig" not in free.accepted(False)


@pytest.mark.parametrize(
    "change", [{"HostingEcrUri": None}, {"HostingUseScriptUri": True, "HostingScriptUri": "s3://a/b.tar.gz"}], ids=["no image", "a script"]
)
def test_a_model_that_cannot_be_served_so_is_refused(change):
    document = {name: value for name, value in {**json.loads(HUB.read_text()), **change}.items() if value is not None}
    with pytest.raises(SpecError, match="choose another model"):
        jumpstart.read("odd", "1.0.0", json.dumps(document))


def test_the_table_holds_every_type_that_is_chosen():
    for name in ("ml.c7i.large", "ml.g5.xlarge", "ml.g6e.12xlarge"):
        assert hosting_instances.room_gib(find(name), hosting_instances.demand(1, None, ServeSpec())) > 0
