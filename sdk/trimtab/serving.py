"""What is to be served: a model alone, a model merged from base and adapter, or adapters beside their base, as files on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from trimtab import weights
from trimtab.artifact import ADAPTER, Artifact
from trimtab.artifact import MANIFEST as ARTIFACT_MANIFEST
from trimtab.cache import cache_dir
from trimtab.catalog import catalog, in_s3, is_path
from trimtab.errors import SpecError, WeightsError
from trimtab.events import Event
from trimtab.model_folder import MANIFEST as WEIGHTS_MANIFEST
from trimtab.model_folder import chosen
from trimtab.remote_code import allowed, code_of
from trimtab.spec import ServeSpec
from trimtab.weights import BaseModel

TUNED = "tuned"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Serving:
    """What a server gets to read, complete and checked.

    `files` are all of it: by its place in the endpoint's tree ("model/config.json") the file on this machine. `model` is the folder of a
    merged model, of one that was trained whole, or of a base alone, `base` the base's folder where `adapters` (folders by name) are served
    beside it. Of a base alone whose weights stay in S3 `uri` is where, and `files` are all but its weights. `digest` names all of it by
    contents, `bytes` is its size, `title` is for lists. Of a model that is not merged yet `foreseen` are its base's files, by the same
    names: `bytes` is theirs.
    """

    model: Path | None
    base: Path | None
    adapters: Mapping[str, Path]
    files: Mapping[str, Path]
    spec: ServeSpec
    title: str
    digest: str
    bytes: int
    device: Literal["xeon", "gpu"] = "xeon"
    uri: str = ""
    foreseen: Mapping[str, Path] = field(default_factory=dict)

    def refuse_remote(self) -> None:
        """Raise SpecError for weights that are not on this machine."""
        if self.uri:
            raise SpecError(
                f"the weights of {self.uri} stay in S3, and only SageMaker reads them there: add  --backend sagemaker , "
                "or fetch them with  aws s3 sync  and give the folder"
            )


def serving(
    artifact: Artifact | str | Path | None = None,
    base_model: str | Path | None = None,
    *,
    device: Literal["xeon", "gpu"] = "xeon",
    merge: bool = True,
    adapters: Mapping[str, Artifact | str | Path] | None = None,
    spec: ServeSpec | None = None,
    trust_remote_code: str = "",
    title: str = "",
    make: bool = True,
    show: Callable[[Event], None] = lambda event: None,
) -> Serving:
    """What to serve, found, checked and, where there is an adapter, merged.

    An `artifact` is merged onto its base model; with `merge=False`, or with further `adapters` by name, it is served beside the base under
    the name "tuned"; one that is a whole model (method full) is served as it is. `base_model` is an alias, a Hub id or a folder; without it
    it is the one that was trained. Code of a model's author runs only where `trust_remote_code` names the very revision that is served,
    "owner/name@<commit>". Without `make` nothing is merged, and the files are those that there would be.

    Raises WeightsError for a base model that is missing or not the one that was trained, StagingError for an artifact that is damaged and
    for a merge that failed, SpecError for what cannot be served together.
    """
    spec = spec or ServeSpec()
    tuned = None if artifact is None else _artifact(artifact)
    beside = {_adapter_name(name): _artifact(found) for name, found in (adapters or {}).items()}
    every = ([] if tuned is None else [tuned]) + list(beside.values())
    if whole := next((found for found in every if found.is_whole), None):
        if len(every) > 1 or base_model is not None or not merge:
            raise SpecError(
                f"{whole.path} is a whole model (method full), which needs no base and no merge: serve it alone, and what is to be "
                "compared with it as an endpoint of its own"
            )
        files = {path.name: path.resolve() for path in _whole_files(whole)}
        spec = spec.model_copy(update={"name": spec.name or _name(None, every)})
        title = title or spec.name
        return _of(spec, title, device, _digest("whole", whole.digest), {"model": files}, model=whole.path)
    base = _base(base_model, every)
    merging = tuned is not None and merge and not beside
    name = _name(base_model, every)
    alone = name if merging or not every else ""  # beside its adapters the base has that name, which the server knows itself
    trusted = allowed(trust_remote_code, base)
    spec = spec.model_copy(update={"name": spec.name or alone, "trust_remote_code": trusted})
    title = title or name or base.folder.name
    code = code_of(base) if trusted and make else {}
    if not every:
        return _of(spec, title, device, base.digest, {"model": _files(base) | code}, model=base.folder, uri=base.uri or "")
    if base.uri is not None:
        raise WeightsError(f"the weights of {base.uri} are not on this machine, and an adapter needs them: fetch them with  aws s3 sync")
    if tuned is not None and merging:
        from trimtab.merge import merge_digest, pick_of

        digest = merge_digest(tuned, base, pick_of(tuned, base)[0])
        folder, found = _merged(tuned, base, show) if make else _unmade(digest, base)
        made = _of(spec, title, device, digest, {"model": found | code}, model=folder)
        if all(path.exists() for path in found.values()):
            return made
        foreseen = {f"model/{name}": path for name, path in _files(base).items()}
        return replace(made, foreseen=foreseen, bytes=sum(path.stat().st_size for path in foreseen.values()))
    named = ({} if tuned is None else {TUNED: tuned}) | beside
    places = {"input/data/model": _files(base) | code} | {_place(name): _adapter_files(found) for name, found in named.items()}
    digest = _digest("beside", base.digest, *(f"{name} {found.digest}" for name, found in named.items()))
    return _of(spec, title, device, digest, places, base=base.folder, adapters={name: found.path for name, found in named.items()})


def _of(
    spec: ServeSpec,
    title: str,
    device: Literal["xeon", "gpu"],
    digest: str,
    places: Mapping[str, Mapping[str, Path]],
    *,
    model: Path | None = None,
    base: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    uri: str = "",
) -> Serving:
    files = {f"{place}/{name}": path for place, found in places.items() for name, path in found.items()}
    size = sum(path.stat().st_size for path in files.values() if path.exists())
    return Serving(model, base, adapters or {}, files, spec, title, digest, size, device, uri)


def _artifact(given: Artifact | str | Path) -> Artifact:
    found = given if isinstance(given, Artifact) else Artifact(given)
    found.verify()
    return found


def _adapter_name(name: str) -> str:
    if name in (TUNED, "base") or not _NAME.fullmatch(name):
        raise SpecError(f"an adapter cannot be called {name!r}: choose letters, digits, dots and hyphens, and neither base nor {TUNED}")
    return name


def _base(given: str | Path | None, artifacts: Iterable[Artifact]) -> BaseModel:
    """The base model, which is the one that every artifact was trained on."""
    artifacts = list(artifacts)
    if given is not None:
        found = weights.resolve(str(given), say=_quiet)
    elif artifacts:
        found = weights.resolve_trained(artifacts[0])
    else:
        raise SpecError("there is nothing to serve: give an artifact, a base model, or adapters")
    for artifact in artifacts:
        if artifact.base_digest not in ("", found.digest):
            raise WeightsError(
                f"{artifact.path} was trained on {artifact.spec.model} ({artifact.base_digest[:12]}), and {given or found.folder} is "
                f"another model or another revision of it ({found.digest[:12]}): give the model that it was trained on"
            )
    return found


def _name(given: str | Path | None, artifacts: Iterable[Artifact]) -> str:
    """What people call the model: an alias or a Hub id; the folder's name of a local one that was trained; "" for a folder alone."""
    trained = next((artifact.spec.model for artifact in artifacts), None)
    name = trained or str(given)
    if in_s3(name) or (name not in catalog() and is_path(name)):
        return Path(name).name if trained else ""
    return name.partition("@")[0]


