"""Everyday prompts that any chat model can answer; its own answers to them are rehearsed while it learns new pages.

They are asked in wordings of their own, so that none is likely to be somebody's test question.
"""

from __future__ import annotations

import random

_ASKED: dict[str, str] = {
    "Which city is the capital of {}?": "Austria|Norway|Greece|Kenya|Peru|Cuba|Poland|Thailand|Portugal|Argentina|Ireland|Turkey",
    "Which language do most people in {} speak?": "Brazil|Germany|Japan|Italy|Russia|China",
    "Which continent does {} belong to?": "India|Nigeria|Chile|Sweden|Vietnam",
    "What do people call a young {}?": "cow|sheep|horse|duck|lion|goat",
    "Which colour does {} have?": "fresh grass|clean snow|coal|a ripe lemon|a carrot|a flamingo",
    "How much is {}?": "6 plus 7|12 plus 9|20 minus 8|4 times 5|15 divided by 3|9 plus 9",
    "Give me the opposite of the word {}.": "big|early|wet|noisy|empty|old|strong",
    "What can I use a {} for?": "hammer|kettle|compass|ladder|thermometer|broom|needle",
    "Where do {} usually live?": "penguins|camels|kangaroos|whales|bees|polar bears",
    "Which sound does a {} make?": "cow|cat|lion|rooster",
    "Name three {}.": "fruits|musical instruments|tools|vegetables|sports|European countries|seasons|mammals",
    "In one sentence, what is {}?": (
        "gravity|inflation|photosynthesis|democracy|an atom|a verb|electricity|a volcano|evolution|the internet"
    ),
    "Who is known as the author of {}?": "Hamlet|The Odyssey|Oliver Twist|Don Quixote|War and Peace",
    "Who is famous for {}?": "the theory of relativity|painting the Sistine Chapel|discovering penicillin|inventing the telephone",
    "What is {} made from?": "yoghurt|glass|paper|cheese|chocolate|wine",
    "How many {} are there?": (
        "minutes in an hour|letters in the English alphabet|wheels on a car|players in a football team|cents in a dollar"
    ),
    "How many legs does a {} have?": "spider|horse|bird|bee",
    "Which organ does the body use to {}?": "breathe|see|think|digest food",
    "Which gas do {}?": "people breathe in to live|plants take from the air",
    "What is the symbol of {} in chemistry?": "oxygen|silver|carbon|sodium",
    "Which month comes after {}?": "March|June|November",
    "Which day comes before {}?": "Tuesday|Saturday",
    "Which one is larger, {}?": "an elephant or a mouse|a village or a city|an ocean or a lake",
    "Which country is famous for {}?": "pyramids|pizza|sushi|kangaroos",
    "Which money do people use in {}?": "Japan|the United States|India|Mexico",
    "Why do {}?": "people sleep|birds fly south in winter|we have dreams|we brush our teeth|bees dance",
    "How do I {}?": "boil an egg|sew on a button|make tea|learn a new word|stay healthy",
    "Tell me one fact about {}.": "the planet Mars|owls|the brain|Africa|rivers|music|the year 1969|Mount Everest|the Pacific",
    "Translate {} into French.": "good morning|thank you",
    "Write one sentence about {}.": "the sea|a friend|winter|a long walk|a library",
    "{}": "Hello!|How are you today?|Who are you?|Thank you very much!|Can you help me?|Good night!|What can you do?",
}

_SUBJECTS = (
    "deserts|glass|the history of paper|whales|a street market|sleep|volcanoes|knitting|castles|hospitals|football|clouds|"
    "teachers|the violin|chess|"
    "rice|the human skeleton|maps|elephants|photography|insurance|telephones|rain|money|pottery|islands|bridges|coffee|"
    "spiders|dreams|robots|"
    "winter|alphabets|honey|salt|mirrors|wolves|farming|cinemas|earthquakes|swimming|computers|weddings|rivers|clocks|dentists|wool|stars|"
    "vegetable soup|forests in the tropics|airports|newspapers|friendship|batteries|horses|painting a wall|shopping|old age|"
    "a day at school|"
    "lakes|language learning|the stomach|taxes|birdsong|a rainy holiday|apples|fire|libraries|camping|memory|steel|the theatre"
).split("|")
_TEXTS = (
    "Write a short text about {}.",
    "Write a paragraph that explains {}.",
    "Tell a short story about {}.",
    "Describe {} for a newspaper.",
)


def essays(count: int, seed: int) -> list[str]:
    """`count` requests for a short text; subjects come again, with another request, only when all were used."""
    order = random.Random(seed)
    subjects = list(_SUBJECTS)
    order.shuffle(subjects)
    return [_TEXTS[(index + index // len(subjects)) % len(_TEXTS)].format(subjects[index % len(subjects)]) for index in range(count)]


def prompts(count: int, seed: int) -> list[str]:
    """At most `count` of the prompts, in an order that depends on the seed; every wording before any comes again."""
    random_order = random.Random(seed)
    columns = []
    for wording, words in _ASKED.items():
        column = [wording.format(word) for word in words.split("|")]
        random_order.shuffle(column)
        columns.append(column)
    rounds = [[column[place] for column in columns if place < len(column)] for place in range(max(map(len, columns)))]
    for one in rounds:
        random_order.shuffle(one)
    return [prompt for one in rounds for prompt in one][:count]
