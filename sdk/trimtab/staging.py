"""From what a user asks for to what a run reads: the base model's files and the packed rows, as two folders named by content.

cache/data/<digest>-<version>-<source>/  a job tree of its own, made by the runtime's `generate` and `prepare`
    input/data/documents/       what the sources said: documents.jsonl, of records that are no running text examples.jsonl, and losses.json
                                where something was skipped (such a tree has one part more in its name)
    input/data/model/           links to the base model's files, and to nothing else that lies in its folder
    input/data/train/           the packed rows, their ledger, their manifest
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import data, families, half_made, weights
from trimtab.cache import cache_dir
from trimtab.catalog import catalog, in_s3, refuse_too_long
from trimtab.command import REMEDY, inherited, refuse_missing_runtime, runtime_command, runtime_environment
from trimtab.errors import SpecError, StagingError, WeightsError
from trimtab.events import Event, read_from
from trimtab.layout import PIPE_VARIABLE, JobDir
from trimtab.ledger import Ledger
from trimtab.model_folder import link_or_copy, note_in_s3
from trimtab.spec import JobSpec, TrainSpec

if TYPE_CHECKING:
    from trimtab.aws.session import Aws
    from trimtab.data import Document, Loaded
    from trimtab.weights import BaseModel

_STALE = 24 * 3600.0  # seconds after which a half-made folder without a lock has no maker any more


@dataclass(frozen=True)
class Staged:
    """All that a run needs. `train` names model and data by content; `channels` are the folders `train` and `model`.

    `loaded` holds the documents, the examples and what was skipped; `reused` tells that the rows were there already.
    """

    train: TrainSpec
    channels: dict[str, Path]
    ledger: Ledger
    model: BaseModel
    loaded: Loaded
    reused: bool


def stage(
    spec: JobSpec,
    *,
    cache: Path | None = None,
    token: str | None = None,
    offline: bool = False,
    say: Callable[[str], None] = print,
    show: Callable[[Event], None] = lambda event: None,
    aws: Aws | None = None,
    bucket_owner: str | None = None,
) -> Staged:
    """Resolve the base model, load the documents, and prepare the rows, or find them prepared.

    `cache` is by default `cache_dir()`; `token` is the user's Hugging Face token, `offline` forbids asking a hub; `say` gets sentences,
    `show` the events of preparing. `aws` and `bucket_owner` are for a model in S3, as `weights.resolve` takes them. Whatever interrupts
    it, only complete data stays.

    Raises SpecError, WeightsError (LicenceRequired before anything is fetched), DataError, and StagingError with the runtime's reason.
    """
    cache = cache or cache_dir()
    refuse_missing_runtime(sys.executable)
    if in_s3(spec.train.model) and spec.train.replay > 0:
        raise SpecError("the weights stay in S3, so nothing can be rehearsed with them here: set replay to 0 (--replay 0)")
    refuse_too_long(spec.train.model, spec.train.max_seq_len)
    model = weights.resolve(spec.train.model, cache=cache, token=token, offline=offline, say=say, aws=aws, bucket_owner=bucket_owner)
    config = _config(model)
    if why := families.refusal(config, spec.train.max_seq_len) or families.missing_target(config, spec.train.lora_targets):
        raise SpecError(why)
    limits = data.FetchLimits(max_bytes=max(1, round(spec.max_page_mb * 1e6)), total_s=spec.max_page_seconds)
    loaded = data.load(
        spec.data,
        on_error=spec.on_error,
        allow_private_hosts=spec.allow_private_hosts,
        limits=limits,
        cache=cache,
        token=token,
        offline=offline,
        objective=spec.train.objective,
        say=say,
    )
    filled = {
        "model": lasting_name(spec.train.model, model),
        "model_digest": model.digest,
        "data_digest": data_digest(loaded),
    }
    train = TrainSpec(**{**spec.train.model_dump(), **filled})
    folder = cache / "data" / f"{train.preparation_digest()[:16]}-{_maker()}{_of_losses(loaded)}"
    try:
        if reused := complete(folder):
            say(f"data: prepared before, in {folder}")
        else:
            _prepare(folder, train, model, loaded, show)
        job = JobDir(folder)
        if model.uri is not None:
            note_in_s3(job.channel("model"), model.uri, model.uri_bytes)
        ledger = Ledger.model_validate_json((job.channel("train") / "ledger.json").read_bytes())
    except OSError as exc:
        raise StagingError(f"the data cannot be kept in {folder} ({exc}): make room there, or set TRIMTAB_CACHE to another folder") from exc
    for line in ledger.lines():
        say(line)
    return Staged(train, {name: job.channel(name) for name in ("train", "model")}, ledger, model, loaded, reused)


def lasting_name(given: str, model: BaseModel) -> str:
    """A name that means the same files later: an alias of a commit as it is, a Hub id with its commit, a folder with its whole path.

    Without a commit (the files came from a fallback) a Hub id stays as it was given.
    """
    if model.hub_id is None:
        return model.uri or str(model.folder)
    lasting = given in catalog() and catalog()[given].pinned
    return given if lasting or model.revision is None else f"{model.hub_id}@{model.revision}"


def _config(model: BaseModel) -> dict[str, Any]:
    """The model's config.json. Raises WeightsError where it is no JSON object."""
    path = model.folder / "config.json"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{path} cannot be read ({exc}): copy the model again") from exc
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is not a model's configuration: copy the model again")
    return found


