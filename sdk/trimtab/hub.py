"""A Hugging Face hub: what a model's repository holds at a revision, and a repository's files, checked against what the hub says of
them. Datasets (data/datasets.py) are listed there and fetched here."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import LicenceRequired, WeightsError
from .model_folder import FileFact, chosen, fact_of, lacking

REMEDY = "pip install 'trimtab[weights]'"
LOG_IN = "hf auth login   (or set HF_TOKEN; tokens are made at https://huggingface.co/settings/tokens)"

COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


class NoHub(Exception):
    """No hub answered, or what answered is not one. Never leaves `weights.resolve`; the text is the reason."""


@dataclass(frozen=True)
class HubFile:
    """What the hub says of a file: bytes, and the SHA-256 of a large file or the git blob id (SHA-1) of a small one."""

    size: int | None
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Listing:
    """The usable files of a repository at one commit."""

    hub_id: str
    commit: str
    files: dict[str, HubFile]
    kind: Literal["model", "dataset"] = "model"


def is_off() -> bool:
    """Whether the user forbade asking hubs, with one of the variables that Hugging Face's own libraries read."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def find_token(token: str | None) -> str | None:
    """The token given, else HF_TOKEN's, else that of `hf auth login`."""
    return token or library().get_token()


def ask(hub_id: str, revision: str, *, token: str | None, page: str, patience: float) -> Listing:
    """The commit that `revision` names now and the files to fetch from it.

    `patience` is in seconds and covers everything, name resolution too. Raises NoHub when no hub answered in that time;
    LicenceRequired for a gated model and no token; WeightsError for a model, a revision or a token that the hub does not
    know, and for a model without safetensors or tokenizer.json.
    """
    hub = library()
    api = hub.HfApi(endpoint=endpoint(), token=token or False)
    try:
        info = within(patience, lambda: api.model_info(hub_id, revision=revision, files_metadata=True, timeout=patience))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, hub.errors.HTTPError) as exc:
        # HTTPError is the root of the HTTP client's errors: refusals and failed connections are below it, TimeoutError is an OSError.
        # The rest is what the library raises on an answer that no hub gives, such as the page of a login portal.
        raise refusal(exc, hub_id, revision, token=token, page=page) from exc
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise NoHub(f"an answer without the commit of {hub_id} at {revision}")
    if info.gated and token is None:
        raise LicenceRequired(needs_token(hub_id, page))
    present = {sibling.rfilename: sibling for sibling in info.siblings or [] if "/" not in sibling.rfilename}
    if lack := lacking(present):
        raise WeightsError(f"{hub_id} at {revision} cannot be used: {lack}.")
    listed = {name: present[name] for name in chosen(present)}
    return Listing(
        hub_id,
        commit,
        {name: file_of(sibling) for name, sibling in listed.items()},
    )


def file_of(sibling: Any) -> HubFile:
    """What the hub's listing says of a file."""
    return HubFile(sibling.size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


def download(listing: Listing, *, token: str | None, page: str) -> tuple[Path, dict[str, FileFact]]:
    """Fetch a listing's files into Hugging Face's own cache, going on where an earlier attempt stopped; their folder and facts.

    Raises LicenceRequired for a token without access, WeightsError for a transfer that broke off, a disk without room and a file
    that differs from what the hub says of it (that file is removed).
    """
    hub = library()
    _refuse_full_disk(listing, Path(hub.constants.HF_HUB_CACHE))
    try:
        folder = Path(
            hub.snapshot_download(
                listing.hub_id,
                repo_type=listing.kind,
                revision=listing.commit,
                allow_patterns=[glob.escape(name) for name in listing.files],
                endpoint=endpoint(),
                token=token or False,
            )
        )
    except hub.errors.GatedRepoError as exc:
        raise LicenceRequired(needs_access(listing.hub_id, page) if token else needs_token(listing.hub_id, page)) from exc
    except (OSError, RuntimeError, ValueError, hub.errors.HTTPError, getattr(hub.errors, "XetDownloadError", OSError)) as exc:
        raise WeightsError(
            f"The download of {listing.hub_id} broke off ({_short(exc)}). Run the same command again: it goes on where it stopped."
        ) from exc
    facts = {}
    for name, said in listing.files.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"The download of {listing.hub_id} ended without {name}. Run the same command again.")
        facts[name] = fact_of(path)
        if not _agrees(path, facts[name], said):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise WeightsError(
                f"{name} of {listing.hub_id} arrived with other bytes than the hub says it has; it was removed. "
                "Run the same command again; if that repeats, look at the proxy or mirror between here and the hub (HF_ENDPOINT)."
            )
    return folder, facts


