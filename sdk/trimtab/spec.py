"""What a job is. `TrainSpec` is the only thing that crosses into the container; it crosses as hyperparameters.

A hyperparameter is one line of JSON, strings too, so nothing has to be guessed back. The limits are SageMaker's
(CreateTrainingJob, API reference: at most 100 pairs, keys to 256 characters, values to 2,500 on one line).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trimtab.errors import SpecError
from trimtab.secrets import looks_like_token

SPEC_VERSION = 1

PREPARATION_FIELDS = {
    *("spec_version", "model_digest", "data_digest", "max_seq_len", "too_long", "objective"),
    *("views", "questions", "replay", "epochs", "seed"),
}
_OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets", "use_rslora", "use_dora", "lora_init", "lora_dropout", "keep_merged")
# how many ranks there were is noted with a checkpoint, for "auto" is another number on another machine
_BESIDE_THE_COURSE = {"max_minutes", "save_every_steps", "save_every_minutes", "keep_checkpoints", "keep_merged", "ranks"}
MOST_RANKS = 256

_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 100, 256, 2_500
_PLATFORM_KEYS = re.compile(r"^(sagemaker_.*|_tuning_objective_metric)$")


class _Spec(BaseModel):
    """Frozen, strict about names, and refusing in our own words."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        refuse_unknown(values, type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise SpecError(_explain(exc)) from exc


