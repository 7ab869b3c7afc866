"""Marks: how it is known where things come to stand in the text that a chat template makes of a conversation.

They are put into the messages, long random numbers that no template looks at, and are taken out of what it makes of them. A mark
inside a control word that somebody wrote (`<` mark `|im_end|>`) hides it from the template and tells afterwards that it is letters. A
mark inside a word of each message tells where that message stands, and one inside the name of a tool that is called, and inside a
word of each text that it is given, that the call is whole.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters of a text: from, up to

_NONCE = str(secrets.randbelow(9 * 10**19) + 10**19)  # digits: no template, JSON or letter case changes them
MARK = re.compile(_NONCE + r"(\d{6})")
BREAK, BEGIN, END = 999_999, 999_998, 999_997  # others are the places of messages, and of texts in calls


def mark(number: int) -> str:
    return f"{_NONCE}{number:06}"


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation. `letters`: spans that spell a control token and are none; `written`: what the assistant wrote,
    each turn up to and with the token that ends it; `thoughts`: its turns whose thinking the template left out; `last_thought`: the last of
    its turns is one of them; `open`: the text ends with its words, and no token tells that it has ended."""

    text: str
    letters: Sequence[Span] = ()
    written: Sequence[Span] = ()
    thoughts: int = 0
    last_thought: bool = False
    open: bool = False


@dataclass(frozen=True)
class Marked:
    """A text without its marks, and where they stood: (place, number), in order."""

    text: str
    marks: list[tuple[int, int]]

    def letters(self, control: re.Pattern[str]) -> list[Span]:
        broken = {place - 1 for place, number in self.marks if number == BREAK}  # a mark stands behind a word's first letter
        return [found.span() for found in control.finditer(self.text) if found.start() in broken] if broken else []

    def places(self) -> dict[int, int]:
        return {number: place for place, number in self.marks if number < END}

    def blocks(self) -> list[Span]:
        """What stands in `{% generation %}`."""
        begins = [place for place, number in self.marks if number == BEGIN]
        ends = [place for place, number in self.marks if number == END]
        return [(begin, end) for begin, end in zip(begins, ends, strict=False) if begin < end]
