"""White space and lines. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

# Invisible in a browser, noise in a token: soft hyphen, zero-width characters (the joiners stay, scripts need them), marks of direction.
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
# Signs that are no letters, in which longer runs of combining marks than any language has may hide.
_SIGNS = re.compile("[^\\w\\s\x00-\u02ff]{31,}")
_MARKS_AT_MOST = 30  # in a row; to put more in order takes the time of their number's square
_JOINER = "\u034f"  # combining grapheme joiner: invisible, and marks are not put in order across it
# Control characters but for those that str.split() takes as white space; lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def collapse(text: str) -> str:
    """One line: every run of white space (line breaks and no-break spaces included) is one blank, Unicode form NFC."""
    return " ".join(unicodedata.normalize("NFC", stream_safe(_CONTROL.sub("", text.translate(_INVISIBLE)))).split())


def stream_safe(text: str) -> str:
    """`text`, whose combining marks can be put in order (NFC) in bearable time: "Stream-Safe Text Format", UAX #15."""
    return text if text.isascii() else _SIGNS.sub(_in_short_runs, text)


def _in_short_runs(signs: re.Match[str]) -> str:
    """The signs with a joiner wherever too many combining marks follow one another."""
    out: list[str] = []
    run = 0
    for char in signs[0]:
        marks = len(unicodedata.normalize("NFD", char)) if unicodedata.combining(char) else 0  # one may stand for two
        run = run + marks if marks else 0
        if run > _MARKS_AT_MOST:
            out.append(_JOINER)
            run = marks
        out.append(char)
    return "".join(out)


def paragraphs(lines: Iterable[str]) -> tuple[str, ...]:
    """Collapsed lines; those without a letter or a digit (rules, bullets, arrows) are dropped."""
    return tuple(line for line in map(collapse, lines) if any(char.isalnum() for char in line))


def words(text: str) -> int:
    """White-space separated words; text written without blanks counts half a word for each character."""
    unspaced = sum(1 for char in text if "\u3040" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff")
    return len(text.split()) if unspaced * 4 < len(text) else unspaced // 2


_SITE_PAGES = 4  # fewer pages say nothing about what a site repeats
_SITE_SHARE = 0.6  # of a site's pages


def without_repeated_edges(pages: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], int]:
    """The pages of one site without the lines at their start and end that most of them share: menus and legal text that no
    element or class name gave away. Such a line stays on the first page that has it, so that nothing is lost.

    Returns the pages in order and how many lines were left out.
    """
    on = Counter(line for lines in pages for line in set(lines))
    repeated = {line for line, count in on.items() if count >= max(_SITE_PAGES, _SITE_SHARE * len(pages))}
    seen: set[str] = set()
    out = []
    for lines in pages:
        again = [line in repeated and line in seen for line in lines]
        shared = [line in repeated for line in lines]
        start = shared.index(False) if False in shared else len(lines)
        end = len(lines) - (shared[::-1].index(False) if False in shared else 0)
        out.append(tuple(line for i, line in enumerate(lines) if start <= i < end or not again[i]))
        seen.update(lines)
    return out, sum(map(len, pages)) - sum(map(len, out))
