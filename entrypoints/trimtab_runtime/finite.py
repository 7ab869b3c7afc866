"""Finding the finite verb of an English clause: auxiliaries, tables of forms, and what may stand before and behind a verb."""

from __future__ import annotations

from trimtab_runtime.phrases import (
    ADVERBS,
    AUXILIARIES,
    BE,
    CLAUSAL,
    DETERMINERS,
    PREPOSITIONS,
    PRONOUNS,
    RELATIVES,
    SUBORDINATORS,
    is_number,
    is_plural,
)
from trimtab_runtime.verbs import LEMMAS, PAST, lemma_of_participle, lemma_of_past, lemma_of_third, word_set

_ALONE = word_set("some others many most few all both several")  # determiners that can be a whole subject


def _nominal_place(tokens: list[str], i: int) -> bool:
    """Whether the word at i stands where a noun or adjective stands, not a verb."""
    before = tokens[i - 1].lower()
    if i == 1 and before in _ALONE:
        return False
    if before in DETERMINERS or before in PREPOSITIONS - {"up", "down", "off"} or before.endswith("'s"):
        return True
    if before in ("of", "and", "or", ",", "to", "be", "very", "first", "last", "second", "third", "new", "old", "own"):
        return True
    return (
        is_number(before)
        and i > 1
        and tokens[i - 2].lower() not in PREPOSITIONS
        and tokens[i - 2].lower() not in ("number", "version", "chapter", "section")
    )


def opens(token: str) -> bool:
    """Whether a word can follow a verb at once: the house, in, two, Ann."""
    low = token.lower()
    return (
        not token
        or low in DETERMINERS | PREPOSITIONS | ADVERBS | PRONOUNS | CLAUSAL | {",", "us", "them"}
        or is_number(token)
        or token[0].isupper()
    )


def _kind(tokens: list[str], i: int) -> str:
    """What finite verb the token can be: aux, past, third, base, or "" for none."""
    word = tokens[i].lower()
    if word in AUXILIARIES and not (i and tokens[i][0].isupper()):  # "on 4 May" is no verb
        return "aux"
    if i == 0 or tokens[i][0].isupper() or _nominal_place(tokens, i):
        return ""
    after, later = (tokens[j].lower() if j < len(tokens) else "" for j in (i + 1, i + 2))
    if after in AUXILIARIES or (lemma_of_past(after) and after not in LEMMAS and not after.endswith("ed")):
        return ""
    plural = is_plural(tokens[:i])
    if word in LEMMAS and plural and after != "of":
        return "base"
    if lemma_of_past(word) and not (word in LEMMAS and (lemma_of_past(after) or tokens[i - 1].endswith("ing"))):
        return "past"
    lemma = lemma_of_third(word)
    if plural or after == "of":
        return ""
    if lemma:
        return "" if lemma not in PAST and after in LEMMAS and after not in ADVERBS | PREPOSITIONS and opens(later) else "third"
    known = tokens[0].lower() in DETERMINERS or (
        tokens[0][0].isupper() and not tokens[0].endswith("s") and not lemma_of_past(tokens[0].lower())
    )
    return "third" if known and after not in ("", ",") and opens(tokens[i + 1]) and lemma_of_third(word, known=False) else ""


def find_verb(tokens: list[str]) -> tuple[int, str] | None:
    """Index and kind of the main clause's finite verb; verbs of relative clauses in the subject are passed over."""
    pending, i = "", 0
    while i < len(tokens):
        word = tokens[i].lower()
        before = tokens[i - 1].lower() if i else ""
        if (word in RELATIVES and i and not (word == "that" and before in PREPOSITIONS)) or (word in PRONOUNS and i and not pending):
            pending = word
        kind = _kind(tokens, i)
        inner = before in PRONOUNS | ADVERBS | {"that", "who", "which"} and (lemma_of_third(word) or word in LEMMAS or lemma_of_past(word))
        if pending and i and ((kind and pending != "whose") or inner or kind == "aux"):
            pending = ""
            while (
                kind == "aux"
                and i + 1 < len(tokens)
                and (tokens[i + 1].lower() in AUXILIARIES | ADVERBS | BE or lemma_of_participle(tokens[i + 1].lower()))
            ):
                i += 1
        elif kind and not pending:
            if not i:
                return None
            if not (kind == "past" and lemma_of_participle(word) and _reduced(tokens, i)):
                return i, kind
        i += 1
    return None


def _reduced(tokens: list[str], i: int) -> bool:
    """Whether a participle at i only describes the subject ("tools bought here are ..."): a finite verb follows in the same stretch."""
    for j in range(i + 1, min(len(tokens), i + 10)):
        word = tokens[j].lower()
        if word in RELATIVES | PRONOUNS | (SUBORDINATORS - {"as", "before", "after", "since"}) | {",", "and", "but", "there"}:
            return False
        if word in AUXILIARIES:
            return j > i + 1
        follows = tokens[i + 1].lower() in PREPOSITIONS | ADVERBS
        if follows and j > i + 1 and lemma_of_past(word) and not _nominal_place(tokens, j) and j + 1 < len(tokens) and opens(tokens[j + 1]):
            return True
    return False
