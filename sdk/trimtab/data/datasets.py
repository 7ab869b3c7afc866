"""Datasets of more than one file: those of a Hugging Face hub, and folders that `datasets.save_to_disk` wrote.

hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT], or .../PATH of one file. Of the repository are read, in this order: the files that
its card names, its parquet files, the parquet files that the hub made of it (branch refs/convert/parquet; not for a given revision),
its .jsonl, .csv, .tsv and .json files. Without a SPLIT it is `train`, or the only one; what is left is said.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trimtab import hub
from trimtab.counting import counted
from trimtab.data.arrow import needed
from trimtab.data.parts import Part, kind_of
from trimtab.errors import DataError, WeightsError
from trimtab.hub import HubFile, Listing, NoHub

PATIENCE_S = 15.0
CONVERTED = "refs/convert/parquet"
_NAME = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/convert/[\w.-]+|refs/pr/\d+|[^/]+))?(?:/(.*))?")
_SPLITS = "train|training|validation|valid|dev|val|testing|test|evaluation|eval"
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")
_IN_NAME = re.compile(rf"(?:^|[-_. ])({_SPLITS})(?:[-_. \d]|$)", re.I)
_NO_RECORDS = frozenset({"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"})

Tables = dict[tuple[str, str], tuple[str, ...]]
"""Files by (configuration, split)."""


@dataclass(frozen=True)
class Wanted:
    """What a name asks for. `rest` is what follows the repository: a configuration, a split, both, or a file's path."""

    hub_id: str
    revision: str | None
    rest: tuple[str, ...]

    @property
    def page(self) -> str:
        return f"https://huggingface.co/datasets/{self.hub_id}"

    @classmethod
    def of(cls, name: str) -> Wanted:
        """Raises DataError for a name of another form."""
        if (match := _NAME.fullmatch(name)) is None:
            raise DataError("only datasets are read from a hub, by  hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT]; correct the name")
        return cls(match[1], unquote(match[2]) if match[2] else None, tuple(part for part in (match[3] or "").split("/") if part))


def from_hub(name: str, *, cache: Path, token: str | None, offline: bool, say: Callable[[str], None]) -> tuple[Part, ...]:
    """The files of a dataset on a hub, fetched into Hugging Face's own cache and checked there.

    `token` and `offline` are as for `weights.resolve`. What a name meant is noted in `cache`: a commit asks nobody a second time, and
    another revision means without a hub what it meant the last time. Raises DataError with what to do.
    """
    wanted = Wanted.of(name)
    key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]
    note = cache / "datasets" / wanted.hub_id.replace("/", "--") / f"{key}.json"
    try:
        library = hub.library("a dataset")
        if hub.COMMIT.fullmatch(wanted.revision or "") and (kept := _kept(note, wanted, library)):
            return kept
        try:
            if offline or hub.is_off():
                raise NoHub("offline was asked for" if offline else "HF_HUB_OFFLINE is set")
            listing = _listing(wanted, hub.find_token(token), say)
        except NoHub as exc:
            if kept := _kept(note, wanted, library):
                say(f"data: no hub answered ({exc}): {name} is taken to mean what it meant the last time")
                return kept
            raise DataError(
                f"it is not on this machine and no hub answered ({exc}). Connect to a network that reaches {wanted.page} "
                "(or a mirror: HF_ENDPOINT), or pass the dataset's files"
            ) from exc
        if any(kind_of(file) == "parquet" for file in listing.files):
            needed(name)  # before hours of fetching, not after
        say(f"data: fetching {counted(len(listing.files), 'file')} of {wanted.hub_id} at {listing.commit}")
        folder, _ = hub.download(listing, token=hub.find_token(token), page=wanted.page)
    except WeightsError as exc:
        raise DataError(str(exc)) from exc
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"commit": listing.commit, "files": sorted(listing.files)}), encoding="utf-8")
    except OSError as exc:
        raise DataError(f"{note} cannot be written ({exc.strerror}); make room there, or set TRIMTAB_CACHE to another folder") from exc
    return _parts(wanted, folder, sorted(listing.files))


def _parts(wanted: Wanted, folder: Path, files: Iterable[str]) -> tuple[Part, ...]:
    return tuple(Part(f"{wanted.hub_id}/{name}", kind_of(name) or "", path=folder / name) for name in files)


