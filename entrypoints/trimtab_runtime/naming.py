"""Questions after people and names: who did it, what it is called, who or what it is, and what the subject is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimtab_runtime.clauses import Clause
from trimtab_runtime.phrases import (
    CLAUSAL,
    COLOURS,
    DETERMINERS,
    PRONOUNS,
    TIMES,
    Phrase,
    apposed,
    count,
    head_of,
    is_person,
    is_plural,
    is_role,
    join,
    names,
    trimmed,
)
from trimtab_runtime.verbs import PAST, past, third_person, word_set
from trimtab_runtime.wording import Asked, agents_of, inverted, predicate, tail_of

_THINGS_DO = word_set("cost weigh contain provide support include consist lie measure comprise weigh")  # subjects of these are no people
_MADE = word_set("build make release write found open print use install configure publish")
_GROUPS = word_set(
    """charity company council committee government club society foundation school university party jury army band village"""
)


def _person_wordings(role: Sequence[str], rest: str) -> list[str]:
    """Who did it: three wordings, with the role where it is known ("the baker Ann Lee")."""
    noun = join(role[1:] if role[0].lower() in DETERMINERS else role) if len(role) > 1 else ""
    return [
        f"who {rest}",
        f"what is the name of the {noun or 'person'} who {rest}",
        *([f"which {noun} {rest}"] if noun and role[0] != "our" else []),
    ]


def from_agent(clause: Clause) -> list[Asked]:
    """Who did it, from "was opened by the mayor Ann Lee", in the active voice; what it was done by, otherwise."""
    if not (agents := agents_of(clause)) or agents[0].words[0].endswith("ing"):
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


def from_name(clause: Clause) -> list[Asked]:
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
            be = clause.auxiliaries[0]
            found.append(Asked(1, name, (f"what {be} {subject} called", f"what {be} the name of {subject}", f"what {be} {subject}")))
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


def from_complement(clause: Clause) -> list[Asked]:
    """Who or what a thing is: from "the keeper of the vault is Ann Lee"; where both sides are definite, either can be asked."""
    first = clause.phrases[0] if clause.phrases else Phrase("of", ())
    words = trimmed(first.words)
    subject, be, chain = join(clause.subject), clause.auxiliaries[0], clause.auxiliaries[1:]
    if first.preposition or not words or subject.lower() in PRONOUNS | {"who"} or count(first.words):
        return []
    if words[0].lower() in ("anything", "something", "what"):
        return []
    low, head, whose = [word.lower() for word in words], words[head_of(words)], clause.subject[head_of(clause.subject)]
    named = bool(apposed(words)[1]) and head_of(words) == len(words) - 1
    if clause.resolved and head.lower() in TIMES:
        return []
    if low[0] not in DETERMINERS and not named:
        return [Asked(1, join(words), (f"what colour {be} {subject}",))] if low[-1] in COLOURS and len(low) < 4 and not chain else []
    person = is_person(words) or is_person(clause.subject) or (is_role(head) and is_role(whose))
    owned = any(word.endswith(("'s", "s'")) for word in clause.subject)
    proper = not owned and (clause.subject[0][0].isupper() or (whose[0].isupper() and not {"of", "in"} & set(clause.subject)))
    definite, bare = low[0] in ("the", "our"), not owned and not proper and clause.subject[0].lower() not in DETERMINERS
    if person and proper and definite:
        asked = [] if chain else [Asked(3, join(words), (f"who {be} {subject}",))]
        name_of = () if chain else (f"what is the name of {join(words)}",)
        return asked if clause.resolved else [Asked(2, subject, (predicate(clause, "who"), *name_of)), *asked]
    found = []
    if not (bare and definite) and not (person and not named and chain):
        plain = join(["who" if person else "what", be, subject, *chain])
        found.append(Asked(2, join(words), (plain, f"what is the name of {subject}") if named and not proper else (plain,)))
    if definite and not person and not clause.resolved:
        one = "is" if be == "are" and not is_plural(words) else be
        plain = join(["what", one, *chain, *words, tail_of(clause, [first], 8)])
        called = (f"what is {join(words)} called", f"what is the name of {join(words)}")
        found.append(Asked(3, subject, called if proper and not chain and be == "is" else (plain,)))
    return found


def from_subject(clause: Clause) -> list[Asked]:
    """Questions that the subject answers."""
    low = [word.lower() for word in clause.subject]
    head = clause.subject[head_of(clause.subject)]
    clausal = any(phrase.words[:1] and phrase.words[0] in CLAUSAL for phrase in clause.phrases[:1])
    if (
        clausal
        or clause.resolved
        or clause.copula
        or low[0] in PRONOUNS | {"who", "someone", "everyone", "anyone", "everything", "anything"}
    ):
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
