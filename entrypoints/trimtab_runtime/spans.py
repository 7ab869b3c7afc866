"""What can be asked about one clause: its times, counts, names, agents, places, object and subject, each with some wordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab_runtime.clauses import TWO_OBJECTS, Clause
from trimtab_runtime.phrases import (
    ADVERBS,
    COLOURS,
    DETERMINERS,
    PREPOSITIONS,
    PRONOUNS,
    RELATIVES,
    TIMES,
    Phrase,
    apposed,
    count,
    head_of,
    is_number,
    is_person,
    is_place,
    is_plural,
    is_role,
    join,
    names,
    trimmed,
    when,
)
from trimtab_runtime.verbs import PAST, past, third_person, word_set
from trimtab_runtime.wording import inverted, predicate, tail_of

_MOVING = word_set("go move travel lead return sail come run fly walk bring take carry send ship transfer ride drive march")
_PERSUADING = word_set("ask tell allow enable help let want order force invite persuade encourage permit require")
_LIGHT = word_set("take make give have pay change keep lose")
_FAR = ("below", "above", "from", "beneath", "down", "under", "beyond", "off", "behind")
_ADJECTIVES = ("high", "tall", "deep", "wide", "long", "thick", "old", "heavy")


_OBTAINING = word_set(
    """come buy bring get receive take collect import order fetch move borrow inherit steal acquire purchase travel return run sail"""
)
_THINGS_DO = word_set("cost weigh contain provide support include consist lie measure comprise weigh")  # subjects of these are no people
_MADE = word_set("build make release write found open print use install configure publish")
_GROUPS = word_set(
    """charity company council committee government club society foundation school university party jury army band village"""
)
_COMPARED = word_set("better worse more less well faster slower further earlier later most least")


@dataclass(frozen=True)
class Asked:
    """One thing asked about: its rank (lower is more specific), the words that answer it, and wordings to choose from."""

    rank: int
    answer: str
    wordings: tuple[str, ...]


def asked_of(clause: Clause) -> list[Asked]:
    """All that can be asked about a clause; wordings are without capital and question mark, and not yet checked."""
    if clause.subject[0].lower() == "there":
        return _there(clause)
    found = [*_times(clause)]
    untimed = [(i, phrase) for i, phrase in enumerate(clause.phrases) if not when(phrase)]
    for i, phrase in untimed:
        found += _counted(clause, phrase, i)
    found += _agent(clause) + _called(clause) + (_copula(clause) if clause.copula else _object(clause)) + _places(clause) + _subject(clause)
    if clause.reason:
        found.append(Asked(5, "because", (inverted(clause, "why"),)))
    return found


def _agents(clause: Clause) -> list[Phrase]:
    return [phrase for phrase in clause.phrases if clause.passive and phrase.preposition == "by" and phrase.words and not when(phrase)]


def _person_wordings(role: Sequence[str], rest: str) -> list[str]:
    """Who did it: three wordings, with the role where it is known ("the baker Ann Lee")."""
    noun = join(role[1:] if role[0].lower() in DETERMINERS else role) if len(role) > 1 else ""
    return [
        f"who {rest}",
        f"what is the name of the {noun or 'person'} who {rest}",
        *([f"which {noun} {rest}"] if noun and role[0] != "our" else []),
    ]


# --- spans -----------------------------------------------------------------------------------------------------------------------


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
        skip += _agents(clause) if len(everything) > 1 else []
        skip += [one for one in clause.leading if phrase in clause.leading and when(one)]
        if ranged and phrase.preposition in ("from", "to"):
            fronts = ["when"] if phrase.preposition == "from" else []
        found.append(Asked(1, phrase.text, tuple(inverted(clause, front, skip) for front in fronts)))
    return found


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


def _agent(clause: Clause) -> list[Asked]:
    """Who did it, from "was opened by the mayor Ann Lee", in the active voice; what it was done by, otherwise."""
    if not (agents := _agents(clause)) or agents[0].words[0].endswith("ing"):
        return []
    agent = agents[0]
    words = trimmed(agent.words)
    role, name = apposed(words)
    if not name and words[0][0].isupper():
        name = names(words[: head_of(words) + 1])
    person = is_person(words) or is_role(words[head_of(words)])
    if not person and not (name and not role):
        if words[0].lower() in DETERMINERS and words[0].lower() != "all":
            return [Asked(4, join(words), (inverted(clause, "what", [agent], "by"),))]
        return []
    chain = clause.auxiliaries
    if len(chain) == 1 and chain[0] in ("was", "were"):
        active = past(clause.lemma)
    elif len(chain) == 1 and chain[0] in ("is", "are"):
        active = third_person(clause.lemma)
    elif chain[-1] == "been" and len(chain) == 2:
        active = f"{'had' if chain[0] == 'had' else 'has'} {clause.verb}"
    elif chain[-1] == "be" and len(chain) == 2:
        active = f"{chain[0]} {clause.lemma}"
    else:
        return []
    subject = join(clause.subject)
    done = {"we": "us", "they": "them", "i": "me", "he": "him", "she": "her"}.get(subject.lower(), subject)
    rest = join([active, done, tail_of(clause, [agent])])
    answer = join(name) if name else join(words)
    if not person:
        return [Asked(2, answer, (f"who {rest}", inverted(clause, "by whom", [agent])))]
    found = [Asked(2, answer, (*_person_wordings(role, rest), inverted(clause, "by whom", [agent])))]
    if len(role) > 1 and len(name) > 1:
        found.append(Asked(6, join(role[1:]), (f"who is {join(name)}",)))
    return found


def _called(clause: Clause) -> list[Asked]:
    """Names given with called, named or known as."""
    subject = join(clause.subject)
    if clause.passive and clause.lemma in ("call", "name", "know", "entitle", "title", "nickname"):
        first = clause.phrases[0] if clause.phrases else Phrase("", ())
        if first.preposition not in ("", "as") or not first.words or not any(word[0].isupper() for word in first.words):
            return []
        wordings = [inverted(replace(clause, verb="called"), "what", clause.phrases)]
        if len(clause.auxiliaries) == 1 and clause.lemma in ("call", "name"):
            be = "was" if clause.auxiliaries[0] in ("was", "were") else "is"
            wordings += [
                f"what {be} the name of {subject}",
                f"what name {'did' if be == 'was' else 'do' if clause.plural else 'does'} {subject} have",
            ]
        return [Asked(1, join(names(trimmed(first.words)) or trimmed(first.words)), tuple(wordings))]
    found = []
    for number, phrase in enumerate(clause.phrases):
        words = [word for word in phrase.words if word != ","]
        at = next((i for i, word in enumerate(words) if word in ("called", "named", "nicknamed") and 0 < i < len(words) - 1), -1)
        if at < 0 or not (words[at + 1][0].isupper() or words[at + 1] == "the"):
            continue
        noun, name = words[:at], join(words[at + 1 :])
        before = clause.phrases[number - 1] if number else None
        if not phrase.preposition and clause.copula:
            found.append(Asked(1, name, (f"what is {subject} called", f"what is the name of {subject}", f"what is {subject}")))
            continue
        lead = [phrase.preposition] if phrase.preposition else []
        skip = [phrase]
        if "of" in noun:
            cut = len(noun) - noun[::-1].index("of")
            lead, noun = [*lead, *noun[:cut]], noun[cut:]
        if noun and noun[0].lower() in ("a", "an", "the", "one"):
            noun = noun[1:]
        if phrase.preposition in ("about", "on", "with") and before and not before.preposition and not lead[1:]:
            noun, lead, skip = (
                [*[word for word in before.words if word not in DETERMINERS], phrase.preposition, *noun],
                [],
                [before, phrase],
            )
        if noun:
            found.append(Asked(2, name, (inverted(clause, join([*lead, "which", *noun]), skip),)))
    return found


def _copula(clause: Clause) -> list[Asked]:
    first = clause.phrases[0] if clause.phrases else Phrase("of", ())
    words = trimmed(first.words)
    subject, be = join(clause.subject), clause.auxiliaries[0]
    if first.preposition or not words or subject.lower() in PRONOUNS | {"who"} or count(first.words):
        return []
    low = [word.lower() for word in words]
    named = bool(apposed(words)[1]) and head_of(words) == len(words) - 1
    chain = clause.auxiliaries[1:]
    if low[0] not in DETERMINERS and not named:
        return [Asked(1, join(words), (f"what colour {be} {subject}",))] if low[-1] in COLOURS and len(low) < 4 and not chain else []
    person = (
        is_person(words)
        or is_person(clause.subject)
        or (is_role(words[head_of(words)]) and is_role(clause.subject[head_of(clause.subject)]))
    )
    who = "who" if person else "what"
    owned = any(word.endswith(("'s", "s'")) for word in clause.subject)
    if clause.resolved and words[head_of(words)].lower() in TIMES:
        return []
    proper = (clause.subject[0][0].isupper() and not owned) or (
        len(clause.subject) > 1 and clause.subject[-1][0].isupper() and not {"of", "in"} & set(clause.subject)
    )
    definite = low[0] in ("the", "our")
    found = []
    timed = [phrase for phrase in clause.phrases[1:] if not when(phrase)]
    if person and proper and definite:
        found.append(
            Asked(
                2,
                subject,
                (join([predicate(clause, "who", timed if chain else ())]), f"what is the name of {join(words)}")
                if not chain
                else (predicate(clause, "who"),),
            )
        )
        if not chain:
            found.append(Asked(3, join(words), (f"who {be} {subject}",)))
        return found if not clause.resolved else found[1:]
    bare = clause.subject[0].lower() not in DETERMINERS and not proper
    if not (bare and definite) and not (person and not named and chain):
        wordings = [join([f"{who} {be} {subject}", *chain])]
        if named and not proper:
            wordings.append(f"what is the name of {subject}")
        found.append(Asked(2, join(words), tuple(wordings)))
    if definite and not person and not clause.resolved:
        rest = join([*words, tail_of(clause, [first], 8)])
        called = (f"what is {join(words)} called", f"what is the name of {join(words)}") if proper and not chain and be == "is" else ()
        found.append(Asked(3, subject, called or (join([f"what {'is' if be == 'are' and not is_plural(words) else be}", *chain, rest]),)))
    return found


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
    if target.infinitive and at == 0 and not clause.passive:
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
        attached = [phrase for phrase in following[:1] if phrase.preposition in ("with", "about", "like", "of", "than")]
        if following and following[0].preposition == "from" and clause.lemma not in _OBTAINING:
            attached = following[:1]
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
    return [] if target in _agents(clause) else [Asked(5, text, (inverted(clause, who, [target, *rest], target.preposition),))]


def _places(clause: Clause) -> list[Asked]:
    """Where: a run of phrases of place is one answer; one that belongs to another phrase is not asked."""
    found: list[Asked] = []
    phrases = clause.phrases
    runs: list[list[Phrase]] = []
    for i, phrase in enumerate(phrases):
        if not is_place(phrase) or when(phrase):
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
        far = [phrase for phrase in phrases if not phrase.preposition and (count(phrase.words) or ("", [], ""))[2] == "length"]
        found.append(Asked(3, run[0].text, (inverted(clause, "where", [*skip, *far], first if first in ("from", "for") else ""),)))
    return found


def _subject(clause: Clause) -> list[Asked]:
    """Questions that the subject answers."""
    low = [word.lower() for word in clause.subject]
    head = clause.subject[head_of(clause.subject)]
    if clause.resolved or clause.copula or low[0] in PRONOUNS | {"who", "someone", "everyone", "anyone", "everything", "anything"}:
        return []
    if (
        (low[0].endswith("ing") and len(low) > 6)
        or (clause.passive and clause.lemma in ("call", "name"))
        or (len(low) == 1 and low[0] in DETERMINERS)
    ):
        return []
    size = len(tail_of(clause).split())
    subject = join(clause.subject)
    found = []
    counted = count(clause.subject)
    if counted and counted[2] in ("things", "percent") and len(counted[1]) < 6 and low[0] not in ("the", "these"):
        front = f"how many {join(counted[1])}" if counted[2] == "things" else f"what percentage {join(counted[1])}"
        found.append(Asked(1, counted[0], (predicate(clause, front, plural=True),)))
    thing = clause.thing or clause.lemma in _THINGS_DO or (clause.passive and clause.lemma in _MADE)
    if is_person(clause.subject) and not thing:
        role, name = apposed(clause.subject)
        wordings = _person_wordings(role, predicate(clause, ""))
        return [*found, Asked(2, join(name), tuple(wordings))] if size > 1 else found
    who = "who" if head[0].islower() and (is_role(head) or head in _GROUPS) else "what"
    irregular = clause.lemma in PAST or clause.auxiliaries
    return [*found, Asked(6, subject, (predicate(clause, who),))] if size > 1 and (irregular or size > 2 or found) else found
