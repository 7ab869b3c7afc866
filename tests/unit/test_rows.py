"""What was packed can be read back, and what was damaged is not read at all."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as within
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.errors import StagingError
from trimtab.ledger import Account, Ledger
from trimtab_runtime.examples import Sample
from trimtab_runtime.rows import PackedRows, write_rows


def samples(count: int = 50, seed: int = 0) -> list[Sample]:
    draw = np.random.default_rng(seed)
    return [
        Sample("document" if number % 2 else "sentence", draw.integers(0, 500, size).tolist(), (draw.random(size) < 0.5).tolist())
        for number, size in enumerate(draw.integers(1, 200, count).tolist())
    ]


def test_every_token_comes_back_with_its_flag(tmp_path: Path) -> None:
    given = samples()
    ledger = write_rows(tmp_path, [given], 64, {})
    rows = PackedRows(tmp_path)
    found = [pair for index in range(len(rows)) for pair in zip(rows[index].tokens.tolist(), rows[index].learned.tolist(), strict=True)]
    assert sorted(found) == sorted(pair for sample in given for pair in zip(sample.ids, sample.learned, strict=True))
    assert ledger.total.tokens == ledger.total.trained == len(found)
    assert ledger.total.dropped == 0
    assert set(ledger.accounts) == {"document", "sentence"}
    assert all(sum(rows[index].lengths) == len(rows[index].tokens) <= 64 for index in range(len(rows)))


def test_what_is_said_of_all_rows_is_summed_up_row_by_row(tmp_path: Path) -> None:
    """Memory for each row was 2 kB with all their shapes at once; what packs them keeps some hundred bytes."""
    sample = Sample("document", range(16), b"\1" * 16)
    counts, peaks = (500, 2500), []
    for count in counts:
        tracemalloc.start()
        write_rows(tmp_path / str(count), [[sample] * count], 16, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 1000
    mean = {"tokens": 16.0, "learned": 15.0, "groups": 1.0, "padded": 16.0, "explicit": 256.0, "flash": 0.0}
    assert PackedRows(tmp_path / "2500").facts["shape"] == {"mean": mean, "most": mean, "distinct": 16}


def test_a_long_sample_goes_on_in_the_next_row_in_its_order(tmp_path: Path) -> None:
    write_rows(tmp_path, [[Sample("document", list(range(150)), [True] * 150)]], 64, {})
    rows = PackedRows(tmp_path)
    assert sorted(rows[index].tokens.tolist() for index in range(len(rows))) == [[*range(64)], [*range(64, 128)], [*range(128, 150)]]


def test_a_teacher_stays_with_its_token(tmp_path: Path) -> None:
    ids = np.arange(40, dtype=np.int32).reshape(20, 2)
    taught = Sample("replay", list(range(100, 120)), [True] * 20, teacher=list(range(20)))
    write_rows(tmp_path, [[*samples(10), taught]], 16, {}, (ids, np.full((20, 2), 0.5, dtype=np.float16)))
    rows = PackedRows(tmp_path)
    pairs = {}
    for index in range(len(rows)):
        row = rows[index]
        for token, place in zip(row.tokens.tolist(), row.teacher.tolist(), strict=True):
            if place >= 0:
                pairs[token] = row.teacher_ids[place].tolist()
    assert pairs == {100 + number: [2 * number, 2 * number + 1] for number in range(20)}


def test_the_rows_of_a_round_hold_that_rounds_samples_and_no_others(tmp_path: Path) -> None:
    rounds = [samples(30, seed=1), samples(10, seed=2), samples(20, seed=3)]
    ledger = write_rows(tmp_path, rounds, 64, {})
    rows = PackedRows(tmp_path)
    assert len(rows) == ledger.rows == sum(ledger.rounds)
    assert len(ledger.rounds) == 3
    first = 0
    for those, count in zip(rounds, ledger.rounds, strict=True):
        found = sorted(token for index in range(first, first + count) for token in rows[index].tokens.tolist())
        assert found == sorted(token for sample in those for token in sample.ids)
        first += count
    assert "3 rounds" in ledger.lines()[-1]


@pytest.mark.parametrize("name", ["tokens.npy", "ledger.json", "manifest.json"])
def test_a_cut_or_changed_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, [samples()], 64, {})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(StagingError, match=name):
        PackedRows(tmp_path)


def test_a_ledger_that_does_not_balance_cannot_be_written_down() -> None:
    with pytest.raises(ValidationError, match="10 tokens in, but 8 trained"):
        Account(samples=1, tokens=10, trained=8, dropped=1)
    with pytest.raises(ValidationError, match="cannot stand in"):
        Ledger(accounts={"document": Account(samples=1, tokens=65, trained=65, dropped=0)}, rounds=(1,), row_tokens=64)


kinds = st.sampled_from(["document", "chat", "completion", "replay"])
counts = st.integers(0, 10**9)
dropped = st.builds(lambda samples, tokens: Account(samples=samples, tokens=tokens, dropped=tokens, left_out=samples), counts, counts)
cut = st.builds(lambda samples, tokens: Account(tokens=tokens, dropped=tokens, cut=samples), counts, counts)


@within(max_examples=30)
@given(
    rounds=st.lists(st.lists(st.tuples(kinds, st.integers(1, 90)), min_size=1, max_size=12), min_size=1, max_size=3),
    left_out=st.dictionaries(kinds, dropped | cut, max_size=3),
)
def test_whatever_comes_in_is_trained_or_dropped_and_each_sample_is_found_again(
    rounds: list[list[tuple[str, int]]], left_out: dict[str, Account]
) -> None:
    given = [
        [Sample(kind, [1000 * number + place for place in range(size)], bytes([1]) * size) for number, (kind, size) in enumerate(one)]
        for one in rounds
    ]
    with tempfile.TemporaryDirectory() as folder:
        ledger = write_rows(Path(folder), given, 32, {}, left_out=left_out, notes=["a note"])
        rows = PackedRows(Path(folder))
        for number, sample in enumerate(given[0]):
            pieces = rows.where(number)
            assert {rows.sample(*piece) for piece in pieces} == {(sample.kind, number)}
            begins = [sum(rows[row].lengths[:place]) for row, place in pieces]
            found = [rows[row].tokens[begin:][: rows[row].lengths[place]] for (row, place), begin in zip(pieces, begins, strict=True)]
            assert np.concatenate(found).tolist() == list(sample.ids)
        assert rows.where(len(given[0])) == []
    came = sum(size for one in rounds for _, size in one)
    away = sum(account.dropped for account in left_out.values())
    assert (ledger.total.trained, ledger.total.dropped, ledger.total.tokens) == (came, away, came + away)
    assert ledger.total.left_out == sum(account.left_out for account in left_out.values())
    assert Ledger.model_validate_json(ledger.model_dump_json()) == ledger
    assert ledger.lines()[0] == "a note"


@given(a=dropped, b=cut, trained=counts)
def test_accounts_add_up_and_what_does_not_balance_is_refused(a: Account, b: Account, trained: int) -> None:
    whole = a + b + Account(samples=1, tokens=trained, trained=trained)
    assert (whole.tokens, whole.trained, whole.dropped) == (a.tokens + b.tokens + trained, trained, a.tokens + b.tokens)
    assert (whole.left_out, whole.cut) == (a.left_out, b.cut)
    with pytest.raises(ValidationError, match="left out"):
        Account(**{**whole.model_dump(), "left_out": whole.samples + 1})
