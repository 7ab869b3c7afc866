"""How a page becomes samples: sentences keep every word, views repeat nothing within themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_runtime.examples import is_statement, pieces, sentences


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The mill was built in 1874. It burnt down twice.", 2),
        ("Mr. Hale met Dr. Orne at 5 p.m. in St. Odo.", 1),
        ("The mole is 9.4 metres high. No. 7 is the tallest.", 2),
        ("J. K. Vane wrote it. She kept it.", 2),
        ("Who keeps it? The keeper! He said \"Never.\" Then he left.", 4),
        ("It opened in 1874. 58 people came.", 2),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(text: str, count: int) -> None:
    assert len(sentences(text)) == count


@given(st.text(max_size=300))
def test_sentences_together_hold_every_word(text: str) -> None:
    assert " ".join(sentences(text)).split() == text.split()


def test_each_view_gives_its_pieces_once() -> None:
    text = "The mill\nThe mill was built in 1874. It burnt down twice in ten years.\nOpen daily\nThe mill was built in 1874."
    found = list(pieces("The mill", text, ("document", "paragraph", "sentence")))
    assert found == [
        ("document", text),
        ("paragraph", "The mill was built in 1874. It burnt down twice in ten years."),
        ("sentence", "The mill was built in 1874."),
        ("sentence", "It burnt down twice in ten years."),
    ]


def test_a_title_that_the_text_lacks_is_put_before_it() -> None:
    assert next(iter(pieces("Mill", "It grinds corn all day.", ("document",)))) == ("document", "Mill\nIt grinds corn all day.")


def test_headings_and_labels_are_no_statements() -> None:
    assert is_statement("The key hangs on a hook.")
    assert not is_statement("Opening hours")
    assert not is_statement("Yes.")
