"""Questions that a page's sentence answers, written by rule (English; a sentence in another language gets none).

Each question asks about one span of the sentence (a date, a number, a name, a place, the subject, the object), so that the sentence
itself is the answer and nothing is taught that the page does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

from trimtab_runtime.clauses import (
    ADVERBS,
    BE,
    DETERMINERS,
    PREPOSITIONS,
    PRONOUNS,
    Clause,
    Phrase,
    clauses,
    is_number,
    is_plural,
    join,
)
from trimtab_runtime.verbs import LEMMAS, lemma_of_third, past, third_person

_MONTHS = "january february march april may june july august september october november december".split()
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_SEASONS = "spring summer autumn winter".split()
_YEAR = re.compile(r"\b(1[0-9]{3}|20[0-9]{2})s?\b")
_PERIODS = re.compile(
    r"^(years?|months?|weeks?|days?|hours?|minutes?|seconds?|decades?|centur(?:y|ies)|summers?|winters?|weekends?|nights?|seasons?)$"
)
_MONEY = re.compile(r"^(pounds?|dollars?|euros?|pence|cents?|francs?|yen|crowns?|kron[eao]r?)$")
_LENGTHS = re.compile(r"^(met(?:re|er)s?|kilomet(?:re|er)s?|miles?|feet|foot|yards?|inch(?:es)?|centimet(?:re|er)s?|cm|km|m|mm)$")
_WEIGHTS = re.compile(r"^(kilograms?|kilos?|grams?|tons?|tonnes?|kg|pounds?|ounces?)$")
_COLOURS = frozenset(
    "red blue green yellow orange purple violet pink brown black white grey gray turquoise gold golden silver crimson scarlet navy beige".split()
)
_PLACES = frozenset(
    """room hall tunnel mine vault garden house cabinet village town city valley island building school church chapel library museum station street lane road park
    square centre center yard shed tower castle cellar basement kitchen office workshop laboratory field hill hillside mountain river lake sea
    coast forest wood harbour port bridge shop desk gate floor bunker country countries region gallery terrace ground drawer shaft cave farm barn monastery theatre
    hospital university college corner wall roof bank pond glasshouse attic bay quarry directory folder file end mouth slope""".split()
)
_ORGANISATIONS = frozenset(
    """bank mill foundation university hall lane street road museum island islands company institute trust society club medal prize award festival library school
    church house park garden project party council race supper lecture night group valley mountains station server software system version""".split()
)
_NOT_ROLES = frozenset(
    "river lake mount isle island village town city year ship boat house variety book film song medal prize university company software".split()
)
_ROLES = re.compile(
    r"(er|or|ist|ian|man|woman|eer|ess|keeper|judge|clerk|monk|nun|king|queen|prince|chef|cook|guard|pilot|poet|priest|nurse|shepherd|captain|chair|head|mayor|doctor|"
    r"student|pupil|architect|friend|sister|brother|son|wife|aunt|president|apprentice|champion|volunteer|guide|smith|wright|herd)$"
)
_AGES = re.compile(r",? aged (\w+)")


@dataclass(frozen=True)
class Asked:
    """One thing asked about: its rank (lower is more specific), the words that answer it, and wordings to choose from."""

    rank: int
    answer: str
    wordings: tuple[str, ...]


def questions(sentence: str, *, subject_hint: str = "", limit: int = 3, seed: int = 0) -> list[str]:
    """At most `limit` questions that the sentence answers, the most specific first, each about another thing where possible.

    `subject_hint` is what a leading he, she, it or they stands for ("the oldest bridge"); without it such a sentence is asked nothing.
    The same arguments give the same questions; another seed gives other wordings of the same facts. [] where no rule fits.
    """
    asked: list[Asked] = []
    for clause in clauses(sentence):
        resolved = _resolve(clause, subject_hint)
        if resolved is not None:
            asked += _ask(resolved)
    asked.sort(key=lambda one: one.rank)
    choose = Random(f"{seed} {sentence}")
    rows = []
    for one in asked:
        fine = list(dict.fromkeys(text for text in (_finish(wording) for wording in one.wordings) if _sound(text, one.answer)))
        turn = choose.randrange(len(fine)) if fine else 0
        rows.append(fine[turn:] + fine[:turn])
    found: list[str] = []
    for turn in range(max(map(len, rows), default=0)):
        found += [row[turn] for row in rows if turn < len(row)]
    return list(dict.fromkeys(found))[:limit]


def with_hints(sentences: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each sentence of a paragraph with its `subject_hint`: what a leading pronoun most likely stands for, or ""."""
    person = thing = things = ""
    for sentence in sentences:
        start = re.match(r"(?:[-*•]\s*)?(?:\w+ )?(he|she|his|her|it|its|they|their)\b", sentence, re.I)
        word = start[1].lower() if start else ""
        hint = person if word in ("he", "she", "his", "her") else thing if word in ("it", "its") else things if word else ""
        yield sentence, hint
        found = clauses(sentence)
        if not found:
            if not word:
                thing = things = ""
            continue
        main = found[0]
        names = _people(found)
        if main.subject[0].lower() not in PRONOUNS:
            subject = join(main.subject)
            if is_plural(main.subject):
                thing, things = "", subject
            else:
                thing, things = ("" if subject in names else subject), ""
                if re.search(r"\b(called|named)\b", sentence) and not names:
                    person = subject
        elif word not in ("it", "they"):
            thing = things = ""
        if names:
            person = names[0]


