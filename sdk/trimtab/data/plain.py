"""Plain text and Markdown to a title and paragraph lines. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trimtab.data.clean import paragraphs
from trimtab.data.tables import row_lines

_BULLET = re.compile(r"\s*(?:[-*+•‣◦]|\d{1,3}[.)])\s+(?=\S)")
_HEADING = re.compile(r"\s{0,3}#{1,6}\s(.*)")
_UNDERLINE = re.compile(r"\s{0,3}(?:=+|-{2,})\s*$")
_RULE = re.compile(r"\s{0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$")
_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
_DIVIDER = re.compile(r"\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?")  # of a line without white space around
_REFERENCE = re.compile(r"\s{0,3}\[[^\]]+\]:\s+\S+.*$")
# Between two lines "---", the first of which opens the file; without a "key:" under it that is a rule, and what follows is text.
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?=[\"'\w][^\n:]{0,80}:|---|\.\.\.)(?:.*\n)*?(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
_COMMENT = re.compile(r"<!--.*?-->", re.S)
# What a mark encloses is bounded, or holds no opening mark: else a text of nothing but opening marks would take hours.
_INLINE = (
    (re.compile(r"!\[([^\[\]]*)\]\([^)\s]{0,1000}(?:\s+[\"'][^)]{0,300})?\)"), r"\1"),  # ![alt](src)
    (re.compile(r"\[([^\[\]]+)\]\([^)\s]{0,1000}(?:\s+[\"'][^)]{0,300})?\)"), r"\1"),  # [text](url)
    (re.compile(r"\[([^\[\]]+)\]\[[^\[\]]*\]"), r"\1"),  # [text][reference]
    (re.compile(r"<((?:https?|mailto):[^<>\s]+)>"), r"\1"),
    (re.compile(r"(?<![\w`])(\*\*|__)(?=\S)(.{1,300}?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"(?<![\w*`])([*_])(?=[^\s*_])(.{1,300}?)(?<=[^\s*_])\1(?![\w*])"), r"\2"),
    (re.compile(r"(`{1,3})(.{1,300}?)\1"), r"\2"),
    (re.compile(r"</?[A-Za-z][^<>]{0,300}>"), ""),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!|<>~-])"), r"\1"),
)


def text_lines(text: str) -> tuple[str, ...]:
    """Paragraphs of plain text: blocks between blank lines; without any blank line, every line. List items stay lines."""
    lines = text.strip("\n").split("\n")
    if all(line.strip() for line in lines):
        return paragraphs(lines)
    return paragraphs(_blocks(lines))


def markdown(text: str) -> tuple[str, tuple[str, ...]]:
    """The first heading ("" if none) and the paragraphs of a Markdown text, its marks taken off."""
    text = _without_comments(_FRONT_MATTER.sub("", text.lstrip("\n"), count=1))
    title, prose, out = "", list[str](), list[str]()
    lines = iter([*text.split("\n"), ""])

    def flush() -> None:
        out.extend(_unmarked(block) for block in _blocks(prose))
        prose.clear()

    for line in lines:
        if fence := _FENCE.match(line):
            flush()
            out.extend(_fenced(lines, fence[1]))
        elif heading := _HEADING.match(line):
            flush()
            out.append(_unmarked(_without_closing_marks(heading[1].strip())))
            title = title or out[-1]
        elif _UNDERLINE.match(line) and prose and prose[-1].strip() and "|" not in prose[-1]:
            heading_text = prose.pop()
            flush()
            out.append(_unmarked(heading_text))
            title = title or out[-1]
        elif _DIVIDER.fullmatch(line.strip()) and prose and "|" in prose[-1]:
            header = _cells(prose.pop())
            flush()
            out.extend(row_lines([header, *_table_rows(lines)], has_header=True))
        elif _RULE.match(line) or _REFERENCE.match(line):
            flush()
        else:
            prose.append(re.sub(r"^\s{0,3}(?:>\s?)+", "", line))
    flush()
    return " ".join(title.split()), paragraphs(out)


def _without_comments(text: str) -> str:
    """`text` without its comments; one that nothing closes is text."""
    last = text.rfind("-->") + 3 if "-->" in text else 0
    return _COMMENT.sub("", text[:last]) + text[last:]


def _without_closing_marks(heading: str) -> str:
    """The heading of "Fares ##" is "Fares", that of "Written in C#" the whole."""
    marked = heading.rstrip("#")
    return marked.rstrip() if not marked or marked[-1].isspace() else heading


def _blocks(lines: list[str]) -> Iterator[str]:
    block: list[str] = []
    for line in [*lines, ""]:
        bullet = _BULLET.match(line)
        if (bullet or not line.strip()) and block:
            yield " ".join(block)
            block = []
        if line.strip():
            block.append(line[bullet.end() :] if bullet else line)


def _fenced(lines: Iterator[str], fence: str) -> Iterator[str]:
    for line in lines:
        if line.strip().startswith(fence):
            return
        yield line


def _table_rows(lines: Iterator[str]) -> Iterator[list[str]]:
    for line in lines:
        if "|" not in line:
            return
        yield _cells(line)


def _cells(line: str) -> list[str]:
    return [_unmarked(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _unmarked(text: str) -> str:
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text
