"""The blocks of an HTML tree: paragraphs, headings, list items, table rows. Pure, and without recursion: pages nest deeply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bs4 import BeautifulSoup
from bs4.element import CData, NavigableString, Tag

from trimtab.data.clean import collapse
from trimtab.data.tables import row_lines
from trimtab.errors import DataError

HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
# Never shown, or shown as a control. A form itself stays: some sites wrap the whole page in one.
INVISIBLE = frozenset(
    {
        *("script", "style", "noscript", "noframes", "template", "head", "title", "meta", "link", "svg", "canvas", "iframe", "frame"),
        *("object", "embed", "audio", "video", "map", "button", "select", "textarea", "input", "option", "datalist", "progress"),
        *("meter", "rt", "rp", "dialog"),
    }
)
_BLOCKS = frozenset(
    {
        *("html", "body", "main", "article", "section", "header", "footer", "nav", "aside", "search", "div", "p", "center", "hr"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "hgroup", "ul", "ol", "menu", "li", "dl", "dt", "dd", "pre", "blockquote", "address"),
        *("table", "caption", "thead", "tbody", "tfoot", "tr", "td", "th", "figure", "figcaption", "details", "summary"),
        *("form", "fieldset", "legend"),
    }
)
_SPAN_AT_MOST = 50  # rows and columns that one cell may cover; a page can ask for billions
_LAYOUT_WORDS = 60  # a table without <th> and with a longer cell, or with one column, only arranges the page
_TAGS_AT_MOST = 300_000  # half a gigabyte of memory and half a minute; the longest specifications on one page have fewer
_TAG = re.compile(r"<[A-Za-z]")
_XML_DECLARATION = re.compile(r"\A\s*<\?xml[^>]*>")
_TABLES_DEEP = 3  # tables within so many others only arrange the page
_ANCHOR_SIGNS = frozenset("¶#§🔗")


@dataclass(frozen=True)
class Block:
    text: str  # collapsed, never empty
    tag: Tag  # the innermost block element around it


@dataclass(frozen=True)
class _Row:
    cells: list[Tag]
    in_head: bool


def parse(html: str) -> BeautifulSoup:
    """A tree of `html`; any text gives one. Raises DataError as `parseable` does."""
    return BeautifulSoup(parseable(html), "lxml")


def parseable(html: str) -> str:
    """`html` without what makes the parser warn: an XML declaration, or a short text that looks like a file name.

    Raises DataError for one of so many tags that its tree would fill the memory.
    """
    if html.count("<") > _TAGS_AT_MOST and (tags := sum(1 for _ in _TAG.finditer(html))) > _TAGS_AT_MOST:
        raise DataError(
            f"it has {tags:,} tags, and {_TAGS_AT_MOST:,} are read of one page; save it in parts, or its text as .txt, and pass them"
        )
    return _XML_DECLARATION.sub("", html, count=1) + "\n"


def blocks(root: Tag, *, dropped: Callable[[Tag], bool] = lambda tag: False) -> list[Block]:
    """The blocks under `root` in reading order; subtrees for which `dropped` holds are left out.

    A definition term and its definition make one block ("Built: 1974"), as does a row of a table that holds data.
    """
    return _definitions(list(_walk(root, dropped)))


def _walk(root: Tag, dropped: Callable[[Tag], bool]) -> Iterator[Block]:
    text: list[str] = []
    inside = [root]  # block elements around the current position
    tables = 0  # of them

    def flush() -> Iterator[Block]:
        line = collapse("".join(text))
        text.clear()
        if line:
            yield Block(line, inside[-1])

    stack: list[tuple[Tag, Iterator[object]]] = [(root, iter(root.children))]
    while stack:
        parent, children = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            tables -= parent.name == "table"
            if parent.name in _BLOCKS:
                yield from flush()
                if len(inside) > 1:
                    inside.pop()
        elif isinstance(child, Tag):
            if child.name in INVISIBLE or dropped(child) or _is_anchor_sign(child):
                continue
            if child.name == "br":
                follows = child.previous_sibling
                while follows is not None and not isinstance(follows, Tag):
                    follows = follows.previous_sibling
                if follows is not None and follows.name == "br" and not collapse("".join(text[-1:])):
                    yield from flush()
                text.append(" ")
            elif child.name in _BLOCKS:
                yield from flush()
                if child.name == "table" and tables < _TABLES_DEEP and (rows := _data_rows(child, dropped)) is not None:
                    yield from (Block(line, child) for line in map(collapse, rows) if line)
                elif child.name == "pre":
                    yield from (Block(line, child) for line in map(collapse, re.split(r"\n\s*\n", _shown(child, dropped))) if line)
                else:
                    inside.append(child)
                    tables += child.name == "table"
                    stack.append((child, iter(child.children)))
            else:
                stack.append((child, iter(child.children)))
        elif type(child) in (NavigableString, CData):
            text.append(str(child))
    yield from flush()


def _definitions(found: list[Block]) -> list[Block]:
    out: list[Block] = []
    for block in found:
        last = out[-1] if out else None
        if last and last.tag.name == "dt" and (dd := _in_definition(block.tag)) is not None and dd.find_previous_sibling() is last.tag:
            joint = " " if last.text[-1] in ".?!:" else ": "
            out[-1] = Block(f"{last.text}{joint}{block.text}", dd)
        else:
            out.append(block)
    return out


def _in_definition(tag: Tag) -> Tag | None:
    """The `dd` whose first paragraph `tag` is."""
    while tag.name in ("p", "div") and tag.parent is not None and tag.find_previous_sibling() is None:
        tag = tag.parent
    return tag if tag.name == "dd" else None


def _is_anchor_sign(tag: Tag) -> bool:
    return tag.name == "a" and len(tag.contents) == 1 and str(tag.contents[0]).strip() in _ANCHOR_SIGNS


def _data_rows(table: Tag, dropped: Callable[[Tag], bool]) -> list[str] | None:
    """The lines of a table of data, its caption first; None for a table that only arranges the page."""
    if table.get("role") in ("presentation", "none") or table.find("table") is not None:
        return None
    rows = _rows(table, dropped)
    if rows is None:
        return None
    cells = [row.cells for row in rows]
    has_heads = any(cell.name == "th" for row in cells for cell in row)
    texts = {id(cell): _cell_text(cell, dropped) for row in cells for cell in row}
    if not has_heads and (max(map(len, cells), default=0) < 2 or any(len(text.split()) > _LAYOUT_WORDS for text in texts.values())):
        return None
    in_head = [row.in_head for row in rows]
    all_heads = [bool(row) and all(cell.name == "th" for cell in row) for row in cells]
    first = next((i for i, row in enumerate(cells) if row), 0)
    has_header = len(rows) > 1 and bool(cells[first:]) and len(cells[first]) > 1 and (in_head[first] or all_heads[first])
    if has_header:  # of several header rows the last names the columns
        while first + 1 < len(rows) - 1 and in_head[first + 1]:
            first += 1
    grid = _grid([[(texts[id(cell)], span(cell, "rowspan"), span(cell, "colspan")) for cell in row] for row in cells[first:]])
    caption = table.find("caption")
    return [*([_cell_text(caption, dropped)] if caption and not dropped(caption) else []), *row_lines(grid, has_header=has_header)]


def _rows(table: Tag, dropped: Callable[[Tag], bool]) -> list[_Row] | None:
    """The rows of `table` with their cells; what stands in a cell is the cell's. None where there is text outside the cells."""
    rows: list[_Row] = []
    left: list[tuple[Tag, _Row | None, bool]] = [(table, None, False)]  # an element, the row around it, whether a head is
    while left:
        tag, row, in_head = left.pop()
        if tag is not table and (tag.name == "caption" or tag.name in INVISIBLE or dropped(tag)):
            continue
        if tag.name in ("td", "th") and row is not None:
            row.cells.append(tag)
            continue
        if any(type(child) in (NavigableString, CData) and any(map(str.isalnum, str(child))) for child in tag.children):
            return None
        if tag.name == "tr":
            row = _Row([], in_head)
            rows.append(row)
        in_head = in_head or tag.name == "thead"
        left += [(child, row, in_head) for child in reversed(elements(tag))]
    return rows