def _people(found: list[Clause]) -> list[str]:
    names = []
    for clause in found:
        if _is_person(clause.subject, clause):
            names.append(join(clause.subject))
        for phrase in clause.phrases:
            role, name = _apposed(phrase.words)
            if name and (role and _ROLES.search(role[-1]) or phrase.preposition == "by" and clause.passive):
                names.append(join(name))
            elif not role and _is_person(phrase.words, None) and clause.auxiliaries and clause.auxiliaries[-1] in BE and not clause.verb:
                names.append(join(phrase.words))
    return names


def _resolve(clause: Clause, hint: str) -> Clause | None:
    """The clause with its pronoun subject replaced by the hint; None when it stays unclear who or what is meant."""
    first = clause.subject[0].lower()
    if first in ("it", "he", "she", "they") and len(clause.subject) == 1:
        words = tuple(hint.split())
        if not words or is_plural(words) != (first == "they"):
            return None
        return replace(clause, subject=words)
    if first in ("its", "his", "her", "their"):
        words = hint.split()
        if not words or len(words) > 5:
            return None
        owner = words[:-1] + [words[-1] + ("'" if words[-1].endswith("s") else "'s")]
        return replace(clause, subject=(*owner, *clause.subject[1:]))
    if (
        first in ("this", "that", "these", "those", "there", "which", "what", "such", "one", "some", "others", "i", "each", "both")
        and len(clause.subject) == 1
    ):
        return clause if first == "there" else None
    return clause


# --- wording -------------------------------------------------------------------------------------------------------------------


def _tail(clause: Clause, without: Iterable[Phrase] = (), room: int = 12) -> str:
    """The phrases after the verb but those asked about, the leading ones last, shortened to `room` words."""
    skip = list(without)
    kept: list[str] = []
    used = 0
    for number, phrase in enumerate([*clause.phrases, *clause.leading]):
        if any(phrase is one for one in skip):
            continue
        words = _trim(phrase)
        if used + len(words) > room and number:
            continue
        used += len(words)
        kept += words
    if clause.about and used + len(clause.about) <= room:
        kept += clause.about
    return join(kept)


def _trim(phrase: Phrase) -> list[str]:
    """A phrase without its relative clause and without what follows a comma."""
    words = list(phrase.words)
    for i, word in enumerate(words):
        if word.lower() in ("who", "which", "whose", "whom", "that", "where", ",") and i:
            words = words[:i]
            break
    return [phrase.preposition, *words] if phrase.preposition else words


def _subject(clause: Clause) -> str:
    return join(clause.subject)


def _inverted(clause: Clause, wh: str, without: Iterable[Phrase] = (), after: str = "", room: int = 12) -> str:
    """wh + auxiliary + subject + verb + the rest; `after` stands right behind the verb (a stranded preposition)."""
    tail = _tail(clause, without, room)
    if clause.auxiliaries:
        middle = [*clause.auxiliaries[1:], clause.verb]
        return join([wh, clause.auxiliaries[0], _subject(clause), *middle, after, tail])
    do = {"past": "did", "third": "does", "base": "do"}[clause.tense]
    return join([wh, do, _subject(clause), clause.lemma, after, tail])