def _kept(note: Path, wanted: Wanted, library: Any) -> tuple[Part, ...]:
    """The files as they were fetched before; none when one of them is not there any more."""
    try:
        noted = json.loads(note.read_bytes())
        commit, files = noted["commit"], noted["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    found = [library.try_to_load_from_cache(wanted.hub_id, name, revision=commit, repo_type="dataset") for name in files]
    if not all(isinstance(path, str) for path in found):
        return ()
    return _parts(wanted, Path(found[0].removesuffix(files[0])), files)


def _listing(wanted: Wanted, token: str | None, say: Callable[[str], None]) -> Listing:
    """The files to fetch. Raises NoHub, WeightsError (LicenceRequired), and DataError for a split or a configuration that is not there."""
    commit, files, card = _ask(wanted, wanted.revision or "main", token)
    path = "/".join(wanted.rest)
    if path in files and kind_of(path):
        return Listing(wanted.hub_id, commit, {path: files[path]}, kind="dataset")
    usable = sorted(name for name in files if kind_of(name) and name.rpartition("/")[2] not in _NO_RECORDS)
    parquet = [name for name in usable if kind_of(name) == "parquet"]
    found = by_card(usable, card) or by_name(parquet)
    if not found and wanted.revision is None and (converted := _converted(wanted, token)):
        commit, files = converted
        found = by_name([name for name in files if kind_of(name) == "parquet"])
    found = found or by_name(usable)
    if not found:
        raise DataError(f"{wanted.hub_id} has no file of records (parquet, .jsonl, .json, .csv, .tsv); look at {wanted.page}")
    chosen = choose(found, wanted, say)
    return Listing(wanted.hub_id, commit, {name: files[name] for name in chosen}, kind="dataset")


def _ask(wanted: Wanted, revision: str, token: str | None) -> tuple[str, dict[str, HubFile], Any]:
    library = hub.library("a dataset")
    api = library.HfApi(endpoint=hub.endpoint(), token=token or False)
    try:
        info = hub.within(PATIENCE_S, lambda: api.dataset_info(wanted.hub_id, revision=revision, files_metadata=True, timeout=PATIENCE_S))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, library.errors.HTTPError) as exc:
        raise hub.refusal(exc, wanted.hub_id, revision, token=token, page=wanted.page, what="dataset") from exc
    commit = str(info.sha)
    if not hub.COMMIT.fullmatch(commit) or (hub.COMMIT.fullmatch(revision) and commit != revision):
        raise NoHub(f"an answer without the commit of {wanted.hub_id} at {revision}")
    if info.gated and token is None:
        raise DataError(hub.needs_token(wanted.hub_id, wanted.page))
    card = info.card_data.to_dict().get("configs") if info.card_data else None
    return commit, {sibling.rfilename: hub.file_of(sibling) for sibling in info.siblings or []}, card


def _converted(wanted: Wanted, token: str | None) -> tuple[str, dict[str, HubFile]] | None:
    try:
        commit, files, _ = _ask(wanted, CONVERTED, token)
    except WeightsError:  # there is no such branch
        return None
    return commit, files


