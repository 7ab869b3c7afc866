"""The blocks of an HTML tree: paragraphs, headings, list items, table rows. Pure, and without recursion: pages nest deeply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bs4 import BeautifulSoup
from bs4.element import CData, NavigableString, Tag

from trimtab.data.clean import collapse
from trimtab.data.tables import row_lines

HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
# Never shown, or shown as a control. A form itself stays: some sites wrap the whole page in one.
INVISIBLE = frozenset(
    {
        *("script", "style", "noscript", "template", "head", "title", "meta", "link", "svg", "canvas", "iframe", "frame", "object"),
        *("embed", "audio", "video", "map", "button", "select", "textarea", "input", "option", "datalist", "progress", "meter"),
        *("rt", "rp", "dialog"),
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
_XML_DECLARATION = re.compile(r"\A\s*<\?xml[^>]*>")
_TABLES_DEEP = 3  # tables within so many others only arrange the page
_ANCHOR_SIGNS = frozenset("¶#§🔗")


@dataclass(frozen=True)
class Block:
    text: str  # collapsed, never empty
    tag: Tag  # the innermost block element around it


def parse(html: str) -> BeautifulSoup:
    """A tree of `html`; any text gives one."""
    return BeautifulSoup(parseable(html), "lxml")


def parseable(html: str) -> str:
    """`html` without what makes the parser warn: an XML declaration, or a short text that looks like a file name."""
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
                follows = child.find_previous_sibling()
                if follows is not None and follows.name == "br" and not collapse("".join(text[-1:])):
                    yield from flush()
                text.append(" ")
            elif child.name in _BLOCKS:
                yield from flush()
                if child.name == "table" and tables < _TABLES_DEEP and (rows := _data_rows(child, dropped)) is not None:
                    yield from (Block(line, child) for line in map(collapse, rows) if line)
                elif child.name == "pre":
                    yield from (Block(line, child) for line in map(collapse, re.split(r"\n\s*\n", child.get_text())) if line)
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
    rows = [row for row in table.find_all("tr") if not any(map(dropped, _up_to(row, table)))]
    cells = [[cell for cell in row.find_all(["td", "th"]) if not dropped(cell)] for row in rows]
    has_heads = any(cell.name == "th" for row in cells for cell in row)
    texts = {id(cell): _cell_text(cell, dropped) for row in cells for cell in row}
    if not has_heads and (max(map(len, cells), default=0) < 2 or any(len(text.split()) > _LAYOUT_WORDS for text in texts.values())):
        return None
    in_head = [any(tag.name == "thead" for tag in _up_to(row, table)) for row in rows]
    all_heads = [bool(row) and all(cell.name == "th" for cell in row) for row in cells]
    first = next((i for i, row in enumerate(cells) if row), 0)
    has_header = len(rows) > 1 and bool(cells[first:]) and len(cells[first]) > 1 and (in_head[first] or all_heads[first])
    if has_header:  # of several header rows the last names the columns
        while first + 1 < len(rows) - 1 and in_head[first + 1]:
            first += 1
    grid = _grid([[(texts[id(cell)], _span(cell, "rowspan"), _span(cell, "colspan")) for cell in row] for row in cells[first:]])
    caption = table.find("caption")
    return [*([caption.get_text()] if caption else []), *row_lines(grid, has_header=has_header)]


def _up_to(tag: Tag, ancestor: Tag) -> Iterator[Tag]:
    """`tag` and what is around it, below `ancestor`."""
    while tag is not ancestor and tag.parent is not None:
        yield tag
        tag = tag.parent


def _cell_text(cell: Tag, dropped: Callable[[Tag], bool]) -> str:
    return " ".join(block.text for block in _walk(cell, dropped))


def _span(cell: Tag, name: str) -> int:
    value = str(cell.get(name, "1")).strip()
    return min(max(int(value), 1), _SPAN_AT_MOST) if value.isascii() and value.isdigit() and len(value) < 10 else 1


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
