"""English statements cut into clauses: subject, auxiliaries, verb, and the phrases after it. By rule, without a tagger.

A clause that the rules cannot read with some confidence is left out: no question is better than a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from trimtab_runtime.verbs import LEMMAS, lemma_of_participle, lemma_of_past, lemma_of_third

BE = frozenset("is are was were am be been being".split())
MODALS = frozenset("may must will would could should can might shall cannot".split())
AUXILIARIES = frozenset("is are was were am has have had do does did".split()) | MODALS
NEGATIONS = frozenset("not never no nobody nothing none neither cannot nor".split())
DETERMINERS = frozenset(
    "the a an this these those each every our your their his her its my some any no another both all such own most many several few".split()
)
PREPOSITIONS = frozenset(
    "in on at from to by with for since during after before until till into onto through under below above beneath beside between along behind "
    "near across against among around about over off without within inside outside towards toward via per past beyond despite as upon throughout "
    "opposite down up like than".split()
)
PRONOUNS = frozenset("i we you he she it they".split())
ADVERBS = frozenset(
    "also now still always only already often usually once currently today then just even ever sometimes soon later again together too both "
    "since first originally therefore however thus nearly almost mostly mainly largely partly simply no-longer far so more most there here".split()
)
_RELATIVES = frozenset("that who which whose whom where".split())
_SUBORDINATORS = frozenset("because while although though whereas since unless if when where whether so until before after once as".split())
_PLURALS = frozenset(
    "people children men women others some many most few all both these those mice geese feet teeth they we you police cattle two three".split()
)
_QUANTITIES = frozenset("half most some all many third thirds quarter quarters rest majority number percent %".split())
_PARTICLES = frozenset("up out off back away over down apart together along aside".split())
_TIMES = frozenset(
    "year years month months week weeks day days hour hours morning evening afternoon night nights spring summer autumn winter season monday tuesday "
    "wednesday thursday friday saturday sunday weekend decade century minute minutes mornings evenings afternoons summers winters weekends".split()
)
_TOKEN = re.compile(r"\d[\d,.:]*\d|[^\s,;:()]+|[,;:()]")


@dataclass(frozen=True)
class Phrase:
    """A stretch after the verb: a preposition ("" for an object or complement) and its words."""

    preposition: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return join([self.preposition, *self.words] if self.preposition else self.words)


@dataclass(frozen=True)
class Clause:
    """`auxiliaries` in order, the finite one first ([] for a plain verb); `verb` is "" when a form of be is the main verb."""

    subject: tuple[str, ...]
    auxiliaries: tuple[str, ...]
    verb: str
    lemma: str
    tense: str  # "past", "third", "base", or "" where an auxiliary carries it
    phrases: tuple[Phrase, ...]
    leading: tuple[Phrase, ...] = ()
    reason: bool = False
    about: tuple[str, ...] = field(default=())  # the condition: "when the power fails"

    @property
    def plural(self) -> bool:
        return is_plural(self.subject)

    @property
    def passive(self) -> bool:
        return bool(self.verb and self.auxiliaries and self.auxiliaries[-1] in BE and not self.verb.endswith("ing"))


def join(words: tuple[str, ...] | list[str]) -> str:
    """Words to text, punctuation closed up."""
    return re.sub(r" +([,;:])", r"\1", " ".join(word for word in words if word)).strip(" ,;:")


def tokens_of(sentence: str) -> list[str]:
    """Words and marks of a sentence, without bullets, parentheses, quotation marks and the full stop."""
    text = re.sub(r"[“”\"]", "", sentence.replace("’", "'"))
    text = re.sub(r"\s*[(\[][^()\[\]]*[)\]]", "", text)
    text = re.sub(r"^[\s\-*•·–—]+", "", text).strip()
    text = re.sub(r"\s+[–—-]+\s+|—", " ; ", re.sub(r"[.!]+$", "", text))
    return _TOKEN.findall(text)


def is_number(word: str) -> bool:
    """A count in digits or words: 3,250, forty, dozen."""
    return bool(re.fullmatch(r"[£$€]?\d[\d,.]*(?:st|nd|rd|th)?%?", word)) or word.lower() in _NUMBERS or word.lower().split("-")[0] in _TENS


_TENS = frozenset("twenty thirty forty fifty sixty seventy eighty ninety".split())
_NUMBERS = _TENS | frozenset(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen hundred thousand million dozen".split()
)


def is_plural(subject: tuple[str, ...] | list[str]) -> bool:
    """Whether a noun phrase takes a plural verb."""
    head, low = 0, [word.lower() for word in subject]
    while head < len(low) and low[head] not in PREPOSITIONS | _RELATIVES | {",", "of"} and not (head and low[head] in PRONOUNS):
        head += 1
    if "and" in low[:head] and low[0] not in ("each", "every"):
        return True
    last = low[head - 1] if head else ""
    if last in _QUANTITIES and head < len(low) and low[head] == "of":
        return is_plural(subject[head + 1 :])
    return (
        last in _PLURALS
        or is_number(last)
        or (
            last.endswith("s")
            and not last.endswith(("ss", "us", "is", "'s"))
            and not subject[0][:1].isupper() * (head > 1 and subject[head - 1][0].isupper() and low[0] not in DETERMINERS)
        )
    )


def _nominal_before(tokens: list[str], i: int) -> bool:
    """Whether the word at i stands where a noun or adjective stands, not a verb."""
    before = tokens[i - 1].lower()
    return (
        before in DETERMINERS
        or before in PREPOSITIONS - {"up", "down", "off"}
        or before.endswith("'s")
        or before == "of"
        or before in ("and", "or", ",", "to", "be", "very", "first", "last", "second", "third", "new", "old")
        or is_number(before)
        and i > 1
        and tokens[i - 2].lower() not in ("number", "version", "chapter", "section")
    )


def _kind(tokens: list[str], i: int) -> str:
    """What finite verb the token can be: aux, past, third, base, or "" for none."""
    word = tokens[i].lower()
    if word in AUXILIARIES:
        return "aux"
    if i == 0 or tokens[i][0].isupper() or _nominal_before(tokens, i):
        return ""
    after = tokens[i + 1].lower() if i + 1 < len(tokens) else ""
    if after in AUXILIARIES or (lemma_of_past(after) and after not in LEMMAS and not after.endswith("ed")):
        return ""
    plural = is_plural(tokens[:i])
    if word in LEMMAS and plural and after != "of":
        return "base"
    if lemma_of_past(word) and not (word in LEMMAS and (lemma_of_past(after) or tokens[i - 1].endswith("ing"))):
        return "past"
    if plural or after == "of" or after in LEMMAS and after not in ADVERBS | PREPOSITIONS:
        return ""
    if lemma_of_third(word):
        return "third"
    opens = after in DETERMINERS | PREPOSITIONS | ADVERBS | {"that", "how", "whether"} or is_number(after)
    return (
        "third" if opens and lemma_of_third(word, known=False) and (i > 1 or tokens[0][0].isupper() and not tokens[0].endswith("s")) else ""
    )


def find_verb(tokens: list[str]) -> tuple[int, str] | None:
    """Index and kind of the main clause's finite verb; verbs of relative clauses in the subject are passed over."""
    pending, i = 0, 0
    while i < len(tokens):
        word = tokens[i].lower()
        if word in (";", ":"):
            return None
        if word in _RELATIVES and i and not (word == "that" and tokens[i - 1].lower() in PREPOSITIONS):
            pending = 1
        elif word in PRONOUNS and i and not pending:
            pending = 1
        kind = _kind(tokens, i)
        if (
            not kind
            and pending
            and i
            and (lemma_of_third(word) or word in LEMMAS or lemma_of_past(word))
            and tokens[i - 1].lower() in _RELATIVES | PRONOUNS | ADVERBS
        ):
            kind = "inner"
        if kind and pending:
            pending = 0
            while (
                kind == "aux"
                and i + 1 < len(tokens)
                and (tokens[i + 1].lower() in AUXILIARIES | ADVERBS | BE or lemma_of_participle(tokens[i + 1].lower()))
            ):
                i += 1
        elif kind and i:
            if not (kind == "past" and lemma_of_participle(word) and _later_auxiliary(tokens, i)):
                return i, kind
        elif kind:
            return None
        i += 1
    return None