class TrainSpec(_Spec):
    """All that the container needs to train. Every field is an option of `trimtab fit`; its description is the help text."""

    spec_version: int = Field(SPEC_VERSION, description="version of this contract; client and container must agree")
    model: str = Field(description="base model: a catalog alias, a Hub id or a local folder")
    model_digest: str = Field("", description="digest of the base model's files; filled in when the weights are resolved")
    data_digest: str = Field("", description="digest of the documents; filled in when the data is staged")

    recipe: Literal["pages", "knowledge", "instruct", "domain-chat", "full-text"] = Field(
        "pages", description="a set of values for the options below that are not given; trimtab recipes lists them with their sources"
    )
    method: Literal["qlora", "lora", "full"] = Field(
        "qlora", description="qlora: adapters on a base in 4-bit NF4; lora: adapters on a base in the compute dtype; full: all parameters"
    )
    lora_rank: int = Field(32, ge=1, le=1024, description="rank of the adapters")
    lora_alpha: float = Field(64.0, gt=0, description="adapters are scaled by alpha / rank")
    lora_targets: tuple[str, ...] = Field(
        (),
        description="layers that get adapters, by the end of their names, such as q_proj; none named: every linear one but the head",
    )
    use_rslora: bool = Field(False, description="scale adapters by alpha / sqrt(rank): rank-stabilised LoRA")
    use_dora: bool = Field(False, description="learn a weight's magnitude apart from its direction: DoRA")
    lora_init: Literal["qera", "zeros"] = Field(
        "qera", description="qlora's adapters begin as what quantisation took away (qera), or as nothing (zeros)"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")

    max_seq_len: int = Field(1024, ge=16, le=1_048_576, description="tokens in a packed row; longer documents go on in the next")
    objective: Literal["auto", "all", "answers"] = Field(
        "auto",
        description="which tokens are learned; auto: all of running text, and of prompts and conversations what answers",
    )
    too_long: Literal["fail", "drop", "cut"] = Field(
        "fail", description="a prompt with its answer, or a conversation, that is longer than a row: fail, drop it, or cut its end; counted"
    )
    views: tuple[Literal["document", "paragraph", "sentence"], ...] = Field(
        ("document", "sentence", "sentence"),
        min_length=1,
        description="how a page becomes samples: whole, by paragraph, by sentence; a view given twice is learned twice",
    )
    questions: int = Field(
        3,
        ge=0,
        le=16,
        description="questions asked about each sentence, written by rule, answered by the sentence (chat models; 0: none)",
    )
    replay: float = Field(0.45, ge=0, le=4, description="chat and general prose rehearsed, as a share of the other tokens (0: none)")

    epochs: int = Field(5, ge=1, le=10_000, description="passes over the rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps, whatever epochs says")
    max_minutes: float | None = Field(None, gt=0, description="stop after so long, with a checkpoint and a usable artifact")
    learning_rate: float = Field(7e-4, gt=0, le=1, description="peak learning rate of AdamW")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay")
    batch_rows: int = Field(1, ge=1, le=4096, description="rows in one forward pass")
    accumulation: int = Field(1, ge=1, le=4096, description="forward passes in one optimiser step")
    ranks: int | Literal["auto"] = Field(
        1,
        description="processes that train together on each machine, each on cores and memory of its own and on batch_rows * accumulation "
        "rows a step; auto: one for each socket, or sub-NUMA cluster, that the run may use",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="compute dtype; auto: bf16 where the machine has it")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of everything random")

    save_every_steps: int = Field(50, ge=1, description="checkpoint every so many steps")
    save_every_minutes: float = Field(5.0, gt=0, description="and at least this often")
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="complete checkpoints to keep")
    keep_merged: bool = Field(False, description="leave the merged model, too, to be served from where the artifact lies")

    @model_validator(mode="after")
    def _same_version(self) -> Self:
        if self.spec_version != SPEC_VERSION:
            raise SpecError(version_mismatch(self.spec_version))
        return self

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        defaults = {name: type(self).model_fields[name].default for name in _OF_ADAPTERS}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.method == "full" and given:
            said = " and ".join(filter(None, [", ".join(given[:-1]), given[-1]]))
            raise SpecError(
                f"method full trains the whole model and leaves it whole, and {said} {'are' if len(given) > 1 else 'is'} for adapters: "
                f"leave {'them' if len(given) > 1 else 'it'} out, or choose  --method lora"
            )
        return self

    @field_validator("ranks", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_RANKS):
            raise ValueError(f"is neither auto nor a whole number from 1 to {MOST_RANKS}")
        return value

    @field_validator("model")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: give a catalog alias, a Hub id or a folder")
        return value

    def to_hyperparameters(self) -> dict[str, str]:
        """Every field as one line of JSON, strings too. Raises SpecError beyond the platform's limits or on a secret."""
        pairs = {key: json.dumps(value) for key, value in self.model_dump(mode="json").items()}
        if len(pairs) > _MAX_PAIRS:
            raise SpecError(f"{len(pairs)} hyperparameters; a training job takes {_MAX_PAIRS}")
        for key, value in pairs.items():
            if len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
                raise SpecError(f"{key} is {len(value):,} characters as JSON; a hyperparameter takes {_MAX_VALUE:,}: shorten it")
            if looks_like_token(value):
                raise SpecError(f"{key} looks like an access token; hyperparameters are readable by many: set HF_TOKEN instead")
        return pairs

    @classmethod
    def from_hyperparameters(cls, pairs: Mapping[str, str]) -> TrainSpec:
        """The same class, the same checks, on the other side. What the platform added by itself is left out.

        Raises SpecError for a value that is no JSON, an unknown name, or another spec_version.
        """
        values: dict[str, Any] = {}
        for key, text in pairs.items():
            if _PLATFORM_KEYS.match(key):
                continue
            try:
                values[key] = json.loads(text)
            except (TypeError, json.JSONDecodeError) as exc:
                raise SpecError(f"hyperparameter {key} is not JSON: {text!r}; every value is one line of JSON, strings in quotes") from exc
        version = values.get("spec_version")
        if version != SPEC_VERSION:  # first: another version may have other names
            raise SpecError(version_mismatch(version))
        return cls(**values)

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal specs have equal digests."""
        return _digest(self.model_dump(mode="json"))

    def course_digest(self) -> str:
        """sha256 of the fields that decide what each step does: a run may go on under other limits of time, and save more often."""
        return _digest(self.model_dump(mode="json", exclude=_BESIDE_THE_COURSE))

    def sharing(self, nodes: int = 1) -> int:
        """How many processes share a step's rows on so many machines; `auto` counts as one, for only the machine tells."""
        return nodes * (1 if self.ranks == "auto" else self.ranks)

    def preparation_digest(self) -> str:
        """sha256 of the fields that shape the packed rows: jobs that share it share their prepared data."""
        # each epoch rehearses other text; without replay the rows are the same for any number of them
        fields = PREPARATION_FIELDS if self.replay else PREPARATION_FIELDS - {"epochs"}
        return _digest(self.model_dump(mode="json", include=fields))


