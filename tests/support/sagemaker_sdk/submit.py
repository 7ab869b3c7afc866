"""Asks SageMaker for training jobs with AWS's own SDK. It runs in the environment of requirements.txt, which knows nothing of trimtab.

    python submit.py create REQUESTS ANSWER     TrainingJob.create, for each request
    python submit.py train REQUESTS ANSWER      ModelTrainer.train of each, until it is done, with its log

REQUESTS is a JSON list of bodies of CreateTrainingJob. ANSWER becomes a JSON object: `jobs`, what each job was called and how it stood in
the end, and `hosts`, every host that this process looked up or connected to.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

hosts: set[str] = set()


def _note_host(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        hosts.add(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        hosts.add(str(arguments[1][0]))


sys.addaudithook(_note_host)  # before the imports, so that theirs count

from sagemaker.core.resources import TrainingJob  # noqa: E402
from sagemaker.core.training.configs import (  # noqa: E402
    CheckpointConfig,
    Compute,
    InputData,
    MetricDefinition,
    Networking,
    OutputDataConfig,
    S3DataSource,
    StoppingCondition,
)
from sagemaker.core.utils.code_injection.codec import transform  # noqa: E402
from sagemaker.core.utils.utils import configure_logging  # noqa: E402
from sagemaker.train.model_trainer import ModelTrainer  # noqa: E402


def create(arguments: dict[str, Any]) -> TrainingJob:
    return TrainingJob.create(**arguments)


def train(arguments: dict[str, Any]) -> TrainingJob:
    """A job of the image's own entrypoint; it is called the request's name and the time. Tags are not passed on.

    Every place in S3 is named: for a default one the SDK asks STS for the account, at its public address whatever the endpoints are.
    """
    algorithm, channels = arguments["algorithm_specification"], arguments["input_data_config"]
    trainer = ModelTrainer(
        role=arguments["role_arn"],
        base_job_name=arguments["training_job_name"],
        training_image=algorithm["training_image"],
        training_input_mode=algorithm["training_input_mode"],
        hyperparameters=arguments["hyper_parameters"],
        environment=arguments["environment"],
        input_data_config=[
            InputData(channel_name=channel["channel_name"], data_source=S3DataSource(**channel["data_source"]["s3_data_source"]))
            for channel in channels
        ],
        output_data_config=OutputDataConfig(**arguments["output_data_config"]),
        checkpoint_config=CheckpointConfig(**arguments["checkpoint_config"]),
        compute=Compute(**arguments["resource_config"], enable_managed_spot_training=arguments["enable_managed_spot_training"]),
        stopping_condition=StoppingCondition(**arguments["stopping_condition"]),
        networking=Networking(
            enable_network_isolation=arguments["enable_network_isolation"],
            enable_inter_container_traffic_encryption=arguments["enable_inter_container_traffic_encryption"],
        ),
    ).with_metric_definitions([MetricDefinition(**metric) for metric in algorithm["metric_definitions"]])
    trainer.train(wait=True, logs=True)
    job = trainer._latest_training_job
    assert job is not None
    return job


def main(verb: str, requests: str, answer: str) -> None:
    configure_logging("INFO")  # else the log that `train` follows is not shown
    ask, jobs = {"create": create, "train": train}[verb], []
    for request in json.loads(Path(requests).read_text(encoding="utf-8")):
        job = ask(transform(request, "CreateTrainingJobRequest"))  # the SDK's own way from the service's names to its own
        jobs.append({"name": job.training_job_name, "status": job.training_job_status})
    for thread in threading.enumerate():  # what it would tell AWS of itself it sends in threads that nobody waits for
        if thread is not threading.current_thread():
            thread.join(10)
    Path(answer).write_text(json.dumps({"jobs": jobs, "hosts": sorted(hosts)}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
