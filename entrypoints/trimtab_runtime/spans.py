"""What can be asked about one clause: its times, counts, names, agents, places, object and subject, each with some wordings."""

from __future__ import annotations

from dataclasses import replace

from trimtab_runtime.clauses import TWO_OBJECTS, Clause
from trimtab_runtime.naming import from_agent, from_complement, from_name, from_subject
from trimtab_runtime.phrases import (
    ADVERBS,
    COLOURS,
    DETERMINERS,
    PREPOSITIONS,
    PRONOUNS,
    RELATIVES,
    Phrase,
    apposed,
    count,
    is_number,
    is_person,
    is_place,
    join,
    names,
    trimmed,
    when,
)
from trimtab_runtime.verbs import word_set
from trimtab_runtime.wording import Asked, agents_of, inverted, tail_of

_MOVING = word_set("go move travel lead return sail come run fly walk bring take carry send ship transfer ride drive march")
_PERSUADING = word_set("ask tell allow enable help let want order force invite persuade encourage permit require")
_LIGHT = word_set("take make give have pay change keep lose")
_FAR = ("below", "above", "from", "beneath", "down", "under", "beyond", "off", "behind")
_ADJECTIVES = ("high", "tall", "deep", "wide", "long", "thick", "old", "heavy")


_OBTAINING = word_set(
    """come buy bring get receive take collect import order fetch move borrow inherit steal acquire purchase travel return run sail"""
)
_COMPARED = word_set("better worse more less well faster slower further earlier later most least")


def asked_of(clause: Clause) -> list[Asked]:
    """All that can be asked about a clause; wordings are without capital and question mark, and not yet checked."""
    if clause.subject[0].lower() == "there":
        return _there(clause)
    found = [*_times(clause)]
    untimed = [(i, phrase) for i, phrase in enumerate(clause.phrases) if not when(phrase)]
    for i, phrase in untimed:
        found += _counted(clause, phrase, i) + _counted_inside(clause, phrase)
    for phrase in clause.leading:
        found += [] if when(phrase) else _counted(clause, phrase, 0)
    found += (
        from_agent(clause)
        + from_name(clause)
        + (from_complement(clause) if clause.copula else _object(clause))
        + _places(clause)
        + from_subject(clause)
    )
    if clause.reason:
        found.append(Asked(4, f"{clause.reason} clause", (inverted(clause, clause.reason),)))
    return found


def _there(clause: Clause) -> list[Asked]:
    if not clause.phrases or not clause.auxiliaries or clause.verb or clause.phrases[0].preposition:
        return []
    first = clause.phrases[0]
    found, rest = count(first.words), tail_of(clause, [first])
    be = clause.auxiliaries[0]
    if found and found[2] == "things":
        return [Asked(1, found[0], (join([f"how many {join(found[1])} {be} there", rest]),))]
    if (named := names(first.words)) and {"called", "named"} & set(first.words):
        noun = [word for word in trimmed(first.words) if word != ","]
        return [Asked(1, join(named), (f"what is the name of the {join(noun[1:])}", f"what is the {join(noun[1:])} called"))]
    return [Asked(5, first.text, (join([f"what {'is' if be == 'are' else be} there", rest]),))] if rest else []


def _times(clause: Clause) -> list[Asked]:
    found = []
    everything = [*clause.phrases, *clause.leading]
    ends = ("from", "to", "until")
    for i, phrase in enumerate(everything):
        fronts = when(phrase)
        ranged = any(one.preposition in ("to", "until") for one in everything)
        attached = phrase.preposition == "from" and not ranged and clause.phrases[:1] != (phrase,)
        before = everything[i - 1] if 0 < i < len(clause.phrases) else None
        nested = before is not None and phrase.preposition == "in" and not before.preposition and "day" in before.words
        if not fronts or attached or nested:
            continue
        skip = [one for one in everything if one is phrase or (one.preposition in ends and phrase.preposition in ends and when(one))]
        skip += agents_of(clause) if len(everything) > 1 else []
        skip += [one for one in clause.leading if phrase in clause.leading and when(one)]
        skip += [one for one in clause.phrases if one.preposition == "at" and one.words[:2] == ("the", "age")]
        if ranged and phrase.preposition in ("from", "to"):
            fronts = ["when"] if phrase.preposition == "from" else []
        found.append(Asked(1, phrase.text, tuple(inverted(clause, front, skip) for front in fronts)))
    return found


def _counted_inside(clause: Clause, phrase: Phrase) -> list[Asked]:
    """A number further on: in a list ("rope, tar and 40 kinds of hook"), or behind "of" ("a loan of 900 pounds")."""
    words = list(phrase.words)
    if count(words) is not None or clause.copula:
        return []
    starts = [i + 1 for i, word in enumerate(words) if word in (",", "and")] if "," in words and not phrase.preposition else []
    for start in starts:
        found = count(words[start:])
        if found and found[2] == "things":
            return [Asked(2, found[0], (inverted(clause, f"how many {join(found[1])}", [phrase]),))]
    if words[:1] == ["a"] and words[2:3] == ["of"] and (found := count(words[3:])) and found[2] == "money":
        return [Asked(2, found[0], (inverted(clause, f"{phrase.preposition} how large a {words[1]}", [phrase]),))]
    return []