def _of_subject(clause: Clause, wh: str, without: Iterable[Phrase] = (), plural: bool = False, room: int = 14) -> str:
    """wh + the predicate as it stands, in the singular unless `plural`."""
    tail = _tail(clause, without, room)
    if clause.auxiliaries:
        first = clause.auxiliaries[0]
        if not plural:
            first = {"are": "is", "were": "was", "have": "has", "do": "does"}.get(first, first)
        return join([wh, first, *clause.auxiliaries[1:], clause.verb, tail])
    verb = third_person(clause.lemma) if clause.tense == "base" and not plural else clause.verb
    return join([wh, verb, tail])


def _finish(text: str) -> str:
    text = re.sub(r"\b([Oo]ur)\b", "your" if re.search(r"\b(we|us)\b", text) else "the", text)
    text = re.sub(r"\bare we\b", "are you", re.sub(r"\bwe\b", "you", re.sub(r"\bus\b", "you", text)))
    text = re.sub(r"\s+", " ", text).strip(" ,;:.")
    return text[:1].upper() + text[1:] + "?"


def _sound(text: str, answer: str) -> bool:
    """Whether a question is short, closed and does not say its own answer."""
    words = text[:-1].split()
    low = [word.lower().strip(",;:") for word in words]
    if not 3 <= len(words) <= 22 or low[-1] in DETERMINERS - {"all", "this", "that", "her", "another"} | {
        "and",
        "or",
        "but",
        "which",
        "who",
        "of",
        "than",
    }:
        return False
    if re.search(
        r"\b(it|he|she|they|them|him|her|his|its|their|theirs|this|these|those|my|you yourself|not|never)\b", " ".join(low[1:])
    ) and not re.search(r"\bthis (year|month|week)", text.lower()):
        return False
    said = {
        word
        for word in re.findall(r"[\w'-]+", answer.lower())
        if word not in DETERMINERS | PREPOSITIONS and word not in ("of", "and", "year", "years")
    }
    return bool(said) and not said <= set(re.findall(r"[\w'-]+", text.lower()))


def _names(words: tuple[str, ...] | list[str]) -> list[str]:
    """The capitalised run at the end of a noun phrase."""
    i = len(words)
    while i and (
        words[i - 1][0].isupper()
        or words[i - 1] in ("of", "the", "and", "de", "van", "von")
        and i > 1
        and i < len(words)
        and words[i - 2][0].isupper()
    ):
        i -= 1
    return list(words[i:])


