"""Files of records, one record at a time: JSON lines, a JSON list, csv and tsv, each also gzipped; arrow.py adds parquet.

A file is never held whole, but for .json, whose brackets close at its end. A record that is broken does not end the reading: it is
given as `Broken` in its place, with the line where it begins.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from trimtab.data.forms import KNOWN
from trimtab.data.parts import LONGEST, Broken, Counted, Numbered, Part, too_large
from trimtab.errors import DataError

_NUL = "it holds NUL bytes, as a file has that was not written to its end; remove the line or write the file again"
_DIGITS = 4000  # of a whole number: Python converts no more than 4,300
LARGEST_JSON = 500_000_000  # bytes of a .json file, which is held in memory


def read(part: Part) -> Iterator[Numbered]:
    """The records of a file, in order. What the file itself cannot give is a `Broken` too, the last one.

    Raises DataError when the package that reads it is missing, and only then.
    """
    if part.kind in ("parquet", "arrow"):
        from trimtab.data.arrow import rows

        yield from rows(part)
        return
    number = 0
    try:
        with _opened(part) as file:
            records = {"jsonl": _json_lines, "json": _json, "csv": _table, "tsv": _table}[part.kind](file, part)
            for number, record in records:
                yield number, record
    except DataError as exc:
        yield 1, Broken(str(exc), last=True)
    except (EOFError, zlib.error):
        yield number + 1, Broken("the gzip file is cut short or damaged from here on; copy it again", last=True)
    except gzip.BadGzipFile as exc:
        yield number + 1, Broken(f"the gzip file is damaged from here on ({exc}); copy it again", last=True)
    except OSError as exc:
        yield number + 1, Broken(f"it cannot be read ({exc.strerror or exc}); check its permissions and the disk", last=True)


def _opened(part: Part) -> io.BufferedIOBase:
    """The file's bytes, unpacked where they begin like gzip, whatever the name says."""
    if part.body is not None:
        packed = part.body.startswith(b"\x1f\x8b")
        body = gzip.GzipFile(fileobj=io.BytesIO(part.body)) if packed else io.BytesIO(part.body)
        return _bounded(body, part) if packed and part.at_most is not None else body
    assert part.path is not None
    file = part.path.open("rb")
    head = file.read(2)
    file.seek(0)
    return _Unpacked(file) if head == b"\x1f\x8b" else file


class _Unpacked(gzip.GzipFile):
    """A gzip file that closes what it reads from."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._packed = file
        super().__init__(fileobj=file)

    def close(self) -> None:
        super().close()
        self._packed.close()


def _bounded(body: io.BufferedIOBase, part: Part) -> io.BufferedIOBase:
    """What a fetched gzip file unpacks to, if that is not more than a page may be."""
    assert part.at_most is not None
    unpacked = body.read(part.at_most + 1)
    if len(unpacked) > part.at_most:
        raise DataError(too_large(part.at_most))
    return io.BytesIO(unpacked)


def _lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without a byte order mark. A longer line than LONGEST comes in pieces of that length."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), start=1):
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _wide(head: bytes) -> str | None:
    """Why a file that begins so is no UTF-8, or None."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head[:64].count(0) * 3 > len(head[:64]) > 3):
        return "it is UTF-16 or UTF-32, not UTF-8; write it again as UTF-8, for example with  iconv -f UTF-16 -t UTF-8 IN > OUT"
    return None


