"""What is asked, and how a clause's words are put in a question's order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trimtab_runtime.clauses import Clause
from trimtab_runtime.phrases import DETERMINERS, Phrase, join, trimmed, when
from trimtab_runtime.verbs import third_person


@dataclass(frozen=True)
class Asked:
    """One thing asked about: its rank (lower is more specific), the words that answer it, and wordings to choose from."""

    rank: int
    answer: str
    wordings: tuple[str, ...]


def tail_of(clause: Clause, without: Iterable[Phrase] = (), room: int = 12) -> str:
    """The phrases after the verb but those asked about, the leading ones last, shortened to about `room` words."""
    skip = list(without)
    kept: list[str] = []
    cut = False
    for number, phrase in enumerate(clause.phrases):
        words = _plain(phrase)
        whole = len(words) == len(phrase.words) + bool(phrase.preposition)
        if not any(phrase is one for one in skip) and not (cut and not when(phrase)) and (not number or len(kept) + len(words) <= room):
            kept += words
        cut = cut or not whole
    for phrase in clause.leading:
        words = _plain(phrase)
        if not any(phrase is one for one in skip) and len(kept) + len(words) <= room:
            kept += words
    if clause.condition and len(kept) + len(clause.condition) <= room:
        kept += clause.condition
    return join(kept)


def _plain(phrase: Phrase) -> list[str]:
    """A phrase's words without relative clause, without "called ...", and without a second half that starts anew ("inside and a few")."""
    words = trimmed(phrase.words)
    for i, word in enumerate(words):
        if word == "and" and (
            not i or (i + 1 < len(words) and words[i + 1] in DETERMINERS and "," not in words and words[0] not in DETERMINERS)
        ):
            words = words[:i]
            break
    return [word for word in (phrase.preposition, *words) if word]


def inverted(clause: Clause, front: str, without: Iterable[Phrase] = (), after: str = "", room: int = 12) -> str:
    """front + auxiliary + subject + verb + the rest; `after` stands right behind the verb (a stranded preposition)."""
    tail = tail_of(clause, without, room)
    subject = join(clause.subject)
    if clause.auxiliaries:
        return join([front, clause.auxiliaries[0], subject, *clause.auxiliaries[1:], clause.verb, after, tail])
    return join([front, {"past": "did", "third": "does", "base": "do"}[clause.tense], subject, clause.lemma, after, tail])


def predicate(clause: Clause, front: str, without: Iterable[Phrase] = (), *, plural: bool = False, room: int = 14) -> str:
    """front + the predicate as it stands, in the singular unless `plural`."""
    tail = tail_of(clause, without, room)
    if clause.auxiliaries:
        first = clause.auxiliaries[0]
        first = first if plural else {"are": "is", "were": "was", "have": "has", "do": "does"}.get(first, first)
        return join([front, first, *clause.auxiliaries[1:], clause.verb, tail])
    return join([front, third_person(clause.lemma) if clause.tense == "base" and not plural else clause.verb, tail])


def agents_of(clause: Clause) -> list[Phrase]:
    """The phrases that say by whom or what a passive's deed was done."""
    return [phrase for phrase in clause.phrases if clause.passive and phrase.preposition == "by" and phrase.words and not when(phrase)]
