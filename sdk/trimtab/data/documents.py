"""The way from what the user passes to clean documents, and the file that holds them.

sources.py    addresses, files, folders -> a list of pages to read
reading.py    each of them read, several at once
fetch.py      one page from the network (addresses.py, limits.py, loader.py)
decode.py     bytes -> text
extract.py    HTML -> title and lines of the main text (markup.py, tables.py); plain.py the same for text and Markdown
clean.py      white space, what a site repeats on every page
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.data.clean import without_repeated_edges, words
from trimtab.data.limits import FetchLimits
from trimtab.data.reading import Reading, read_all
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
    """A source without a document, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reason: str


class Loaded(BaseModel):
    """What `load` read, in the order of the sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def text_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def load(
    sources: str | Path | Sequence[str | Path],
    *,
    on_error: Literal["fail", "skip"] = "fail",
    allow_private_hosts: bool = False,
    proxies_from_environment: bool = False,
    limits: FetchLimits = _LIMITS,
    say: Callable[[str], None] = print,
) -> Loaded:
    """The documents behind `sources`: http and https addresses, .html, .htm, .txt and .md files, folders of them.

    Pages are fetched in parallel, `limits.per_host` at a time from one host; the order stays. A source read twice, or whose text
    another one already has, is kept once. `allow_private_hosts` permits addresses that are not public, as of this machine.
    `proxies_from_environment` goes through the proxy that HTTPS_PROXY and the like name, which then resolves the names.

    Raises DataError naming every source that failed and why; with `on_error="skip"` only when no document is left.
    """
    expanded = expand(sources)
    total = len(expanded.sources) + len(expanded.refused)
    if not total:
        raise DataError("no data was given; pass at least one address, file or folder")
    for note in expanded.notes:
        say(f"data: {note}")
    results = read_all(
        expanded.sources,
        limits,
        allow_private_hosts=allow_private_hosts,
        proxies_from_environment=proxies_from_environment,
        say=say,
    )
    failed = [*expanded.refused, *(result for result in results if isinstance(result, Refused))]
    if failed and (on_error == "fail" or len(failed) == total):
        raise DataError(_failure(failed, total))
    for item in failed:
        say(f"data: skipped {item.source}: {item.reason}")
    readings = [result for result in results if isinstance(result, Reading)]
    documents = _documents(_without_repetition(readings, say), say)
    kept, shown = sum(words(document.text) for document in documents), sum(reading.page_words for reading in readings)
    noun = "document" if len(documents) == 1 else "documents"
    say(f"data: {len(documents):,} {noun} with {kept:,} words of main text; the pages show {shown:,} words")
    return Loaded(documents=tuple(documents), skipped=tuple(Skipped(source=item.source, reason=item.reason) for item in failed))


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


def _without_repetition(readings: Sequence[Reading], say: Callable[[str], None]) -> list[Reading]:
    """The readings without the lines that most pages of their site begin or end with."""
    sites: dict[str, list[int]] = defaultdict(list)
    for number, reading in enumerate(readings):
        sites[reading.source.site].append(number)
    out = list(readings)
    for site, numbers in sites.items():
        pages, fewer = without_repeated_edges([readings[number].lines for number in numbers])
        for number, lines in zip(numbers, pages, strict=True):
            out[number] = replace(readings[number], lines=lines)
        if fewer:
            where = site if readings[numbers[0]].source.url else "the folder"
            say(f"data: left out {fewer} lines that most pages of {where} begin or end with, but for their first occurrence")
    return out


def _documents(readings: Sequence[Reading], say: Callable[[str], None]) -> list[Document]:
    """One document for each text."""
    documents: dict[str, Document] = {}
    for reading in readings:
        text = "\n".join(reading.lines)
        key = text_id(text)
        if not text:
            say(f"data: {reading.source.name} has no text of its own, only what most pages of its site repeat; left out")
        elif key in documents:
            say(f"data: {reading.source.name} has the same text as {documents[key].source}; kept once")
        else:
            documents[key] = Document(
                id=key, source=reading.source.name, title=reading.title, text=text, sha256=reading.sha256, fetched_at=reading.fetched_at
            )
    return list(documents.values())


def _failure(failed: Sequence[Refused], total: int) -> str:
    listed = [f"  {item.source}: {item.reason}" for item in failed[:_NAMED_AT_MOST]]
    if len(failed) > _NAMED_AT_MOST:
        listed.append(f"  and {len(failed) - _NAMED_AT_MOST} more")
    if len(failed) == total:
        head = f"none of the {total} sources could be read:" if total > 1 else "the source could not be read:"
        advice = "Correct what was passed and try again."
    else:
        head = f"{len(failed)} of {total} sources could not be read:"
        advice = 'Correct them, or go on without them with on_error="skip".'
    return "\n".join([head, *listed, advice])
