"""English word classes and noun phrases: what a stretch of words stands for (a time, a place, a count, a person, a name)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab_runtime.verbs import LEMMAS, lemma_of_participle, word_set

BE = word_set("is are was were am be been being")
MODALS = word_set("may must will would could should can might shall cannot")
AUXILIARIES = word_set("is are was were am has have had do does did") | MODALS
NEGATIONS = word_set("not never no nobody nothing none neither cannot nor")
DETERMINERS = word_set(
    """the a an this these those each every our your their his her its my some any no another both all such own most many several
    few"""
)
PREPOSITIONS = word_set(
    """in on at from to by with for since during after before until till into onto through under below above beneath beside between
    along behind near across against among around about over off without within inside outside towards toward via per past
    beyond despite as upon throughout opposite down up like"""
)
PRONOUNS = word_set("i we you he she it they")
ADVERBS = word_set(
    """also now still always only already often usually once currently today then just even ever sometimes soon later again together
    too both since first originally therefore however thus nearly almost mostly mainly largely partly simply far so more most
    there here"""
)
RELATIVES = word_set("that who which whose whom where")
TIMES = word_set(
    """year years month months week weeks day days hour hours morning evening afternoon night nights spring summer autumn winter
    season monday tuesday wednesday thursday friday saturday sunday weekend decade century minute minutes mornings evenings
    afternoons summers winters weekends"""
)
SUBORDINATORS = word_set("because while although though whereas since unless if when where whether so until before after once as")
CLAUSAL = word_set("that whether how what why")
_PARTICLES = word_set("up out off back away over down apart together along aside")
_PLURALS = word_set(
    """people children men women others some many most few all both these those mice geese feet teeth they we you police cattle
    staff"""
)
_QUANTITIES = word_set("half most some all many third thirds quarter quarters rest majority number percent %")
_MONTHS = word_set("january february march april may june july august september october november december")
_DAYS = word_set("monday tuesday wednesday thursday friday saturday sunday")
_SEASONS = word_set("spring summer autumn winter")
_YEAR = re.compile(r"\b(1[0-9]{3}|20[0-9]{2})s?\b")
_PERIODS = re.compile(
    r"^(years?|months?|weeks?|days?|hours?|minutes?|seconds?|decades?|centur(?:y|ies)|summers?|winters?|weekends?|nights?|seasons?)$"
)
_MONEY = re.compile(r"^(pounds?|dollars?|euros?|pence|cents?|francs?|yen|crowns?|kron[eao]r?)$")
_LENGTHS = re.compile(r"^(met(?:re|er)s?|kilomet(?:re|er)s?|miles?|feet|foot|yards?|inch(?:es)?|centimet(?:re|er)s?|cm|km|m|mm)$")
_WEIGHTS = re.compile(r"^(kilograms?|kilos?|grams?|tons?|tonnes?|kg|ounces?)$")
COLOURS = word_set(
    """red blue green yellow orange purple violet pink brown black white grey gray turquoise gold golden silver crimson scarlet navy
    beige"""
)
_PLACES = word_set(
    """room hall tunnel mine vault garden house cabinet village town city valley island building school church chapel library museum
    station street lane road park square centre center yard shed tower castle cellar basement kitchen office workshop
    laboratory field hill hillside mountain river lake sea coast forest wood harbour port bridge shop desk gate floor bunker
    country countries region gallery terrace ground drawer shaft cave farm barn monastery theatre hospital university college
    corner wall roof bank pond glasshouse attic bay quarry directory folder file end mouth slope bench table entrance window
    lobby café cathedral abbey palace temple beach cape fort canal dam pier quay mill lighthouse airport hotel inn isle
    island"""
)
_ORGANISATIONS = word_set(
    """bank mill foundation university hall lane street road museum island islands company institute trust society club medal prize
    award festival library school church house park garden project party council race supper lecture night group valley
    mountains station server software system version"""
)
# nouns for people: many -er words are things (drawer, server), so these are listed
_PEOPLE = word_set(
    """person people man men woman women child children boy girl mother father brother sister son daughter wife husband uncle aunt
    friend member visitor volunteer customer user guest winner speaker reader writer author editor keeper owner founder
    leader manager director teacher schoolteacher pupil student professor lecturer headteacher baker cook chef butcher brewer
    farmer gardener grower breeder beekeeper shepherd miller miner painter sculptor builder joiner carpenter mason plumber
    roofer glazier thatcher potter weaver tailor clockmaker architect engineer inventor designer developer programmer
    maintainer administrator contributor researcher scientist doctor surgeon nurse vet lawyer judge clerk banker trader
    merchant shopkeeper landlord sailor captain fisherman pilot driver postman watchman nightwatchman guard soldier officer
    king queen prince princess emperor president minister mayor councillor politician bishop priest monk nun vicar poet
    singer composer musician drummer player conductor dancer actor actress presenter broadcaster journalist photographer
    historian curator librarian botanist explorer traveller climber collector beginner borrower champion apprentice assistant
    helper supporter trustee chair chairman chairwoman chairperson secretary treasurer coordinator cleaner ringer diver rider
    racer runner swimmer skipper ferryman worker labourer craftsman staff crew team family families villager neighbour
    resident citizen donor sponsor"""
)
_PERSON_ENDING = re.compile(r".{3}(ist|man|woman|maker|keeper|smith|wright|herd|teacher|worker|holder|ologist)s?$")
_TOKEN = re.compile(r"\d[\d,.:]*\d|[^\s,;:()]+|[,;:()]")
_TENS = word_set("twenty thirty forty fifty sixty seventy eighty ninety")
_NUMBERS = _TENS | word_set(
    """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    hundred thousand million billion dozen"""
)
_APPROXIMATE = word_set(
    """about around some more less than at least most up to nearly over almost only another minus exactly roughly approximately just
    under"""
)


@dataclass(frozen=True)
class Phrase:
    """A stretch after the verb: a preposition ("" for an object or complement) and its words."""

    preposition: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return join([self.preposition, *self.words])

    @property
    def infinitive(self) -> bool:
        """Whether it is "to" with a verb, as in "to build a second vault"."""
        return (
            self.preposition == "to" and bool(self.words) and self.words[0] in LEMMAS | {"be", "have", "do"} and self.words[1:2] != ("of",)
        )


def join(words: Sequence[str]) -> str:
    """Words to text, punctuation closed up."""
    return re.sub(r" +([,;:])", r"\1", " ".join(word for word in words if word)).strip(" ,;:")


def tokens_of(sentence: str) -> list[str]:
    """Words and marks of a sentence, without bullets, parentheses, quotation marks and the full stop."""
    text = re.sub(r"[“”\"]", "", sentence.replace("’", "'"))
    text = re.sub(r"\s*[(\[][^()\[\]]*[)\]]", "", text)
    text = re.sub(r"^[\s\-*•·–—]+", "", text).strip()
    text = re.sub(r"\b(?:in order|so as) to\b", "to", text)
    return _TOKEN.findall(re.sub(r"\s+[–—-]+\s+|—", " ; ", re.sub(r"[.!]+$", "", text)))


def is_number(word: str) -> bool:
    """A count in digits or words: 3,250, forty, dozen."""
    return bool(re.fullmatch(r"[£$€]?\d[\d,.]*%?", word)) or word.lower() in _NUMBERS or word.lower().split("-")[0] in _TENS


def head_of(words: Sequence[str]) -> int:
    """Index of a noun phrase's head: the last word before its first preposition, relative clause or comma."""
    at = 0
    while at < len(words):
        low = words[at].lower()
        if at and (low in PREPOSITIONS | RELATIVES | PRONOUNS or low in (",", "of", "called", "named")):
            break
        at += 1
    return at - 1


