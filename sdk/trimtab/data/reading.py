"""Sources to pages: each fetched or opened, decoded and reduced to its main text, several at once. Of a source of records its files
are found, or fetched; they are read later (examples.py), in order and a record at a time."""

from __future__ import annotations

import hashlib
import importlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from trimtab.data.clean import words
from trimtab.data.decode import decode
from trimtab.data.limits import FetchLimits
from trimtab.data.parts import RECORD_TYPES, Part
from trimtab.data.plain import markdown, text_lines
from trimtab.data.sources import FILE_KINDS, Refused, Source
from trimtab.errors import DataError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

_TELL_EVERY_S = 5.0


@dataclass(frozen=True)
class Reading:
    """A source as title and lines, not yet compared with the others."""

    source: Source
    title: str
    lines: tuple[str, ...]
    page_words: int  # in the whole page, menus included
    sha256: str  # of the bytes
    fetched_at: str


@dataclass(frozen=True)
class RecordFiles:
    """A source of records as its files."""

    source: Source
    parts: tuple[Part, ...]


Result = Reading | RecordFiles | Refused


@dataclass(frozen=True)
class Asking:
    """How a hub of datasets is asked: what a name meant is noted in `cache`; `token` and `offline` as for `weights.resolve`."""

    cache: Path
    token: str | None = None
    offline: bool = False


def read_all(
    sources: Sequence[Source],
    limits: FetchLimits,
    *,
    allow_private_hosts: bool,
    proxies_from_environment: bool,
    asking: Asking,
    say: Callable[[str], None],
) -> list[Result]:
    """One result for each source, in order. Raises DataError when a package is missing, and only then."""
    if any(source.url or (not source.records and _kind(source) == "text/html") for source in sources):
        _needed("trimtab.data.extract")
    if any(source.url for source in sources):
        _needed("trimtab.data.fetch")  # here, before the threads: its import silences a warning, which holds for all threads

    def read(source: Source) -> Result:
        try:
            if source.url:
                return _page(source, limits, allow_private_hosts, proxies_from_environment)
            return _record_files(source, asking, say) if source.records else _file(source, limits)
        except DataError as exc:
            return Refused(source.name, str(exc))

    others = iter(_in_parallel([source for source in sources if source.records != "hub"], read, limits, say))
    # a large download in this thread, where an interrupt ends it
    return [read(source) if source.records == "hub" else next(others) for source in sources]


def _needed(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as exc:
        raise DataError(f"reading pages needs more packages ({exc}):  pip install 'trimtab[data]'") from exc


def _in_parallel(
    sources: Sequence[Source], read: Callable[[Source], Result], limits: FetchLimits, say: Callable[[str], None]
) -> list[Result]:
    """`read` of each source, `limits.per_host` at a time for one host and `limits.parallel` in all.

    Each host has a queue that at most `per_host` workers empty, so that a slow host never holds the workers of the others.
    """
    results: dict[int, Result] = {}
    queues: dict[str, deque[int]] = defaultdict(deque)
    for number, source in enumerate(sources):
        queues[source.site if source.url else ""].append(number)

    def empty(queue: deque[int]) -> None:
        while True:
            try:
                number = queue.popleft()
            except IndexError:
                return
            results[number] = read(sources[number])

    with ThreadPoolExecutor(max_workers=limits.parallel, thread_name_prefix="trimtab-data") as pool:
        try:
            pending = {pool.submit(empty, queue) for queue in queues.values() for _ in range(min(limits.per_host, len(queue)))}
            while pending:
                done, pending = wait(pending, timeout=_TELL_EVERY_S, return_when=FIRST_EXCEPTION)
                for task in done:
                    task.result()
                if pending:
                    say(f"data: {len(results)} of {len(sources)} sources read")
        except BaseException:  # an interrupt too: what is queued is not started, what is running ends at its time limit
            for queue in queues.values():
                queue.clear()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(sources))]


def _record_files(source: Source, asking: Asking, say: Callable[[str], None]) -> RecordFiles:
    """The files behind a source on this machine or on a hub. A file of records may be of any size."""
    from trimtab.data.datasets import from_hub, from_saved

    if source.records == "hub":
        return RecordFiles(source, from_hub(source.name, cache=asking.cache, token=asking.token, offline=asking.offline, say=say))
    assert source.path is not None
    if source.records == "saved":
        return RecordFiles(source, from_saved(source.path, source.name, say))
    return RecordFiles(source, (Part(source.name, str(source.records), path=source.path),))


def _page(source: Source, limits: FetchLimits, allow_private_hosts: bool, proxies_from_environment: bool) -> Reading | RecordFiles:
    from trimtab.data.fetch import fetch_page

    assert source.url is not None
    page = fetch_page(
        source.url,
        limits,
        allow_private_hosts=allow_private_hosts,
        proxies_from_environment=proxies_from_environment,
        records=source.records is not None,
    )
    if kind := source.records or RECORD_TYPES.get(page.media_type):
        return RecordFiles(source, (Part(source.name, kind, body=page.body, at_most=limits.max_bytes),))
    return _reading(source, page.body, page.text, page.media_type, page.tree)


def _file(source: Source, limits: FetchLimits) -> Reading:
    assert source.path is not None
    try:
        with source.path.open("rb") as file:
            body = file.read(limits.max_bytes + 1)
    except OSError as exc:
        raise DataError(f"it cannot be read ({exc.strerror}); check its permissions") from exc
    if len(body) > limits.max_bytes:
        raise DataError(f"it is larger than {limits.max_bytes:,} bytes; raise max_page_mb (--max-page-mb) if it is worth it")
    kind = _kind(source)
    return _reading(source, body, decode(body, markup=kind == "text/html").text, kind, None)


def _kind(source: Source) -> str:
    return FILE_KINDS[source.path.suffix.lower()] if source.path else ""


def _reading(source: Source, body: bytes, text: str, kind: str, tree: BeautifulSoup | None) -> Reading:
    """Raises DataError when there is no text."""
    if kind == "text/markdown":
        title, lines = markdown(text)
        page_words = sum(map(words, lines))
    elif kind == "text/plain":
        title, lines = "", text_lines(text)
        page_words = sum(map(words, lines))
    else:
        from trimtab.data.extract import extract

        extracted = extract(text, tree)
        title, lines, page_words = extracted.title, extracted.lines, extracted.page_words
    if not body.strip():
        raise DataError("it is empty")
    if not lines:
        raise DataError("it holds no text; if a browser shows some, a script writes it: save the page from the browser and pass the file")
    fetched_at = datetime.now(UTC).isoformat(timespec="seconds")
    return Reading(source, title or _stem(source), lines, page_words, hashlib.sha256(body).hexdigest(), fetched_at)


def _stem(source: Source) -> str:
    """A title for what has none: the last part of the path without its suffix."""
    last = unquote(urlsplit(source.name).path.rstrip("/").rpartition("/")[2]) if source.url else Path(source.name).name
    return Path(last).stem.replace("_", " ").replace("-", " ") or source.name
