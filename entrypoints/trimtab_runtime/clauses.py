"""English statements cut into clauses: subject, auxiliaries, verb, and the phrases after it. By rule, without a tagger.

A clause that the rules cannot read with some confidence is left out: no question is better than a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trimtab_runtime.finite import find_verb, opens
from trimtab_runtime.phrases import (
    ADVERBS,
    AUXILIARIES,
    BE,
    DETERMINERS,
    NEGATIONS,
    PREPOSITIONS,
    PRONOUNS,
    SUBORDINATORS,
    TIMES,
    Phrase,
    is_number,
    is_plural,
    names,
    phrases_of,
    tokens_of,
)
from trimtab_runtime.verbs import LEMMAS, lemma_of_participle, lemma_of_past, lemma_of_third, word_set

_LEADING = word_set(
    """and but so also however today now then still therefore yet here finally moreover nowadays currently originally usually
    meanwhile"""
)
_LEADING_PAIRS = (
    ("so", "far"),
    ("at", "present"),
    ("at", "first"),
    ("at", "last"),
    ("sooner", "or", "later"),
    ("as", "a", "result"),
    ("in", "addition"),
)
_ENGLISH = (DETERMINERS | AUXILIARIES | PREPOSITIONS | PRONOUNS) - {"a", "i", "in", "he"} | {"of", "and"}
_FOREIGN = word_set(
    """de o os um uma que com em para la le les el los las un une des du et est il di del che das und ein eine den ist het een och
    att en y e não é"""
)
TWO_OBJECTS = word_set("leave give lend offer send show tell award teach pay grant bring hand sell")
_DAY = r"(?:(?:early|late|mid) |about |(?:the )?(?:spring|summer|autumn|winter|end|beginning) of |\d{1,2}(?:st|nd|rd|th)? )*"
_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_MONTH = rf"(?:(?:{_MONTHS}) )?(?:\d{{1,2}} )?"
_RECURRING = r"(?:every|each|last|next|this) (?:year|month|week|day|morning|evening|night|spring|summer|autumn|winter|\w+day)(?= (?!of ))"
_LONGEST = 2_000  # characters; what is longer is no sentence of 70 words, and would be searched for minutes
_DATED = re.compile(
    rf"(?:in|since|by|until|around|during|from|on|at) {_DAY}{_MONTH}(?:1[0-9]{{3}}|20[0-9]{{2}})s?(?= (?!of |and )|$)"
    rf"|on \d{{1,2}} (?:{_MONTHS})(?= (?:the|a|our) )|{_RECURRING}"
)


@dataclass(frozen=True)
class Clause:
    """`auxiliaries` in order, the finite one first (() for a plain verb); `verb` is "" when a form of be is the main verb."""

    subject: tuple[str, ...]
    auxiliaries: tuple[str, ...]
    verb: str
    lemma: str
    tense: str  # "past", "third" or "base" of a plain verb; "" where an auxiliary carries it
    phrases: tuple[Phrase, ...]
    leading: tuple[Phrase, ...] = ()  # adverbials that stood before the subject
    condition: tuple[str, ...] = ()  # "when the power fails"
    reason: str = ""  # the question word that a following clause answers: why, when
    thing: bool = False  # the subject is known to be no person
    resolved: bool = False  # the subject stands for a pronoun: the sentence does not say it

    @property
    def plural(self) -> bool:
        """Whether the subject takes a plural verb."""
        return is_plural(self.subject)

    @property
    def copula(self) -> bool:
        """Whether be is the main verb."""
        return bool(self.auxiliaries and self.auxiliaries[-1] in BE and not self.verb)

    @property
    def passive(self) -> bool:
        """Whether it is a passive: was opened, has been sold."""
        return bool(self.verb and self.auxiliaries and self.auxiliaries[-1] in BE and not self.verb.endswith("ing"))


def clauses(sentence: str) -> list[Clause]:
    """The clauses of a statement that could be read, the main one first. [] where there is none (headings, commands, speech)."""
    if len(sentence) > _LONGEST:
        return []
    speech = (
        re.search(r"[“\"].*\b(says?|said|asks?|asked)\b", sentence) or sentence.count('"') % 2 or ("“" in sentence and "”" not in sentence)
    )
    tokens = tokens_of(sentence)
    if not tokens or len(tokens) > 70 or speech or sentence.rstrip().endswith("?") or tokens[0][0].islower():
        return []
    if _command(tokens) or not _english(tokens):
        return []
    found: list[Clause] = []
    part: list[str] = []
    for token in [*tokens, ";"]:
        if token in (";", ":"):
            found += _part(part, found[0].subject if found else ())
            part = []
        else:
            part.append(token)
    return found


def _english(tokens: list[str]) -> bool:
    """Whether the small words of a sentence are English ones rather than those of its neighbours."""
    low = [token.lower() for token in tokens]
    ours = sum(word in _ENGLISH for word in low)
    return ours >= sum(word in _FOREIGN for word in low) and (ours > 0 or len(low) < 9 or "a" in low)


def _command(tokens: list[str]) -> bool:
    """Whether a sentence starts with a verb in its base form: Bring shoes."""
    first, after = tokens[0].lower(), tokens[1].lower() if len(tokens) > 1 else ""
    if after.endswith("'s") or (first == "last" and after in TIMES):
        return False
    if first == "please":
        return True
    opens = after in DETERMINERS | PREPOSITIONS | ADVERBS | {"them", "us", "me", "him", ",", "down", "up"} or is_number(after)
    return first in LEMMAS and (
        opens or (after.endswith("s") and len(tokens) > 2 and not lemma_of_past(tokens[2].lower()) and tokens[2].lower() not in AUXILIARIES)
    )


def _part(tokens: list[str], main: tuple[str, ...]) -> list[Clause]:
    """The clauses of what stands between semicolons or colons."""
    if len(tokens) < 3:
        return []
    tokens, relatives = _without_relatives(tokens)
    leading, condition, tokens = _without_leading(tokens)
    found = _predicates(tokens, main)
    if found:
        same = found[0].subject
        found = [replace(one, leading=tuple(leading), condition=tuple(condition)) if one.subject == same else one for one in found]
    for subject, rest in relatives:
        found += [replace(one, thing=rest[0] == "which") for one in _predicates([*subject, *rest[1:]], ())]
    return found


# --- what stands around the main clause ------------------------------------------------------------------------------------------


def _without_relatives(tokens: list[str]) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """Take out ", who ...," and the like; those that follow a name give clauses of their own: (name, rest)."""
    kept: list[str] = []
    relatives: list[tuple[list[str], list[str]]] = []
    i = 0
    while i < len(tokens):
        after = [token.lower() for token in tokens[i + 1 : i + 5]]
        starts = after[:1] and after[0] in ("who", "which", "whose", "where", "when")
        starts = starts or (after[1:2] and after[1] in ("which", "whom")) or ("which" in after[2:] and "of" in after)
        if tokens[i] == "," and starts:
            complete = find_verb(kept) is not None
            end = i + 2
            while end < len(tokens) and not (
                tokens[end] == "," and (not complete or (tokens[end + 1 : end + 2] and tokens[end + 1].lower() in ("and", "but")))
            ):
                end += 1
            name = names(kept) if len(names(kept)) >= 2 else []
            before = kept[-len(name) - 1].lower() if len(kept) > len(name) else ""
            if name and (after[0] == "who" or (after[0] == "which" and before not in PREPOSITIONS | {"the", "of"})):
                relatives.append((name, tokens[i + 1 : end]))
            elif after[0] in ("who", "which") and (noun := _noun_at_end(kept, after[1:2])):
                relatives.append((noun, tokens[i + 1 : end]))
            if complete and end + 1 < len(tokens) and find_verb(tokens[end + 2 :]) is None:
                end = len(tokens)
            i = end if complete else end + 1
            continue
        kept.append(tokens[i])
        i += 1
    return kept, relatives


def _noun_at_end(tokens: list[str], verb: list[str]) -> list[str]:
    """The noun phrase that ends here, made definite, where an auxiliary agrees with it: "17 beehives, which are" -> the beehives."""
    low = [token.lower() for token in tokens]
    start = next((i for i in range(len(low) - 2, max(-1, len(low) - 5), -1) if low[i] in ("a", "an", "the") or is_number(low[i])), -1)
    noun = low[start + 1 :]
    if start < 0 or not verb or set(noun) & (PREPOSITIONS | {"of", "and", ","}) or any(word[0].isupper() for word in tokens[start + 1 :]):
        return []
    agrees = verb[0] in (("are", "were", "have") if is_plural(noun) else ("is", "was", "has"))
    return ["the", *noun] if agrees else []


def _without_leading(tokens: list[str]) -> tuple[list[Phrase], list[str], list[str]]:
    """Leading adverbials ("In 1961", "On busy Sundays,") and conditions ("When it rains,") apart from the clause itself."""
    low = [token.lower() for token in tokens]
    if len(low) < 3:
        return [], [], tokens
    for pair in _LEADING_PAIRS:
        if tuple(low[: len(pair)]) == pair and len(low) > len(pair) + 2:
            return _without_leading(tokens[len(pair) + (low[len(pair)] == ",") :])
    if low[0] in _LEADING:
        now = [Phrase("", (low[0],))] if low[0] in ("today", "now") else []
        more, condition, rest = _without_leading(tokens[2 if low[1] == "," else 1 :])
        return [*now, *more], condition, rest
    if low[0] in PREPOSITIONS and low[1] in ("this", "that", "these", "those") and low[2] not in TIMES:
        return [], [], []  # "At that temperature ...": what is meant stands elsewhere
    comma = low.index(",") if "," in low else 0
    if low[0].endswith("ly") and low[1] == ",":
        return _without_leading(tokens[2:])
    unclear = {"it", "he", "she", "they", "his", "her", "its", "their", "them"}
    if low[0] in SUBORDINATORS and low[0] not in ("so", "whether", "where") and comma and find_verb(tokens[1:comma]):
        condition = [] if unclear & set(low[:comma]) or low[comma - 1] in AUXILIARIES else [low[0], *_lowered(tokens[1:comma])]
        return [], condition, tokens[comma + 1 :]
    if low[0] in ("if", "when", "because", "although", "though", "while", "unless", "whenever"):
        return [], [], []
    timed = low[0] in ("every", "each", "last", "next", "this", "once") and low[1] in TIMES
    counted = (
        low[0] in PREPOSITIONS and (is_number(low[1]) or low[:2] in (["at", "most"], ["at", "least"])) and not _DATED.match(" ".join(low))
    )
    there = next((i for i in range(1, min(len(low) - 1, 12)) if low[i] == "there" and low[i + 1] in AUXILIARIES), 0)
    end = 0
    if there and (low[0] in PREPOSITIONS or there == 1):
        end = there
    elif (low[0] in PREPOSITIONS or timed) and not (counted and (not comma or find_verb(tokens[:comma]))):
        dated = _DATED.match(" ".join(low))
        pronoun = next((i for i in range(2, min(len(low) - 1, 8)) if low[i] in PRONOUNS), 0)
        end = len(dated[0].split()) if dated else comma if comma < 14 and not find_verb(tokens[:comma]) else 0
        article = next((i for i in range(2, min(len(low) - 1, 7)) if low[i] in ("a", "an", "the", "every", "each")), 0)
        article = 0 if low[article - 1] in PREPOSITIONS | {"of", "and"} else article
        end = end or (pronoun if low[0] not in SUBORDINATORS and not find_verb(tokens[:pronoun]) else 0)
        end = end or (article if find_verb(tokens[:article]) is None else 0)
    if not end:
        return [], [], tokens
    more, condition, rest = _without_leading(tokens[end + (low[end] == ",") :]) if end < len(low) else ([], [], [])
    found = [] if unclear & set(low[:end]) else phrases_of(_lowered(tokens[:end]))[:2]
    return [*found, *more], condition, rest


def _lowered(tokens: list[str]) -> list[str]:
    """The words with a sentence's capital taken off, unless the first is a name."""
    first = tokens[0] if tokens else ""
    named = (
        (tokens[1:2] and tokens[1][0].isupper()) or (tokens[1:2] == ["of"] and tokens[2:3] and tokens[2][0].isupper())
    ) and first.lower() not in DETERMINERS | PREPOSITIONS | PRONOUNS
    common = len(tokens) > 1 or first.lower() in DETERMINERS | PREPOSITIONS | PRONOUNS | word_set(
        "anyone everyone someone everything anybody"
    )
    common = common or bool(re.search(r"(s|ing|tion|ment|ship|ness|ance|ence)$", first))
    return tokens if not first or first != first.capitalize() or first == "I" or named or not common else [first.lower(), *tokens[1:]]