def _shown(pre: Tag, dropped: Callable[[Tag], bool]) -> str:
    """The text of a <pre> as it stands there, its line breaks kept, without what is not shown."""
    text: list[str] = []
    left: list[object] = [pre]
    while left:
        node = left.pop()
        if isinstance(node, Tag):
            if node.name == "br":
                text.append("\n")
            elif node is pre or not (node.name in INVISIBLE or dropped(node) or _is_anchor_sign(node)):
                left += reversed(node.contents)
        elif type(node) in (NavigableString, CData):
            text.append(str(node))
    return "".join(text)


def _cell_text(cell: Tag, dropped: Callable[[Tag], bool]) -> str:
    return " ".join(block.text for block in _walk(cell, dropped))


def elements(tag: Tag) -> list[Tag]:
    """The elements right in `tag`."""
    return [child for child in tag.children if isinstance(child, Tag)]


def span(cell: Tag, name: str, at_most: int = _SPAN_AT_MOST) -> int:
    """How many rows or columns a cell covers."""
    value = str(cell.get(name, "1")).strip()
    return min(max(int(value), 1), at_most) if value.isascii() and value.isdigit() and len(value) < 10 else 1


def _grid(rows: list[list[tuple[str, int, int]]]) -> list[list[str]]:
    """Rows of (text, rows covered, columns covered) as rows of texts, each repeated wherever it reaches."""
    out: list[list[str]] = []
    reaching: dict[int, tuple[str, int]] = {}  # column -> text from above, rows left
    for row in rows:
        line: list[str] = []
        cells = iter(row)
        while True:
            column = len(line)
            if column in reaching:
                text, left = reaching.pop(column)
                line.append(text)
                if left > 1:
                    reaching[column] = text, left - 1
                continue
            cell = next(cells, None)
            if cell is None:
                break
            text, down, across = cell
            for _ in range(across):
                if down > 1:
                    reaching[len(line)] = text, down - 1
                line.append(text)
        if any(line):
            out.append(line)
    return out
