"""What the user passes, as a list of sources: web addresses, files, folders, datasets. Reads names, not contents."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from trimtab.counting import counted
from trimtab.data.parts import KINDS, kind_of

FILE_KINDS = {".html": "text/html", ".htm": "text/html", ".txt": "text/plain", ".md": "text/markdown"}
_READ = ", ".join([*FILE_KINDS, *(kind for kind in KINDS if not kind.endswith(".gz"))])
_BESIDE = frozenset({"readme.md", "dataset_infos.json", "dataset_info.json"})  # of records: what is said of them, not one of them
_DATASET_PAGE = re.compile(r"https?://(?:www\.)?huggingface\.co/datasets/([^/?#]+/[^/?#]+)/?(?:[?#].*)?", re.I)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?!\\)")
_DOMAIN = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,24}(?::\d+)?(?:/\S*)?", re.I)
_SECRET_NAME = re.compile(r"token|secret|passw|pwd|key|sig|auth|credential|session|jwt|^(?:code|sid|x-amz-.*)$", re.I)
_SECRET_VALUE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w.~+/=-]{32,}")


@dataclass(frozen=True)
class Source:
    """One page, or one place of records, to read. `name` is what documents and messages show: nothing secret, no folder of this machine.

    `records` is None for a page, else what kind its name promises: a file of one of `KINDS`, `saved` (a folder that
    `datasets.save_to_disk` wrote) or `hub` (a dataset on a hub, which has neither url nor path).
    """

    name: str
    site: str  # what its pages have in common: the host, or the folder that was passed
    url: str | None = None
    path: Path | None = None
    records: str | None = None


@dataclass(frozen=True)
class Refused:
    """A source that cannot be read, and why. `records`, such as "2 of 15 records", says how much of it, where the rest can be."""

    source: str
    reason: str
    records: str = ""


@dataclass(frozen=True)
class Expanded:
    sources: tuple[Source, ...]  # in the user's order, each once
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]  # what was left out without being an error


def expand(given: str | Path | Sequence[str | Path]) -> Expanded:
    """The sources in `given`: addresses and files as they are, folders as their files, in the order of their paths."""
    sources: dict[str, Source] = {}
    refused: list[Refused] = []
    notes: list[str] = []
    for item in [given] if isinstance(given, str | os.PathLike) else given:
        if isinstance(item, str) and (scheme := _SCHEME.match(item.strip())):
            found, problems, said = _from_url(item.strip(), scheme[1].lower())
        else:
            found, problems, said = _from_path(Path(item))
        refused += problems
        notes += said
        for key, source in found:
            if key in sources:
                notes.append(f"{source.name} was given more than once and is read once")
            sources.setdefault(key, source)
    return Expanded(tuple(sources.values()), tuple(dict.fromkeys(refused)), tuple(dict.fromkeys(notes)))


def check_url(url: str) -> str | None:
    """What is wrong with an address, or None. Where it leads is checked when it is connected to."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "it cannot be read as an address; check its spelling"
    if parts.scheme.lower() not in ("http", "https"):
        return f"{parts.scheme}: is not read, only http and https; download it and pass the file"
    if parts.username is not None or parts.password is not None:
        return "it carries a user name or password, which would end up in records; download the page and pass the file"
    if not host or re.search(r"[\s\\\x00-\x1f]", url):
        return "it cannot be read as an address; check its spelling"
    return None


def public_url(url: str) -> str:
    """`url` as it may be shown and stored: no user name or password, no fragment, values of secret query parameters as "***"."""
    try:
        parts = urlsplit(url)
        netloc = parts.netloc.rpartition("@")[2]
        pairs = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return "an unreadable address"
    query = parts.query
    if any(_is_secret(name, value) for name, value in pairs):
        shown = ((quote(name), "***" if _is_secret(name, value) else quote(value)) for name, value in pairs)
        query = "&".join(f"{name}={value}" for name, value in shown)
    return urlunsplit((parts.scheme.lower(), netloc, parts.path, query, ""))


def public_source(given: str) -> str:
    """A source as it may be stored: an address as `public_url` gives it, a path as it is."""
    return public_url(given.strip()) if _SCHEME.match(given.strip()) else given


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.fullmatch(value))


_Found = tuple[list[tuple[str, Source]], list[Refused], list[str]]


def _from_url(url: str, scheme: str) -> _Found:
    name = public_url(url)
    if scheme == "file":
        return [], [Refused(name, f"file: addresses are not read; pass the path: {unquote(urlsplit(url).path)}")], []
    if scheme == "hf":
        if problem := _hub_problem(url):
            return [], [Refused(name, problem)], []
        return [(name, Source(name, "hf", records="hub"))], [], []
    if problem := check_url(url):
        return [], [Refused(name, problem)], []
    if dataset := _DATASET_PAGE.fullmatch(url):
        return [], [Refused(name, f"it is the page about a dataset; for its records pass  hf://datasets/{dataset[1]}")], []
    parts = urlsplit(url)
    port = "" if parts.port in (None, {"http": 80, "https": 443}[scheme]) else f":{parts.port}"
    host = (parts.hostname or "").lower()
    same = urlunsplit((scheme, (f"[{host}]" if ":" in host else host) + port, parts.path or "/", parts.query, ""))
    return [(same, Source(name, host + port, url=same, records=kind_of(parts.path)))], [], []


