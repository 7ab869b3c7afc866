"""Every target for its share of TRIMTAB_FUZZ_SECONDS (40); the seeds are the same each time, so that a faster machine only goes further.

`make fuzz SECONDS=600` goes on for longer, with seeds of its own.
"""

from __future__ import annotations

import os

import pytest

from fuzz.running import Target, run_for
from fuzz.targets import TARGETS

SECONDS = float(os.environ.get("TRIMTAB_FUZZ_SECONDS", "40"))


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_no_example_is_found_that_breaks(target: Target) -> None:
    assert run_for(target, SECONDS / len(TARGETS), first_seed=0) > 0


def test_names_are_all_different() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_a_property_that_does_not_hold_is_found() -> None:
    """The way from the example to the failure is not always silent."""
    from hypothesis import strategies as st

    def never_nine(value: int) -> None:
        assert value != 9

    with pytest.raises(AssertionError):
        run_for(Target("nine", st.integers(0, 20), never_nine), 5.0, first_seed=0)