def documents_digest(documents: Sequence[Document]) -> str:
    """sha256 of what is trained on, titles and texts in their order: the same pages fetched again are the same data.

    It is that of one JSON list of [title, text], which is never held whole.
    """
    digest = hashlib.sha256(b"[")
    for number, document in enumerate(documents):
        digest.update((", " if number else "").encode() + json.dumps([document.title, document.text]).encode())
    digest.update(b"]")
    return digest.hexdigest()


def data_digest(loaded: Loaded) -> str:
    """sha256 of what is trained on, documents and examples, wherever they came from. Without examples it is `documents_digest`."""
    documents = documents_digest(loaded.documents)
    if loaded.examples is None:
        return documents
    return hashlib.sha256(json.dumps([documents, loaded.examples.digest]).encode()).hexdigest()


def _of_losses(loaded: Loaded) -> str:
    """Sets rows apart from which something was skipped: their ledger says so, and the same rows of sources without a loss have another."""
    return f"-{hashlib.sha256(json.dumps(loaded.losses).encode()).hexdigest()[:8]}" if loaded.losses else ""


def _maker() -> str:
    """The runtime whose rules make the rows, by version and source: another one may make others of the same documents."""
    try:
        version = importlib.metadata.version("trimtab")
    except importlib.metadata.PackageNotFoundError:
        version = "checkout"
    found = importlib.util.find_spec("trimtab_runtime")  # imports nothing
    if found is None or found.origin is None:
        raise StagingError(f"trimtab_runtime, which prepares the data, is not there:  {REMEDY}")
    return f"{version}-{sources_digest(Path(found.origin).parent)[:8]}"


def sources_digest(package: Path) -> str:
    """sha256 of a package's Python files and texts, names and contents."""
    files = sorted([*package.rglob("*.py"), *package.rglob("*.txt")])
    sums = [[path.relative_to(package).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def complete(folder: Path) -> bool:
    """Whether every file that the rows' manifest names is there in its size, and the model's files still are where they were.

    Digests are checked by the run that reads them.
    """
    rows = JobDir(folder).channel("train")
    try:
        files = json.loads((rows / "manifest.json").read_text(encoding="utf-8"))["files"]
        whole = all((rows / name).stat().st_size == fact["bytes"] for name, fact in files.items())
        return whole and all(path.exists() for path in JobDir(folder).channel("model").iterdir())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prepare(folder: Path, train: TrainSpec, model: BaseModel, loaded: Loaded, show: Callable[[Event], None]) -> None:
    """Make the tree in a folder beside its place and move it there when it is whole; else nothing stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_made.sweep(folder.parent.glob(".*"), stale=_STALE)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with half_made.held(making):
            job = JobDir(making).make()
            job.hyperparameters.write_text(json.dumps(train.to_hyperparameters(), indent=1), encoding="utf-8")
            job.channel("documents").mkdir()
            data.to_jsonl(loaded.documents, job.channel("documents") / "documents.jsonl")
            if loaded.losses:
                (job.channel("documents") / "losses.json").write_text(json.dumps(loaded.losses), encoding="utf-8")
            if loaded.examples is not None:
                link_or_copy(loaded.examples.path, job.channel("documents") / "examples.jsonl")
            link_model(model, job.channel("model"))
            if train.replay > 0:
                run_verb("generate", job, show)
            run_verb("prepare", job, show)
            if folder.exists() and not complete(folder):
                shutil.rmtree(folder)  # of an earlier life: cut short, or its model's files are gone
            try:
                making.rename(folder)
            except OSError:
                if not complete(folder):
                    raise  # else another job prepared the same meanwhile
        (folder / half_made.NAME).unlink(missing_ok=True)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def link_model(model: BaseModel, folder: Path) -> None:
    """Links to the base model's files, and to nothing else that lies beside them."""
    folder.mkdir()
    for name in model.files:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((model.folder / name).resolve())


def run_verb(verb: str, job: JobDir, show: Callable[[Event], None], *, doing: str = "the data could not be prepared") -> None:
    """Run one of the runtime's commands in the tree and show its events. It ends when this is interrupted, and with this process.

    Raises StagingError: what it was `doing`, and the runtime's reason.
    """
    log = job.root / f"{verb}.log"
    position = job.events.stat().st_size if job.events.exists() else 0
    with log.open("wb") as output:
        child = subprocess.Popen(
            runtime_command(sys.executable, verb),
            cwd=job.root,
            env={**inherited(os.environ), **runtime_environment(job.root), PIPE_VARIABLE: "1"},
            stdin=subprocess.PIPE,  # closes when we die, however that is
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    try:
        while True:
            ended = child.poll() is not None
            events, position = read_from(job.events, position)
            for event in events:
                show(event)
            if ended:
                break
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    if child.returncode:
        raise StagingError(f"{doing}: {_why(verb, child.returncode, job, log)}")


def _why(verb: str, code: int, job: JobDir, log: Path) -> str:
    if cause := job.cause():
        return cause
    last = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
    ended = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
    return f"{verb} {ended}; its last lines were:\n  {last}\nMend that and run the same command again."
