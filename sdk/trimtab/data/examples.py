"""Records to examples: a file with one canonical object a line, each example once, written while the sources are read.

The forms and their columns are in forms.py. A record of running text becomes no example but a document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import BaseModel, ConfigDict, Field

from trimtab import half_made
from trimtab.cache import prune
from trimtab.counting import counted
from trimtab.data.forms import Canonical, canonical, learned
from trimtab.data.parts import Broken, Part, places
from trimtab.data.records import read
from trimtab.data.turns import FormError
from trimtab.errors import DataError

NAMED = 5  # broken records of a file that are named; a file with more is not read on where it would fail anyway
_STALE_S = 24 * 3600.0  # after which a half-made folder without a lock has no maker any more
_TELL_EVERY_S = 5.0
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Examples(BaseModel):
    """Training examples in a file, one JSON object a line, in the order of the sources.

    `digest` is of their contents in order, without where they came from. `path` belongs to a cache and is never changed; after a day it
    may go, when such files take too much of the disk (`cache.prune`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    count: int = Field(gt=0)
    forms: dict[str, int]  # completion, chat, guanaco: how many of each
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass
class Told:
    """What is to be said of a source, gathered over its files."""

    shapes: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)  # by the form's name and the columns read
    left_out: dict[str, None] = field(default_factory=dict)
    read: int = 0
    again: int = 0  # the same as one before
    first_again: str = ""
    broken_count: int = 0
    broken: list[str] = field(default_factory=list)  # what is wrong, each with the places of the first that have it

    def lines(self, name: str, objective: str) -> list[str]:
        found = [
            f"{name}: {counted(count, 'record')} with {', '.join(used)}: {form}; {learned(form, objective)}"
            for (form, used), count in self.shapes.items()
        ]
        if self.left_out:
            found.append(f"{name}: left out, because no form reads them there: {_listed(list(self.left_out))}")
        if self.again:
            again = counted(self.again, "record is", "records are")
            found.append(f"{name}: {again} the same as one before (the first: {self.first_again}); each is kept once")
        return found

    def problem(self, *, go_on: bool) -> str:
        """What is broken; "" when nothing is. With `go_on` the broken records were left out and counted."""
        if not self.read:
            return "it holds no records"
        found = list(self.broken)
        if self.broken_count > NAMED:
            found.append(f"and {self.broken_count - NAMED:,} more of {self.read:,} records")
        elif self.broken_count == NAMED and not go_on:
            found.append("what comes after these was not looked at")
        return found[0] if len(found) == 1 else "\n    ".join(["", *found]) if found else ""

    def counted(self, *, go_on: bool) -> str:
        """How many records are broken, where others are not: "2 of 15 records"; else ""."""
        if not self.broken_count or not self.shapes:
            return ""
        stopped = self.broken_count >= NAMED and not go_on
        return f"{self.broken_count:,} of {'the first ' if stopped else ''}{self.read:,} records"


class Writer:
    """Writes the examples of several files into one, in a folder of the cache; `finish` gives it its lasting name."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "examples"
        self._making = contextlib.ExitStack()
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
        self._making.close()

    @property
    def count(self) -> int:
        return self._forms.total()

    def add(self, content: dict[str, object], source: str) -> bool:
        """Write one example; False for one that is there already. Raises FormError for a text that cannot be written."""
        line = encoded(content)
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
            Path(self._file.name).replace(path)
            prune(self._folder)
        except OSError as exc:
            raise self._no_room(exc) from exc
        return Examples(path=path, count=self._forms.total(), forms=dict(sorted(self._forms.items())), digest=digest)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            making = self._making.enter_context(half_made.making(self._folder, ".examples.", stale=_STALE_S))
            self._file = (making / "examples.jsonl").open("wb")
        return self._file

    def _no_room(self, exc: OSError) -> DataError:
        return DataError(
            f"the examples cannot be kept in {self._folder} ({exc.strerror or exc}); "
            "make room there, or set TRIMTAB_CACHE to another folder"
        )


def encoded(content: dict[str, object]) -> bytes:
    """One line of JSON. Raises FormError for what UTF-8 or JSON cannot hold."""
    try:
        return _ENCODE(content).encode("utf-8")
    except UnicodeEncodeError as exc:
        raise FormError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; correct it") from exc
    except (RecursionError, TypeError, ValueError) as exc:
        raise FormError("it holds what JSON cannot, such as an infinite number, or is nested too deeply; correct it") from exc


def collect(
    parts: Sequence[Part], writer: Writer, add_text: Callable[[str, str, str], bool], *, go_on: bool, say: Callable[[str], None]
) -> Told:
    """Read a source's files: examples to `writer`, running text to `add_text` (title, text, source; False: it is there already).

    A broken record is left out. Where that fails the load anyway (not `go_on`), the reading ends after NAMED of them. `say` hears how
    far a long reading is. Raises DataError when a package is missing or the disk is full.
    """
    told, spoke = Told(), time.monotonic()
    for part in parts:
        broken: dict[str, list[int]] = {}
        shown = f"{part.name}, " if len(parts) > 1 else ""
        for number, record, why in _canonical(part):
            told.read += 1
            if told.read % 4096 == 0 and time.monotonic() - spoke > _TELL_EVERY_S:
                spoke = time.monotonic()
                say(f"data: {told.read:,} records of {part.name} read")
            try:
                if record is None:
                    raise FormError(why)
                new = _add(record, writer, add_text, f"{part.name}:{number}")
            except FormError as exc:
                told.broken_count += 1
                if told.broken_count <= NAMED:
                    broken.setdefault(str(exc), []).append(number)
                if told.broken_count == NAMED and not go_on:
                    break
                continue
            if not new:
                told.again, told.first_again = told.again + 1, told.first_again or shown + places(part, [number])
            told.shapes[record.name, record.used] += 1
            if record.left_out:
                told.left_out |= dict.fromkeys(record.left_out)
        told.broken += [f"{shown}{places(part, numbers)}: {reason}" for reason, numbers in broken.items()]
        if told.broken_count >= NAMED and not go_on:
            break
    return told


def _add(record: Canonical, writer: Writer, add_text: Callable[[str, str, str], bool], source: str) -> bool:
    if record.content["form"] != "text":
        return writer.add(record.content, source)
    encoded(record.content)
    return add_text(record.content["title"], record.content["text"], source)


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


def _listed(names: list[str]) -> str:
    shown = [name if len(name) <= 40 else name[:40] + "…" for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
