"""The way from what the user passes to clean documents and training examples, and the file that holds the documents.

sources.py    addresses, files, folders, datasets -> a list of pages and files of records to read
reading.py    each of them read, several at once
fetch.py      one page from the network (addresses.py, limits.py, loader.py)
decode.py     bytes -> text
extract.py    HTML -> title and lines of the main text (markup.py, tables.py); plain.py the same for text and Markdown
clean.py      white space, what a site repeats on every page
datasets.py   a dataset of a hub, or of save_to_disk -> its files of records
records.py    such a file -> its records (arrow.py: parquet and arrow)
forms.py      a record -> the canonical object of its form (turns.py: conversations)
examples.py   such objects -> the file of examples; running text becomes documents
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.cache import cache_dir
from trimtab.counting import counted
from trimtab.data.clean import without_repeated_edges, words
from trimtab.data.examples import Examples, Writer, collect
from trimtab.data.limits import FetchLimits
from trimtab.data.reading import Asking, Reading, RecordFiles, Result, read_all
from trimtab.data.sources import Refused, expand
from trimtab.errors import DataError

_LIMITS = FetchLimits()
_NAMED_AT_MOST = 50  # failures in one message


class Document(BaseModel):
    """One page or file as clean text. Two documents with the same `id` have the same text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$")  # first 16 hexadecimal digits of the SHA-256 of `text`
    source: str  # an address without secrets, or a file name relative to what was passed
    title: str
    text: str = Field(min_length=1)  # paragraphs, headings, list items and table rows, one "\n" between two
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the page's bytes, decompressed, or of the file's
    fetched_at: str  # ISO 8601, UTC, to the second

    @property
    def paragraphs(self) -> tuple[str, ...]:
        return tuple(self.text.split("\n"))

    @model_validator(mode="after")
    def _id_is_of_text(self) -> Self:
        if self.id != text_id(self.text):
            raise ValueError("id does not belong to text")
        return self


class Skipped(BaseModel):
    """A source of which all was left out, or some `records`, such as "2 of 15 records", and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reason: str
    records: str = ""


class Loaded(BaseModel):
    """What `load` read, in the order of the sources: running text as documents, records of other forms as examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]
    examples: Examples | None = None

    @property
    def losses(self) -> tuple[str, ...]:
        """What was skipped, in a sentence for the account of the data; none when nothing was."""
        names = [f"{item.records} of {item.source}" if item.records else item.source for item in self.skipped]
        more = f"; and {len(names) - _NAMED_AT_MOST:,} more" if len(names) > _NAMED_AT_MOST else ""
        return (f"skipped, because they cannot be read: {'; '.join(names[:_NAMED_AT_MOST])}{more}",) if names else ()


def text_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def load(
    sources: str | Path | Sequence[str | Path],
    *,
    on_error: Literal["fail", "skip"] = "fail",
    allow_private_hosts: bool = False,
    proxies_from_environment: bool = False,
    limits: FetchLimits = _LIMITS,
    cache: Path | None = None,
    token: str | None = None,
    offline: bool = False,
    objective: Literal["auto", "all", "answers"] = "auto",
    say: Callable[[str], None] = print,
) -> Loaded:
    """The documents and examples behind `sources`: http and https addresses, files of pages (.html, .htm, .txt, .md) and of records
    (.jsonl, .json, .csv, .tsv, also as .gz, and .parquet), folders of them, folders that `datasets.save_to_disk` wrote, and datasets on a
    hub as hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT].

    Pages are fetched in parallel, `limits.per_host` at a time from one host; the order stays. A source read twice, or whose text
    another one already has, is kept once; so is a record. `allow_private_hosts` permits addresses that are not public, as of this
    machine. `proxies_from_environment` goes through the proxy that HTTPS_PROXY and the like name, which then resolves the names.
    `limits` hold for pages and for whatever is fetched by address; files of records on this machine may be of any size.

    Examples are written to a file in `cache` (by default `cache_dir()`). `token` (else HF_TOKEN, else that of `hf auth login`) is for
    hubs of datasets; with `offline` none is asked. `objective` is what the job learns of its records; it is only said.

    Raises DataError naming every source that failed and why, of records the first by file and line; with `on_error="skip"` only when
    nothing is left.
    """
    expanded = expand(sources)
    total = len(expanded.sources) + len(expanded.refused)
    if not total:
        raise DataError("no data was given; pass at least one address, file or folder")
    for note in expanded.notes:
        say(f"data: {note}")
    cache = cache or cache_dir()
    results = read_all(
        expanded.sources,
        limits,
        allow_private_hosts=allow_private_hosts,
        proxies_from_environment=proxies_from_environment,
        asking=Asking(cache, token, offline),
        say=say,
    )
    failed = [*expanded.refused, *(result for result in results if isinstance(result, Refused))]
    if failed and (on_error == "fail" or len(failed) == total):
        raise DataError(_failure(failed, total, go_on=on_error == "skip"))
    for item in failed:
        say(f"data: skipped {item.source}: {item.reason}")
    gathered = _Gathered(say)
    with Writer(cache) as writer:
        for result in _without_repetition(results, say):
            if isinstance(result, Reading):
                gathered.page(result)
            elif isinstance(result, RecordFiles) and (problem := gathered.records(result, writer, objective, go_on=on_error == "skip")):
                failed.append(problem)
        of_records = any(isinstance(result, RecordFiles) for result in results)
        if failed and of_records and (on_error == "fail" or not (gathered.documents or writer.count)):
            raise DataError(_failure(failed, total, go_on=on_error == "skip"))
        examples = writer.finish()
    gathered.tell(examples)
    skipped = tuple(Skipped(source=item.source, reason=item.reason, records=item.records) for item in failed)
    return Loaded(documents=tuple(gathered.documents.values()), skipped=skipped, examples=examples)