def is_plural(words: Sequence[str]) -> bool:
    """Whether a noun phrase takes a plural verb."""
    if not words:
        return False
    at = head_of(words)
    low = [word.lower() for word in words[: at + 1]]
    if "and" in low and low[0] not in ("each", "every"):
        return True
    last = low[-1]
    if last in _QUANTITIES and words[at + 1 : at + 2] in (["of"], ("of",)):
        return is_plural(words[at + 2 :])
    if at and words[at][0].isupper() and words[at - 1][0].isupper() and low[0] not in DETERMINERS:
        return False  # a name: Ann Cummings
    return (
        last in _PLURALS
        or (is_number(last) and (not at or low[-2] in DETERMINERS))
        or (last.endswith("s") and not last.endswith(("ss", "us", "is", "'s")))
    )


def trimmed(words: Sequence[str]) -> list[str]:
    """A noun phrase without its relative clause, its "called ..." and what follows a comma."""
    for i, word in enumerate(words):
        if i and (word.lower() in RELATIVES or word in (",", "called", "named", "nicknamed")):
            return list(words[:i])
    return list(words)


def names(words: Sequence[str]) -> list[str]:
    """The capitalised run at the end of a noun phrase: ["Dar", "Essun"] of "the oases of Dar Essun"."""
    i = len(words)
    while i and (
        words[i - 1][:1].isupper()
        or (1 < i < len(words) and words[i - 1] in ("of", "the", "and", "de", "van", "von") and words[i - 2][0].isupper())
    ):
        i -= 1
    return list(words[i:])


