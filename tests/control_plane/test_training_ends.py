"""How training jobs end: by themselves, by what goes wrong, and by being ended; spot jobs, and jobs on several instances."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloud
from control_plane import ControlPlane, Settings
from control_plane.faults import CAPACITY
from control_plane.store import TrainingJob
from control_plane.training import NO_IMAGE, NO_MEMORY, TrainingRunner, algorithm_error
from support.cloud import QUICK
from support.training_jobs import GRACEFUL, PATIENCE, WAITS, Jobs, client_at, prefix, statuses, until


class TestItsEnd:
    def test_a_job_has_the_life_of_sagemakers(self, jobs: Jobs) -> None:
        name = jobs.start("sleep 1; echo trained >/opt/ml/model/weights; mkdir /opt/ml/output/data/x; echo 1 >/opt/ml/output/data/x/e")
        found = jobs.wait(name)
        assert statuses(found) == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
        messages = [each["StatusMessage"] for each in found["SecondaryStatusTransitions"]]
        assert messages[-3:] == [
            "Training image download completed. Training in progress.", "Uploading generated training model", "Training job completed"
        ]  # fmt: skip
        assert found["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{jobs.bucket}/out/{name}/output/model.tar.gz"
        assert jobs.packed(name) == {"weights": "trained\n"}
        assert jobs.packed(name, "output.tar.gz") == {"x/e": "1\n"}
        assert found["TrainingTimeInSeconds"] == found["BillableTimeInSeconds"] >= 1

    def test_uncompressed_output_is_a_prefix(self, jobs: Jobs) -> None:
        name = jobs.start("echo w >/opt/ml/model/weights; echo e >/opt/ml/output/data/events", output={"CompressionType": "NONE"})
        assert jobs.wait(name)["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{jobs.bucket}/out/{name}/output/model/"
        assert jobs.keys(f"out/{name}/output/") == ["data/events", "model/weights"]

    def test_output_is_encrypted_with_the_key_that_is_named(self, jobs: Jobs) -> None:
        name = jobs.start("echo w >/opt/ml/model/weights", output={"KmsKeyId": "1234abcd-12ab-34cd-56ef-1234567890ab"})
        assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
        head = jobs.s3.head_object(Bucket=jobs.bucket, Key=f"out/{name}/output/model.tar.gz")
        assert head["ServerSideEncryption"] == "aws:kms"
        assert head["SSEKMSKeyId"].endswith("1234abcd-12ab-34cd-56ef-1234567890ab")

    def test_a_failure_tells_what_its_file_says_and_leaves_what_it_wrote(self, jobs: Jobs) -> None:
        name = jobs.start("echo half >/opt/ml/model/weights; echo 'the loss is not a number' >/opt/ml/output/failure; exit 7")
        found = jobs.wait(name)
        assert (found["TrainingJobStatus"], found["SecondaryStatus"]) == ("Failed", "Failed")
        assert found["FailureReason"] == "AlgorithmError: the loss is not a number, exit code: 7"
        assert jobs.packed(name) == {"weights": "half\n"}

    def test_what_a_container_links_to_is_not_what_lies_there_here(self, jobs: Jobs) -> None:
        """A link out of the folder, and a failure file that nobody could read to its end."""
        name = jobs.start("cd /opt/ml; echo w >model/w; ln -s w model/v; ln -s /etc/hostname model/x; mkfifo output/failure; exit 4")
        assert jobs.wait(name)["FailureReason"] == "AlgorithmError: , exit code: 4"
        assert jobs.packed(name) == {"v": "w\n", "w": "w\n"}

    def test_a_reason_has_at_most_1024_characters(self) -> None:
        assert algorithm_error("", 2) == "AlgorithmError: , exit code: 2"
        assert len(algorithm_error("é" * 2000, 1)) == 1024
        assert algorithm_error("é" * 2000, 1).endswith(", exit code: 1")

    def test_an_image_that_is_nowhere(self, jobs: Jobs) -> None:
        found = jobs.run("", algorithm={"TrainingImage": "123456789012.dkr.ecr.us-east-1.amazonaws.com/none-of-ours:1"})
        assert (found["TrainingJobStatus"], found["FailureReason"]) == ("Failed", NO_IMAGE)

    def test_an_entrypoint_that_is_not_in_the_image(self, jobs: Jobs) -> None:
        found = jobs.run("", algorithm={"ContainerEntrypoint": ["nowhere"]})
        assert found["FailureReason"].startswith("AlgorithmError: ")
        assert found["FailureReason"].endswith("exit code: 127")

    def test_a_container_killed_for_memory(self, jobs: Jobs, localstack: str) -> None:
        with (
            ControlPlane(aws_url=localstack, settings=Settings(memory="24m")) as plane,
            contextlib.closing(client_at(jobs.sagemaker, plane.url)) as sagemaker,
        ):
            mine = replace(jobs, plane=plane, sagemaker=sagemaker)
            assert mine.run("exec python3 -c 'bytearray(1 << 28)'")["FailureReason"] == NO_MEMORY

    def test_no_capacity(self, jobs: Jobs) -> None:
        jobs.plane.fault(kind="capacity", instance_type="ml.m7i.2xlarge", hang=3.0)
        late = jobs.start("echo late", resources={"InstanceType": "ml.m7i.2xlarge"})
        jobs.plane.fault(kind="capacity", instance_type="ml.m7i.xlarge")
        assert jobs.run("", resources={"InstanceType": "ml.m7i.xlarge"})["FailureReason"] == CAPACITY
        found = jobs.wait(late)
        assert found["TrainingJobStatus"] == "Completed"
        assert statuses(found)[:3] == ["Starting", "Pending", "Starting"]


class TestBeingEnded:
    def test_a_stopped_job_gets_sigterm_and_its_model_is_kept(self, jobs: Jobs) -> None:
        name = jobs.start(GRACEFUL)
        jobs.until_printed(name, "going")
        jobs.sagemaker.stop_training_job(TrainingJobName=name)
        assert jobs.describe(name)["TrainingJobStatus"] in ("Stopping", "Stopped")
        found = jobs.wait(name)
        assert (found["TrainingJobStatus"], found["SecondaryStatus"]) == ("Stopped", "Stopped")
        assert statuses(found)[-4:] == ["Training", "Stopping", "Uploading", "Stopped"]
        assert jobs.lines(name) == ["going", "caught"]
        assert jobs.packed(name) == {"weights": "saved\n"}

    def test_one_that_does_not_end_is_killed_and_its_model_is_kept(self, jobs: Jobs, localstack: str) -> None:
        grace = 2.0
        with (
            ControlPlane(aws_url=localstack, settings=replace(QUICK, grace=grace)) as plane,
            contextlib.closing(client_at(jobs.sagemaker, plane.url)) as sagemaker,
        ):
            mine = replace(jobs, plane=plane, sagemaker=sagemaker)
            name = mine.start("trap '' TERM; echo w >/opt/ml/model/w; echo going; while :; do sleep 0.1; done")
            mine.until_printed(name, "going")
            began = time.monotonic()
            sagemaker.stop_training_job(TrainingJobName=name)
            assert mine.wait(name)["TrainingJobStatus"] == "Stopped"
            assert grace <= time.monotonic() - began < 60
        assert jobs.packed(name) == {"w": "w\n"}

    def test_the_time_limits_of_running_and_of_waiting(self, jobs: Jobs) -> None:
        jobs.plane.fault(kind="capacity", instance_type="ml.m7i.xlarge", hang=600.0)
        limits = {"MaxRuntimeInSeconds": 1, "MaxWaitTimeInSeconds": 2}
        waiting = jobs.spot("", resources={"InstanceType": "ml.m7i.xlarge"}, limits=limits)
        running = jobs.start(GRACEFUL, limits={"MaxRuntimeInSeconds": 10})  # the start of the container counts
        found = jobs.wait(waiting)
        assert (found["TrainingJobStatus"], found["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")
        found = jobs.wait(running)
        assert (found["TrainingJobStatus"], found["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
        assert jobs.lines(running) == ["going", "caught"]
        assert jobs.packed(running) == {"weights": "saved\n"}

    def test_the_time_limit_of_being_pending(self, localstack: str, tmp_path: Path) -> None:
        """Of the runner itself: the least that the API takes is two hours."""
        request = {
            "ResourceConfig": {"InstanceType": "ml.m7i.large", "InstanceCount": 1},
            "StoppingCondition": {"MaxPendingTimeInSeconds": 1},
        }
        job = TrainingJob("pending", "arn", request, account=cloud.ACCOUNT, region=cloud.REGION)
        with contextlib.closing(TrainingRunner(localstack, cloud.REGION, tmp_path)) as runner:
            job.shortage = 60.0
            runner.start(job)
            assert job.ended.wait(PATIENCE)
        assert (job.status, job.training_seconds) == ("Stopped", None)


class TestSpot:
    def test_an_interrupted_job_goes_on_from_its_checkpoints(self, jobs: Jobs) -> None:
        script = """
        cd /opt/ml; ls checkpoints | sed 's/^/has /'; ls /tmp | sed 's/^/old /'
        if [ -f checkpoints/last ]; then cat checkpoints/last >model/weights; exit 0; fi
        trap 'echo two >checkpoints/last; exit 143' TERM
        touch /tmp/mark model/of-the-first-life; mkdir checkpoints/1; echo one >checkpoints/1/step; echo going; while :; do sleep 0.1; done
        """
        name = jobs.spot(script)
        jobs.until_printed(name, "going")
        until(lambda: jobs.keys("checkpoints/") == ["1/step"])  # while it runs
        jobs.plane.interrupt(name)
        found = jobs.wait(name)
        assert found["TrainingJobStatus"] == "Completed"
        assert statuses(found) == [
            "Starting", "Downloading", "Training", "Interrupted", "Starting", "Downloading", "Training", "Uploading", "Completed"
        ]  # fmt: skip
        assert len(jobs.streams(name)) == 2
        assert jobs.lines(name) == ["going", "has 1", "has last"]
        assert jobs.packed(name) == {"weights": "two\n"}
        assert found["BillableTimeInSeconds"] <= found["TrainingTimeInSeconds"]

    def test_a_sync_that_breaks_off_leaves_half_a_checkpoint(self, jobs: Jobs) -> None:
        script = """
        cd /opt/ml/checkpoints
        if [ -d 1 ]; then find . -type f | sort | sed 's/^/has /'; exit 0; fi
        trap 'exit 143' TERM
        mkdir 1; for n in a b c; do echo $n >1/$n; done; echo first
        until [ -f /go ]; do sleep 0.05; done
        mkdir 2; for n in a b c; do echo $n >2/$n; done; echo second; while :; do sleep 0.1; done
        """
        name = jobs.spot(script)
        jobs.until_printed(name, "first")
        until(lambda: jobs.keys("checkpoints/") == ["1/a", "1/b", "1/c"])
        training: Any = jobs.plane.place(jobs.plane.account, jobs.plane.region).training
        training.cut_sync(name, 2)
        jobs.let_go(name)
        jobs.until_printed(name, "second")
        until(lambda: len(jobs.keys("checkpoints/2/")) == 2)
        jobs.plane.interrupt(name)
        assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
        assert jobs.lines(name)[2:] == ["has ./1/a", "has ./1/b", "has ./1/c", "has ./2/a", "has ./2/b"]

    def test_a_deleted_checkpoint_stays_in_s3_and_a_changed_one_is_sent_again(self, jobs: Jobs) -> None:
        name = jobs.spot(f"cd /opt/ml/checkpoints; echo 1 >a; echo 1 >b\n{WAITS}rm a; echo 2 >b")
        until(lambda: jobs.keys("checkpoints/") == ["a", "b"])
        jobs.let_go(name)
        assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
        assert jobs.keys("checkpoints/") == ["a", "b"]
        assert jobs.object("checkpoints/b") == b"2\n"


class TestSeveralInstances:
    def test_they_find_each_other_and_their_files_are_put_together(self, jobs: Jobs) -> None:
        for name in "abc":
            jobs.put(f"shards/{name}", name)
        script = """
        me=$(hostname); cd /opt/ml
        [ $me = algo-1 ] && other=algo-2 || other=algo-1
        python3 -c "import socket; print(socket.gethostbyname('$other'))" | sed 's/[0-9.]\\+/found the other/'
        ls input/data/shards | xargs echo $me; echo $me >model/$me; echo $me >model/both
        """
        channel = prefix("shards", f"s3://{jobs.bucket}/shards/", S3DataDistributionType="ShardedByS3Key")
        name = jobs.start(script, resources={"InstanceCount": 2}, channels=[channel], EnableNetworkIsolation=True)
        assert jobs.wait(name)["TrainingJobStatus"] == "Completed"
        assert jobs.lines(name, "algo-1") == ["found the other", "algo-1 a c"]
        assert jobs.lines(name, "algo-2") == ["found the other", "algo-2 b"]
        assert jobs.packed(name) == {"algo-1": "algo-1\n", "algo-2": "algo-2\n", "both": "algo-1\n"}

    def test_one_that_fails_ends_the_others(self, jobs: Jobs) -> None:
        other = "python3 -c \"import socket; socket.create_connection(('algo-1', 4000))\""
        script = f"""
        if [ $(hostname) = algo-2 ]; then until {other} 2>/dev/null; do sleep 0.1; done; echo lost >/opt/ml/output/failure; exit 3; fi
        trap 'echo caught; exit 143' TERM; echo going; python3 -m http.server 4000 >/dev/null 2>&1 & while :; do sleep 0.1; done
        """
        found = jobs.run(script, resources={"InstanceCount": 2})
        assert found["FailureReason"] == "AlgorithmError: lost, exit code: 3"
        assert jobs.lines(found["TrainingJobName"], "algo-1") == ["going", "caught"]
