"""Questions with known answers, asked before and after tuning, and how an answer is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError

KINDS = ("starts", "questions", "general")

FORMAT = """\
{"starts":    [{"prompt": "The mill was built in", "accept": ["1874"]}],
 "questions": [{"prompt": "When was the mill built?", "accept": ["1874"]}],
 "general":   [{"prompt": "What is the capital of Japan?", "accept": ["Tokyo"]}]}"""

# words of an answer that are looked at: a sentence's end, or a chat answer's first sentences
WORDS = {"starts": 30, "questions": 60, "general": 60}


@dataclass(frozen=True)
class Probe:
    """`prompt` as it is asked; an answer that holds one of `accept` is right."""

    prompt: str
    accept: tuple[str, ...]


Probes = Mapping[str, tuple[Probe, ...]]


def load(file: Path, *, default: Probes | None = None) -> Probes:
    """Probes of each kind from a JSON file; a kind that it lacks is taken from `default`, or is empty.

    Raises SpecError for a file that is none, named with the place and the format.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise SpecError(f"the probe file {file} cannot be read: {exc.strerror}. Give a JSON file like\n{FORMAT}") from exc
    except ValueError as exc:
        raise SpecError(f"the probe file {file} is not JSON ({exc}). It looks like\n{FORMAT}") from exc
    if not isinstance(data, dict) or not set(data) & set(KINDS):
        raise SpecError(f"the probe file {file} holds none of {', '.join(KINDS)}. It looks like\n{FORMAT}")
    unknown = sorted(set(data) - set(KINDS))
    if unknown:
        raise SpecError(f"the probe file {file} has {unknown[0]!r}; known are {', '.join(KINDS)}. It looks like\n{FORMAT}")
    odd = [kind for kind in KINDS if not isinstance(data.get(kind, []), list)]
    if odd:
        raise SpecError(f"the probe file {file}: {odd[0]} is no list. It looks like\n{FORMAT}")
    return {
        kind: tuple(_probe(entry, f"{file}: {kind}[{number}]") for number, entry in enumerate(data[kind]))
        if kind in data
        else tuple((default or {}).get(kind, ()))
        for kind in KINDS
    }


def is_right(answer: str, accept: Iterable[str], *, words: int) -> bool:
    """Whether one of the accepted answers stands, as whole words, in the first `words` words. Case and punctuation do not count."""
    said = " " + " ".join(plain_words(answer)[:words]) + " "
    return any(" " + " ".join(plain_words(wanted)) + " " in said for wanted in accept)


def plain_words(text: str) -> list[str]:
    """Lower-case words; thousands' commas and apostrophes are dropped, every other mark separates."""
    return re.findall(r"\w+", re.sub(r"(?<=\d),(?=\d{3})|['’]", "", text.lower()))


def _probe(entry: Any, place: str) -> Probe:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise SpecError(f"{place} has no prompt. It looks like\n{FORMAT}")
    accept = entry.get("accept")
    accept = [accept] if isinstance(accept, str) else accept
    if not isinstance(accept, list) or not all(isinstance(one, str) and plain_words(one) for one in accept) or not accept:
        raise SpecError(f"{place} accepts nothing: give at least one answer in accept. It looks like\n{FORMAT}")
    return Probe(entry["prompt"].strip(), tuple(accept))