def _decoded(line: bytes) -> str:
    """Raises ValueError with what is wrong."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(
            f"it is not UTF-8 (byte 0x{line[exc.start]:02x} at position {exc.start + 1}); write the file again as UTF-8"
        ) from exc


def _json_lines(file: io.BufferedIOBase, part: Part) -> Iterator[Numbered]:
    for number, line in _lines(file):
        if number == 1 and (wide := _wide(line)):
            yield 1, Broken(wide, last=True)
            return
        if len(line) > LONGEST:
            yield number, Broken(f"the line is longer than {LONGEST:,} bytes; write one record a line", last=True)
            return
        if not line or line.isspace():
            continue
        yield number, _record(line.rstrip(b"\r\n"), number)


def _record(line: bytes, number: int) -> dict[str, Any] | Broken:
    try:
        value = parsed(_decoded(line))
    except ValueError as exc:
        if number == 1 and line.strip() in (b"[", b"{"):
            return Broken("the file is one JSON value over many lines; name it .json, or write one record a line", last=True)
        if b"\0" in line:
            return Broken(_NUL)
        return Broken(str(exc))
    if isinstance(value, dict):
        return value
    if number == 1 and isinstance(value, list):
        return Broken("it is a JSON list; name the file .json, or write one record a line", last=True)
    return Broken("it is no object; write each record as an object, {...}")


def parsed(text: str) -> Any:
    """A JSON text, strictly: no name twice in an object, no NaN, no Infinity. Raises ValueError with what is wrong and what to do."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise ValueError(_no_json(exc)) from exc
    except RecursionError as exc:
        raise ValueError("it is nested too deeply to be read; flatten it, or remove the record") from exc


def _no_json(exc: json.JSONDecodeError) -> str:
    where = f"column {exc.colno}" if "\n" not in exc.doc.strip() else f"line {exc.lineno}, column {exc.colno}"
    return f"it is not JSON ({exc.msg[:1].lower()}{exc.msg[1:]} at {where}); correct it, or remove the record"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = str(_repeated(name for name, _ in pairs))
        raise ValueError(f"{twice[:40]!r} is there twice in one object; keep one of them")
    return found


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null, or a text")


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits; write it as a text")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_int)


def _json(file: io.BufferedIOBase, part: Part) -> Iterator[Numbered]:
    """A list of records; one object with such a list, or with columns; or, as many .json files are, one record a line."""
    body = file.read(LARGEST_JSON + 1)
    if len(body) > LARGEST_JSON:
        yield 1, Broken(f"a .json file is read whole, and this is larger than {LARGEST_JSON:,} bytes; write it as .jsonl", last=True)
        return
    if wide := _wide(body):
        yield 1, Broken(wide, last=True)
        return
    body = body.removeprefix(b"\xef\xbb\xbf")
    start = body.lstrip()[:1]
    try:
        if start == b"[":
            yield from _list(_decoded(body))
        elif start == b"{" and not _is_lines(body):
            yield from _object(parsed(_decoded(body)))
        elif start:
            yield from _json_lines(io.BytesIO(body), part)
    except ValueError as exc:
        yield 1, Broken(str(exc), last=True)


def _is_lines(body: bytes) -> bool:
    """Whether the first line is a whole object and another follows."""
    first, _, rest = body.lstrip().partition(b"\n")
    if not rest.lstrip().startswith(b"{"):
        return False
    try:
        parsed(first.decode("utf-8", errors="replace"))
    except ValueError:
        return False
    return True


def _list(text: str) -> Iterator[Numbered]:
    """The elements of a JSON list one after another, each with the line where it begins."""
    at = text.index("[") + 1
    line, counted, first = 1, 0, True
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and first:
            end = at
            break
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as exc:
            yield exc.lineno, Broken(f"it is not JSON ({exc.msg[:1].lower()}{exc.msg[1:]} at column {exc.colno}); correct it", last=True)
            return
        except (ValueError, RecursionError) as exc:
            reason = "it is nested too deeply to be read; flatten it" if isinstance(exc, RecursionError) else str(exc)
            yield line, Broken(reason, last=True)
            return
        yield line, value if isinstance(value, dict) else Broken("it is no object; write each record as an object, {...}")
        first = False
        end = at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line += text.count("\n", counted, at)
            yield line, Broken("after this record there is neither a comma nor the list's end; correct the file", last=True)
            return
        at += 1
    if text[end + 1 :].strip():
        yield line + text.count("\n", counted, end), Broken("the list ends here and more follows; correct the file", last=True)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _object(value: Any) -> Iterator[Numbered]:
    """The records of an object: the one list of objects in it, such as `data`, or columns of one length. They are counted; they have
    no lines of their own."""
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if lists and not KNOWN & {name.lower() for name in value}:
        if len(lists) > 1:
            yield 1, Broken(f"it has several lists of records ({', '.join(lists)}); keep one in a file", last=True)
            return
        for number, row in enumerate(value[lists[0]], start=1):
            yield Counted(number), row if isinstance(row, dict) else Broken("it is no object; write each record as an object, {...}")
        return
    columns = {name: _column(column) for name, column in value.items()}
    lengths = {len(column) for column in columns.values() if column is not None}
    if None in columns.values() or not columns:
        yield 1, value  # one record
    elif len(lengths) > 1:
        yield (
            1,
            Broken(f"its columns are of different lengths ({', '.join(map(str, sorted(lengths)))}); write a list of objects", last=True),
        )
    else:
        for number, row in enumerate(zip(*(column or [] for column in columns.values()), strict=True), start=1):
            yield Counted(number), dict(zip(columns, row, strict=True))