def to_jsonl(documents: Iterable[Document], path: str | Path) -> None:
    """Write one document a line in UTF-8, the whole file or nothing. Raises DataError when it cannot be written."""
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(document.model_dump_json().encode("utf-8") + b"\n" for document in documents)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as exc:
        raise DataError(f"{path} cannot be written ({exc.strerror}); check the folder, its permissions and the space left") from exc


def from_jsonl(path: str | Path) -> tuple[Document, ...]:
    """The documents of a file of `to_jsonl`. Raises DataError naming the file and the line of the first broken one."""
    path, documents = Path(path), list[Document]()
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines(): a text may hold other line separators
    except OSError as exc:
        raise DataError(f"{path} cannot be read ({exc.strerror}); make it again with trimtab.data.load") from exc
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            documents.append(Document.model_validate_json(line))
        except ValidationError as exc:
            problem = exc.errors(include_url=False, include_input=False)[0]
            what = ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
            raise DataError(f"{path}, line {number}: {what}; correct it, or make the file again with trimtab.data.load") from exc
    return tuple(documents)


def _without_repetition(results: Sequence[Result], say: Callable[[str], None]) -> list[Result]:
    """The results, pages without the lines that most pages of their site begin or end with."""
    sites: dict[str, list[tuple[int, Reading]]] = defaultdict(list)
    for number, result in enumerate(results):
        if isinstance(result, Reading):
            sites[result.source.site].append((number, result))
    out = list(results)
    for site, readings in sites.items():
        pages, fewer = without_repeated_edges([reading.lines for _, reading in readings])
        for (number, reading), lines in zip(readings, pages, strict=True):
            out[number] = replace(reading, lines=lines)
        if fewer:
            where = site if readings[0][1].source.url else "the folder"
            say(f"data: left out {fewer} lines that most pages of {where} begin or end with, but for their first occurrence")
    return out


class _Gathered:
    """The documents so far, by their id: one for each text. The `_kept` are those of pages."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.documents: dict[str, Document] = {}
        self._say = say
        self._pages = self._kept = self._page_words = self._shown_words = 0
        self._now = datetime.now(UTC).isoformat(timespec="seconds")

    def page(self, reading: Reading) -> None:
        text = "\n".join(reading.lines)
        key = text_id(text)
        self._shown_words += reading.page_words
        self._pages += 1
        if not text:
            self._say(f"data: {reading.source.name} has no text of its own, only what most pages of its site repeat; left out")
        elif key in self.documents:
            self._say(f"data: {reading.source.name} has the same text as {self.documents[key].source}; kept once")
        else:
            self._kept += 1
            self._page_words += words(text)
            self.documents[key] = Document(
                id=key, source=reading.source.name, title=reading.title, text=text, sha256=reading.sha256, fetched_at=reading.fetched_at
            )

    def text(self, title: str, text: str, source: str) -> bool:
        """Take a record of running text; False when there is the same text already."""
        sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        key = sha256[:16]
        if key in self.documents:
            return False
        self.documents[key] = Document(id=key, source=source, title=title, text=text, sha256=sha256, fetched_at=self._now)
        return True

    def records(self, files: RecordFiles, writer: Writer, objective: str, *, go_on: bool) -> Refused | None:
        """Read a source of records, and say what its files hold; what is broken in it, if anything."""
        told = collect(files.parts, writer, self.text, go_on=go_on, say=self._say)
        for line in told.lines(files.source.name, objective):
            self._say(f"data: {line}")
        problem = told.problem(go_on=go_on)
        broken = told.counted(go_on=go_on)
        if problem and go_on:
            self._say(
                f"data: {files.source.name}: {broken} skipped: {problem}" if broken else f"data: skipped {files.source.name}: {problem}"
            )
        return Refused(files.source.name, problem, broken) if problem else None

    def tell(self, examples: Examples | None) -> None:
        if self._pages:
            self._say(
                f"data: {counted(self._kept, 'document')} with {counted(self._page_words, 'word')} of main text; "
                f"the pages show {counted(self._shown_words, 'word')}"
            )
        if examples:
            forms = ", ".join(f"{count:,} {form}" for form, count in examples.forms.items())
            self._say(f"data: {counted(examples.count, 'example')} ({forms})")


def _failure(failed: Sequence[Refused], total: int, *, go_on: bool) -> str:
    """What to say of a load that failed, with what to do; `go_on`: though what is broken was to be skipped."""
    partly = any(item.records for item in failed)
    listed = [f"  {item.source}: {_cannot(item) if total > 1 else ''}{item.reason}" for item in failed[:_NAMED_AT_MOST]]
    if len(failed) > _NAMED_AT_MOST:
        listed.append(f"  and {len(failed) - _NAMED_AT_MOST} more")
    if total == 1:
        head = f"{failed[0].records} cannot be read:" if partly else "the source could not be read:"
    elif len(failed) == total and not partly:
        head = f"none of the {total} sources could be read:"
    else:
        head = f"{len(failed)} of {total} sources could not be read{' whole' if partly else ''}:"
    if go_on or (len(failed) == total and not partly):
        advice = "Correct what was passed and try again."
    else:
        advice = 'Correct what is broken, or go on without it: --on-error skip (on_error="skip").'
    return "\n".join([head, *listed, advice])


def _cannot(item: Refused) -> str:
    return f"{item.records} cannot be read:{'' if item.reason.startswith(chr(10)) else ' '}" if item.records else ""
