"""The containers that can serve a model on SageMaker: ours, and AWS's for vLLM, LMI and TGI. Pure.

All read the plain Hugging Face folder in `/opt/ml/model` and answer `/invocations`, but differ in their variables and in the bodies they
take. Sources: "Amazon SageMaker AI Deployment" (AWS Deep Learning Containers, vLLM); the vLLM user guide and "LMI handlers Inference API
Schema" (DJL Serving); TGI's launcher arguments (Hugging Face).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from trimtab.errors import SpecError
from trimtab.layout import SERVE_VARIABLE
from trimtab.spec import ServeSpec

KINDS = ("trimtab", "vllm", "lmi", "tgi")
MODEL = "/opt/ml/model"
GRACE = 25.0  # seconds: SageMaker kills a container 30 s after SIGTERM
_OF_DTYPE = {"trimtab": {}, "vllm": {}, "lmi": {"bfloat16": "bf16", "float32": "fp32"}, "tgi": {}}


@dataclass(frozen=True)
class Container:
    """What a model is served in. `ami` is the machine image that it needs, if it needs one."""

    kind: str
    image: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ami: str | None = None


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((files(__package__) / "containers.toml").read_text(encoding="utf-8"))


def registry(account: str, region: str) -> str:
    """The host of an account's images in a region."""
    return f"{account}.dkr.ecr.{region}.{'amazonaws.com.cn' if region.startswith('cn-') else 'amazonaws.com'}"


def aws_image(kind: str, region: str) -> str:
    """The image of one of AWS's containers, pulled from the region's own registry."""
    row, accounts = _table()[kind], _table()["accounts"]
    return f"{registry(accounts.get(region, accounts['usual']), region)}/{row['repository']}:{row['tag']}"


def ami_of(kind: str) -> str | None:
    """The machine image that the container's CUDA needs."""
    found: str | None = _table().get(kind, {}).get("ami")
    return found


def environment(kind: str, spec: ServeSpec, name: str, gpus: int) -> dict[str, str]:
    """The variables that make a container serve `/opt/ml/model` as `spec` asks, as the model `name`, on so many GPUs.

    Raises SpecError for what the container cannot be asked.
    """
    if kind == "trimtab":
        # SageMaker checks who asks, and starts a container again that ends by itself: neither key nor time limit are the container's
        asked = {"open": True, "ttl_minutes": None, "grace_seconds": min(spec.grace_seconds, GRACE)}
        return {SERVE_VARIABLE: spec.model_copy(update=asked).to_text()}
    usual = ServeSpec()
    for option in ("engine", "max_waiting", "cache_gb"):
        if getattr(spec, option) != getattr(usual, option):
            raise SpecError(
                f"{option} is for our own container, not for {kind}: leave it out, or leave out  container={kind}  to use our image"
            )
    if spec.trust_remote_code:
        raise SpecError(f"the container {kind} runs no code of a model's folder for trimtab: leave trust_remote_code out")
    dtype = None if spec.dtype == "auto" else _OF_DTYPE[kind].get(spec.dtype, spec.dtype)
    running = spec.max_running if spec.max_running != usual.max_running else None
    if kind == "vllm":
        found = {
            "SM_VLLM_MODEL": MODEL, "SM_VLLM_SERVED_MODEL_NAME": name, "SM_VLLM_TENSOR_PARALLEL_SIZE": max(gpus, 1),
            "SM_VLLM_MAX_MODEL_LEN": spec.max_context, "SM_VLLM_MAX_NUM_SEQS": running, "SM_VLLM_DTYPE": dtype,
        }  # fmt: skip
    elif kind == "lmi":
        found = {
            "HF_MODEL_ID": MODEL, "OPTION_ROLLING_BATCH": "vllm", "OPTION_TENSOR_PARALLEL_DEGREE": max(gpus, 1),
            "OPTION_MAX_MODEL_LEN": spec.max_context, "OPTION_MAX_ROLLING_BATCH_SIZE": running, "OPTION_DTYPE": dtype,
        }  # fmt: skip
    else:
        context = spec.max_context
        found = {
            "HF_MODEL_ID": MODEL, "SM_NUM_GPUS": max(gpus, 1), "MAX_TOTAL_TOKENS": context,
            "MAX_INPUT_TOKENS": None if context is None else context - 1, "MAX_CONCURRENT_REQUESTS": running, "DTYPE": dtype,
        }  # fmt: skip
    return {key: str(value) for key, value in found.items() if value is not None}


def kind_of_image(image: str) -> str:
    """What an image that somebody else chose, such as JumpStart's, most likely is: AWS's are known by their repository's name."""
    repository = image.rpartition("/")[2].partition(":")[0]
    return next((kind for kind in KINDS[1:] if _table()[kind]["repository"] == repository), "vllm" if "vllm" in repository else "tgi")