def in_hub_cache(hub_id: str, revision: str) -> Path | None:
    """The folder of this revision in Hugging Face's own cache; None when it is not there. Asks no network."""
    path = library().try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def needs_token(hub_id: str, page: str) -> str:
    return (
        f"{hub_id} is given only to people who accepted its licence, and no token was found. Accept it at {page} and then type:  {LOG_IN}"
    )


def needs_access(hub_id: str, page: str) -> str:
    return f"The token has no access to {hub_id}. Ask for access at {page} with the same account, or log in with another:  {LOG_IN}"


def library(what: str = "a model") -> Any:
    """huggingface_hub, imported now. Raises WeightsError with the remedy when it is missing."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as exc:
        raise WeightsError(f"{exc.name} is needed to fetch {what}:  {REMEDY}") from exc
    return huggingface_hub


def endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # read at each call; the library reads it once, when it is imported


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError after `seconds`.

    A thread is needed because looking up a name cannot be given a time limit: without a network it may take half a minute.
    """
    from multiprocessing import TimeoutError as PoolTimeoutError
    from multiprocessing.pool import ThreadPool

    with ThreadPool(1) as pool:
        try:
            return pool.apply_async(call).get(seconds)
        except PoolTimeoutError as exc:
            raise TimeoutError(f"no answer within {seconds:g} s") from exc


def refusal(exc: Exception, hub_id: str, revision: str, *, token: str | None, page: str, what: str = "model") -> Exception:
    """What an error of asking for `what` means: a hub that said no, or no hub at all."""
    errors = library().errors
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.GatedRepoError):
        return LicenceRequired(needs_access(hub_id, page) if token else needs_token(hub_id, page))
    if isinstance(exc, errors.RevisionNotFoundError):
        return WeightsError(f"{hub_id} has no revision {revision}. Give another as {hub_id}@REVISION, for example {hub_id}@main.")
    if isinstance(exc, errors.RepositoryNotFoundError):
        if token:
            return WeightsError(
                f"The hub shows no {what} {hub_id} to this token. Check the spelling at {page}, or log in with another:  {LOG_IN}"
            )
        return WeightsError(f"The hub shows no {what} {hub_id}. Check the spelling at {page}; if it is private, log in first:  {LOG_IN}")
    if isinstance(exc, errors.HFValidationError):
        return WeightsError(f"{hub_id!r} cannot be the name of a {what} on a hub. Give owner/name or owner/name@revision.")
    if status == 401 and token:
        return WeightsError(f"The hub does not accept the token (401). Correct HF_TOKEN or type:  {LOG_IN}")
    if status == 403 and token:
        return LicenceRequired(needs_access(hub_id, page))
    return NoHub(_short(exc))


def _short(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:160]}" if text else type(exc).__name__


def _agrees(path: Path, fact: FileFact, said: HubFile) -> bool:
    if said.sha256 is not None:
        return fact.sha256 == said.sha256
    if said.blob_id is not None:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == said.blob_id
    return said.size is None or fact.size == said.size


def _refuse_full_disk(listing: Listing, cache: Path) -> None:
    held = cache / f"{listing.kind}s--{listing.hub_id.replace('/', '--')}" / "snapshots" / listing.commit
    needed = sum(file.size or 0 for name, file in listing.files.items() if not (held / name).exists())
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise WeightsError(
            f"{listing.hub_id} needs {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free. "
            "Make room, or set HF_HOME and TRIMTAB_CACHE to folders on a larger disk."
        )
