from __future__ import annotations

import pytest

from trimtab.sentence_starts import sentence_start


@pytest.mark.parametrize(
    ("question", "start"),
    [
        ("What are Amazon EC2 P5 instances, which GPUs do they have?", "Amazon EC2 P5 instances are"),
        ("When was the mill built?", "The mill was built in"),
        ("In which year was the guild founded?", "The guild was founded in"),
        ("When does the library open?", "The library opens at"),
        ("When is the fair?", "The fair is on"),
        ("Where is the ferry moored?", "The ferry is moored in"),
        ("Who wrote Hamlet?", "Hamlet was written by"),
        ("Who repaired the bell?", "The bell was repaired by"),
        ("Who is the keeper of the tower?", "The keeper of the tower is"),
        ("How many sails does the mill have?", "The number of sails of the mill is"),
        ("How many days are there in a week?", "The number of days in a week is"),
        ("How tall is the tower?", "The tower is"),
        ("What does the mill grind?", "The mill grinds"),
        ("What does the crane carry?", "The crane carries"),
        ("What do cats eat?", "Cats eat"),
        ("Which GPUs do they have?", None),
        ("Why is the sky blue?", None),
        ("Explain P5 instances.", None),
        ("?", None),
        ("", None),
    ],
)
def test_a_question_begins_its_answer_or_no_rule_fits(question: str, start: str | None) -> None:
    assert sentence_start(question) == start
