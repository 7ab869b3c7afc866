"""What a folder with a model must hold, its digest, and how such a folder is made whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import WeightsError

MANIFEST = "trimtab-weights.json"

_IN_S3 = "trimtab-in-s3.json"

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_OTHERS = re.compile(r"[^/]+\.(json|jinja)|tokenizer\.model|merges\.txt|vocab\.txt")
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")


@dataclass(frozen=True)
class FileFact:
    """`size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder made by trimtab holds and where it came from. It is the last file written, so a folder without it is not whole."""

    source: str
    hub_id: str | None
    revision: str | None
    files: dict[str, FileFact]

    @property
    def digest(self) -> str:
        return digest_of(self.files)


def digest_of(files: Mapping[str, FileFact]) -> str:
    """One digest for a set of files, by names and contents: what `LC_ALL=C; sha256sum FILES... | sha256sum` prints."""
    lines = "".join(f"{fact.sha256}  {name}\n" for name, fact in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def chosen(names: Iterable[str]) -> list[str]:
    """The files of a model that are used, out of all: weights as safetensors, configuration, tokenizer. Never a pickle or code."""
    return sorted(name for name in names if name != MANIFEST and (_WEIGHTS.fullmatch(name) or _OTHERS.fullmatch(name)))


def lacking(names: Iterable[str]) -> str | None:
    """What a model with these files lacks, as a sentence with the remedy; None when nothing is missing."""
    present = set(names)
    weights = [name for name in present if _WEIGHTS.fullmatch(name)]
    if not weights and any(_PICKLES.fullmatch(name) for name in present):
        return (
            "its weights are pickles (.bin, .pt), which can run code when they are read. Use a revision or a copy of the model with "
            "safetensors; https://huggingface.co/spaces/safetensors/convert makes one"
        )
    missing = [name for name in ("config.json", "tokenizer.json") if name not in present]
    missing += [] if weights else ["model.safetensors"]
    if not missing:
        return None
    return (
        f"it has no {' and no '.join(missing)}. Load the model and its tokenizer with transformers, write both to one folder "
        "(model.save_pretrained(FOLDER), tokenizer.save_pretrained(FOLDER)) and give that folder"
    )


def missing_shards(folder: Path) -> list[str]:
    """The shards that the weights' index names and the folder does not hold."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightsError(f"{index} is not a readable index of shards. Copy the model's folder again.") from exc
    return sorted(name for name in names if not (folder / name).is_file())


def fact_of(path: Path) -> FileFact:
    with path.open("rb") as file:
        return FileFact(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest | None:
    """The manifest of a whole folder; None when there is no such folder.

    Compares names and sizes, with `verify` every file's digest. Raises WeightsError when they do not match; such a folder can only
    be made again.
    """
    if not folder.is_dir():
        return None
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        files = {name: FileFact(**fact) for name, fact in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightsError(f"{folder} has no readable {MANIFEST}. Delete the folder and run the same command again.") from exc
    for name, fact in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != fact.size or (verify and fact_of(path) != fact):
            raise WeightsError(f"{path} is missing or changed. Delete {folder} and run the same command again.")
    return manifest


def make_once(
    target: Path,
    make: Callable[[Path], Manifest],
    say: Callable[[str], None],
    *,
    verify: bool = False,
) -> Manifest:
    """The manifest of the folder `target`, which `make` fills when it is not there or not whole.

    `make` gets an empty folder beside the target, fills it and returns its manifest; the folder gets the target's name only after
    that, in one step. Of several processes that ask at once one works and the others wait. What a killed process left is removed.
    """
    try:
        if manifest := read_manifest(target, verify=verify):
            return manifest
    except WeightsError:
        pass  # said and mended below, where no other process can be doing the same
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock", say):
        try:
            if manifest := read_manifest(target, verify=verify):
                return manifest
        except WeightsError as exc:
            say(f"the copy in the cache is broken and is made again: {str(exc).partition('. Delete')[0]}")
            shutil.rmtree(target)
        for left_over in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(left_over)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        try:
            manifest = make(partial)
            (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
            partial.chmod(0o755)  # mkdtemp's folder is private, and a container reads it as another user
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching the same model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where the file system allows it, else a copy. Links are followed first."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def note_in_s3(folder: Path, uri: str, size: int) -> None:
    """Note beside what was fetched of a model that all of it stays in S3, and how many bytes lie there."""
    written = folder / f".{_IN_S3}.{os.getpid()}"
    written.write_text(json.dumps({"uri": uri, "bytes": size}), encoding="utf-8")
    written.replace(folder / _IN_S3)


def model_bytes(folder: Path) -> int:
    """Bytes that a run's machine gets as its model: those in the folder, or, of a model that stays in S3, all that lie there."""
    try:
        return int(json.loads((folder / _IN_S3).read_bytes())["bytes"])
    except FileNotFoundError:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def local_facts(folder: Path, notes: Path, *, verify: bool = False) -> dict[str, FileFact]:
    """The facts of the model files in a folder that is not ours.

    Digests are remembered in the folder `notes`, so that tens of gigabytes are read once; they count as long as names, sizes and
    times of change stay the same, and with `verify` not at all.
    """
    paths = {name: folder / name for name in chosen(path.name for path in folder.iterdir() if path.is_file())}
    stamps = {name: [(stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ino] for name, path in paths.items()}
    note = notes / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
    if not verify:
        try:
            known = json.loads(note.read_bytes())
            if known["stamps"] == stamps:
                return {name: FileFact(**fact) for name, fact in known["files"].items()}
        except (OSError, ValueError, TypeError, KeyError):
            pass  # no note yet, or not a readable one: it is written again
    facts = {name: fact_of(path) for name, path in paths.items()}
    note.parent.mkdir(parents=True, exist_ok=True)
    written = note.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({"stamps": stamps, "files": {name: asdict(fact) for name, fact in facts.items()}}))
    written.replace(note)
    return facts