def apposed(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(["the", "baker"], ["Ann", "Lee"]) of "the baker Ann Lee"; the first is empty for a bare name, both where there is no name."""
    plain = trimmed(words)
    name = names(plain)
    role = plain[: len(plain) - len(name)]
    if not name or (
        role and (not role[-1][0].islower() or any(word.lower() in PREPOSITIONS | {"of"} for word in role) or role[-1] in DETERMINERS)
    ):
        return [], []
    return role, name


def is_role(word: str) -> bool:
    """Whether a noun is one for people: gardener, botanists."""
    low = word.lower()
    return low in _PEOPLE or low.removesuffix("s") in _PEOPLE or bool(_PERSON_ENDING.fullmatch(low))


def is_person(words: Sequence[str]) -> bool:
    """Whether a noun phrase is the name of a person, with or without a noun before it."""
    role, name = apposed(words)
    if role:
        return is_role(role[-1])
    return (
        2 <= len(name) <= 3
        and len(name) == len(words)
        and all(re.fullmatch(r"[A-ZÀ-Þ][\w'’.-]*", word) and not (word.isupper() and len(word) > 2) for word in name)
        and name[-1].lower() not in _ORGANISATIONS | _PLACES
        and not any(word.lower() in DETERMINERS for word in name)
    )


def is_place(phrase: Phrase) -> bool:
    """Whether a prepositional phrase tells where: in the mine, at Skerrow Mill."""
    where = "in on at near under below above beneath beside between behind inside outside to from into across along through for"
    if phrase.preposition not in where.split() or not phrase.words:
        return False
    words = list(phrase.words)
    head = words[: head_of(words) + 1]
    last = head[-1].lower()
    if any(map(is_number, head)) or any(is_role(word) and word[0].islower() for word in head) or ("and" in head and last not in _PLACES):
        return False
    named = head[-1][0].isupper() and (head[0][0].isupper() or head[0] in ("the", "our")) and not is_person(head)
    return last in _PLACES or last.removesuffix("s") in _PLACES or (named and last not in _MONTHS and last not in _DAYS)


def when(phrase: Phrase) -> list[str]:
    """Question words for a phrase of time ("in 1961": when, in which year), or []."""
    low, first = [word.lower() for word in phrase.words], phrase.preposition
    text = " ".join(low)
    if not low or (
        first
        and first
        not in ["in", "on", "at", "from", "since", "until", "till", "by", "during", "before", "after", "for", "within", "to", "around"]
    ):
        return []
    if first == "for":
        long = (
            is_number(low[0])
            or low[0] in ("more", "about", "nearly", "over", "almost", "a", "many", "several")
            or low[0] in ("years", "decades", "centuries")
        )
        return ["how long", "for how long"] if _PERIODS.match(low[-1]) and long else []
    if first in ("in", "within") and _PERIODS.match(low[-1]) and any(map(is_number, low[:-1])):
        return ["how soon", "within what time"] if first == "within" else ["when"]
    if low[:2] == ["once", "every"] or (low[0] in ("every", "each") and len(low) > 2 and is_number(low[1])):
        return ["how often"]
    if low[0] in ("daily", "twice", "weekly") or (low[0] in ("every", "once") and len(low) == 2 and low[1] in TIMES):
        return ["how often"]
    if low[0] in ("every", "each", "per", "once"):
        return []
    year, month = _YEAR.search(text), next((word for word in phrase.words if word.lower() in _MONTHS and word[0].isupper()), "")
    day = any(word.removesuffix("s") in _DAYS for word in low)
    dated = year and (len(low) <= 3 or re.search(r"\b(spring|summer|autumn|winter|end|beginning|early|late|mid|century)\b", text))
    if not (dated or month or day):
        clock = low[-1] in _SEASONS or re.search(
            r"\b(o'clock|noon|midnight|morning|evening|afternoon|night|easter|christmas|quarter)$", text
        )
        if clock and first in ("in", "at", "from", "until", "on", "during", "since", ""):
            return {"until": ["until when"], "since": ["since when"], "at": ["at what time", "when"]}.get(first, ["when"])
        return ["when"] if (low[0] in ("last", "next", "this") and len(low) == 2) or text in ("the next year", "the following year") else []
    if first == "from" and year:
        return []
    if first == "since":
        return ["since when", "since when" if month else "since which year"]
    if first in ("until", "till", "to"):
        return ["until when"]
    if first in ("before", "after", "by"):
        return [f"{first} which year"] if year and not month else [f"{first} when"] if first == "by" else []
    if len(low) == 1 or (month and year and len(low) == 2):
        kind = "month" if month else "year" if year else "day"
        inner = {"month": "in", "year": "in", "day": "on"}[kind]
        return ["when", f"{inner} which {kind}", f"{inner} what {kind}"] if first == inner else ["when"]
    return ["when"]


def count(words: Sequence[str]) -> tuple[str, list[str], str] | None:
    """(number, what is counted, kind) of words that start with a number: "about 90 brass bells" -> ("90", ["brass", "bells"], "things")."""
    plain = trimmed(words)
    i = 0
    while i < len(plain) and plain[i].lower() in _APPROXIMATE:
        i += 1
    if plain[i : i + 1] == ["a"] and i + 1 < len(plain) and plain[i + 1] in ("hundred", "thousand", "million", "dozen"):
        i += 1
    begin = i
    while i < len(plain) and is_number(plain[i]):
        i += 1
    if i == begin:
        return None
    number, counted = join(plain[begin:i]), plain[i:]
    for cut, word in enumerate(counted):
        if word.lower() in ("and", "or", "plus"):
            counted = counted[:cut]
            break
    if number[0] in "£$€":
        return number, [], "money"
    if number.endswith("%") or (counted and counted[0].lower() in ("percent", "%")):
        return number, counted if number.endswith("%") else counted[1:], "percent"
    unit = counted[0].lower() if counted else ""
    if not unit or _YEAR.fullmatch(number) or unit[0].isdigit() or unit in ("o'clock", "am", "pm", "of") or unit in PREPOSITIONS:
        return None
    kinds = {"money": _MONEY, "length": _LENGTHS, "weight": _WEIGHTS, "period": _PERIODS, "degrees": re.compile("degrees?$")}
    return number, counted, next((kind for kind, form in kinds.items() if form.match(unit)), "things")


# --- cutting what follows a verb ---------------------------------------------------------------------------------------------------


def phrases_of(words: Sequence[str]) -> list[Phrase]:
    """Cut at prepositions (but "of") and before expressions of time; relative clauses and comma tails but for lists are dropped."""
    found: list[Phrase] = []
    part: list[str] = []
    preposition = ""
    words = _without_tail(list(words))
    for i, word in enumerate(words):
        low = word.lower()
        particle, timely, starts = _is_particle(words, i), _starts_time(words, i, part), _starts_phrase(words, i, part)
        if (starts or particle or (timely and not (preposition and not part))) and (part or preposition):
            found.append(Phrase(preposition, tuple(part)))
            preposition, part = "", []
        if particle:
            found.append(Phrase("", (low,)))
        elif starts:
            preposition = low
        elif timely and low == "a" and not part:
            preposition = "per"
        else:
            part.append(word)
    found = [*found, Phrase(preposition, tuple(part))] if part or preposition else found
    return [phrase for phrase in found if phrase.preposition or phrase.words not in {("even",), ("only",), ("just",), ("also",), ("both",)}]


def _starts_time(words: list[str], i: int, part: list[str]) -> bool:
    """Whether an expression of time without preposition starts here: every day, a year, once every, the next spring."""
    low = words[i].lower()
    after, later = (words[j].lower() if j < len(words) else "" for j in (i + 1, i + 2))
    if low in ("every", "each", "this", "next", "last", "once"):
        return after in TIMES and words[i - 1 : i] != ["the"]
    if low == "a":
        return after in TIMES and bool(part)
    if low == "the" and part:
        return (after in ("next", "following", "same") and later in TIMES) or (after in TIMES and later == "before")
    return low in ("today", "daily", "twice") or (low == "once" and after == "every")


def _is_particle(words: list[str], i: int) -> bool:
    """Whether the word goes with the verb: took over, brought back."""
    low, after = words[i].lower(), words[i + 1].lower() if i + 1 < len(words) else ""
    loose = low in ("up", "out", "off", "back", "away", "apart") and after not in DETERMINERS
    return low in _PARTICLES and (not after or after == "," or loose) and (low, after) != ("up", "to")


def _starts_phrase(words: list[str], i: int, part: list[str]) -> bool:
    """Whether the word is a preposition that opens a phrase, not part of a number ("about 40", "up to 14") or of "pane by pane"."""
    low, after = words[i].lower(), words[i + 1].lower() if i + 1 < len(words) else ""
    before = words[i - 1].lower() if i else ""
    if low not in PREPOSITIONS or not after or low == "than" or _is_particle(words, i):
        return False
    if (low in ("about", "around", "over") and is_number(after)) or (low, after) == ("up", "to") or (before, low) == ("up", "to"):
        return False
    return before != after and not (low == "as" and part and before in ("as", "such", "well", "known"))


def _describes(words: list[str], i: int) -> bool:
    """Whether a participle describes the noun before it: "57 notebooks bound in oilcloth"."""
    before, after = words[i - 1].lower(), words[i + 1].lower() if i + 1 < len(words) else ""
    if i < 2 or after not in ("in", "with", "by", "from", "on", "for", "at") or not lemma_of_participle(words[i].lower()):
        return False
    return before not in DETERMINERS | PREPOSITIONS | ADVERBS | BE | {"and", "or", ",", "of"} and not before.endswith("ly")


def _without_tail(words: list[str]) -> list[str]:
    """Drop a relative clause with all that follows it, and what follows a comma unless the words make a list ("books, tools and seed")."""
    at = next((i for i, word in enumerate(words) if i and (word.lower() in RELATIVES or _describes(words, i))), 0)
    if at:
        words = words[: at - 1] if words[at - 1].lower() in PREPOSITIONS else words[:at]
    if "," not in words:
        return words
    cut = words.index(",")
    kept, rest = words[:cut], words[cut + 1 :]
    opens = rest[0].lower() if rest else ""
    if opens in ("called", "named") or (opens == "at" and rest[1:3] == ["the", "age"]):
        return [*kept, *(rest[: rest.index(",")] if "," in rest else rest)]
    name = next((i for i, word in enumerate(rest) if not word[0].isupper()), len(rest))
    if name >= 2 and kept and kept[-1][0].islower() and (name == len(rest) or rest[name] == ","):
        return [*kept, *rest[:name], *rest[name + 1 :]]
    listed = {"and", "or"} & set(rest) and all(len(item.split()) <= 6 for item in " ".join(rest).split(" , "))
    return words if listed and opens not in {"and", "but", "or", "then", "much", "together"} | PREPOSITIONS else kept
