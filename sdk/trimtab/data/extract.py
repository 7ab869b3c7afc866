"""HTML to a title and the lines of its main text. Pure.

trafilatura says where the main text is; the blocks of that part of the tree are then all kept but for what is boilerplate by its
element, role or class name. Its own output is not used as the text: it loses 2 to 20 % of it (README.md has the numbers).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bs4 import BeautifulSoup
from bs4.element import Tag

from trimtab.data.clean import collapse, paragraphs, words
from trimtab.data.markup import HEADINGS, INVISIBLE, Block, blocks, parse

_NEVER_MAIN = frozenset({"nav", "footer", "search"})
_NEVER_MAIN_ROLES = frozenset({"navigation", "contentinfo", "search", "dialog", "alertdialog", "menu", "menubar", "toolbar", "tablist"})
_PERHAPS = frozenset({"aside", "form"})  # kept when trafilatura found main text in them
_PERHAPS_NAMES = re.compile(
    r"(?:^|[-_ ])(?:(?:side|nav|menu|tool|top|bottom)-?(?:bar|lang)s?|nav\w*|menus?|footer\w*|header-?links|pager|pagination|related|"
    r"read-?(?:more|next)|share|sharing|social|follow|promos?|advert\w*|ads?|sponsor\w*|banners?|toc|skip\w*|popups?|modals?|"
    r"newsletters?|subscri\w+|sign-?up|breadcrumbs?|crumbs?|cookies?|consent|gdpr|privacy-?notice|comments?|feedback|rating)(?=$|[-_ ])"
)
_ASKS_NAMES = re.compile(r"cookie|consent|gdpr|newsletter|subscri|sign-?up")  # boxes that ask for a click: never main text when small
_CRUMBS = re.compile(r"breadcrumb|crumbs(?=$|[-_ ])")
_HIDDEN_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.I)
_LISTS = ["ul", "ol", "menu", "dl", "table"]
_MAY_BE_LINKS = frozenset({*_LISTS, "p", "div", "center"})
_LINK_SHARE = 0.9  # a list of which this much is link text leads elsewhere
_BOX_SHARE = 1 / 3  # of the main part: what is larger is no box beside the text, whatever it is called
_ASKING_WORDS = 120
_LANDMARK_SHARE = 0.5  # of trafilatura's text that <main> must hold to be believed
_SURE_WORDS = 5  # a shorter block of trafilatura's text (a date, a label) does not widen the container chosen by it
_PART_SHARE = 2 / 3  # of the body's words, boxes left out, that this container must hold: with less it would lose main text


@dataclass(frozen=True)
class Extracted:
    title: str  # of <title>, else the first <h1>, else ""
    lines: tuple[str, ...]  # one for each paragraph, heading, list item, table row
    page_words: int  # in the whole page as a browser shows it
    found_by: str  # "landmark" (<main>, <article>), "trafilatura", "body"


def extract(html: str, tree: BeautifulSoup | None = None) -> Extracted:
    """The main text of a page, whose `tree` may be given if it is at hand. A page without text gives no lines."""
    tree = parse(html) if tree is None else tree
    body = tree.body or tree
    everything = blocks(body, dropped=_hidden)
    found = _located(html, everything)
    boxes = _Boxes(found)
    roots, found_by = _roots(body, found, boxes)
    lines = [line for root in roots for line in _without_empty_headings(boxes.main_blocks(root))]
    if (headline := _only_h1(body)) and headline not in lines:  # often in a page header beside the main part
        lines.insert(0, headline)
    return Extracted(_title(tree), paragraphs(lines), sum(words(block.text) for block in everything), found_by)


def _title(tree: BeautifulSoup) -> str:
    for name in ("title", "h1"):
        for tag in tree.find_all(name):
            if tag.find_parent("svg") is None and (text := collapse(tag.get_text(" " if name == "h1" else ""))):
                return text
    return ""


def _only_h1(body: Tag) -> str:
    found = [tag for tag in body.find_all("h1") if not any(map(_hidden, (tag, *tag.parents)))]
    return collapse(found[0].get_text()) if len(found) == 1 else ""


def _squeezed(text: str) -> str:
    return re.sub(r"[\s|]+", "", text)


def _located(html: str, everything: Sequence[Block]) -> list[Block]:
    """The blocks whose text trafilatura takes for main text."""
    import trafilatura

    text = trafilatura.extract(html, fast=True, favor_recall=True, include_comments=False, deduplicate=False) or ""
    lines = {_squeezed(line.removeprefix("- ")) for line in text.split("\n")}
    joined = _squeezed("".join(line.removeprefix("- ") for line in text.split("\n")))
    return [block for block in everything if (short := _squeezed(block.text)) in lines or (len(short) > 30 and short in joined)]


def _hidden(tag: Tag) -> bool:
    style = tag.get("style")
    return tag.has_attr("hidden") or tag.get("aria-hidden") == "true" or (isinstance(style, str) and bool(_HIDDEN_STYLE.search(style)))


def _names(tag: Tag) -> str:
    """Class and id in lower case, words of camelCase apart: "site-footer nav-main"."""
    class_, id_ = tag.get("class"), tag.get("id")
    text = " ".join([*(class_ if isinstance(class_, list) else [class_ or ""]), str(id_ or "")])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", text).lower()


class _Boxes:
    """Tells boilerplate boxes from main text, given the blocks that are main text for sure."""

    def __init__(self, found: Sequence[Block]) -> None:
        self.weight: dict[int, int] = defaultdict(int)  # id of a tag -> characters of found text in it
        for block in found:
            tag: Tag | None = block.tag
            while tag is not None:
                self.weight[id(tag)] += len(block.text)
                tag = tag.parent

    def main_blocks(self, root: Tag) -> list[Block]:
        """The blocks of `root` without its boilerplate; of a body that holds a heading elsewhere, without the page's header."""
        limit = _BOX_SHARE * sum(words(block.text) for block in blocks(root, dropped=self._never))
        return blocks(root, dropped=lambda tag: self._never(tag) or self._box(tag, limit))

    def _never(self, tag: Tag) -> bool:
        if tag.name in _NEVER_MAIN or tag.get("role") in _NEVER_MAIN_ROLES or _hidden(tag):
            return True
        return tag.name == "header" and tag.find_parent(["main", "article", "section"]) is None and tag.find("h1") is None

    def _box(self, tag: Tag, limit: float) -> bool:
        names = _names(tag)
        named = bool(names.strip()) and bool(_PERHAPS_NAMES.search(names))
        aside = (tag.name in _PERHAPS or tag.get("role") == "complementary") and tag.find_parent(_is_landmark) is None
        links = tag.name in _MAY_BE_LINKS and tag.find_parent(_LISTS) is None
        if not (named or aside or links):
            return False
        text = collapse(tag.get_text(" "))
        size = words(text)
        if named and size <= _ASKING_WORDS and (_asks(tag, names) or (_CRUMBS.search(names) and size <= 25)):
            return size < 2 * limit
        if size > limit or self.weight[id(tag)]:
            return False
        return named or aside or _only_links(tag, text)


