"""Records to examples: a file with one canonical object a line, each example once, written while the sources are read.

The forms and their columns are in forms.py. A record of running text becomes no example but a document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import BaseModel, ConfigDict, Field

from trimtab.data.forms import Canonical, canonical, learned
from trimtab.data.parts import Broken, Part, places
from trimtab.data.records import read
from trimtab.data.turns import FormError
from trimtab.errors import DataError

NAMED = 5  # broken records of a file that are named; a file with more is not read on where it would fail anyway
_STALE_S = 24 * 3600.0  # after which a half-written file has no writer any more
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Examples(BaseModel):
    """Training examples in a file, one JSON object a line, in the order of the sources.

    `digest` is of their contents in order, without where they came from. `path` belongs to a cache and is never changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    count: int = Field(gt=0)
    forms: dict[str, int]  # completion, chat, guanaco: how many of each
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class Told(BaseModel):
    """What is said of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lines: tuple[str, ...]
    broken: tuple[str, ...]  # what is wrong, each with the places of the first that have it
    broken_count: int
    read: int


class Writer:
    """Writes the examples of several files into one, in a folder of the cache; `finish` gives it its lasting name."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "examples"
        self._making = self._folder
        self._file: IO[bytes] | None = None
        self._seen: set[bytes] = set()
        self._digest = hashlib.sha256()
        self._forms: Counter[str] = Counter()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is left to write has no room either
                self._file.close()
            self._making.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        return self._forms.total()

    def add(self, content: dict[str, object], source: str) -> bool:
        """Write one example; False for one that is there already. Raises FormError for a text that cannot be written."""
        line = _encoded(content)
        key = hashlib.blake2b(line, digest_size=16).digest()
        if key in self._seen:
            return False
        self._seen.add(key)
        self._digest.update(key)
        self._forms[str(content["form"])] += 1
        try:
            self._opened().write(line[:-1] + b',"source":' + _ENCODE(source).encode("utf-8", "replace") + b"}\n")
        except OSError as exc:
            raise self._no_room(exc) from exc
        return True

    def finish(self) -> Examples | None:
        """The examples under their digest; None when there are none. Raises DataError when they cannot be kept."""
        if self._file is None:
            return None
        digest = self._digest.hexdigest()
        path = self._folder / f"{digest}.jsonl"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._making.chmod(0o644)
            self._making.replace(path)
        except OSError as exc:
            raise self._no_room(exc) from exc
        return Examples(path=path, count=self._forms.total(), forms=dict(sorted(self._forms.items())), digest=digest)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".examples.*"):  # of a client that was killed
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - leftover.stat().st_mtime > _STALE_S:
                        leftover.unlink()
            descriptor, name = tempfile.mkstemp(dir=self._folder, prefix=".examples.")
            self._making, self._file = Path(name), os.fdopen(descriptor, "wb")
        return self._file

    def _no_room(self, exc: OSError) -> DataError:
        return DataError(
            f"the examples cannot be kept in {self._folder} ({exc.strerror or exc}); "
            "make room there, or set TRIMTAB_CACHE to another folder"
        )


def _encoded(content: dict[str, object]) -> bytes:
    try:
        return _ENCODE(content).encode("utf-8")
    except UnicodeEncodeError as exc:
        raise FormError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; correct it") from exc
    except (RecursionError, TypeError) as exc:
        raise FormError("it holds what is no text, or is nested too deeply; correct it, or remove the record") from exc


def collect(part: Part, writer: Writer, add_text: Callable[[str, str, str], bool], *, objective: str, go_on: bool) -> Told:
    """Read one file: examples to `writer`, running text to `add_text` (title, text, source; False: it is there already).

    A broken record is left out. Where that fails the load anyway (not `go_on`), the reading ends after NAMED of them.
    Raises DataError when a package is missing or the disk is full.
    """
    shapes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    left_out: dict[str, None] = {}
    broken: dict[str, list[int]] = {}
    broken_count = total = again = 0
    first_again = ""
    for number, record, why in _canonical(part):
        total += 1
        source = f"{part.name}:{number}"
        try:
            if record is None:
                raise FormError(why)
            text = record.content["form"] == "text"
            if text:
                _encoded(record.content)
                new = add_text(str(record.content["title"]), str(record.content["text"]), source)
            else:
                new = writer.add(record.content, source)
        except FormError as exc:
            broken_count += 1
            if broken_count <= NAMED:
                broken.setdefault(str(exc), []).append(number)
            if broken_count == NAMED and not go_on:
                break
            continue
        if not new:
            again, first_again = again + 1, first_again or places(part, [number])
        shapes[record.name, record.used] += 1
        left_out |= dict.fromkeys(record.left_out)
    lines = [f"{part.name}: {_shape_line(name, used, count, objective)}" for (name, used), count in shapes.items()]
    if left_out:
        lines.append(f"{part.name}: left out, because no form reads them there: {_listed(list(left_out))}")
    if again:
        lines.append(f"{part.name}: {again:,} {_noun(again)} the same as one before (the first: {first_again}); each is kept once")
    named = tuple(f"{places(part, numbers)}: {reason}" for reason, numbers in broken.items())
    return Told(lines=tuple(lines), broken=named, broken_count=broken_count, read=total)


def _canonical(part: Part) -> Iterator[tuple[int, Canonical | None, str]]:
    """Each record in canonical form, or why it has none."""
    for number, record in read(part):
        if isinstance(record, Broken):
            yield number, None, record.reason
            continue
        try:
            found = canonical(record)
        except FormError as exc:
            yield number, None, str(exc)
        else:
            yield number, found, ""


def _shape_line(name: str, used: tuple[str, ...], count: int, objective: str) -> str:
    return f"{count:,} {'record' if count == 1 else 'records'} with {', '.join(used)}: {name}; {learned(name, objective)}"


def _noun(count: int) -> str:
    return "record is" if count == 1 else "records are"


def _listed(names: list[str]) -> str:
    shown = [name if len(name) <= 40 else name[:40] + "…" for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
