"""A tuned model as one plain folder: base and adapter merged, kept by content, so that it is made once.

cache/merged/<digest>/          a Hugging Face folder: config.json, safetensors as the base has them, tokenizer, trimtab.json
cache/merged/picks/<digest>.json    onto which weights an adapter is best merged, as `measure` found (merge_report.py)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from trimtab.artifact import ADAPTER, MANIFEST, Artifact
from trimtab.cache import cache_dir
from trimtab.command import refuse_missing_runtime
from trimtab.errors import SpecError, StagingError, WeightsError
from trimtab.events import Event
from trimtab.layout import JobDir
from trimtab.model_folder import MANIFEST as WEIGHTS_MANIFEST
from trimtab.model_folder import FileFact, Manifest, fact_of, link_or_copy, local_facts, make_once
from trimtab.staging import link_model, run_verb
from trimtab.weights import BaseModel

Onto = Literal["auto", "dequantised", "original"]

FORMAT = 1  # of the merged folder; another one is made anew


def merged(
    artifact: Artifact,
    base: BaseModel,
    *,
    onto: Onto = "auto",
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[Event], None] = lambda event: None,
) -> Path:
    """The folder of `base` with the adapter of `artifact` in its weights; it is made when it is not in the cache.

    `onto` the base's `original` weights, or the `dequantised` ones that a qlora adapter was trained on; `auto` is what `measure` picked
    for this artifact, else what it was trained on. Files are as large as the base's, and stored in the same type. Of two processes that
    ask at once one makes it; what is interrupted leaves nothing. The folder belongs to the cache: copy it before you change it.

    Raises WeightsError for another base model than the trained one, SpecError for an artifact that is a whole model, for an adapter that
    this version does not merge and for `dequantised` where the run did not quantise, StagingError where there is no room, with the
    runtime's reason.
    """
    refuse_whole(artifact)
    refuse_other_base(artifact, base)
    chosen = pick_of(artifact, base)[0] if onto == "auto" else onto
    if chosen == "dequantised" and artifact.spec.method != "qlora":
        raise SpecError(
            f"a {artifact.spec.method} adapter was trained on the original weights: leave --onto out, or choose  --onto original"
        )
    refuse_missing_runtime(sys.executable)
    folder = cache_dir() / "merged" / merge_digest(artifact, base, chosen)[:32]
    try:
        manifest = make_once(folder, lambda place: _make(place, artifact, base, chosen, show), say)
        if local_facts(folder, cache_dir() / "digests") != manifest.files:  # reads each file once, and then only looks whether it changed
            make_once(folder, lambda place: _make(place, artifact, base, chosen, show), say, verify=True)
    except OSError as exc:
        raise StagingError(f"the merged model cannot be kept in {folder.parent} ({exc}): make room there, or set TRIMTAB_CACHE") from exc
    return folder


def export(folder: Path, output: Path) -> Path:
    """A merged folder from the cache once more, as a user's own, whole or not at all. Weights share bytes with the cache where they can.

    Raises StagingError for a folder that holds something, and where there is no room.
    """
    refuse_used(output)
    output = output.expanduser().absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        try:
            for path in sorted(folder.iterdir()):
                if path.suffix == ".safetensors":
                    link_or_copy(path, partial / path.name)
                elif path.name != WEIGHTS_MANIFEST:
                    shutil.copyfile(path, partial / path.name)
            partial.chmod(0o755)  # mkdtemp's folder is private
            partial.rename(output)  # takes the place of an empty one
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as exc:
        raise StagingError(f"the merged model cannot be put into {output} ({exc}): make room there, or choose another folder") from exc
    return output


def refuse_used(output: Path) -> None:
    """Raise StagingError for a place where something is."""
    output = output.expanduser()
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise StagingError(f"{output} is there already: choose a folder that is new or empty")


def refuse_whole(artifact: Artifact) -> None:
    """Raise SpecError where there is nothing to merge."""
    if artifact.is_whole:
        raise SpecError(f"there is nothing to merge: {artifact.path} is a whole model (method full); deploy it, or copy it, as it is")


def refuse_other_base(artifact: Artifact, base: BaseModel) -> None:
    """Raise WeightsError where `base` is not what the artifact was trained on, or lies elsewhere."""
    if base.uri is not None:
        raise WeightsError(f"the weights of {base.uri} are not on this machine: copy them to a folder, and give that as the base model")
    if base.digest != artifact.base_digest:
        raise WeightsError(
            f"{base.folder} is not the model that was tuned ({artifact.spec.model}, digest {artifact.base_digest[:16]}; this one has "
            f"{base.digest[:16]}): give the base model of the run"
        )


def pick_of(artifact: Artifact, base: BaseModel) -> tuple[Literal["dequantised", "original"], str]:
    """Onto which weights `auto` merges, and why."""
    if artifact.spec.method != "qlora":
        return "original", f"{artifact.spec.method} trains on the original weights"
    try:
        note = json.loads(pick_file(artifact, base).read_text(encoding="utf-8"))
        if note["pick"] in ("dequantised", "original"):
            return note["pick"], str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    return "dequantised", "the weights that the adapter was trained on; not measured yet (trimtab merge HANDLE measures it)"


def pick_file(artifact: Artifact, base: BaseModel) -> Path:
    return cache_dir() / "merged" / "picks" / f"{merge_digest(artifact, base, '')[:32]}.json"


def merge_digest(artifact: Artifact, base: BaseModel, onto: str) -> str:
    """Names a merged model by what it is made of: adapter, its settings and tokenizer, base, and onto which weights."""
    small = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifact.path.iterdir())
        if path.is_file() and path.name not in (ADAPTER, MANIFEST, "README.md")
    }
    spec = [artifact.spec.method, artifact.spec.dtype]
    return hashlib.sha256(json.dumps([FORMAT, artifact.digest, small, spec, base.digest, onto]).encode()).hexdigest()


def lay_out(root: Path, artifact: Artifact, base: BaseModel) -> JobDir:
    """The channels of the runtime's `merge` and `losses`: links to the base's files and to the artifact."""
    job = JobDir(root)
    job.channel("").mkdir(parents=True)
    link_model(base, job.channel("model"))
    job.adapters.mkdir()
    (job.adapters / "tuned").symlink_to(artifact.path, target_is_directory=True)
    return job


def _make(place: Path, artifact: Artifact, base: BaseModel, onto: str, show: Callable[[Event], None]) -> Manifest:
    needed = sum((base.folder / name).stat().st_size for name in base.files)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StagingError(
            f"the merged model takes {needed / 1e9:.1f} GB and {place.parent} has {free / 1e9:.1f} GB left: make room there, or set "
            "TRIMTAB_CACHE to another folder"
        )
    with tempfile.TemporaryDirectory(prefix="trimtab-merge-") as root:
        job = lay_out(Path(root), artifact, base)
        job.model.symlink_to(place, target_is_directory=True)
        job.channel("merge").mkdir()
        (job.channel("merge") / "request.json").write_text(json.dumps({"onto": onto}), encoding="utf-8")
        run_verb("merge", job, show, doing="the model could not be merged")
    told = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
    facts = {name: FileFact((place / name).stat().st_size, sha256) for name, sha256 in told.items()} | {MANIFEST: fact_of(place / MANIFEST)}
    return Manifest(f"{artifact.spec.model} with the adapter {artifact.digest[:16]}, merged onto its {onto} weights", None, None, facts)