def by_card(files: Sequence[str], configs: Any) -> Tables:
    """The tables that a dataset card's `configs` name; none when it names no file that is there."""
    tables: Tables = {}
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, Mapping):
            continue
        name, folder = str(config.get("config_name", "default")), str(config.get("data_dir") or "").strip("/")
        inside = [file for file in files if not folder or file.startswith(f"{folder}/")]
        if config.get("data_files") is None:
            found = {(name, split): paths for (_, split), paths in by_name(inside).items()} if folder else {}
        else:
            found = {}
            for split, patterns in _patterns(config["data_files"]):
                globs = [_glob(f"{folder}/{pattern}" if folder else pattern) for pattern in patterns]
                if paths := tuple(file for file in inside if any(glob.fullmatch(file) for glob in globs)):
                    found[name, split] = paths
        tables |= found
    return tables


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
    """What `data_files` of a card holds, in each way of writing it: a pattern, a list of them, or of objects with split and path."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        found.setdefault(split, []).extend(str(one).removeprefix("./") for one in (path if isinstance(path, list) else [path]))
    return list(found.items())


def _glob(pattern: str) -> re.Pattern[str]:
    marks = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(marks.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern)))


def by_name(files: Iterable[str]) -> Tables:
    """Tables by the names of files and folders: CONFIG/SPLIT/0000.parquet, data/SPLIT-00000-of-00002.parquet, CONFIG/train.jsonl.

    A file whose name tells no split is of `train`.
    """
    tables: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        *folders, last = file.split("/")
        stem = last.partition(".")[0]
        shard, word = _SHARD.fullmatch(stem), _IN_NAME.search(stem)
        in_folder = next((folder for folder in reversed(folders) if re.fullmatch(_SPLITS, folder.removeprefix("partial-"), re.I)), None)
        if stem.isdigit() and len(folders) > 1:  # as the hub writes them
            in_folder = folders[-1]
        split = shard[1] if shard else word[1] if word else in_folder or "train"
        config = "/".join(folder for folder in folders if folder not in ("data", in_folder)) or "default"
        tables.setdefault((config, split), []).append(file)
    return {key: tuple(paths) for key, paths in tables.items()}


def choose(tables: Tables, wanted: Wanted, say: Callable[[str], None]) -> tuple[str, ...]:
    """The files of the configuration and the split that are wanted. Says what is left. Raises DataError naming what there is."""
    configs = list(dict.fromkeys(config for config, _ in tables))
    rest = list(wanted.rest)
    name = f"hf://datasets/{wanted.hub_id}" + (f"@{wanted.revision}" if wanted.revision else "")
    if rest and rest[0] in configs:
        config = rest.pop(0)
    elif len(configs) == 1 or "default" in configs:
        config = configs[0] if len(configs) == 1 else "default"
    elif rest:
        raise DataError(f"{wanted.hub_id} has no configuration {rest[0]}; it has: {', '.join(configs[:50])}")
    else:
        raise DataError(f"{wanted.hub_id} has several configurations: {', '.join(configs[:50])}; pass one:  {name}/{configs[0]}")
    splits = [split for of, split in tables if of == config]
    if len(rest) > 1 or (rest and rest[0] not in splits):
        raise DataError(f"{wanted.hub_id} has no {'/'.join(rest)} in {config}; its splits are: {', '.join(splits)}")
    split = rest[0] if rest else the_split(splits, lambda one: f"{name}/{config}/{one}")
    left = [other for other in splits if other != split]
    say(f"data: {wanted.hub_id}: {config}, split {split}" + (f"; not read: {', '.join(left)}" if left else ""))
    if split.startswith("partial-"):
        say(f"data: {wanted.hub_id}: the hub converted only a part of this split")
    return tables[config, split]


def the_split(splits: Sequence[str], name_of: Callable[[str], str]) -> str:
    """`train`, or the only one: what is kept apart for testing is never trained on by accident."""
    trains = [split for split in splits if split.removeprefix("partial-").startswith("train")]
    exact = [split for split in trains if split.removeprefix("partial-") == "train"]
    for candidates in (exact, trains, splits):
        if len(candidates) == 1:
            return candidates[0]
    raise DataError(f"it has several splits: {', '.join(splits)}; pass one:  {name_of((trains or list(splits))[0])}")


def from_saved(folder: Path, name: str, say: Callable[[str], None]) -> tuple[Part, ...]:
    """The arrow files of a folder of `datasets.save_to_disk`, of its split `train` or its only one. Raises DataError."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = _names(json.loads((folder / "dataset_dict.json").read_bytes())["splits"])
            split = the_split(splits, lambda one: f"{name}/{one}")
            if left := [other for other in splits if other != split]:
                say(f"data: {name}: split {split}; not read: {', '.join(left)}")
            folder, name = folder / split, f"{name}/{split}"
        state = json.loads((folder / "state.json").read_bytes())
        files = _names([file["filename"] for file in state["_data_files"]])
        if state.get("_indices_data_files"):
            raise DataError("its rows were picked or shuffled and not rewritten; call flatten_indices() before save_to_disk()")
    except OSError as exc:
        raise DataError(f"{exc.filename or folder} cannot be read ({exc.strerror}); save it again with save_to_disk()") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError("its state.json or dataset_dict.json cannot be read; save it again with save_to_disk()") from exc
    return tuple(Part(f"{name}/{file}", "arrow", path=folder / file) for file in files)


def _names(values: Any) -> list[str]:
    """Plain names of files or folders, no paths. Raises ValueError."""
    if not isinstance(values, list) or not values or not all(re.fullmatch(r"[\w. -]+", str(value)) and value != ".." for value in values):
        raise ValueError("no list of names")
    return [str(value) for value in values]
