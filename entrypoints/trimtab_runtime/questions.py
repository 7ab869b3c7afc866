"""Questions that a page's sentence answers, written by rule (English; a sentence in another language gets none).

Each question asks about one span of the sentence (a date, a number, a name, a place, the object, the subject), so that the sentence
itself is the answer and nothing is taught that the page does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

from trimtab_runtime.clauses import Clause, clauses
from trimtab_runtime.phrases import DETERMINERS, PREPOSITIONS, PRONOUNS, apposed, is_number, is_person, is_plural, is_role, join
from trimtab_runtime.spans import asked_of
from trimtab_runtime.wording import Asked

_PRONOUN_START = re.compile(r"(?:[-*•]\s*)?(?:\w+ )?(he|she|his|her|it|its|they|their)\b", re.IGNORECASE)
_UNCLEAR = re.compile(r"\b(it|he|she|they|them|him|theirs|this|these|those|my|not|never)\b")
_OWNED = re.compile(r"\b(its|his|her|their)\b")  # whose, in a passive, is rarely the subject's
_WITH = re.compile(r", with (?:about |some |more than |over |nearly |at least )?([\w,.-]*\w) ([a-z-]+(?: [a-z-]+)?)(?=,| and |\.?$)")
_AGED = re.compile(r"((?:[A-ZÀ-Þ][\w'’-]+ )+[A-ZÀ-Þ][\w'’-]+), aged (\w+)")


def questions(sentence: str, *, subject_hint: str = "", limit: int = 3, seed: int = 0) -> list[str]:
    """At most `limit` questions that the sentence answers, the most specific first, each about another thing where possible.

    `subject_hint` is what a leading he, she, it or they stands for ("the oldest bridge"); without it such a sentence is asked nothing.
    The same arguments give the same questions; another seed gives other wordings of the same facts. [] where no rule fits.
    """
    asked: list[Asked] = []
    for clause in clauses(sentence):
        resolved = _resolved(clause, subject_hint)
        if resolved is not None:
            asked += [one for one in asked_of(resolved) if not (clause.passive and _OWNED.search(" ".join(one.wordings)))]
    asked += _aside(sentence, asked)
    choose = Random(f"{seed} {sentence}")
    rows = []
    for one in sorted(asked, key=lambda one: one.rank):
        least = 3 if one.rank < 4 else 4  # "What grows?" would be said of anything
        sound = list(dict.fromkeys(text for text in map(_finished, one.wordings) if _is_sound(text, one.answer, least)))
        turn = choose.randrange(len(sound)) if sound else 0
        rows.append(sound[turn:] + sound[:turn])
    in_turn = [row[turn] for turn in range(max(map(len, rows), default=0)) for row in rows if turn < len(row)]
    return list(dict.fromkeys(in_turn))[:limit]


def _aside(sentence: str, asked: list[Asked]) -> list[Asked]:
    """What stands between commas beside the clauses: an age, or what a thing comes with."""
    found = []
    if asked and (aged := _AGED.search(sentence)):
        found.append(Asked(1, aged[2], (f"how old is {aged[1]}",)))
    main = clauses(sentence)[:1]
    beside = _WITH.search(sentence)
    if main and beside and is_number(beside[1]) and main[0].subject[0].lower() not in PRONOUNS:
        do = "do" if main[0].plural else "does"
        found.append(Asked(1, beside[1], (f"how many {beside[2]} {do} {join(main[0].subject)} have",)))
    return found


def with_hints(sentences: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each sentence of a paragraph with its `subject_hint`: what a leading pronoun most likely stands for, or ""."""
    person = thing = things = ""
    for sentence in sentences:
        start = _PRONOUN_START.match(sentence)
        word = start[1].lower() if start else ""
        yield sentence, person if word in ("he", "she", "his", "her") else thing if word in ("it", "its") else things if word else ""
        found = clauses(sentence)
        people = _people(found)
        subject = re.sub(r"\b(his|her|its|their)\b", "the", join(found[0].subject)) if found else ""
        if not found or subject.split()[0].lower() in PRONOUNS | {"his", "her", "its", "their", "there", "this", "that"}:
            if word not in ("it", "they") or not found:
                thing = things = ""
        elif is_plural(found[0].subject):
            thing, things = "", subject
        else:
            thing, things = "" if subject in people else subject, ""
            if re.search(r"\b(called|named)\b", sentence) and not people:
                people = [subject]  # "The cat is called Tom. He ..."
        person = people[0] if people else person