def _later_auxiliary(tokens: list[str], i: int) -> bool:
    """Whether a participle at i only describes the subject: a finite verb follows with nothing between that opens a clause."""
    for j in range(i + 1, min(len(tokens), i + 9)):
        word = tokens[j].lower()
        if word in _RELATIVES | PRONOUNS | _SUBORDINATORS - {"as", "before", "after", "since"} or word in {
            ",",
            ";",
            ":",
            "and",
            "but",
            "there",
        }:
            return False
        if word in AUXILIARIES:
            return j > i + 1
    return False


def clauses(sentence: str) -> list[Clause]:
    """The clauses of a statement that could be read, the main one first. [] where there is none (headings, commands, speech)."""
    tokens = tokens_of(sentence)
    if (
        not tokens
        or len(tokens) > 70
        or re.search(r"[“\"].*\b(says?|said|asks?|asked)\b", sentence)
        or sentence.count('"') % 2
        or sentence.rstrip().endswith("?")
    ):
        return []
    found: list[Clause] = []
    part: list[str] = []
    for token in [*tokens, ";"]:
        if token in (";", ":"):
            found += _sentence_part(part, found[0].subject if found else ())
            part = []
        else:
            part.append(token)
    return found


def _sentence_part(tokens: list[str], main: tuple[str, ...]) -> list[Clause]:
    if len(tokens) < 3:
        return []
    tokens, relatives = _without_relatives(tokens)
    leading, about, tokens = _without_leading(tokens)
    found = _predicates(tokens, main)
    if found:
        found[0] = replace(found[0], leading=tuple(leading), about=tuple(about))
    for subject, rest in relatives:
        found += _predicates([*subject, *rest], ())
    return found


