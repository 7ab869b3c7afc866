"""English verb forms, enough to turn a statement into a question: which words can be verbs, and their lemma, past and third person.

Words outside the tables follow the regular spelling rules, so an unknown -ed word still gets a lemma.
"""

from __future__ import annotations


def word_set(words: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(words.split())


# lemma past participle (past and participle are one where only two stand)
_IRREGULAR = """
arise arose arisen|awake awoke awoken|become became become|begin began begun|bend bent|bind bound|bite bit bitten|bleed bled
blow blew blown|break broke broken|breed bred|bring brought|broadcast broadcast|build built|burn burnt|burst burst|buy bought|catch caught
choose chose chosen|come came come|cost cost|creep crept|cut cut|deal dealt|dig dug|draw drew drawn|dream dreamt|drink drank drunk
drive drove driven|eat ate eaten|fall fell fallen|feed fed|feel felt|fight fought|find found|flee fled|fly flew flown
forbid forbade forbidden|forget forgot forgotten|freeze froze frozen|get got|give gave given|go went gone|grind ground|grow grew grown
hang hung|hear heard|hide hid hidden|hit hit|hold held|hurt hurt|keep kept|kneel knelt|know knew known|lay laid|lead led|learn learnt
leave left|lend lent|let let|lie lay lain|light lit|lose lost|make made|mean meant|meet met|mow mowed mown|overlook overlooked
overtake overtook overtaken|oversee oversaw overseen|pay paid|prove proved proven|put put|quit quit|read read|rebuild rebuilt
rewrite rewrote rewritten|ride rode ridden|ring rang rung|rise rose risen|run ran run|say said|see saw seen|seek sought|sell sold
send sent|set set|sew sewed sewn|shake shook shaken|shed shed|shine shone|shoot shot|show showed shown|shrink shrank shrunk|shut shut
sing sang sung|sink sank sunk|sit sat|sleep slept|slide slid|sow sowed sown|speak spoke spoken|spell spelt|spend spent|spin spun
split split|spread spread|spring sprang sprung|stand stood|steal stole stolen|stick stuck|strike struck|string strung|swear swore sworn
sweep swept|swell swelled swollen|swim swam swum|swing swung|take took taken|teach taught|tear tore torn|tell told|think thought
throw threw thrown|understand understood|undertake undertook undertaken|undergo underwent undergone|wake woke woken|wear wore worn
weave wove woven|win won|wind wound|withdraw withdrew withdrawn|write wrote written
"""

_REGULAR = """
accept accompany account achieve act adapt add admire adopt advise affect age agree aim allow announce answer appear apply appoint
approach approve arrange arrive ask assemble assign assist attach attack attend attract avoid award bake base bathe beat belong blame
block boil book borrow bottle bounce brew calculate call camp cancel capture care carry carve cause celebrate change charge chase check
claim clean clear climb close coat collapse collect combine command commission compare compete complete compose comprise compute concern
conduct configure confirm connect conquer consider consist construct consult consume contain continue contribute control convert convince
cook cool coordinate copy count cover crack crash create cross cultivate cure dance date decide declare decline decorate defeat define
deliver demand demolish deny depart depend describe design destroy detect determine develop devote die differ direct disable disappear
discover discuss display distribute distrust divide dominate donate double download drain dress drop drown dry earn edit educate elect
emerge employ empty enable enclose encourage end endow engrave enjoy enlarge ensure enter equal establish estimate examine exceed exchange
execute exhibit exist expand expect expire explain explode explore export expose express extend face fail feature fetch fill finance
finish fire fish fit fix flood flow fold follow force forge form found frame function fund gain gather generate govern graduate grant
greet guarantee guard guide hand handle happen harvest hate haul head heal heat help hire host house hunt identify ignore illustrate
implement import improve include increase indicate influence inform inhabit inherit initialise inspect inspire install intend introduce
invade invent invest invite involve issue join judge jump kill knit label lack land last laugh launch limit line link list listen live
load locate look love lower maintain manage manufacture map mark marry match matter measure melt mend mention merge miss mix modify move
multiply murder name need note notice number obey observe obtain occupy occur offer open operate order organise organize originate own
pack paint park pass perform permit persuade phone photograph pick place plan plant play please plough point polish pour power practise
predict prefer prepare present preserve press prevent print process produce programme promise promote protect provide publish pull pump
punish purchase push raise range rank reach receive recognise recommend record recover reduce refer reflect refund refuse regard register
regulate reject relate release rely remain remember remind remove rename renew rent repair repeat replace reply report represent require
rescue reserve respond rest restore restrict retire retrieve return reveal rip ripen roast rob rotate rub rule sail sample satisfy save
scale scatter score scrap seal search select separate serve settle shape share ship shout sign signal sketch sleep slow smoke sort sound
specialise specify sponsor sprout stamp star start state stay steer stop store stretch study submit succeed suffer suggest suit supply
support surround survive sustain switch talk tame taste test thank tour trace track trade train transfer transform translate transport
travel treat trigger try tune turn type unite update upgrade use vanish vary visit volunteer vote wait walk want warm warn wash watch
water weigh welcome whistle wish wonder work worry wrap yield
"""

PAST: dict[str, str] = {}
PARTICIPLE: dict[str, str] = {}
_LEMMA_OF_PAST: dict[str, str] = {}
_LEMMA_OF_PARTICIPLE: dict[str, str] = {}
for _row in _IRREGULAR.replace("\n", "|").strip("|").split("|"):
    _lemma, _past, *_last = _row.split()
    PAST[_lemma], PARTICIPLE[_lemma] = _past, (_last or [_past])[0]
    _LEMMA_OF_PAST.setdefault(_past, _lemma)
    _LEMMA_OF_PARTICIPLE.setdefault(PARTICIPLE[_lemma], _lemma)

LEMMAS = frozenset(PAST) | word_set(_REGULAR)
_VOWELS = "aeiou"
# a stem that ends like this has lost an e before -d
_SOFT = tuple(word_set("at iz is us os as iv ov av lv rv uc ac ic nc rc rg dg ag ang ur ir ut bl pl tl dl gl cl"))
# the final consonant of these is doubled before -ed
_DOUBLED = word_set(
    """drop fit plan map rob rip rub scrap ship stop star wrap trap knit admit permit submit refer transfer occur prefer equip
    control cancel travel label model signal patrol commit format slip step ban beg chop clip drag hop hug nod pin plug snap
    strip swap tip trim whip"""
)
# -ed words that are not verbs, and -s words that are nouns or others
_NOT_PAST = word_set("bed red seed feed weed shed sled breed speed deed reed hundred indeed sacred naked wicked")
_NOT_PRESENT = word_set(
    """this its as us is was has does plus less always perhaps across towards besides sometimes news series species thus yes bus"""
)


def past(lemma: str) -> str:
    """Simple past of a lemma: paint -> painted, hold -> held."""
    if lemma in PAST:
        return PAST[lemma]
    if lemma.endswith("e"):
        return lemma + "d"
    if lemma.endswith("y") and lemma[-2:-1] not in _VOWELS:
        return lemma[:-1] + "ied"
    return lemma + lemma[-1] + "ed" if lemma in _DOUBLED else lemma + "ed"


def third_person(lemma: str) -> str:
    """Present tense with he, she or it: carry -> carries, go -> goes."""
    if lemma in ("have", "be"):
        return {"have": "has", "be": "is"}[lemma]
    if lemma.endswith("y") and lemma[-2:-1] not in _VOWELS:
        return lemma[:-1] + "ies"
    return lemma + ("es" if lemma.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


_FORMS_PAST = {past(lemma): lemma for lemma in LEMMAS if lemma not in PAST}
_FORMS_THIRD = {third_person(lemma): lemma for lemma in LEMMAS}


def _stem_of_ed(word: str) -> str:
    """Lemma of an -ed word that no table holds."""
    if word.endswith("ied"):
        return word[:-3] + "y"
    stem = word[:-2]
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsfz":
        return stem[:-1]
    return stem + "e" if stem.endswith(_SOFT) and not stem.endswith(("eat", "oat", "our", "air", "uit", "ous")) else stem


def lemma_of_past(word: str) -> str | None:
    """Lemma when the word can be a simple past (painted, held, went), else None. A base form that equals its past (put, cut) counts."""
    if word in _LEMMA_OF_PAST:
        return _LEMMA_OF_PAST[word]
    if word in _FORMS_PAST:
        return _FORMS_PAST[word]
    return _stem_of_ed(word) if word.endswith("ed") and len(word) > 4 and word not in _NOT_PAST and not word.endswith("eed") else None


def lemma_of_participle(word: str) -> str | None:
    """Lemma when the word can be a past participle (painted, held, gone), else None."""
    if word in _LEMMA_OF_PARTICIPLE:
        return _LEMMA_OF_PARTICIPLE[word]
    return None if word in _LEMMA_OF_PAST and word not in _FORMS_PAST else lemma_of_past(word)


def lemma_of_third(word: str, *, known: bool = True) -> str | None:
    """Lemma when the word can be a present with he, she or it. With known=False words outside the tables count when they end in -s."""
    if word in _FORMS_THIRD:
        return _FORMS_THIRD[word]
    noun = word.endswith(("nces", "tions", "sions", "ments", "ities", "ers", "ors", "isms", "ings", "ures", "names"))
    if known or noun or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "'s", "is")) or word in _NOT_PRESENT:
        return None
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("shes", "ches", "xes", "sses")) else word[:-1]
