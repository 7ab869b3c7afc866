"""Training jobs that really run: unmodified boto3 asks, containers of a shell script answer, S3 and Logs are LocalStack's."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

from control_plane import ControlPlane, channels, cloudwatch
from control_plane.container import LABEL
from control_plane.layout import Host, hosts_of, resource_config
from control_plane.training import TrainingRunner
from support.cloud import QUICK
from support.training_jobs import WAITS, Jobs, client_at, prefix, statuses, until


class TestWhatAContainerFinds:
    def test_its_tree_is_roots_and_its_files_say_what_it_is_part_of(self, jobs: Jobs) -> None:
        script = """
        umask; id -u; echo "$@"; hostname; env | grep -E '^(TRAINING|AWS|SM_|MINE)' | sort
        cd /opt/ml; stat -c '%n %u:%g %a' input input/config input/data/code model output checkpoints
        for name in hyperparameters resourceconfig inputdataconfig checkpointconfig; do echo "$(cat input/config/$name.json)"; done
        touch input/written && echo writable
        """
        checkpoints = {"S3Uri": f"s3://{jobs.bucket}/checkpoints"}
        name = jobs.start(
            script, HyperParameters={"lora_rank": "8", "model": '"a"'}, Environment={"MINE": "1"}, CheckpointConfig=checkpoints
        )
        found = jobs.wait(name)
        assert found["TrainingJobStatus"] == "Completed"
        lines = jobs.lines(name)
        assert lines[:4] == ["0022", "0", "train", "algo-1"]
        assert lines[4:8] == [
            "AWS_REGION=us-east-1", "MINE=1", f"TRAINING_JOB_ARN={found['TrainingJobArn']}", f"TRAINING_JOB_NAME={name}"
        ]  # fmt: skip
        folders = ("input", "input/config", "input/data/code", "model", "output", "checkpoints")
        assert lines[8:14] == [f"{each} 0:0 755" for each in folders]
        hyperparameters, resources, channel, checkpoint = map(json.loads, lines[14:18])
        assert hyperparameters == {"lora_rank": "8", "model": '"a"'}
        assert (resources["current_host"], resources["hosts"], resources["current_instance_type"]) == ("algo-1", ["algo-1"], "ml.m7i.large")
        assert channel["code"]["TrainingInputMode"] == "File"
        assert checkpoint == {"LocalPath": "/opt/ml/checkpoints", "S3Uri": checkpoints["S3Uri"]}
        assert lines[18] == "writable"

    def test_volumes_in_place_of_folders_look_the_same(self, jobs: Jobs, localstack: str, client: DockerClient) -> None:
        """What a caller gets who is not root."""
        with ControlPlane(aws_url=localstack, settings=replace(QUICK, volumes=True)) as plane:
            mine_alone = {"label": f"{LABEL}={plane.place(plane.account, plane.region).training.engine.mark}"}  # type: ignore[union-attr]
            mine = Jobs(plane, None, jobs.s3, jobs.logs, jobs.bucket, jobs.image)
            with contextlib.closing(client_at(jobs.sagemaker, plane.url)) as mine.sagemaker:
                script = """
                cd /opt/ml; stat -c '%n %u:%g %a' input model output checkpoints
                if [ -f checkpoints/1 ]; then cat checkpoints/1 >model/m; exit 0; fi
                trap 'exit 143' TERM; umask 077; echo one >checkpoints/1; echo saved; while :; do sleep 0.1; done
                """
                name = mine.spot(script)
                mine.until_printed(name, "saved")
                until(lambda: mine.keys("checkpoints/"))
                assert len(client.volumes.list(filters=mine_alone)) == 4
                plane.interrupt(name)
                assert mine.wait(name)["TrainingJobStatus"] == "Completed"
                assert mine.lines(name)[:4] == [f"{each} 0:0 755" for each in ("input", "model", "output", "checkpoints")]
                assert mine.packed(name) == {"m": "one\n"}
                assert client.volumes.list(filters=mine_alone) == []

    def test_an_entrypoint_and_arguments_of_the_request_take_the_place_of_the_images(self, jobs: Jobs) -> None:
        algorithm = {"ContainerEntrypoint": ["/bin/sh", "-c"], "ContainerArguments": ["echo $0 $1 >/opt/ml/model/said", "a", "b c"]}
        found = jobs.run("", algorithm=algorithm)
        assert jobs.packed(found["TrainingJobName"]) == {"said": "a b c\n"}

    def test_with_isolation_there_is_no_network_but_its_own(self, jobs: Jobs) -> None:
        name = jobs.start("ls /sys/class/net; cat /proc/net/route | wc -l", EnableNetworkIsolation=True)
        jobs.wait(name)
        assert jobs.lines(name) == ["lo", "1"]


class TestChannels:
    def test_prefixes_manifests_and_gzip(self, jobs: Jobs) -> None:
        jobs.put("data/a", "A")
        jobs.put("data/deep/b", "B")
        jobs.put("data/folder/", b"")
        jobs.put("data.other", "not mine")
        manifest = jobs.put("lists/m", json.dumps([{"prefix": f"s3://{jobs.bucket}/data/"}, "deep/b", "a"]))
        packed = jobs.put("packed/c", gzip.compress(b"C"))
        given = [
            prefix("whole", f"s3://{jobs.bucket}/data/"),
            prefix("one", f"s3://{jobs.bucket}/data/a"),
            prefix("listed", manifest, S3DataType="ManifestFile"),
            prefix("unpacked", packed) | {"CompressionType": "Gzip"},
        ]
        name = jobs.start(
            "cd /opt/ml/input/data; find whole one listed unpacked -type f | sort | while read f; do echo $f $(cat $f); done",
            channels=given,
        )
        assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
        assert jobs.lines(name) == ["listed/a A", "listed/deep/b B", "one/a A", "unpacked/c C", "whole/a A", "whole/deep/b B"]

    def test_data_that_cannot_be_had_fails_the_job_before_it_trains(self, jobs: Jobs) -> None:
        """Each of these in a job of its own, all at once."""
        reasons = {
            ("ManifestFile", "broken"): "is no manifest",
            ("ManifestFile", "lacking"): "NoSuchKey|404",
            ("ManifestFile", "outside"): "names no file in its folder",
            ("S3Prefix", "absolute/"): "names no file in its folder",
            ("S3Prefix", "clash/"): "is an object and the folder of",
        }
        jobs.put("broken", "[1, 2")
        jobs.put("lacking", json.dumps([{"prefix": f"s3://{jobs.bucket}/"}, "nowhere"]))
        jobs.put("outside", json.dumps([{"prefix": f"s3://{jobs.bucket}/"}, "../../nowhere"]))
        jobs.put("clash/a", "file")
        jobs.put("absolute//tmp/file", "file")
        jobs.put("clash/a/b", "file")
        started = {
            jobs.start("echo ran", channels=[prefix("data", f"s3://{jobs.bucket}/{key}", S3DataType=kind)]): said
            for (kind, key), said in reasons.items()
        }
        for name, said in started.items():
            found = jobs.wait(name)
            assert found["TrainingJobStatus"] == "Failed", said
            assert found["FailureReason"].startswith("ClientError: Data download failed:")
            assert any(each in found["FailureReason"] for each in said.split("|")), (said, found["FailureReason"])
            assert "Training" not in statuses(found)

    @pytest.mark.parametrize(
        ("key", "asked", "place"),
        [
            ("a/b/c", "a/b/", "c"),
            ("a/b/c", "a/b", "c"),
            ("a/b/c", "a/b/c", "c"),
            ("a/b/cd", "a/b/c", "cd"),
            ("ab/c", "a", "ab/c"),
            ("a", "", "a"),
        ],
    )
    def test_a_file_is_named_by_what_follows_the_prefix(self, key: str, asked: str, place: str) -> None:
        assert channels.relative(key, asked) == place

    def test_shards_are_each_objects_of_one_machine(self) -> None:
        hosts = hosts_of({"InstanceType": "ml.m7i.large", "InstanceCount": 3})
        source = {"S3DataDistributionType": "ShardedByS3Key"}
        shards = [channels.share(list("abcde"), source, host, hosts) for host in hosts]
        assert shards == [["a", "d"], ["b", "e"], ["c"]]

    def test_a_group_of_instances_gets_its_own_data_alone(self) -> None:
        groups = [
            {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "InstanceGroupName": "gpu"},
            {"InstanceType": "ml.m7i.large", "InstanceCount": 2, "InstanceGroupName": "cpu"},
        ]
        hosts = hosts_of({"InstanceGroups": groups})
        assert hosts[1] == Host("algo-2", "ml.m7i.large", "cpu")
        assert [channels.share(["a"], {"InstanceGroupNames": ["cpu"]}, host, hosts) for host in hosts] == [[], ["a"], ["a"]]
        assert resource_config(hosts[2], hosts)["instance_groups"][1]["hosts"] == ["algo-2", "algo-3"]


class TestLogs:
    def test_every_line_comes_once_in_order_while_it_runs(self, jobs: Jobs) -> None:
        count = 3000
        name = jobs.start(f"echo early\n{WAITS}i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done; printf 'no end'")
        jobs.until_printed(name, "early")
        assert jobs.describe(name)["TrainingJobStatus"] == "InProgress"
        jobs.let_go(name)
        jobs.wait(name)
        stream, found, token = jobs.streams(name)[0], [], ""
        while True:
            more = {"nextToken": token} if token else {}
            page = jobs.logs.get_log_events(logGroupName=cloudwatch.TRAINING, logStreamName=stream, startFromHead=True, **more)
            found += [each["message"] for each in page["events"]]
            if not page["events"] or page["nextForwardToken"] == token:
                break
            token = page["nextForwardToken"]
        assert found == ["early", *(f"line {number}" for number in range(count)), "no end"]

    def test_batches_keep_to_the_limits_of_the_api(self) -> None:
        line = "é" * 300_000
        parts = list(cloudwatch.pieces(line))
        assert "".join(parts) == line
        assert max(len(part.encode()) for part in parts) <= 262_144 - 26
        events = [(1, part) for part in parts] + [(2, "x")] * 25_000
        made = list(cloudwatch.batches(events))
        assert [event for batch in made for event in batch] == events
        assert max(map(len, made)) <= 10_000
        assert max(sum(len(text.encode()) + 26 for _, text in batch) for batch in made) <= 1_048_576

    def test_a_metric_is_read_from_the_lines(self, jobs: Jobs) -> None:
        metrics = [{"Name": "loss", "Regex": "loss=([0-9.]+)"}]
        found = jobs.run("echo loss=2.5; echo loss=1.25", algorithm={"MetricDefinitions": metrics})
        assert [(each["MetricName"], each["Value"]) for each in found["FinalMetricDataList"]] == [("loss", 1.25)]


class TestProcesses:
    def test_a_command_in_place_of_an_image(self, localstack: str, aws: Callable[..., Any], bucket: str, tmp_path: Path) -> None:
        script = tmp_path / "script"
        script.write_text("""
        echo "$1 $SM_ML_ROOT" | sed "s#/.*/#/.../#"; cd $SM_ML_ROOT; cat input/config/hyperparameters.json; echo
        echo w >model/w; cp input/data/code/script checkpoints/; sleep 300 & exit 3
        """)
        with ControlPlane(aws_url=localstack, runner="process", command=["/bin/sh", str(script)], settings=QUICK) as plane:
            jobs = Jobs(plane, aws("sagemaker", plane.url), aws("s3"), aws("logs"), bucket, "any/image:1")
            found = jobs.wait(jobs.spot("data", HyperParameters={"a": "1"}))
        assert found["FailureReason"] == "AlgorithmError: , exit code: 3"
        assert jobs.lines(found["TrainingJobName"]) == ["train /.../algo-1", '{"a": "1"}']
        assert jobs.packed(found["TrainingJobName"]) == {"w": "w\n"}
        assert jobs.keys("checkpoints/") == ["script"]

    def test_it_needs_a_command(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="ENTRYPOINT"):
            TrainingRunner("http://127.0.0.1:1", "us-east-1", tmp_path, "process")


def test_nothing_is_left_when_the_control_plane_ends(jobs: Jobs, localstack: str, client: DockerClient) -> None:
    with ControlPlane(aws_url=localstack) as plane:
        with contextlib.closing(client_at(jobs.sagemaker, plane.url)) as sagemaker:
            mine = Jobs(plane, sagemaker, jobs.s3, jobs.logs, jobs.bucket, jobs.image)
            name = mine.start("trap '' TERM; echo going; while :; do sleep 0.1; done", resources={"InstanceCount": 2})
            until(lambda: mine.lines(name).count("going") == 2)
            mark = plane.place(plane.account, plane.region).training.engine.mark  # type: ignore[union-attr]
            labelled = {"label": f"{LABEL}={mark}"}
            assert len(client.containers.list(filters=labelled)) == 2
            assert len(client.networks.list(filters=labelled)) == 1
        work = plane.work
    assert client.containers.list(all=True, filters=labelled) == []
    assert client.networks.list(filters=labelled) == []
    assert not work.exists()