# --- predicates ------------------------------------------------------------------------------------------------------------------


def _predicates(tokens: list[str], main: tuple[str, ...]) -> list[Clause]:
    """Subject and first predicate, then the predicates and clauses joined to it."""
    found = find_verb(tokens)
    if found is None or not 0 < found[0] <= 22:
        return []
    at, kind = found
    if tokens[0].lower() in PREPOSITIONS and not (is_number(tokens[1]) or tokens[1].lower() in ("most", "least")):
        return []
    if lemma_of_participle(tokens[0].lower()) and tokens[0].islower() and tokens[1].lower() in PREPOSITIONS:
        return []  # "laid in a drawer made of wood"
    subject = tuple(_lowered(tokens[:at]))
    while len(subject) > 1 and subject[-1].lower() in ADVERBS - {"here", "there"} | {","}:
        subject = subject[:-1]
    if "," in subject and not {"and", "or"} & set(subject[subject.index(",") :]):
        if subject[0].lower() not in DETERMINERS and not subject[0][0].isupper():
            return []
        subject = subject[: subject.index(",")]
    if not subject:
        return []
    if main and len(subject) == 1 and subject[0] in ("it", "he", "she", "they") and is_plural(main) == (subject[0] == "they"):
        subject = main
    return _of_subject(subject, tokens[at:], kind)