def _column(value: Any) -> list[Any] | None:
    """A column as a list, or as pandas writes it, an object of values by row number. A list of turns is a value, not a column."""
    if isinstance(value, list):
        turns = bool(value) and all(isinstance(item, dict) and ({"role", "from"} & set(item)) for item in value)
        return None if turns else value
    return list(value.values()) if isinstance(value, dict) and value and all(key.isdigit() for key in value) else None


def _table(file: io.BufferedIOBase, part: Part) -> Iterator[Numbered]:
    """Rows below a line of column names. A quoted field may hold line breaks; a row's number is the line where it begins."""
    csv.field_size_limit(LONGEST)
    feed = _Feed(file)
    first = feed.peek()
    if wide := _wide(first):
        yield 1, Broken(wide, last=True)
        return
    rows = csv.reader(feed, delimiter="\t" if part.kind == "tsv" else _delimiter(first), strict=True)
    header: list[str] | None = None
    while True:
        begins = feed.number + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as exc:
            yield begins, Broken(_no_row(exc), last=True)
            return
        if feed.problem:
            (number, reason), feed.problem = feed.problem, None
            yield number, Broken(reason, last=header is None)
            if header is None:
                return
            continue
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if (twice := _repeated(header)) is not None:
                yield begins, Broken(f"the column name {twice[:40]!r} is there twice; rename one", last=True)
                return
        elif len(row) != len(header):
            yield (
                begins,
                Broken(f"the row has {len(row)} fields and the first line names {len(header)}; quote fields that hold the separator"),
            )
        else:
            yield begins, {name or "(no name)": value for name, value in zip(header, row, strict=True)}


class _Feed:
    """The lines of a table as text. Of one that cannot be decoded the `problem` is kept, its number and what is wrong, and it is given all
    the same: it may stand inside a quoted field, whose other lines are no rows of their own."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._lines = _lines(file)
        self._first: bytes | None = None
        self.number = 0
        self.problem: tuple[int, str] | None = None

    def peek(self) -> bytes:
        self._first = next(self._lines, (0, b""))[1]
        return self._first

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line, self._first = self._first, None
        if line is None:
            _, line = next(self._lines)
        elif not line:
            raise StopIteration
        self.number += 1
        if b"\0" in line:
            self.problem = self.problem or (self.number, _NUL)
            line = line.replace(b"\0", b"?")
        try:
            return _decoded(line)
        except ValueError as exc:
            self.problem = self.problem or (self.number, str(exc))
            return line.decode("utf-8", errors="replace")


def _no_row(exc: csv.Error) -> str:
    if "new-line character" in str(exc):  # outside quotes, without the \n that ends a line
        return "its lines end with \\r alone, as old Macs wrote them; save it with line ends LF (\\n)"
    return f"the row that begins here cannot be read ({exc}); look for a quote that is not closed"


def _delimiter(first: bytes) -> str:
    """What separates the column names: a comma, or the semicolon or tab that some spreadsheets write."""
    return max(",;\t", key=lambda mark: first.count(mark.encode()))
