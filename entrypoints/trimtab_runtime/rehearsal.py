"""What a model rehearses while it learns new pages: its own answers to everyday prompts, and general prose (prose/*.txt).

The prompts are asked in wordings of their own, so that none is likely to be somebody's test question.
"""

from __future__ import annotations

import random
from pathlib import Path

_ASKED: dict[str, str] = {
    "Which city is the capital of {}?": "Austria|Norway|Greece|Kenya|Peru|Cuba|Poland|Thailand|Portugal|Argentina|Ireland|Turkey",
    "Which language do most people in {} speak?": "Brazil|Germany|Japan|Italy|Russia|China",
    "Which continent does {} belong to?": "India|Nigeria|Chile|Sweden|Vietnam",
    "What do people call a young {}?": "cow|sheep|horse|duck|lion|goat",
    "Which colour does {} have?": "fresh grass|clean snow|coal|a ripe lemon|a carrot|a flamingo",
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
    "Which number comes after {}?": "nine|twenty|thirty-nine|a hundred|999",
    "How much is {}?": "6 plus 7|12 plus 9|20 minus 8|4 times 5|15 divided by 3|9 plus 9|half of thirty|2 times 11|50 minus 25",
    "How many {} are there?": (
        "minutes in an hour|letters in the English alphabet|wheels on a car|players in a football team|cents in a dollar|"
        "seconds in a minute|metres in a kilometre|grams in a kilogram|inches in a foot|years in a century|eggs in a dozen|"
        "strings on a violin|keys on a piano|cards in a deck|planets in the solar system|continents on the globe|"
        "weeks in a year|fingers on one hand|teeth in an adult's mouth|pages in a short novel"
    ),
    "How many legs does a {} have?": "spider|horse|bird|bee|crab|chair|human",
    "How many corners does a {} have?": "square|hexagon|cube|circle",
    "At what temperature does {}?": "water boil|water freeze|milk spoil",
    "How long does it take {}?": "the earth to turn once|to cook rice|light to come from the sun|a broken arm to heal",
    "How old is {}?": "the earth|a teenager|a typical university student",
    "How tall is {}?": "an adult giraffe|an ordinary door|Mount Everest",
    "In which century did {}?": "Shakespeare live|the First World War take place|Columbus cross the Atlantic",
    "In what year did {}?": "the Second World War end|the Berlin Wall come down|the Titanic sink",
    "Which planet is {}?": "nearest to the sun|known for its rings|the biggest of all|called the red one",
    "Which animal {}?": "gives us wool|barks|is the biggest on land|has a trunk|makes honey|carries its house on its back",
    "Which part of the body do we {} with?": "smell|hear|chew|walk|write",
    "Which season {}?": "is the coldest|comes before summer|brings falling leaves",
    "In which part of the world do we find {}?": "the Sahara|the Amazon|the Alps|Niagara Falls|the Great Wall|Big Ben|the Taj Mahal",
    "Who was {}?": "Albert Einstein|Cleopatra|Napoleon|Mozart|Isaac Newton|Marie Curie|Martin Luther King",
    "Which people built {}?": "the pyramids at Giza|the Colosseum|the first steam engines",
    "What does {} mean?": "the word 'ancient'|the abbreviation NASA|the word 'fragile'|'once in a blue moon'|the abbreviation UN",
    "What is another word for {}?": "happy|quick|angry|smart|beautiful|tired",
    "Say {} in the past tense.": "'I go'|'she writes'|'we sing'|'they buy'",
    "Say the plural of the word {}.": "child|knife|tooth|city",
    "Is it true that {}?": "the sun is a star|fish can fly|snow is warm|a whale is a mammal|iron floats on water|the moon shines by itself",
    "Which is heavier, {}?": "a feather or a stone|a kilogram of lead or two kilograms of cotton|a cat or a cow",
    "Which metal {}?": "is liquid in a warm room|rusts|do cables contain|are aeroplanes made of",
    "Which instrument {}?": "measures time|has black and white keys|shows where north is|lets us see distant stars",
    "Which sport {}?": "uses a racket|do people play on ice|is Wimbledon known for",
    "Who works in a {}?": "hospital|school|bakery|court|garage",
    "What should I wear when {}?": "it rains|it is very hot|I go skiing",
    "What do we call {}?": (
        "frozen water|a person who writes books|a doctor for animals|the place where books are lent|a group of lions|"
        "the father of my father|a shape with five sides|a house made of snow"
    ),
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


def prose() -> list[str]:
    """General texts of 120 to 450 words, written for this project on as many subjects: English as people write it."""
    files = sorted((Path(__file__).parent / "prose").glob("*.txt"))
    return [text.strip() for file in files for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]


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