def _hub_problem(url: str) -> str | None:
    """What keeps an hf:// name from being shown and noted as it is, or None."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "it cannot be read as a name; pass  hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT]"
    if "@" in parts.netloc:
        return "it carries a user name or a token, which would end up in records; set HF_TOKEN, and pass  hf://datasets/OWNER/NAME"
    if "?" in url or "#" in url:
        return "names of datasets have no ? and no #; pass  hf://datasets/OWNER/NAME[@REVISION], and set HF_TOKEN for a token"
    return None


def _from_path(path: Path) -> _Found:
    name = path.as_posix() if not path.is_absolute() and ".." not in path.parts else path.name or path.as_posix()
    if path.is_dir():
        if _was_saved(path):
            return [(os.path.realpath(path), Source(name, str(path), path=path, records="saved"))], [], []
        try:
            return _from_folder(path, name if name != "." else "")
        except OSError as exc:
            return [], [Refused(name, f"the folder cannot be read ({exc.strerror}); check its permissions")], []
    if not path.exists():
        return [], [Refused(name, _missing(path))], []
    kind = kind_of(path.name)
    if kind is None and path.suffix.lower() not in FILE_KINDS:
        return [], [Refused(name, f"files of this kind are not read, only {_READ}; export it as one of them")], []
    return [(os.path.realpath(path), Source(name, str(path.parent), path=path, records=kind))], [], []


def _was_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it: one split, or several."""
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _from_folder(folder: Path, name: str) -> _Found:
    """The files under `folder`. Hidden names are passed over; a link that leads out is refused, one that stays inside is followed
    only if it is a file (a folder is read where it is). Beside web pages a .json file is passed over, as sites keep their settings
    in such, and beside records what only describes them."""
    found: list[tuple[str, Source]] = []
    refused: list[Refused] = []
    unread: Counter[str] = Counter()
    inside = folder.resolve()
    for path in _walk(folder):
        shown = "/".join(part for part in (name, path.relative_to(folder).as_posix()) if part)
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            refused.append(Refused(shown, "it is a link that leads out of the folder; pass its target if you mean it"))
        elif path.is_dir():
            continue
        elif not path.is_file():
            refused.append(Refused(shown, "it is a link to nothing, or no plain file; remove it or pass the files by name"))
        elif (kind := kind_of(path.name)) or path.suffix.lower() in FILE_KINDS:
            found.append((os.path.realpath(path), Source(shown, str(folder), path=path, records=kind)))
        else:
            unread[path.suffix.lower() or "no suffix"] += 1
    notes = []
    pages = any(source.name.lower().endswith((".html", ".htm")) for _, source in found)
    settings = [source for _, source in found if pages and source.records == "json"]
    records = any(source.records and source not in settings and _last(source) not in _BESIDE for _, source in found)
    passed = [(source, "a .json file beside web pages") for source in settings]
    passed += [(source, "it describes the records beside it") for _, source in found if records and _last(source) in _BESIDE]
    for source, why in passed:
        found = [item for item in found if item[1] is not source]
        notes.append(f"{source.name} was passed over ({why}); pass it by name if it is to be learned")
    if unread:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        files = counted(unread.total(), "file of a kind that is", "files of kinds that are")
        notes.append(f"{name or folder.resolve().name}: passed over {files} not read ({kinds})")
    if not found and not refused:
        refused.append(
            Refused(name or folder.resolve().name, f"the folder holds no file of the kinds that are read ({_READ}); pass one that does")
        )
    return found, refused, notes


def _last(source: Source) -> str:
    return source.name.rpartition("/")[2].lower()


def _walk(folder: Path) -> Iterable[Path]:
    """Everything under `folder` but hidden names, and links to folders as themselves, in the order of the paths' parts."""
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.name.startswith("."):
            continue
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)


def _missing(path: Path) -> str:
    """Why a path that is not there may have been meant otherwise."""
    if _DOMAIN.fullmatch(path.as_posix()) and path.suffix.lower() not in FILE_KINDS:
        return f"there is no such file; an address starts with its scheme: https://{path.as_posix()}"
    parent = path.parent
    if not parent.is_dir():
        return f"there is no folder {parent.as_posix()}; check the path"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in parent.iterdir()), n=1, cutoff=0.5)
    return f"there is no such file or folder; did you mean {near[0]}?" if near else "there is no such file or folder; check the path"