def _without_relatives(tokens: list[str]) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """Take out ", who ...," and the like; those that follow a name or the subject give clauses of their own."""
    kept: list[str] = []
    relatives: list[tuple[list[str], list[str]]] = []
    i = 0
    while i < len(tokens):
        if (
            tokens[i] == ","
            and i + 2 < len(tokens)
            and (tokens[i + 1].lower() in ("who", "which", "whose", "where", "when") or tokens[i + 2].lower() in ("which", "whom"))
        ):
            plain = tokens[i + 1].lower() in ("who", "which")
            end = i + 2
            while end < len(tokens) and not (
                tokens[end] == "," and not (end + 1 < len(tokens) and tokens[end + 1].lower() in ("a", "an", "the") and find_verb(kept))
            ):
                end += 1
            name = _name_at_end(kept)
            if plain and name:
                relatives.append((name, tokens[i + 2 : end]))
            i = end + (1 if end < len(tokens) and not find_verb(kept) else 0)
            continue
        kept.append(tokens[i])
        i += 1
    return kept, relatives


def _name_at_end(tokens: list[str]) -> list[str]:
    i = len(tokens)
    while i and tokens[i - 1][0].isupper() and (i > 1 or tokens[0].lower() not in DETERMINERS):
        i -= 1
    return tokens[i:] if len(tokens) - i >= 2 else []


def _without_leading(tokens: list[str]) -> tuple[list[Phrase], list[str], list[str]]:
    """Leading adverbials ("In 1961", "On busy Sundays,") and conditions ("When it rains,") apart from the clause itself."""
    low = [token.lower() for token in tokens]
    if low[0] in ("and", "but", "so", "also", "however", "today", "now", "then", "still", "therefore", "yet", "here", "finally"):
        time = [Phrase("", (low[0],))] if low[0] in ("today", "now") else []
        start = 2 if len(low) > 1 and low[1] == "," else 1
        more, about, rest = _without_leading(tokens[start:]) if len(tokens) > start else ([], [], [])
        return time + more, about, rest
    comma = low.index(",") if "," in low else 0
    if (
        low[0] in ("when", "if", "while", "although", "because", "before", "after", "once", "whenever", "until", "since", "as", "unless")
        and comma
    ):
        inner = find_verb(tokens[1:comma])
        if inner:
            return [], [low[0], *_lower_first(tokens[1:comma])], tokens[comma + 1 :]
    if low[0] in PREPOSITIONS or low[0] in ("every", "each", "last", "next", "this", "once") and len(low) > 1 and low[1] in _TIMES:
        dated = re.match(
            r"(?:in|since|by|until|around|during|from|on|at) (?:(?:early|late|mid) |about |(?:the )?(?:spring|summer|autumn|winter|end|beginning) of |\d{1,2}(?:st|nd|rd|th)? )*"
            r"(?:(?:january|february|march|april|may|june|july|august|september|october|november|december) )?(?:\d{1,2} )?(?:1[0-9]{3}|20[0-9]{2})s?(?= |$)|(?:every|each|last|next|this) \w+(?= )",
            " ".join(low),
        )
        end = len(dated[0].split()) if dated else 0
        if end and end < len(low) and low[end] != "of":
            pass
        elif comma and comma < 14:
            end = comma
        else:
            end = 0
        if end:
            rest = tokens[end + 1 :] if low[end] == "," else tokens[end:]
            return _phrases(_lower_first(tokens[:end]))[:2], [], rest
    return [], [], tokens


def _lower_first(tokens: list[str]) -> list[str]:
    if not tokens:
        return tokens
    first = tokens[0]
    named = len(tokens) > 1 and tokens[1][0].isupper() and first.lower() not in DETERMINERS | PREPOSITIONS | PRONOUNS
    common = (
        first.lower() in DETERMINERS | PREPOSITIONS | PRONOUNS | _TIMES
        or is_number(first)
        or len(tokens) > 1
        or re.search(r"(s|ing|tion|ment|ship|ness|ance|ence)$", first)
    )
    keep = first != first.capitalize() or first == "I" or named or not common
    return tokens if keep else [first.lower(), *tokens[1:]]