class JobSpec(_Spec):
    """What a user asks for: what to train, on which data, on which device."""

    train: TrainSpec
    data: tuple[str, ...] = Field(min_length=1, description="URLs, files and folders")
    device: Literal["xeon", "gpu"] = Field("xeon", description="what the run computes on")
    nodes: int = Field(1, ge=1, le=64, description="machines that train together, each on batch_rows * accumulation rows a step")
    max_usd: float | None = Field(
        None, gt=0, le=1e6, description="stop before the run costs more US dollars, with a checkpoint and a usable artifact"
    )
    on_error: Literal["fail", "skip"] = Field("fail", description="a source that cannot be read: fail before training, or skip it, named")
    allow_private_hosts: bool = Field(False, description="allow pages on private and loopback addresses")
    max_page_mb: float = Field(10.0, gt=0, le=1e6, description="largest page or file that is read, in MB (10^6 bytes) after unpacking")
    max_page_seconds: float = Field(60.0, gt=0, le=86_400, description="longest that a page may take, with redirects, retries and pauses")

    def limited(self, max_minutes: float | None) -> Self:
        """The same job with another limit of the run's own time."""
        return self.model_copy(update={"train": self.train.model_copy(update={"max_minutes": max_minutes})})

    @model_validator(mode="after")
    def _joined(self) -> Self:
        if self.device == "gpu" and self.nodes > 1:
            raise SpecError("several machines with GPUs cannot train together yet: leave out --nodes, or use CPUs with  --device xeon")
        if self.device == "gpu" and self.train.ranks != 1:
            raise SpecError("ranks share out a machine's processors and memory: leave out --ranks, or use CPUs with  --device xeon")
        return self


class ServeSpec(_Spec):
    """How a model is served. It crosses into the container as one line of JSON in `TRIMTAB_SERVE`; without it all defaults hold."""

    spec_version: int = Field(SPEC_VERSION, description="version of this contract; client and container must agree")
    name: str = Field("", max_length=200, description="one more name that the model answers to, such as its catalog alias")
    engine: Literal["auto", "openvino", "vllm", "transformers"] = Field(
        "auto", description="what computes; auto: the fastest that is installed and takes the model"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="compute dtype; auto: bf16 where the machine has it")
    max_context: int | None = Field(None, ge=16, description="longest prompt and answer together, in tokens, below the model's own")
    max_running: int = Field(32, ge=1, le=4096, description="requests that are answered at once")
    max_waiting: int = Field(64, ge=0, le=65_536, description="requests that may wait for their turn; one more is told to come back (429)")
    cache_gb: float | None = Field(None, gt=0, description="memory for keys and values, in GB (10^9 bytes); chosen by what is free")
    grace_seconds: float = Field(100.0, ge=0, le=3600, description="time that running answers get after SIGTERM")
    ttl_minutes: float | None = Field(None, gt=0, description="end by itself after so long")
    open: bool = Field(False, description="need no API key although others reach the port: a platform in front checks who asks")
    trust_remote_code: bool = Field(False, description="run Python code from the model's folder; its revision was allowed by name")

    @model_validator(mode="after")
    def _same_version(self) -> Self:
        if self.spec_version != SPEC_VERSION:
            raise SpecError(version_mismatch(self.spec_version))
        return self

    def to_text(self) -> str:
        """One line of JSON of what is not the default, and the version."""
        return json.dumps({"spec_version": self.spec_version} | self.model_dump(mode="json", exclude_defaults=True))

    @classmethod
    def from_text(cls, text: str) -> ServeSpec:
        """Raises SpecError for a text that is no JSON object, an unknown name, or another spec_version."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as exc:
            raise SpecError(f"TRIMTAB_SERVE is not JSON ({exc}): write it with ServeSpec.to_text()") from exc
        if not isinstance(values, dict):
            raise SpecError("TRIMTAB_SERVE is not an object: write it with ServeSpec.to_text()")
        return cls(**values)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def version_mismatch(found: object) -> str:
    return (
        f"the job was written for spec_version {found}, this trimtab speaks {SPEC_VERSION}: "
        "use the same trimtab version on both sides (pip install --upgrade trimtab, and rebuild or pull the image of that version)"
    )


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise SpecError for the first name that is not known, with the nearest right one."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "known are: " + ", ".join(sorted(known))
            raise SpecError(f"there is no option {name!r}; {hint}")


def _explain(exc: ValidationError) -> str:
    """Pydantic's findings, all at once, each with the name, what is wrong and what was given."""
    lines = []
    for error in exc.errors(include_url=False):
        name, said = ".".join(str(part) for part in error["loc"]), error["msg"].removeprefix("Value error, ")
        if not name:  # of the whole: it says itself which values do not go together, and what to do
            return said
        given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
        lines.append(f"{name}: {said}{given}")
    return "; ".join(lines) + ". Change the value and run it again."