def _counted(clause: Clause, phrase: Phrase, number: int) -> list[Asked]:
    """How many, how much, how long, how far: a phrase that starts with a number."""
    if phrase.preposition == "at" and phrase.words[:3] == ("the", "age", "of") and is_number(phrase.words[-1]):
        others = [one for one in clause.phrases if when(one)]
        return [Asked(1, phrase.words[-1], (inverted(clause, "at what age", [phrase, *others]),))]
    found = count(phrase.words)
    if found is None:
        return []
    amount, counted, kind = found
    thing, first, subject = join(counted), phrase.preposition, join(clause.subject)
    following = clause.phrases[number + 1] if number + 1 < len(clause.phrases) else None
    nested = (
        number
        and first
        and clause.phrases[number - 1].preposition
        and not when(clause.phrases[number - 1])
        and clause.phrases[number - 1].words
    )
    rest = [word.lower() for word in counted[1:]]
    skip = [phrase]
    if nested:
        return []
    if clause.copula and not first and rest and rest[-1] in _ADJECTIVES:
        wordings = [inverted(clause, f"how {rest[-1]}", skip)]
    elif kind == "money" and clause.lemma == "cost" and not first:
        plain = [one for one in clause.phrases if one is not phrase and one.preposition != "per"]
        what = inverted(clause, "what", skip)
        wordings = (
            [inverted(clause, "how much", skip), f"what is the price of {subject}", what]
            if not plain
            else [inverted(clause, "how much", skip), what]
        )
    elif kind == "money" and first == "for" and clause.lemma in ("buy", "purchase", "acquire", "sell"):
        wordings = [inverted(clause, "for how much", skip)]
        if clause.passive:
            wordings.append(f"how much was paid for {subject}")
        elif clause.lemma != "sell" and not clause.auxiliaries and not clause.phrases[0].preposition:
            pay = replace(clause, verb="paid", lemma="pay", phrases=(Phrase("for", clause.phrases[0].words), *clause.phrases[1:]))
            wordings.append(inverted(pay, "how much", skip))
    elif kind == "money":
        wordings = [inverted(clause, f"{first} how much money", skip), inverted(clause, f"{first} how many {thing}", skip)]
    elif kind == "percent":
        wordings = [
            inverted(clause, f"what percentage {thing}", skip, first),
            inverted(clause, f"how much {thing or 'percent'}", skip, first),
        ]
    elif kind == "length" and not first and following and following.preposition in _FAR:
        wordings = [inverted(clause, f"how far {following.text}", [phrase, following]), inverted(clause, f"how many {thing}", skip)]
    elif kind == "weight" and clause.lemma == "weigh":
        wordings = [inverted(clause, "how much", skip), inverted(clause, "what", skip), inverted(clause, f"how many {thing}", skip)]
    elif kind == "period" and not first and not rest and clause.lemma in ("last", "take", "live", "stay", "wait", "need"):
        wordings = [inverted(clause, "how long", skip), inverted(clause, f"how many {thing}", skip)]
    elif kind == "degrees":
        wordings = [inverted(clause, f"{first} what temperature", skip)] if first in ("at", "to", "below", "above") else []
    elif kind == "period" and first in ("in", "within", "for", "per"):
        wordings = []
    else:
        wordings = [inverted(clause, f"{first} how many {thing}", skip)]
    return [Asked(1, amount, tuple(wordings))]