def _of_subject(subject: tuple[str, ...], words: list[str], kind: str) -> list[Clause]:
    """The predicate that starts with the finite verb words[0], and what is joined to it."""
    end, rest = _end_of_predicate(words, kind)
    clause = _clause(subject, words[:end], kind)
    if not rest:
        return [clause] if clause else []
    link = rest[0].lower()
    if clause and (link == "because" or (link == "when" and not clause.copula)):
        clause = replace(clause, reason="why" if link == "because" else "when")
    if link == "so" and rest[1:2] == ["that"]:
        rest = rest[1:]
    rest = rest[1:]
    continued = _continued(rest, kind)
    if continued == "participle":
        if not clause or not clause.verb or not clause.auxiliaries:
            return [clause] if clause else []
        rest, continued = [*clause.auxiliaries, *rest], "aux"
    more: list[Clause] = []
    if continued:
        while rest[0].lower() in ADVERBS:
            rest = rest[1:]
        more = _of_subject(subject, rest, continued)
    elif link not in ("if", "when", "as", "because", "whether", "where", "unless"):
        more = _predicates(rest, subject)
    return [clause, *more] if clause else more


def _continued(rest: list[str], kind: str) -> str:
    """Kind of a verb that continues the same subject ("and ripens", "and was carried"), else ""."""
    i = 0
    while i < len(rest) - 1 and rest[i].lower() in ADVERBS:
        i += 1
    word, after = (rest[i].lower(), rest[i + 1] if i + 1 < len(rest) else "") if rest else ("", "")
    if word in AUXILIARIES:
        return "aux"
    follows = opens(after)
    if kind == "base":
        return "base" if word in LEMMAS and after and follows and after != "," else ""
    if kind == "aux" and lemma_of_participle(word) and follows:
        return "participle"
    if kind in ("past", "aux") and lemma_of_past(word) and follows and (kind == "past" or not lemma_of_participle(word)):
        return "past"
    return "third" if kind in ("third", "aux") and lemma_of_third(word) and follows else ""


