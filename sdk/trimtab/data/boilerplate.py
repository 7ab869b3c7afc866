"""Which parts of a page are boilerplate: by element, role and class name, and by what is known to be main text. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bs4.element import CData, NavigableString, Tag

from trimtab.data.clean import collapse, words
from trimtab.data.markup import INVISIBLE, Block, blocks

_NEVER_MAIN = frozenset({"nav", "footer", "search"})
_NEVER_MAIN_ROLES = frozenset({"navigation", "contentinfo", "search", "dialog", "alertdialog", "menu", "menubar", "toolbar", "tablist"})
_PERHAPS = frozenset({"aside", "form"})  # outside <main>
_PERHAPS_NAMES = re.compile(
    r"(?:^|[-_ ])(?:(?:side|nav|menu|tool|top|bottom)-?(?:bar|lang)s?|nav\w*|menus?|footer\w*|header-?links|pager|pagination|related|"
    r"read-?(?:more|next)|share|sharing|social|follow|promos?|advert\w*|ads?|sponsor\w*|banners?|toc|skip\w*|popups?|modals?|"
    r"newsletters?|subscri\w+|sign-?up|breadcrumbs?|crumbs?|cookies?|consent|gdpr|privacy-?notice|comments?|feedback|rating)(?=$|[-_ ])"
)
_ASKS_NAMES = re.compile(r"cookie|consent|gdpr|newsletter|subscri|sign-?up")  # small and with something to press, they ask for a click
_CRUMBS = re.compile(r"crumbs?(?=$|[-_ ])")
_HIDDEN_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.I)
_LISTS = frozenset({"ul", "ol", "menu", "dl", "table"})
_MAY_BE_LINKS = _LISTS | {"p", "div", "center"}
_LINK_SHARE = 0.9  # an element of which this much is link text leads elsewhere
_BOX_SHARE = 1 / 3  # of the main part: what is larger is no box beside the text, whatever it is called
_ASKING_WORDS, _CRUMBS_WORDS = 120, 25


@dataclass(slots=True)
class _Facts:
    """What an element holds, in all its depth, and where it stands."""

    in_list: bool
    in_landmark: bool
    never_main: bool
    first: int  # in the order in which elements begin
    last: int = 0  # of the elements in it
    words: int = 0
    characters: int = 0
    link_characters: int = 0
    links: int = 0
    controls: int = 0
    headlines: int = 0

    def add(self, inner: _Facts, tag: Tag) -> None:
        self.words += inner.words
        self.characters += inner.characters
        self.link_characters += inner.characters if tag.name == "a" else inner.link_characters
        self.links += inner.links + (tag.name == "a")
        self.controls += inner.controls + (tag.name in ("a", "button", "input", "form"))
        self.headlines += inner.headlines + (tag.name == "h1")


class Boxes:
    """Tells boilerplate boxes from main text, given the blocks that are main text for sure."""

    def __init__(self, body: Tag, sure: Sequence[Block]) -> None:
        self._facts = _surveyed(body)
        self._main: dict[int, list[Block]] = {}
        self.weight = weights(body, sure)

    def main_blocks(self, root: Tag) -> list[Block]:
        """The blocks of `root` without its boilerplate."""
        if id(root) not in self._main:
            limit = _BOX_SHARE * sum(words(block.text) for block in blocks(root, dropped=self._never))
            self._main[id(root)] = blocks(root, dropped=lambda tag: self._never(tag) or self._box(tag, limit))
        return self._main[id(root)]

    def has_text(self, tag: Tag) -> bool:
        return self._facts[id(tag)].words > 0

    def holds(self, outer: Tag, inner: Tag) -> bool:
        """Whether `inner` is `outer` or in it."""
        around, within = self._facts.get(id(outer)), self._facts.get(id(inner))
        return around is None or (within is not None and around.first <= within.first <= around.last)

    def _never(self, tag: Tag) -> bool:
        facts = self._facts[id(tag)]
        return facts.never_main or (tag.name == "header" and not facts.in_landmark and not facts.headlines)

    def _box(self, tag: Tag, limit: float) -> bool:
        facts, names = self._facts[id(tag)], _names(tag)
        if named := bool(names) and bool(_PERHAPS_NAMES.search(names)):
            asks = facts.words <= _ASKING_WORDS and facts.controls > 0 and bool(_ASKS_NAMES.search(names))
            if asks or (facts.words <= _CRUMBS_WORDS and _CRUMBS.search(names)):
                return facts.words < 2 * limit
        if facts.words > limit or self.weight[id(tag)]:
            return False
        aside = not facts.in_landmark and (tag.name in _PERHAPS or tag.get("role") == "complementary")
        return named or aside or (tag.name in _MAY_BE_LINKS and not facts.in_list and _only_links(facts))


def hidden(tag: Tag) -> bool:
    style = tag.get("style")
    return tag.has_attr("hidden") or tag.get("aria-hidden") == "true" or (isinstance(style, str) and bool(_HIDDEN_STYLE.search(style)))


def plays(tag: Tag, name: str) -> bool:
    """Whether `tag` is, or has the role of, the landmark `name`."""
    return tag.name == name or tag.get("role") == name


def weights(body: Tag, found: Sequence[Block]) -> dict[int, int]:
    """Characters of `found` in each element of `body`, by its id()."""
    weight: dict[int, int] = defaultdict(int)
    for block in found:
        weight[id(block.tag)] += len(block.text)
    for tag in reversed(body.find_all(True)):  # what is in an element comes before it
        weight[id(tag.parent)] += weight[id(tag)]
    return weight


def _only_links(facts: _Facts) -> bool:
    return facts.links > 1 and facts.link_characters >= _LINK_SHARE * facts.characters


def _names(tag: Tag) -> str:
    """Class and id in lower case, words of camelCase apart: "site-footer nav-main"."""
    class_, id_ = tag.get("class") or "", tag.get("id") or ""
    text = " ".join([*([class_] if isinstance(class_, str) else class_), str(id_)]).strip()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", text).lower()


def _surveyed(body: Tag) -> dict[int, _Facts]:
    """Facts of each element by its id(), in one pass: asking the tree for each element would be quadratic in its depth."""
    facts = {id(body): _Facts(in_list=False, in_landmark=_is_landmark(body), never_main=_is_never_main(body), first=0)}
    stack: list[tuple[Tag, Iterator[object]]] = [(body, iter(body.children))]
    while stack:
        tag, children = stack[-1]
        here = facts[id(tag)]
        child = next(children, None)
        if child is None:
            stack.pop()
            here.last = len(facts) - 1
            if stack:
                facts[id(stack[-1][0])].add(here, tag)
        elif isinstance(child, Tag):
            within = here.in_list or tag.name in _LISTS, here.in_landmark or _is_landmark(child)
            facts[id(child)] = _Facts(*within, _is_never_main(child), first=len(facts), last=len(facts))
            if child.name in INVISIBLE:
                facts[id(tag)].add(facts[id(child)], child)
            else:
                stack.append((child, iter(child.children)))
        elif type(child) in (NavigableString, CData):
            text = collapse(str(child))
            here.words += words(text)
            here.characters += len(text)
    return facts


def _is_never_main(tag: Tag) -> bool:
    return tag.name in _NEVER_MAIN or tag.get("role") in _NEVER_MAIN_ROLES or hidden(tag)


def _is_landmark(tag: Tag) -> bool:
    return plays(tag, "main") or plays(tag, "article")