def _predicates(tokens: list[str], main: tuple[str, ...]) -> list[Clause]:
    """Subject and first predicate, then the predicates and clauses joined to it."""
    found = find_verb(tokens)
    if found is None or found[0] > 22:
        return []
    at, kind = found
    subject = tuple(token for token in _lower_first(tokens[:at]))
    while len(subject) > 1 and subject[-1].lower() in ADVERBS | {","}:
        subject = subject[:-1]
    if "," in subject:
        cut = subject.index(",")
        if "and" not in subject[cut:] and "or" not in subject[cut:]:
            subject = subject[:cut]
    if (
        subject[0].lower() in ("it", "he", "she", "they")
        and len(subject) == 1
        and main
        and is_plural(main) == (subject[0].lower() == "they")
    ):
        subject = main
    first_end, rest = _end_of_predicate(tokens, at, kind)
    clause = _clause(subject, tokens[at:first_end], kind)
    result = [clause] if clause else []
    if rest:
        low = rest[0].lower()
        link = low if low in _SUBORDINATORS else ""
        while rest and (rest[0].lower() in {"and", "but", "or", "so", ",", "then", "that"} | _SUBORDINATORS):
            rest = rest[1:]
        if clause and link == "because":
            result[0] = replace(clause, reason=True)
        if rest:
            inner = _kind_after(rest, kind)
            if inner:
                result += _predicates_of(subject, rest, inner, clause)
            elif link not in ("if", "when", "as", "because", "whether", "where"):
                result += _predicates(rest, subject)
    return result


def _predicates_of(subject: tuple[str, ...], rest: list[str], kind: str, first: Clause | None) -> list[Clause]:
    if kind == "participle" and first:
        rest, kind = [*first.auxiliaries, *rest], "aux"
    end, more = _end_of_predicate(rest, 0, kind)
    clause = _clause(subject, rest[:end], kind)
    return [clause] if clause else []


def _kind_after(rest: list[str], kind: str) -> str:
    """Kind of a verb that continues the same subject ("and ripens", "and was carried"), else ""."""
    i = 0
    while i < len(rest) - 1 and rest[i].lower() in ADVERBS:
        i += 1
    word, after = rest[i].lower(), rest[i + 1].lower() if i + 1 < len(rest) else ""
    if word in AUXILIARIES:
        return "aux"
    opens = not after or after in DETERMINERS | PREPOSITIONS | ADVERBS | PRONOUNS | {","} or is_number(after) or rest[i + 1][0].isupper()
    if kind == "base" and word in LEMMAS and after in DETERMINERS | PREPOSITIONS:
        return "base"
    if kind == "third" and lemma_of_third(word) and (opens or after in {"that"} or not lemma_of_third(after)):
        return "third"
    if kind == "past" and lemma_of_past(word) and opens:
        return "past"
    if kind == "aux" and opens and lemma_of_past(word) and not lemma_of_participle(word):
        return "past"
    if kind == "aux" and opens and lemma_of_third(word):
        return "third"
    return ""


def _end_of_predicate(tokens: list[str], at: int, kind: str) -> tuple[int, list[str]]:
    """Where the first predicate stops, and what follows if it is another predicate or clause (its joining word first)."""
    for i in range(at + 1, len(tokens)):
        word = tokens[i].lower()
        before_comma = tokens[i - 1] == ","
        rest = tokens[i + 1 :]
        if not rest:
            break
        if word in ("and", "but", "so", "or") and (_kind_after(rest, kind) or (before_comma or word == "but") and find_verb(rest)):
            return (i - 1 if before_comma else i), tokens[i:]
        if word in ("and", "but") and not before_comma:
            inner = find_verb(rest)
            if inner and inner[0] <= 5 and inner[1] in ("aux", "past", "third") and rest[0].lower() in DETERMINERS | PRONOUNS:
                return i, tokens[i:]
        if (
            word in ("because", "while", "although", "though", "whereas", "unless", "if", "whether")
            or word == "so"
            and rest[0].lower() == "that"
        ):
            return (i - 1 if before_comma else i), tokens[i:]
        if (
            word in ("when", "where", "until", "before", "after", "since", "once", "as")
            and find_verb(rest)
            and rest[0].lower() in DETERMINERS | PRONOUNS
        ):
            inner = find_verb(rest)
            if inner and inner[0] <= 4:
                return (i - 1 if before_comma else i), tokens[i:]
    return len(tokens), []