def _object(clause: Clause) -> list[Asked]:
    """What, or whom, the verb's object or first preposition names."""
    if not clause.phrases or (clause.passive and clause.lemma in ("call", "name", "know")):
        return []
    first = clause.phrases[0]
    second = clause.lemma in TWO_OBJECTS and len(clause.phrases) > 1 and not clause.phrases[1].preposition and not clause.passive
    at = (
        1
        if second
        and not when(clause.phrases[1])
        and clause.phrases[1].words[0].lower() not in ("each", "every", "up", "out", "back", "away")
        else 0
    )
    target = clause.phrases[at]
    low, text = [word.lower() for word in target.words], join(trimmed(target.words))
    if (
        not low
        or low[0] in ("it", "them", "him", "her", "us", "me", "you", "itself", "themselves")
        or (low[0] in PRONOUNS and len(low) == 1)
    ):
        return []
    if low[0] in ("that", "whether", "how", "what", "why") and not target.preposition:
        return [Asked(4, join([phrase.text for phrase in clause.phrases]), (inverted(clause, "what", clause.phrases),))]
    if clause.passive and clause.lemma == "paint" and not first.preposition and low[-1] in COLOURS:
        return [Asked(1, text, (inverted(clause, "what colour", [first]),))]
    if clause.passive and clause.lemma in ("make", "build") and (low[0] == "of" or first.preposition == "from"):
        return [Asked(1, text.removeprefix("of "), (inverted(clause, "what", [first], "of" if low[0] == "of" else "from"),))]
    who = "who" if is_person(target.words) else "what"
    if target.infinitive and at == 0:
        done = "do" if len(low) < 2 or low[1] not in DETERMINERS else low[0]
        rest = [phrase for phrase in clause.phrases[1:] if not when(phrase)] if done == "do" else []
        return [Asked(4, join(target.words[1:]) or low[0], (inverted(clause, "what", [target, *rest], f"to {done}"),))]
    following = clause.phrases[at + 1 :]
    if not target.preposition:
        nounlike = low[0] in DETERMINERS or target.words[0][0].isupper() or low[-1].endswith("s") or is_number(low[0]) or len(low) > 1
        infinitive = any(phrase.infinitive for phrase in following[:1])
        if (
            not nounlike
            or when(target)
            or low[0] in ADVERBS | PREPOSITIONS | _COMPARED
            or clause.lemma == "let"
            or count(target.words)
            or (infinitive and clause.lemma in _PERSUADING)
        ):
            return []
        if (len(low) == 1 and clause.lemma in _LIGHT) or low[0] in ("no", "all", "nothing"):
            return []
        attached: list[Phrase] = [phrase for phrase in following[:1] if phrase.preposition in ("with", "about", "like", "of", "than")]
        if following and following[0].preposition == "from" and clause.lemma not in _OBTAINING:
            attached = list(following[:1])
        if infinitive:
            attached = [phrase for phrase in following if not when(phrase)]
        return [Asked(4, join(apposed(target.words)[1]) or text, (inverted(clause, who, [target, *attached]),))]
    plain = target.preposition in ("with", "for", "on", "about", "into", "to", "through", "in", "of", "by")
    if (
        not plain
        or at
        or when(target)
        or count(target.words)
        or is_place(target)
        or low[0].endswith("ing")
        or low[0] in RELATIVES | {"hand"}
        or clause.copula
    ):
        return []
    rest = [phrase for phrase in following if not when(phrase)]
    return [] if target in agents_of(clause) else [Asked(5, text, (inverted(clause, who, [target, *rest], target.preposition),))]


def _places(clause: Clause) -> list[Asked]:
    """Where: a run of phrases of place is one answer; one that belongs to another phrase is not asked."""
    found: list[Asked] = []
    phrases = clause.phrases
    runs: list[list[Phrase]] = []
    for i, phrase in enumerate(phrases):
        source = phrase.preposition == "from" and clause.lemma in _OBTAINING and not is_person(phrase.words)
        if not (is_place(phrase) or source) or when(phrase) or not phrase.words:
            continue
        last = runs[-1][-1] if runs else None
        if last is not None and i and phrases[i - 1] is last and phrase.preposition not in ("from", "to"):
            runs[-1].append(phrase)
        elif (
            not i
            or not phrases[i - 1].preposition
            or when(phrases[i - 1])
            or phrases[i - 1] is last
            or phrases[i - 1].preposition in ("by", "as")
        ):
            runs.append([phrase])
    for run in runs:
        first = run[0].preposition
        moving = clause.lemma in _MOVING
        if (first in ("to", "through", "along", "across", "into") and not moving) or (first == "for" and clause.lemma != "leave"):
            continue
        if first == "from" and phrases[0] is not run[0] and clause.lemma not in _OBTAINING and not clause.passive:
            continue
        if (clause.copula and phrases[0] is not run[0]) or (first == "on" and clause.lemma in ("depend", "rely", "focus", "base")):
            continue
        skip = [*run, *(one for other in runs if other[0].preposition in ("from", "to") for one in other)]
        skip += [
            phrase
            for phrase in phrases[phrases.index(run[-1]) + 1 :]
            if phrase.preposition and not when(phrase) and phrase.preposition != "by"
        ]
        skip += [phrase for phrase in phrases if not phrase.preposition and (count(phrase.words) or ("", [], ""))[2] == "length"]
        bare = first not in ("from", "for") and (first != "to" or clause.lemma in ("go", "move", "travel", "lead"))
        behind = next((i for i, phrase in enumerate(phrases) if phrase.preposition or when(phrase)), len(phrases))
        stranded = Phrase("", () if bare else (first,))  # "where was it bought from in 1990"
        moved = replace(clause, phrases=(*phrases[:behind], stranded, *phrases[behind:]))
        found.append(Asked(3, run[0].text, (inverted(moved, "where", skip),)))
    return found
