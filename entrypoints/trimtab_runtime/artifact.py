"""What a run leaves: adapter and tokenizer as others read them, a model card, and trimtab.json, written last."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.layout import MERGED, JobDir
from trimtab.ledger import Ledger
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "trimtab.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "generation_config.json",
)
_PACKAGES = ("trimtab", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")


def write(job: JobDir, spec: TrainSpec, model: PeftModel, ledger: Ledger, metrics: dict[str, Any]) -> None:
    """Write the artifact of a run into `job.model`. An artifact without trimtab.json is not finished."""
    folder = job.model
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / MERGED, ignore_errors=True)  # of an earlier life
    # the base is named as the user named it, not by where it lay on this machine
    for config in model.peft_config.values():
        config.base_model_name_or_path = _hub_name(spec.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False, safe_serialization=True)
    for name in TOKENIZER_FILES:
        source = job.channel("model") / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    (folder / "README.md").write_text(model_card(spec, ledger, metrics), encoding="utf-8")
    files = {path.name: manifest.file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest.write_json(
        folder / NAME,
        {
            "format": 1,
            "spec": spec.model_dump(mode="json"),
            "base_model": {"name": spec.model, "digest": spec.model_digest},
            "data_digest": spec.data_digest,
            "ledger": ledger.model_dump(mode="json"),
            "metrics": metrics,
            "versions": versions(),
            "files": files,
        },
    )


def write_merged(job: JobDir, spec: TrainSpec, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Write the model that was trained, adapter and base in one, into `merged/` of the artifact, which is there already.

    Onto the weights that the adapter was trained on: of qlora those that went through NF4. Raises as `merge.merge_folders` does; a
    merged model without trimtab.json is not finished, and the artifact is whole without it.
    """
    from trimtab_runtime.merge import merge_folders

    target = job.model / MERGED
    target.mkdir(exist_ok=True)
    merge_folders(job.channel("model"), job.model, target, "dequantised" if spec.method == "qlora" else "original", say, progress)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_card(spec: TrainSpec, ledger: Ledger, metrics: dict[str, Any]) -> str:
    """A Hugging Face model card: what it is, from what, how it was made, what it is not."""
    total = ledger.total
    front = [
        "---",
        "library_name: peft",
        f"base_model: {_hub_name(spec.model)}",
        "pipeline_tag: text-generation",
        "tags: [lora, trimtab]",
        "---",
    ]
    made = [
        f"- base model: {_hub_name(spec.model)} (files' digest {spec.model_digest[:16] or 'unknown'})",
        f"- method: {spec.method}, rank {spec.lora_rank}, alpha {spec.lora_alpha:g}, all linear layers but the head",
        f"- data: {total.samples:,} samples, {total.tokens:,} tokens = {total.trained:,} trained + {total.dropped:,} dropped "
        + (f"in {len(ledger.rounds)} rounds that epochs take in turn " if len(ledger.rounds) > 1 else "")
        + f"(digest {spec.data_digest[:16]})",
        f"- schedule: {metrics['steps']} of {metrics['of']} steps, {spec.epochs} epochs, peak rate {spec.learning_rate:g}, "
        f"{spec.lr_schedule}; {metrics['ended_by']}",
    ]
    if metrics["steps"]:
        made.append(f"- loss: {metrics['first_loss']:.4f} at the first step, {metrics['last_loss']:.4f} at the last")
    if spec.method == "qlora":
        made.append(
            "- the adapter belongs on the base in NF4 (blocks of 64, double quantisation), as it was trained"
            + (": it also restores part of what quantisation took away" if spec.lora_init == "qera" else "")
        )
    limits = (
        "The adapter repeats what its pages said, as far as it learned it; it can be wrong, and it knows nothing newer. "
        "The base model's licence applies. Answers about other subjects can have become worse: compare before use."
    )
    return "\n".join([*front, "", f"# {Path(_hub_name(spec.model)).name}, tuned with trimtab", "", *made, "", "## Limits", "", limits, ""])


def _hub_name(model: str) -> str:
    """The model's name for others: a Hub id without its commit, a folder's last part and not where it lay on this machine."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model.partition("@")[0]