def _apposed(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """("the village baker", "Ann Lee") of "the village baker Ann Lee"; empty lists where a phrase is built otherwise."""
    plain = _trim(Phrase("", words))
    name = _names(plain)
    role = plain[: len(plain) - len(name)]
    return (
        (role, name)
        if name and all(word[0].islower() for word in role) and not any(word in PREPOSITIONS | {"of", "called", "named"} for word in role)
        else ([], [])
    )


def _is_person(words: tuple[str, ...], clause: Clause | None) -> bool:
    role, name = _apposed(words)
    if role:
        return bool(len(role) > 1 and len(name) >= 1 and _ROLES.search(role[-1]) and role[-1] not in _NOT_ROLES)
    return (
        2 <= len(name) <= 3
        and len(name) == len(words)
        and all(re.fullmatch(r"[A-ZÀ-Þ][\w'’.-]*", word) and not word.isupper() for word in name)
        and name[-1].lower() not in _ORGANISATIONS
        and name[0] != "The"
    )


def _time(phrase: Phrase) -> list[str]:
    """Question words for a phrase of time, or []."""
    low = [word.lower() for word in phrase.words]
    text = " ".join(low)
    first = phrase.preposition
    if first and first not in (
        "in",
        "on",
        "at",
        "from",
        "since",
        "until",
        "till",
        "by",
        "during",
        "before",
        "after",
        "for",
        "within",
        "to",
        "around",
    ):
        return []
    year, month = _YEAR.search(text), next((word for word in low if word in _MONTHS), "")
    day = next((word for word in low if word.rstrip("s") in _DAYS), "")
    if first == "for":
        return (
            ["how long", "for how long"]
            if low and _PERIODS.match(low[-1]) and (is_number(low[0]) or low[0] in ("more", "about", "nearly", "over", "almost", "a"))
            else []
        )
    if first == "within" or first == "in" and len(low) > 1 and _PERIODS.match(low[-1]) and any(map(is_number, low[:-1])):
        return ["how soon", "within what time"] if _PERIODS.match(low[-1] if low else "") and first == "within" else ["when"]
    if low[:2] == ["once", "every"] or low and low[0] in ("every", "each") and len(low) > 2 and is_number(low[1]):
        return ["how often"]
    if low and low[0] in ("every", "each", "daily", "once", "twice", "a"):
        return ["how often"] if len(low) < 3 and (low[0] in ("daily", "once", "twice", "every")) else []
    known = bool(
        year and (len(low) <= 3 or re.search(r"(spring|summer|autumn|winter|end|beginning|early|late|mid|century)", text))
    ) or bool(month or day)
    if month in ("may", "march") and len(low) == 1 and phrase.words[0].islower():
        return []
    if not known:
        if (
            low
            and (
                low[-1] in _SEASONS
                or re.search(r"\b(o'clock|noon|midnight|morning|evening|afternoon|night|easter|christmas|quarter)$", text)
            )
            and first in ("in", "at", "from", "until", "on", "during", "since", "")
        ):
            return {"until": ["until when"], "since": ["since when"], "at": ["at what time", "when"]}.get(first, ["when"])
        if low and low[0] in ("last", "next", "this") and len(low) == 2:
            return ["when"]
        return []
    if first == "since":
        return ["since when", "since which year" if year and not month else "since when"]
    if first in ("until", "till"):
        return ["until when"]
    if first in ("before", "after", "by"):
        return [f"{first} which year"] if year and not month else [f"{first} when"] if first == "by" else []
    if year and not month and not day:
        return ["when", "in which year", "in what year"] if len(low) == 1 else ["when"]
    if month and (len(low) == 1 or year and len(low) == 2):
        return ["when", "in which month", "in what month"]
    if day and len(low) == 1:
        return ["when", "on which day", "on what day"]
    return ["when"] if first in ("in", "on", "at", "from", "during", "around", "") else []


def _count(words: tuple[str, ...]) -> tuple[str, list[str], str] | None:
    """(number, what is counted, its kind) of a phrase that starts with a number: "about 90 brass bells"."""
    trimmed = _trim(Phrase("", words))
    i = 0
    while i < len(trimmed) and trimmed[i].lower() in (
        "about",
        "around",
        "some",
        "more",
        "less",
        "than",
        "at",
        "least",
        "most",
        "up",
        "to",
        "nearly",
        "over",
        "almost",
        "only",
        "another",
        "minus",
        "the",
        "exactly",
        "roughly",
        "approximately",
    ):
        i += 1
    if i >= len(trimmed) or not is_number(trimmed[i]) or re.search(r"(st|nd|rd|th)$", trimmed[i]) and trimmed[i][0].isdigit():
        return None
    begin = i
    while i < len(trimmed) and (is_number(trimmed[i]) or trimmed[i] in ("million", "billion", "thousand", "hundred")):
        i += 1
    if begin and trimmed[begin - 1].lower() == "the" and begin == 1 and not trimmed[i:]:
        return None
    number, counted = join(trimmed[begin:i]), trimmed[i:]
    for cut, word in enumerate(counted):
        if word.lower() in ("and", "or", ","):
            counted = counted[:cut]
            break
    if number[0] in "£$€":
        return number, [], "money"
    if not counted:
        return None
    unit = counted[0].lower()
    if unit in ("percent", "%") or number.endswith("%"):
        return number, counted[1:] if unit in ("percent", "%") else counted, "percent"
    if _YEAR.fullmatch(number) and "," not in number or unit[0].isdigit() or unit in ("o'clock", "am", "pm"):
        return None
    kind = (
        "money"
        if _MONEY.match(unit)
        else "length"
        if _LENGTHS.match(unit)
        else "weight"
        if _WEIGHTS.match(unit)
        else "period"
        if _PERIODS.match(unit)
        else "degrees"
        if unit == "degrees"
        else "things"
    )
    return number, counted, kind


# --- what to ask ---------------------------------------------------------------------------------------------------------------


def _ask(clause: Clause) -> list[Asked]:
    if clause.subject[0].lower() == "there":
        return _there(clause)
    asked: list[Asked] = []
    copula = bool(clause.auxiliaries and clause.auxiliaries[-1] in BE and not clause.verb)
    timed = [phrase for phrase in (*clause.phrases, *clause.leading) if _time(phrase)]
    for phrase in (*clause.phrases, *clause.leading):
        words = _time(phrase)
        if words:
            others = [
                one
                for one in timed
                if one is phrase or one.preposition in ("from", "to", "until") and phrase.preposition in ("from", "to", "until")
            ]
            asked.append(Asked(1, phrase.text, tuple(_inverted(clause, word, others) for word in words)))
    for number, phrase in enumerate(clause.phrases):
        if not any(phrase is one for one in timed):
            asked += _of_count(clause, phrase, number)
    asked += _of_agent(clause)
    asked += _called(clause)
    asked += _copula(clause) if copula else _of_object(clause)
    for phrase in clause.phrases:
        if not any(phrase is one for one in timed):
            asked += _of_place(clause, phrase)
    asked += _of_subjects(clause, copula)
    if clause.reason:
        asked.append(Asked(5, "because", (_inverted(clause, "why"),)))
    return asked


def _there(clause: Clause) -> list[Asked]:
    if not clause.phrases or not clause.auxiliaries or clause.verb:
        return []
    first, count = clause.phrases[0], _count(clause.phrases[0].words)
    rest = _tail(clause, [first])
    if count and not first.preposition:
        return [Asked(1, count[0], (join(["how many", *count[1], clause.auxiliaries[0], "there", rest]),))]
    return [Asked(5, first.text, (join(["what is there", rest]),))] if rest and not first.preposition else []


def _of_count(clause: Clause, phrase: Phrase, number: int) -> list[Asked]:
    found = _count(phrase.words)
    if found is None:
        return []
    amount, counted, kind = found
    thing = join(counted)
    following = clause.phrases[number + 1] if number + 1 < len(clause.phrases) else None
    first = phrase.preposition
    skip = [phrase]
    if kind == "money":
        if clause.lemma == "cost" and not first:
            return [
                Asked(
                    1,
                    amount,
                    (
                        _inverted(clause, "how much", skip),
                        join(["what is the price of", _subject(clause)]),
                        join(["what does", _subject(clause), "cost"]) if clause.tense == "third" else _inverted(clause, "what", skip),
                    ),
                )
            ]
        if first == "for" and clause.lemma in ("buy", "purchase", "acquire", "sell"):
            if clause.passive:
                return [Asked(1, amount, (_inverted(clause, "for how much", skip), join(["how much was paid for", _subject(clause)])))]
            pay = replace(
                clause, verb="paid" if clause.tense == "past" else "pays", lemma="pay", phrases=(Phrase("for", clause.phrases[0].words),)
            )
            return [
                Asked(
                    1,
                    amount,
                    (_inverted(pay, "how much"), _inverted(clause, "for how much", skip))
                    if clause.lemma != "sell" and not clause.auxiliaries
                    else (_inverted(clause, "for how much", skip),),
                )
            ]
        return [
            Asked(
                1,
                amount,
                (
                    _inverted(clause, f"{first} how much money" if first else "how much", skip),
                    _inverted(clause, f"{first} how many {thing}", skip),
                ),
            )
        ]
    if kind == "percent":
        of = thing
        plain = join(["what percentage", of])
        return [
            Asked(
                1,
                amount,
                (_inverted(clause, plain, skip, first), _inverted(clause, join(["how much", of]), skip, first))
                if of
                else (_inverted(clause, plain, skip, first),),
            )
        ]
    rest = [word.lower() for word in counted[1:]]
    if (
        kind in ("length", "weight", "period")
        and rest
        and rest[-1] in ("high", "tall", "deep", "wide", "long", "thick", "old", "heavy")
        and not first
    ):
        return [Asked(1, amount, (_inverted(clause, f"how {rest[-1]}", skip),))]
    if (
        kind == "length"
        and not first
        and following
        and following.preposition in ("below", "above", "from", "beneath", "down", "under", "beyond", "north", "off")
    ):
        return [
            Asked(
                1,
                amount,
                (_inverted(clause, join(["how far", following.text]), [*skip, following]), _inverted(clause, f"how many {thing}", skip)),
            )
        ]
    if kind == "weight" and clause.lemma == "weigh":
        return [
            Asked(
                1,
                amount,
                (_inverted(clause, "how much", skip), _inverted(clause, "what", skip), _inverted(clause, f"how many {thing}", skip)),
            )
        ]
    if kind == "period" and (clause.lemma in ("last", "take", "spend", "live", "stay", "wait", "need") and not first):
        return [Asked(1, amount, (_inverted(clause, "how long", skip), _inverted(clause, f"how many {thing}", skip)))]
    if kind == "degrees":
        return (
            [Asked(1, amount, (_inverted(clause, f"{first} what temperature", skip),))] if first in ("at", "to", "below", "above") else []
        )
    if first == "at" and counted[0] == "age":
        return []
    if first in ("in", "within", "for") and kind == "period":
        return []
    front = f"{first} how many {thing}" if first else f"how many {thing}"
    return [Asked(1, amount, (_inverted(clause, front, skip),))]


def _of_agent(clause: Clause) -> list[Asked]:
    """Who did it, from "was opened by the mayor Ann Lee": asked in the active voice."""
    if not clause.passive or clause.verb.endswith("ing"):
        return []
    agent = next((phrase for phrase in clause.phrases if phrase.preposition == "by" and phrase.words and not _time(phrase)), None)
    if agent is None or agent.words[0].lower() in ("hand", "weight", "means") or agent.words[0].endswith("ing"):
        return []
    role, name = _apposed(agent.words)
    name = name or (_names(agent.words[:3]) if agent.words[0][0].isupper() else [])
    person = bool(name) and (not name or name[-1].lower() not in _ORGANISATIONS) or bool(_ROLES.search(_trim(agent)[-1]))
    tail = _tail(clause, [agent])
    finite = clause.auxiliaries[0]
    chain = list(clause.auxiliaries)
    if len(chain) == 1 and finite in ("was", "were"):
        active = past(clause.lemma)
    elif len(chain) == 1 and finite in ("is", "are"):
        active = third_person(clause.lemma)
    elif chain[-1] == "been":
        active = f"{'had' if finite == 'had' else 'has'} {clause.verb}"
    else:
        active = f"{finite} {clause.lemma}" if finite not in BE else f"{'is' if finite in ('is', 'are') else 'was'} {clause.verb}"
        if finite in BE:
            return []
    predicate = join([active, _object_form(clause), tail])
    who = "who" if person else "what"
    wordings = [f"{who} {predicate}"]
    answer = join(name) if name else join(_trim(agent)[1:])
    if person:
        wordings.append(f"by whom {_inverted(clause, '', [agent])}")
        wordings.append(f"what is the name of the {join(role[1:]) if len(role) > 1 else 'person'} who {predicate}")
        if len(role) > 1 and role[0] in ("the", "a", "an"):
            wordings.append(f"which {join(role[1:])} {predicate}")
    asked = [Asked(2, answer, tuple(wordings))]
    if len(role) > 1 and name and person:
        asked.append(Asked(6, join(role[1:]), (f"who is {join(name)}",)))
    return asked


def _object_form(clause: Clause) -> str:
    text = _subject(clause)
    return {"we": "us", "they": "them", "i": "me", "he": "him", "she": "her"}.get(text.lower(), text)


def _called(clause: Clause) -> list[Asked]:
    """Names given with called, named or known as."""
    asked: list[Asked] = []
    passive = clause.passive and clause.lemma in ("call", "name", "know", "entitle", "title", "nickname")
    if passive and clause.phrases:
        first = clause.phrases[0]
        if first.preposition in ("", "as") and (first.words[:1] and _names(first.words)):
            tense = "was" if clause.auxiliaries[0] in ("was", "were") else "is"
            wordings = [_inverted(replace(clause, verb="called"), "what", clause.phrases)]
            if clause.auxiliaries in (("is",), ("was",), ("are",), ("were",)):
                wordings.append(f"what {tense} the name of {_subject(clause)}")
                wordings.append(f"which name does {_subject(clause)} have" if tense == "is" and not clause.plural else wordings[0])
            return [Asked(1, join(_names(_trim(first))), tuple(wordings))]
        return []
    for phrase in clause.phrases:
        words = list(phrase.words)
        at = next((i for i, word in enumerate(words) if word in ("called", "named", "nicknamed") and 0 < i < len(words) - 1), -1)
        if at < 0 or not words[at + 1][0].isupper() and words[at + 1] != "the":
            continue
        name = [word for word in words[at + 1 :]]
        noun = [word for word in words[:at] if word != ","]
        if noun and noun[0].lower() in ("a", "an", "the", "one"):
            noun = noun[1:]
        if not noun:
            continue
        kind = join(noun)
        if not phrase.preposition and clause.auxiliaries and clause.auxiliaries[-1] in BE and not clause.verb:
            asked.append(
                Asked(
                    1,
                    join(name),
                    (f"what is {_subject(clause)} called", f"what is the name of {_subject(clause)}", f"what is {_subject(clause)}"),
                )
            )
        else:
            front = f"{phrase.preposition} which {kind}" if phrase.preposition else f"which {kind}"
            asked.append(Asked(2, join(name), (_inverted(clause, front, [phrase]),)))
    return asked


def _copula(clause: Clause) -> list[Asked]:
    if not clause.phrases or clause.phrases[0].preposition:
        return []
    first = clause.phrases[0]
    words = _trim(first)
    be = clause.auxiliaries[0]
    low = [word.lower() for word in words]
    subject = _subject(clause)
    if subject.lower() in PRONOUNS | {"who"} or not words:
        return []
    chain = " ".join(clause.auxiliaries[1:])
    if low[0] not in DETERMINERS and not words[0][0].isupper() and not _apposed(tuple(words))[1]:
        if low[-1] in _COLOURS and len(low) < 4:
            return [Asked(1, join(words), (f"what colour {be} {subject}",))]
        return []
    tail = _tail(clause, [first], 8)
    person = (
        _is_person(tuple(words), None)
        or _is_person(clause.subject, clause)
        or bool(
            _ROLES.search(clause.subject[-1 if "of" not in clause.subject else clause.subject.index("of") - 1])
            and clause.subject[0] in ("the", "our", "The", "Our")
        )
    )
    who = "who" if person else "what"
    wordings = [join([f"{who} {be} {subject} {chain}", tail])]
    if _names(words) == words or _apposed(tuple(words))[1] and person:
        wordings.append(f"what is the name of {subject}")
        if person:
            wordings.append(f"who is {subject}")
    asked = [Asked(2, join(words), tuple(wordings))]
    if clause.subject[0][0].isupper() and person and low[0] in ("the", "a", "an", "our"):
        asked.append(Asked(2, subject, (join([f"who {be}", chain, *words, tail]),)))
    elif low[0] in ("the", "our") and not person:
        asked.append(Asked(3, subject, (join([f"what {be}", chain, *words, tail]),)))
    return asked


def _of_object(clause: Clause) -> list[Asked]:
    if not clause.phrases or (clause.passive and clause.lemma in ("call", "name", "know")):
        return []
    asked: list[Asked] = []
    first = clause.phrases[0]
    low = [word.lower() for word in first.words]
    text = join(_trim(first))
    if clause.passive and clause.lemma == "paint" and not first.preposition:
        return [Asked(1, text, (_inverted(clause, "what colour", [first]),))]
    if (
        first.preposition in ("of", "from")
        and clause.passive
        and clause.lemma == "make"
        or low[:1] == ["of"]
        and clause.lemma in ("make", "build")
    ):
        return [Asked(1, text, (_inverted(clause, "what", [first], "of" if low[:1] == ["of"] else first.preposition),))]
    objectlike = (
        not first.preposition
        and low
        and (low[0] in DETERMINERS or first.words[0][0].isupper() or low[-1].endswith("s") or is_number(low[0]))
        and low[0] not in ADVERBS
        and not _time(first)
    )
    if objectlike and not clause.passive and not (_count(first.words) or ("", [], "things"))[2] in ("length", "weight", "period", "money"):
        role, name = _apposed(first.words)
        who = "who" if _is_person(first.words, None) else "what"
        wordings = [_inverted(clause, who, [first])]
        asked.append(Asked(4, join(name) or text, tuple(wordings)))
    elif objectlike and clause.passive:
        asked.append(Asked(4, text, (_inverted(clause, "what", [first]),)))
    if (
        first.preposition in ("with", "for", "on", "about", "into", "to", "through", "by", "in", "of")
        and not _time(first)
        and not _count(first.words)
        and not _place(first)
        and low
        and not low[0].endswith("ing")
    ):
        if not (first.preposition == "by" and clause.passive) and (clause.verb or clause.auxiliaries[-1:] == ()):
            who = "who" if _is_person(first.words, None) else "what"
            asked.append(Asked(5, text, (_inverted(clause, who, [first], first.preposition),)))
    return asked


def _place(phrase: Phrase) -> bool:
    if (
        phrase.preposition
        not in (
            "in",
            "on",
            "at",
            "near",
            "under",
            "below",
            "above",
            "beneath",
            "beside",
            "between",
            "behind",
            "inside",
            "outside",
            "to",
            "from",
            "into",
        )
        or not phrase.words
    ):
        return False
    head: list[str] = []
    for word in _trim(phrase)[1:]:
        if word.lower() in ("of", "and", ",", "called", "named"):
            break
        head.append(word)
    if not head or any(map(is_number, head)):
        return False
    last = head[-1].lower()
    capital = head[-1][0].isupper() and (head[0][0].isupper() or head[0] in ("the", "our"))
    return last in _PLACES or last.rstrip("s") in _PLACES or capital and last not in _MONTHS and not _is_role(head)


def _is_role(words: list[str]) -> bool:
    return any(_ROLES.search(word) and word[0].islower() for word in words)


def _of_place(clause: Clause, phrase: Phrase) -> list[Asked]:
    if not _place(phrase) or (
        phrase.preposition == "to"
        and clause.lemma
        not in (
            "go",
            "move",
            "travel",
            "lead",
            "return",
            "sail",
            "come",
            "run",
            "fly",
            "walk",
            "bring",
            "take",
            "carry",
            "send",
            "ship",
            "transfer",
            "be",
        )
    ):
        return []
    if phrase.preposition == "on" and clause.lemma in ("depend", "rely", "focus", "base"):
        return []
    others = [
        one
        for one in clause.phrases
        if one is not phrase and one.preposition and _place(one) and clause.phrases.index(one) > clause.phrases.index(phrase)
    ]
    start = [one for one in clause.phrases if one.preposition == "from"] if phrase.preposition == "to" else []
    after = "from" if phrase.preposition == "from" else ""
    return [Asked(3, join(_trim(phrase)), (_inverted(clause, "where", [phrase, *others, *start], after),))]


def _of_subjects(clause: Clause, copula: bool) -> list[Asked]:
    """Questions that the subject answers."""
    low = [word.lower() for word in clause.subject]
    if (
        low[0] in PRONOUNS | {"who", "someone", "everyone", "anyone", "everything", "anything", "it"}
        or low[0].endswith("ing")
        and len(low) > 6
    ):
        return []
    if copula and (not clause.phrases or clause.phrases[0].preposition or clause.phrases[0].words[0].lower() not in ("the", "our")):
        return []
    if copula or clause.passive and clause.lemma in ("call", "name"):
        return []
    subject = _subject(clause)
    tail = _tail(clause)
    if len(tail.split()) < 2:
        return []
    person = _is_person(clause.subject, clause)
    role, name = _apposed(clause.subject)
    count = _count(clause.subject)
    if count and count[2] in ("things", "percent") and not (len(count[1]) > 5):
        front = join(["how many", *count[1]]) if count[2] == "things" else join(["what percentage", *count[1]])
        return [
            Asked(1, count[0], (_of_subject(clause, front, plural=True),)),
            Asked(5, subject, (_of_subject(clause, "who" if _is_role(list(clause.subject)) else "what"),)),
        ]
    agent = [phrase for phrase in clause.phrases if phrase.preposition == "by" and clause.passive and not _time(phrase)]
    if person:
        predicate = _of_subject(clause, "")
        wordings = [f"who {predicate}", f"what is the name of the person who {predicate}"]
        if len(role) > 1:
            wordings[1] = f"what is the name of the {join(role[1:])} who {predicate}"
            wordings.append(f"which {join(role[1:])} {predicate}")
        return [Asked(2, join(name), tuple(wordings))]
    group = _is_role([low[low.index("of") - 1] if "of" in low else low[-1]])
    wh = "who" if group or low[-1] in ("people", "children", "others", "team", "family") else "what"
    return [Asked(5, subject, (_of_subject(clause, wh, agent if len(tail.split()) > 9 else ()),))]