def _merged(artifact: Artifact, base: BaseModel, show: Callable[[Event], None]) -> tuple[Path, dict[str, Path]]:
    """The merged model's folder and its files."""
    from trimtab.merge import merged

    folder = merged(artifact, base, show=show)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != WEIGHTS_MANIFEST]
    return folder, {path.relative_to(folder).as_posix(): path.resolve() for path in found}


def _unmade(digest: str, base: BaseModel) -> tuple[Path, dict[str, Path]]:
    """Where a merged model would lie, and what there would be."""
    folder = cache_dir() / "merged" / digest[:32]
    return folder, {name: folder / name for name in (*base.files, ARTIFACT_MANIFEST)}


def _files(base: BaseModel) -> dict[str, Path]:
    return {name: (base.folder / name).resolve() for name in base.files}


def _place(name: str) -> str:
    """Where an adapter lies in the endpoint's tree: the default in `model`, the others under their names."""
    return "model" if name == TUNED else f"input/data/adapters/{name}"


def _whole_files(artifact: Artifact) -> list[Path]:
    """A model's files, and the manifest, by which an engine knows that it is a tuned one."""
    names = {*chosen(path.name for path in artifact.path.iterdir()), ARTIFACT_MANIFEST}
    return [artifact.path / name for name in sorted(names)]


def _adapter_files(artifact: Artifact) -> dict[str, Path]:
    names = [path.name for path in artifact.path.iterdir()]
    return {name: (artifact.path / name).resolve() for name in sorted({*chosen(names), *({ADAPTER} & set(names))})}


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _quiet(line: str) -> None:
    """Who deploys is told of the endpoint, not of where its files came from."""
