"""A question as the beginning of the sentence that answers it, for models that only go on from text. English, by rule."""

from __future__ import annotations

import re
from collections.abc import Callable

# past tense and participle of verbs that do not end in -ed
_SAME = "built made found held kept led lit cut sold bought sent taught told won paid laid set founded".split()
_OTHER = "wrote-written drew-drawn grew-grown gave-given took-taken chose-chosen saw-seen sang-sung wove-woven wore-worn threw-thrown"
_IRREGULAR = {verb: verb for verb in _SAME} | dict(pair.split("-") for pair in f"{_OTHER} knew-known bore-born".split())
_BE = r"(?P<be>is|are|was|were)"
_DONE = rf"(?P<done>\w+ed|{'|'.join(sorted(set(_IRREGULAR.values())))})"
_PAST = rf"(?P<past>\w+ed|{'|'.join(_IRREGULAR)})"
_HOW = "old|long|tall|high|deep|wide|large|big|far|heavy|fast|expensive"

_Words = dict[str, str]
_RULES: tuple[tuple[str, Callable[[_Words], str]], ...] = (
    (rf"when {_BE} (?P<x>.+?) {_DONE}", lambda w: f"{w['x']} {w['be']} {w['done']} in"),
    (rf"in (?:which|what) year {_BE} (?P<x>.+?) {_DONE}", lambda w: f"{w['x']} {w['be']} {w['done']} in"),
    (rf"when {_BE} (?P<x>.+)", lambda w: f"{w['x']} {w['be']} on"),
    (r"when (?:does|do) (?P<x>.+) (?P<verb>open|close|begin|start|end|leave|arrive)", lambda w: f"{w['x']} {_third_person(w['verb'])} at"),
    (rf"where {_BE} (?P<x>.+?) {_DONE}", lambda w: f"{w['x']} {w['be']} {w['done']} in"),
    (rf"where {_BE} (?P<x>.+)", lambda w: f"{w['x']} {w['be']} in"),
    (r"how many (?P<n>.+?) (?:are|were) there (?P<x>.+)", lambda w: f"the number of {w['n']} {w['x']} is"),
    (r"how many (?P<n>.+?) (?:does|do|did) (?P<x>.+?) (?:have|own)", lambda w: f"the number of {w['n']} of {w['x']} is"),
    (rf"how (?:{_HOW}) {_BE} (?P<x>.+)", lambda w: f"{w['x']} {w['be']}"),
    (rf"(?:what|who) {_BE} (?P<x>.+)", lambda w: f"{w['x']} {w['be']}"),
    (r"what does (?P<x>.+) (?P<verb>\w+)", lambda w: f"{w['x']} {_third_person(w['verb'])}"),
    (r"what do (?P<x>.+) (?P<verb>\w+)", lambda w: f"{w['x']} {w['verb']}"),
    (rf"who {_PAST} (?P<x>.+)", lambda w: f"{w['x']} was {_IRREGULAR.get(w['past'], w['past'])} by"),
)


def sentence_start(question: str) -> str | None:
    """What a sentence that answers the question begins with; None where no rule fits.

    Of "What are Amazon EC2 P5 instances, which GPUs do they have?" it is "Amazon EC2 P5 instances are": the first clause counts.
    """
    if not question.rstrip().endswith("?"):
        return None
    clause = re.split(r",\s|;|\?", question.strip(), maxsplit=1)[0].strip()
    for pattern, build in _RULES:
        match = re.fullmatch(pattern, clause, re.IGNORECASE)
        if match:
            words = {name: word.lower() if name in ("be", "done", "past", "verb") else word for name, word in match.groupdict().items()}
            start = build(words)
            return start[0].upper() + start[1:]
    return None


def _third_person(verb: str) -> str:
    if re.search(r"(s|x|z|ch|sh|o)$", verb):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if re.search(r"[^aeiou]y$", verb) else f"{verb}s"
