"""Documents and generated text to samples: token ids, and which of them are learned.

A page can be given whole, by paragraph and by sentence, so that a fact is also seen without the page that stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from trimtab_runtime.tokenizer import Tokenizer

# a full stop after these does not end a sentence
_ABBREVIATIONS = frozenset("mr mrs ms dr prof st no vs etc e.g i.e a.m p.m approx inc ltd co dept fig vol ca jr sr est tel ext".split())
_BOUNDARY = re.compile(r"([.!?])([\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-Z0-9À-Þ])")


@dataclass(frozen=True)
class Sample:
    """One thing to learn. `learned[i]` tells whether token i is a target (the first of a sample never is one).

    `teacher`, where there is one, gives for each target the row in which the base model's own prediction stands
    (-1: none); such a target is matched with that prediction rather than with the token alone.
    """

    kind: str
    ids: Sequence[int]
    learned: Sequence[int]
    teacher: Sequence[int] | None = None


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences, in order; together they hold all its words."""
    found, begin = [], 0
    for match in _BOUNDARY.finditer(paragraph):
        word = paragraph[max(begin, match.start() - 80) : match.start()].rsplit(None, 1)[-1:]  # no abbreviation is longer
        last = word[0].lower().lstrip("(\"'“‘[") if word else ""
        if match[1] == "." and (
            last in _ABBREVIATIONS or (re.fullmatch(r"(\w\.)*\w", last) and not last.isdigit() and len(last) < 4 and "." in last)
        ):
            continue
        if match[1] == "." and re.fullmatch(r"[a-z]", last):  # an initial, as in "J. Smith"
            continue
        found.append(paragraph[begin : match.end(2)].strip())
        begin = match.end()
    found.append(paragraph[begin:].strip())
    return [text for text in found if text]


def is_statement(text: str) -> bool:
    """A sentence to learn by itself: ends like one and is no heading or label."""
    return len(text.split()) >= 4 and text.rstrip("\"'”’)]")[-1:] in {".", "!"}


def pieces(title: str, text: str, views: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(kind, text) of one document: each view as often as it is asked for, and in each nothing twice."""
    paragraphs = [line for line in text.split("\n") if line.strip()]
    whole = text if title.strip() and paragraphs and paragraphs[0].strip() == title.strip() else f"{title}\n{text}".strip()
    for view in views:
        seen = set()
        if view == "document":
            found = [whole]
        elif view == "paragraph":
            found = [line for line in paragraphs if len(sentences(line)) > 1]
        else:
            found = [sentence for line in paragraphs for sentence in sentences(line) if is_statement(sentence)]
        for piece in found:
            if piece not in seen:
                seen.add(piece)
                yield view, piece


def plain(kind: str, text: str, tokenizer: Tokenizer) -> Sample:
    """Running text: every token is learned, and that the text ends."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [*start, *tokenizer.text(text), tokenizer.eos_id]
    return Sample(kind, ids, [True] * len(ids))


def conversation(kind: str, messages: list[dict[str, str]], tokenizer: Tokenizer) -> Sample:
    """A conversation: what the assistant says is learned, and that its turn ends."""
    ids, mine = tokenizer.chat(messages)
    return Sample(kind, ids, mine)
