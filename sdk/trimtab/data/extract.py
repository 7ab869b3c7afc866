"""HTML to a title and the lines of its main text. Pure.

trafilatura says where the main text is; the blocks of that part of the tree are then all kept but for what is boilerplate by its
element, role or class name. Its own output is not used as the text: it loses 2 to 20 % of it (README.md has the numbers).
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import trafilatura
from bs4 import BeautifulSoup
from bs4.element import Tag

from trimtab.data.boilerplate import Boxes, hidden, plays, weights
from trimtab.data.clean import collapse, paragraphs, stream_safe, words
from trimtab.data.markup import HEADINGS, INVISIBLE, Block, blocks, elements, parse, span

logging.getLogger("trafilatura").addHandler(logging.NullHandler())  # it finding nothing is no news: the body is taken then

_LANDMARK_SHARE = 0.5  # of trafilatura's text that <main> must hold to be believed; where it found none, of all but boilerplate
_SURE_WORDS = 5  # a shorter block of trafilatura's text (a date, a label) does not widen the container chosen by it
_PART_SHARE = 2 / 3  # of the body's words, boxes left out, that this container must hold: with less it would lose main text
_COMPARED_AT_MOST = 500_000_000  # characters, over all blocks of a page
# What trafilatura takes the time of: its tables take that of a row's width squared, its parser that of an element's attributes squared.
_ELEMENTS_AT_MOST, _ATTRIBUTES_AT_MOST, _TABLE_WORK_AT_MOST = 100_000, 1_000, 100_000_000
_TITLE_AT_MOST = 1_000  # characters; a longer one is no title, and each sample of the page would begin with it
_WIDEST_SPAN = 100  # as trafilatura reads it


@dataclass(frozen=True)
class Extracted:
    title: str  # of <title>, else the first <h1>, else ""; none is longer than 1,000 characters
    lines: tuple[str, ...]  # one for each paragraph, heading, list item, table row
    page_words: int  # in the whole page as a browser shows it
    found_by: str  # "landmark" (<main>, <article>), "trafilatura", "body"


def extract(html: str, tree: BeautifulSoup | None = None) -> Extracted:
    """The main text of a page, whose `tree` may be given if it is at hand. A page without text gives no lines.

    Raises DataError for a page of more tags than are read.
    """
    tree = parse(html) if tree is None else tree
    body = tree.body or tree
    everything = blocks(body, dropped=hidden)
    found = _located(html, tree, everything)
    boxes = Boxes(body, found)
    roots, found_by = _roots(body, found, boxes)
    lines = [line for root in roots for line in _without_empty_headings(boxes.main_blocks(root), boxes)]
    headline = [block.text for block in everything if block.tag.name == "h1"]
    if len(headline) == 1 and headline[0] not in lines:  # often in a page header beside the main part
        lines = headline + lines
    return Extracted(_title(tree), paragraphs(lines), sum(words(block.text) for block in everything), found_by)


def _title(tree: BeautifulSoup) -> str:
    titles = (collapse(tag.get_text()) for tag in tree.find_all("title", limit=10) if tag.find_parent("svg") is None)
    headings = (tag for tag in tree.find_all("h1", limit=10) if tag.find_parent("svg") is None)
    shown = (" ".join(block.text for block in blocks(tag, dropped=hidden)) for tag in headings)
    return next((text for text in itertools.chain(titles, shown) if 0 < len(text) <= _TITLE_AT_MOST), "")


def _located(html: str, tree: BeautifulSoup, everything: Sequence[Block]) -> list[Block]:
    """The blocks whose text trafilatura takes for main text; none of a page that would keep it busy for minutes."""
    if not _bearable(tree):
        return []
    text = trafilatura.extract(stream_safe(html), fast=True, favor_recall=True, include_comments=False, deduplicate=False) or ""
    lines = [_squeezed(line.removeprefix("- ")) for line in text.split("\n")]
    known, joined = set(lines), "".join(lines)
    if len(joined) * len(everything) > _COMPARED_AT_MOST:
        joined = ""
    return [block for block in everything if (short := _squeezed(block.text)) in known or (len(short) > 30 and short in joined)]


def _bearable(tree: BeautifulSoup) -> bool:
    """Whether trafilatura reads this page in seconds."""
    tags = tree.find_all(True)
    if len(tags) > _ELEMENTS_AT_MOST or any(len(tag.attrs) > _ATTRIBUTES_AT_MOST for tag in tags):
        return False
    work = 0
    for row in tags:
        if row.name == "tr":
            cells = (cell for cell in elements(row) if cell.name in ("td", "th"))
            work += sum(span(cell, "rowspan", _WIDEST_SPAN) * span(cell, "colspan", _WIDEST_SPAN) for cell in cells) ** 2
    return work <= _TABLE_WORK_AT_MOST


def _squeezed(text: str) -> str:
    return re.sub(r"[\s|]+", "", text)


def _roots(body: Tag, found: Sequence[Block], boxes: Boxes) -> tuple[list[Tag], str]:
    """The parts of the tree that hold the main text, in order, and what showed them."""
    weight = boxes.weight if found else weights(body, boxes.main_blocks(body))
    for name in ("main", "article"):
        marked = _outermost(body, name)
        held = sum(weight[id(tag)] for tag in marked)
        if marked and held >= _LANDMARK_SHARE * weight[id(body)] and any(boxes.main_blocks(tag) for tag in marked):
            return marked, "landmark"
    if sure := [block for block in found if words(block.text) >= _SURE_WORDS]:
        cleaned = boxes.main_blocks(body)
        root = _container(body, sure, next((block.tag for block in cleaned if block.tag.name in HEADINGS), None))
        if sum(words(block.text) for block in boxes.main_blocks(root)) >= _PART_SHARE * sum(words(block.text) for block in cleaned):
            return [root], "trafilatura"
    return [body], "body"


def _outermost(body: Tag, name: str) -> list[Tag]:
    """The landmarks of that name in `body` that are shown and in no other one."""
    found: list[Tag] = []
    left = [] if plays(body, name) else [body]
    while left:
        tag = left.pop()
        if hidden(tag) or tag.name in INVISIBLE:
            continue
        if plays(tag, name):
            found.append(tag)
        else:
            left += reversed(elements(tag))
    return found


def _container(body: Tag, sure: Sequence[Block], headline: Tag | None) -> Tag:
    """The innermost element around all blocks, and around the first heading, which often stands beside the main part."""
    weight = weights(body, sure)
    around = {id(tag) for tag in (headline, *headline.parents)} if headline else None
    root = body
    while inner := next((tag for tag in root.find_all(True, recursive=False) if weight[id(tag)] == weight[id(body)]), None):
        if around is not None and id(inner) not in around:
            break
        root = inner
    return root


def _without_empty_headings(found: Sequence[Block], boxes: Boxes) -> list[str]:
    """The lines, without a heading whose section was nothing but boilerplate ("Related pages")."""
    pairs = itertools.zip_longest(found, found[1:])
    return [block.text for block, after in pairs if not _leads_nowhere(block.tag, after, boxes)]


def _leads_nowhere(heading: Tag, following: Block | None, boxes: Boxes) -> bool:
    """Whether the element after a heading has text, but none of it is left, and the next block is of another section."""
    if heading.name not in HEADINGS or heading.name == "h1":
        return False
    after = heading.find_next_sibling()
    if after is None or after.name in HEADINGS or not boxes.has_text(after):
        return False
    if following is None:
        return True
    if boxes.holds(after, following.tag):
        return False
    return (following.tag.name in HEADINGS and following.tag.name <= heading.name) or not (
        heading.parent is None or boxes.holds(heading.parent, following.tag)
    )