def _end_of_predicate(tokens: list[str], kind: str) -> tuple[int, list[str]]:
    """Where the first predicate stops, and what follows if it is another predicate or clause (its joining word first)."""
    for i in range(1, len(tokens) - 1):
        word, rest = tokens[i].lower(), tokens[i + 1 :]
        comma = tokens[i - 1] == ","
        end = i - 1 if comma else i
        if word == "," and _continued(rest, kind) and ("and" in rest or "or" in rest):
            return i, tokens[i:]
        if word in ("and", "but", "so", "or"):
            inner = find_verb(rest)
            plain = inner and inner[0] <= 5 and inner[1] in ("aux", "past", "third") and rest[0].lower() in DETERMINERS | PRONOUNS
            if _continued(rest, kind) or ((comma or word == "but") and inner) or plain or (inner and inner[1] == "aux" and inner[0] <= 2):
                return end, tokens[i:]
        if word in ("because", "when", "while", "although", "though", "whereas", "unless", "if", "whether") or (
            word == "so" and rest[0].lower() == "that"
        ):
            return end, tokens[i:]
        if word in ("where", "until", "before", "after", "since", "once", "as"):
            inner = find_verb(rest)
            if (
                inner
                and inner[0] <= 4
                and "," not in rest[: inner[0]]
                and (rest[0].lower() in DETERMINERS | PRONOUNS or comma or word == "when")
            ):
                return end, tokens[i:]
    return len(tokens), []