def _only_links(tag: Tag, text: str) -> bool:
    anchors = tag.find_all("a")
    return len(anchors) > 1 and sum(len(collapse(a.get_text(" "))) for a in anchors) >= _LINK_SHARE * len(text)


def _plays(tag: Tag, name: str) -> bool:
    return tag.name == name or tag.get("role") == name


def _is_landmark(tag: Tag) -> bool:
    return _plays(tag, "main") or _plays(tag, "article")


def _asks(tag: Tag, names: str) -> bool:
    return bool(_ASKS_NAMES.search(names)) and tag.find(["button", "input", "a", "form"]) is not None


def _roots(body: Tag, found: Sequence[Block], boxes: _Boxes) -> tuple[list[Tag], str]:
    """The parts of the tree that hold the main text, in order, and what showed them."""
    total = boxes.weight[id(body)]
    for name in ("main", "article"):
        marked = [tag for tag in body.find_all(lambda tag, name=name: _plays(tag, name)) if not _covered(tag, name)]
        held = sum(boxes.weight[id(tag)] for tag in marked)
        if marked and held >= _LANDMARK_SHARE * total and any(boxes.main_blocks(tag) for tag in marked):
            return marked, "landmark"
    if sure := _Boxes([block for block in found if words(block.text) >= _SURE_WORDS]).weight:
        cleaned = boxes.main_blocks(body)
        headline = next((block.tag for block in cleaned if block.tag.name in HEADINGS), None)
        around = {id(tag) for tag in (headline, *headline.parents)} if headline else None
        root = body
        while inner := next((tag for tag in root.find_all(True, recursive=False) if sure[id(tag)] == sure[id(body)]), None):
            if around is not None and id(inner) not in around:
                break  # the title often stands beside the main part
            root = inner
        if sum(words(block.text) for block in boxes.main_blocks(root)) >= _PART_SHARE * sum(words(block.text) for block in cleaned):
            return [root], "trafilatura"
    return [body], "body"


def _covered(tag: Tag, name: str) -> bool:
    return any(_hidden(parent) or _plays(parent, name) or parent.name in INVISIBLE for parent in tag.parents)


def _without_empty_headings(found: Sequence[Block]) -> list[str]:
    """The lines, without a heading whose section lost all its blocks as boilerplate ("Related pages")."""
    lines = []
    for i, block in enumerate(found):
        following = found[i + 1].tag if i + 1 < len(found) else None
        if block.tag.name in HEADINGS and block.tag.name != "h1" and i and _leads_nowhere(block.tag, following):
            continue
        lines.append(block.text)
    return lines


def _leads_nowhere(heading: Tag, following: Tag | None) -> bool:
    """Whether a list of links or a box comes next on the page, but not among the blocks."""
    after = heading.find_next_sibling()
    if after is None or after.name in HEADINGS:
        return False
    return following is None or (after is not following and after not in following.parents)