def _clause(subject: tuple[str, ...], words: list[str], kind: str) -> Clause | None:
    """Auxiliaries, verb and phrases of one predicate; None when it is negated or empty."""
    auxiliaries: list[str] = []
    i = 0
    while i < len(words) and (
        words[i].lower() in AUXILIARIES | {"be", "been", "being"}
        or words[i].lower() in ADVERBS | NEGATIONS
        or re.fullmatch(r"\w{2,}ly", words[i].lower())
    ):
        low = words[i].lower()
        if low in NEGATIONS or low.endswith("n't"):
            return None
        if low in AUXILIARIES | BE:
            auxiliaries.append(low)
        elif not auxiliaries and kind != "aux":
            pass
        elif low in ("there", "so", "more", "most", "far", "here", "nearly", "almost"):
            break
        i += 1
    verb = words[i].lower() if i < len(words) else ""
    lemma, tense = "", ""
    if not auxiliaries:
        found = {"past": lemma_of_past, "third": lambda word: lemma_of_third(word, known=False), "base": lambda word: word}.get(
            kind, lambda word: None
        )(verb)
        if not found:
            return None
        lemma, tense = found, kind
        if kind == "past" and verb in LEMMAS and is_plural(subject):
            tense = "base"
    elif auxiliaries[-1] in BE:
        participle = (
            lemma_of_participle(verb)
            if not (verb in LEMMAS and verb not in ("put", "set", "cut", "read", "run", "hit", "built")) or verb == "run"
            else None
        )
        lemma = participle or (verb[:-3] if verb.endswith("ing") and len(verb) > 5 and len(words) > i + 1 else "")
        verb = verb if lemma else ""
    elif auxiliaries[-1] in ("has", "have", "had"):
        lemma = lemma_of_participle(verb) or ""
        if not lemma:
            verb, lemma, tense = auxiliaries.pop(), "have", ""
            tense = {"has": "third", "have": "base", "had": "past"}[verb]
            i -= 1
            if auxiliaries:
                return None
    else:
        lemma = verb if verb in LEMMAS or verb in ("have", "do", "be") else ""
        if not lemma:
            return None
    i += 1 if verb else 0
    if (
        any(word.lower() in ("nobody", "nothing", "none", "never", "not") for word in (*subject, *words[i : i + 2]))
        or subject[0].lower() == "no"
    ):
        return None
    return Clause(subject, tuple(auxiliaries), verb, lemma, tense, tuple(_phrases(words[i:])))


def _phrases(words: list[str]) -> list[Phrase]:
    """Cut at prepositions (but "of") and before time expressions; what follows a comma stays only as part of a list."""
    found: list[Phrase] = []
    preposition, part = "", []
    words = _without_tail(words)

    def close() -> None:
        nonlocal preposition, part
        if part or preposition:
            found.append(Phrase(preposition, tuple(part)))
        preposition, part = "", []

    for i, word in enumerate(words):
        low = word.lower()
        after = words[i + 1].lower() if i + 1 < len(words) else ""
        previous = words[i - 1].lower() if i else ""
        timely = (
            (low in ("every", "each", "last", "this", "next") and after in _TIMES)
            or (low == "a" and after in _TIMES and part and preposition != "for")
            or low in ("today", "daily", "once", "twice")
        )
        if low in _PARTICLES and not after or low in ("up", "out", "off", "back", "away", "apart") and after not in DETERMINERS:
            close()
            found.append(Phrase("", (low,)))
        elif (
            low in PREPOSITIONS
            and not (low in ("about", "around", "over", "up") and (is_number(after) or after == "to"))
            and not (low == "to" and previous == "up")
            and low not in ("than",)
        ):
            if low == "as" and part and part[-1].lower() in ("as", "such", "well", "known"):
                part.append(word)
            elif low == "between" and part and part[-1] == "and":
                part.append(word)
            else:
                close()
                preposition = low
        elif timely and not (not part and preposition):
            close()
            part.append(word)
        else:
            part.append(word)
    close()
    return found


def _without_tail(words: list[str]) -> list[str]:
    """Drop what follows a comma unless the words make a list ("books, tools and seed")."""
    if "," not in words:
        return words
    cut = words.index(",")
    rest = words[cut + 1 :]
    items = " ".join(rest).split(" , ")
    joined = (
        any(word in ("and", "or") for word in rest)
        and all(len(item.split()) <= 6 for item in items)
        and not (rest and rest[0].lower() in ("and", "but", "or", "with", "together", "then", "much"))
    )
    return words if joined else words[:cut]