def _people(found: list[Clause]) -> list[str]:
    """Names of people in the clauses, the likeliest referent of he or she first."""
    named = []
    for clause in found:
        if is_person(clause.subject):
            named.append(join(apposed(clause.subject)[1]))
        for number, phrase in enumerate(clause.phrases):
            role, name = apposed(phrase.words)
            complement = clause.copula and not number and not phrase.preposition
            if is_person(phrase.words) and (role or complement or (phrase.preposition == "by" and clause.passive)):
                named.append(join(name))
        head = clause.subject[-1]
        if (
            clause.copula
            and clause.phrases
            and not clause.phrases[0].preposition
            and is_role(head)
            and not named
            and apposed(clause.phrases[0].words)[1]
        ):
            named.append(join(apposed(clause.phrases[0].words)[1]))
    return named


def _resolved(clause: Clause, hint: str) -> Clause | None:
    """The clause with its pronoun subject replaced by the hint; None when it stays unclear who or what is meant."""
    plain = tuple("the" if i and word in ("his", "her", "its", "their") else word for i, word in enumerate(clause.subject))
    clause = replace(clause, subject=plain)
    first, alone, words = clause.subject[0].lower(), len(clause.subject) == 1, tuple(hint.split())
    if first in ("it", "he", "she", "they") and alone:
        return replace(clause, subject=words, resolved=True) if words and is_plural(words) == (first == "they") else None
    if first in ("its", "his", "her", "their"):
        if not words or len(words) > 5:
            return None
        owner = (*words[:-1], words[-1] + ("'" if words[-1].endswith("s") else "'s"))
        return replace(clause, subject=(*owner, *clause.subject[1:]))
    vague = (
        "this",
        "that",
        "these",
        "those",
        "which",
        "what",
        "such",
        "one",
        "some",
        "others",
        "many",
        "most",
        "few",
        "all",
        "i",
        "each",
        "both",
        "a",
    )
    return None if first in vague and alone else clause


def _finished(text: str) -> str:
    """A wording as a question: the site's we and our become the reader's you and the, a capital and a question mark are put."""
    you = re.search(r"\b(we|us)\b", text)
    text = re.sub(r"\bour\b", "your" if you else "the", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(we|us)\b", "you", re.sub(r"\bam I\b", "are you", text))
    text = re.sub(r"\s+", " ", text).strip(" ,;:.")
    return text[:1].upper() + text[1:] + "?"


def _is_sound(text: str, answer: str, least: int) -> bool:
    """Whether a question is short, complete, clear without its page, and does not say its own answer."""
    words = text[:-1].split()
    low = [word.lower().strip(",;:") for word in words]
    if re.search(r"\bher$|\bher (?:in|on|at|to|for|by|with)\b", text[:-1]):
        return False
    dangling = (DETERMINERS - {"all", "this", "that", "another", "own"}) | {"and", "or", "but", "which", "who", "than"}
    if least == 4 and len(words) < 6 and "you" in low:
        return False  # "What did you keep?" is asked of nothing in particular
    if not least <= len(words) <= 21 or low[-1] in dangling:
        return False
    if _UNCLEAR.search(re.sub(r"\bthis (year|month|week|season)", "", " ".join(low[1:]))):
        return False
    content = {word for word in re.findall(r"[\w'-]+", answer.lower()) if word not in DETERMINERS | PREPOSITIONS | {"of", "and"}}
    return bool(content) and not content <= set(re.findall(r"[\w'-]+", text.lower()))
