"""What a model rehearses while it learns new pages: its own answers to everyday prompts (everyday.txt), and general prose (prose/*.txt).

The prompts are asked in wordings of their own, so that none is likely to be somebody's test question. A line of the file is a
wording and what stands in its braces, in turn:  Which sound does a {} make? = cow|cat|lion
"""

from __future__ import annotations

import random
from pathlib import Path


def prose() -> list[str]:
    """General texts of 120 to 450 words, written for this project on as many subjects: English as people write it."""
    files = sorted((Path(__file__).parent / "prose").glob("*.txt"))
    return [text.strip() for file in files for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]


def wordings() -> dict[str, list[str]]:
    """Each wording of the everyday prompts, and what stands in its braces."""
    lines = (Path(__file__).parent / "everyday.txt").read_text(encoding="utf-8").splitlines()
    return {wording: words.split("|") for wording, words in (line.split(" = ") for line in lines)}


def prompts(count: int, seed: int) -> list[str]:
    """At most `count` of the prompts, in an order that depends on the seed; every wording before any comes again."""
    random_order = random.Random(seed)
    columns = []
    for wording, words in wordings().items():
        column = [wording.format(word) for word in words]
        random_order.shuffle(column)
        columns.append(column)
    rounds = [[column[place] for column in columns if place < len(column)] for place in range(max(map(len, columns)))]
    for one in rounds:
        random_order.shuffle(one)
    return [prompt for one in rounds for prompt in one][:count]
