"""What a run leaves: adapter, or of the method full the model, and tokenizer as others read them, a model card, and trimtab.json, last."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.counting import counted
from trimtab.layout import MERGED, JobDir
from trimtab.ledger import Ledger
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest
from trimtab_runtime.choices import saved_dtype

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "trimtab.json"
NEW = ".new"  # the folder in which an artifact is written, until it is whole
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "generation_config.json",
)
SPELLINGS = ("chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")  # of tokenizers not in one file
SHARD = "4GB"  # of a whole model: few files, each small enough to be sent again
_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)([\W_].*)?", re.IGNORECASE)
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors(\.index\.json)?|adapter_config\.json|config\.json")
_PACKAGES = ("trimtab", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")


def size(spec: TrainSpec, numbers: int) -> int:
    """Bytes of an artifact's weights, which are so many numbers: adapters are saved in fp32, a whole model in its own type."""
    return numbers * (2 if spec.method == "full" and saved_dtype(spec).value == "bfloat16" else 4)


def write(job: JobDir, spec: TrainSpec, model: PeftModel | PreTrainedModel, ledger: Ledger, metrics: dict[str, Any]) -> None:
    """Write the artifact of a run into `job.model`. An artifact without trimtab.json is not finished.

    All of it is written beside the one of an earlier life, into `.new`, before anything of that is touched: a failure or a kill while
    the weights are written leaves it usable. Then the old trimtab.json goes first and the new one comes last, so that none ever
    names files that it does not belong to. A kill between these two leaves no artifact, but takes nothing: only names change there, in
    milliseconds, and the next life makes it again from its checkpoint.
    """
    folder, base, new = job.model, job.channel("model"), job.model / NEW
    discard(folder)
    new.mkdir()
    names: tuple[str, ...] = TOKENIZER_FILES
    if spec.method == "full":
        _write_model(new, base, spec, model)
        names += (*SPELLINGS, *(path.name for path in base.iterdir() if is_licence(path.name)))
    else:
        # the base is named as the user named it, not by where it lay on this machine
        for config in model.peft_config.values():
            config.base_model_name_or_path = _hub_name(spec.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(new), save_embedding_layers=False, safe_serialization=True)
    for name in names:
        if (base / name).is_file():
            shutil.copyfile(base / name, new / name)
    (new / "README.md").write_text(model_card(spec, ledger, metrics), encoding="utf-8")
    files = {}
    for path in sorted(new.iterdir()):
        manifest.flush(path)
        files[path.name] = manifest.file_digest(path)
    manifest.write_json(
        new / NAME,
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
    _put_in_place(new, folder, files)


def discard(folder: Path) -> None:
    """Remove what was written of an artifact that is not in its place yet; one that is stays as it is."""
    shutil.rmtree(folder / NEW, ignore_errors=True)


def _put_in_place(new: Path, folder: Path, names: Iterable[str]) -> None:
    """Let the files `names` of `new`, and its trimtab.json, take the place of the artifact in `folder`."""
    (folder / NAME).unlink(missing_ok=True)
    manifest.flush_names(folder)
    shutil.rmtree(folder / MERGED, ignore_errors=True)  # of the earlier adapter
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
    for name in names:
        (new / name).replace(folder / name)
    manifest.flush_names(folder)
    (new / NAME).replace(folder / NAME)
    manifest.flush_names(folder)
    discard(folder)


def _write_model(folder: Path, base: Path, spec: TrainSpec, model: PreTrainedModel) -> None:
    """The weights as transformers stores them, one shard after the other, and the base's own config.json with their type."""
    import torch

    dtype = getattr(torch, saved_dtype(spec).value)
    weights, converted = {}, dict[tuple[object, ...], torch.Tensor]()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())  # tied weights stay one, which transformers stores once
        if place not in converted or not tensor.numel():
            converted[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        weights[name] = converted[place]
    model.save_pretrained(str(folder), state_dict=weights, max_shard_size=SHARD, safe_serialization=True)
    # what transformers made of it is this run's: without a cache, with other attention
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": saved_dtype(spec).value}, indent=2) + "\n", encoding="utf-8")


def is_licence(name: str) -> bool:
    """Whether a file of a model's folder states its licence, or what it asks to be told."""
    return _LICENCE.fullmatch(name) is not None


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
    total, whole = ledger.total, spec.method == "full"
    front = [
        "---",
        f"library_name: {'transformers' if whole else 'peft'}",
        f"base_model: {_hub_name(spec.model)}",
        "pipeline_tag: text-generation",
        f"tags: [{'trimtab' if whole else 'lora, trimtab'}]",
        "---",
    ]
    made = [
        f"- base model: {_hub_name(spec.model)} (files' digest {spec.model_digest[:16] or 'unknown'})",
        f"- method: {_method(spec)}",
        f"- data: {counted(total.samples, 'sample')}, {total.tokens:,} tokens = {total.trained:,} trained + {total.dropped:,} dropped "
        + (f"in {len(ledger.rounds)} rounds that epochs take in turn " if len(ledger.rounds) > 1 else "")
        + f"(digest {spec.data_digest[:16]})",
        f"- schedule: {metrics['steps']} of {counted(metrics['of'], 'step')}, {counted(spec.epochs, 'epoch')}, "
        f"peak rate {spec.learning_rate:g}, {spec.lr_schedule}, recipe {spec.recipe}; {metrics['ended_by']}",
    ]
    if metrics["steps"]:
        made.append(f"- loss: {metrics['first_loss']:.4f} at the first step, {metrics['last_loss']:.4f} at the last")
    if spec.method == "qlora":
        made.append(
            "- the adapter belongs on the base in NF4 (blocks of 64, double quantisation), as it was trained"
            + (": it also restores part of what quantisation took away" if spec.lora_init == "qera" else "")
        )
    limits = (
        f"The {'model' if whole else 'adapter'} repeats what its pages said, as far as it learned it; it can be wrong, and it knows "
        "nothing newer. The base model's licence applies. Answers about other subjects can have become worse: compare before use."
    )
    return "\n".join([*front, "", f"# {Path(_hub_name(spec.model)).name}, tuned with trimtab", "", *made, "", "## Limits", "", limits, ""])


def _method(spec: TrainSpec) -> str:
    if spec.method == "full":
        return f"full, all parameters, kept in fp32 while they were trained; saved in {saved_dtype(spec).value}"
    kinds = "".join(f", {name}" for name, used in (("rsLoRA", spec.use_rslora), ("DoRA", spec.use_dora)) if used)
    on = ", ".join(spec.lora_targets) or "all linear layers but the head"
    return f"{spec.method}{kinds}, rank {spec.lora_rank}, alpha {spec.lora_alpha:g}, {on}"


def _hub_name(model: str) -> str:
    """The model's name for others: a Hub id without its commit, a folder's last part and not where it lay on this machine."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model.partition("@")[0]