def _clause(subject: tuple[str, ...], words: list[str], kind: str) -> Clause | None:
    """Auxiliaries, verb and phrases of one predicate; None when it is negated or cannot be read."""
    auxiliaries: list[str] = []
    i = 0
    while i < len(words):
        low = words[i].lower()
        if low in NEGATIONS or low.endswith("n't"):
            return None
        if low in AUXILIARIES | BE and (kind == "aux"):
            auxiliaries.append(low)
        elif not (low in ADVERBS - {"there", "so", "more", "most", "far", "here", "nearly", "almost"} or re.fullmatch(r"\w{2,}ly", low)):
            break
        i += 1
    verb = words[i].lower() if i < len(words) else ""
    if not auxiliaries:
        lemma = {"past": lemma_of_past(verb), "third": lemma_of_third(verb, known=False), "base": verb}[kind] or ""
        tense = "base" if kind == "past" and verb in LEMMAS and verb not in ("found", "lay", "saw", "felt") and is_plural(subject) else kind
    elif auxiliaries[-1] in BE:
        base = verb in LEMMAS and verb not in ("put", "set", "cut", "read", "run", "hit", "overcome")
        doing = bool(re.fullmatch(r"\w{3,}ing", verb)) and i + 1 < len(words) and not is_number(verb)
        lemma, tense = (None if base else lemma_of_participle(verb)) or (verb[:-3] if doing else ""), ""
        verb = verb if lemma else ""
    elif auxiliaries[-1] in ("has", "have", "had"):
        lemma, tense = lemma_of_participle(verb) or "", ""
        if not lemma and len(auxiliaries) == 1:
            verb, lemma, i = auxiliaries.pop(), "have", i - 1
            tense = {"has": "third", "have": "base", "had": "past"}[verb]
    else:
        lemma, tense = verb if verb in LEMMAS or verb in ("have", "do", "be") else "", ""
    if not lemma and not (auxiliaries and auxiliaries[-1] in BE):
        return None
    rest = words[i + 1 if verb else i :]
    if subject[0].lower() in ("no", "nobody", "nothing", "none") or any(word.lower() in NEGATIONS | {"no"} for word in rest[:2]):
        return None
    phrases = phrases_of(rest)
    if lemma in TWO_OBJECTS and phrases and not phrases[0].preposition:
        first = phrases[0].words
        cut = next((j for j in range(1, len(first)) if first[j].lower() in DETERMINERS or is_number(first[j])), 0)
        if cut and not {"of", "and", ","} & set(first[:cut]):
            phrases[:1] = [Phrase("", first[:cut]), Phrase("", first[cut:])]
    return Clause(subject, tuple(auxiliaries), verb, lemma, tense, tuple(phrases))
