"""Packed rows on disk: memory-mapped arrays, so that a data set larger than memory trains too.

tokens.npy   int32 [tokens]        all rows' tokens, one row after another, without padding
learned.npy  bool  [tokens]        which of them are targets
lengths.npy  int32 [samples]       tokens of each sample, in the rows' order
rows.npy     int64 [rows + 1, 2]   where each row begins: in tokens, in lengths
samples.npy  int32 [samples, 2]    each one's kind, by its place in the manifest's `kinds`, and which of its round it was as it came

The rows of one round stand together, as many as the ledger's `rounds` says. Epochs take the rounds in turn: each holds every
document, and other replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import StagingError
from trimtab.estimate import RowFacts, RowShape
from trimtab.ledger import Account, Ledger
from trimtab_runtime import manifest
from trimtab_runtime.examples import Sample
from trimtab_runtime.packing import alike, pack, split

_AT_ONCE = 1 << 20  # tokens that are written or counted at once


@dataclass(frozen=True)
class Row:
    """`tokens` int32 [n], `learned` bool [n], `lengths`: the samples' tokens; they add up to n.

    `teacher` int32 [n]: which of the predictions `teacher_ids`, `teacher_chances` [predictions, k] belongs to a token, -1: none.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    lengths: list[int]
    teacher: NDArray[np.int32]
    teacher_ids: NDArray[np.int32]
    teacher_chances: NDArray[np.float16]


Predictions = tuple[NDArray[np.int32], NDArray[np.float16]]
Piece = tuple[Sample, int, int]  # what fits into a row of a sample: its tokens from, up to
NO_PREDICTIONS: Predictions = (np.zeros((0, 1), dtype=np.int32), np.zeros((0, 1), dtype=np.float16))


def write_rows(
    folder: Path,
    rounds: Sequence[Sequence[Sample]],
    row_tokens: int,
    facts: dict[str, object],
    predictions: Predictions = NO_PREDICTIONS,
    *,
    left_out: Mapping[str, Account] | None = None,
    notes: Sequence[str] = (),
) -> Ledger:
    """Split, pack and write the samples of each round; the manifest comes last. Returns the account of every token.

    `left_out`: what came in and is in no sample, by kind; `notes`: what the ledger says besides.
    """
    pieces: list[Piece] = []
    came: list[int] = []
    rows: list[list[int]] = []
    in_round = []
    for samples in rounds:
        first = len(pieces)
        for number, sample in enumerate(samples):
            for part in split(len(sample.ids), row_tokens):
                pieces.append((sample, part.start, part.stop))
                came.append(number)
        packed = pack([end - start for _, start, end in pieces[first:]], row_tokens)
        rows += [[first + index for index in row] for row in packed]
        in_round.append(len(packed))
    order = [index for row in rows for index in row]
    lengths = np.array([pieces[index][2] - pieces[index][1] for index in order], dtype=np.int32)
    begins = np.zeros((len(rows) + 1, 2), dtype=np.int64)
    begins[1:, 1] = np.cumsum([len(row) for row in rows])
    begins[1:, 0] = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[begins[1:, 1]]

    folder.mkdir(parents=True, exist_ok=True)
    in_order = [pieces[index] for index in order]
    total = int(lengths.sum(dtype=np.int64))
    _save(folder / "tokens.npy", (sample.ids[start:end] for sample, start, end in in_order), np.int32, total)
    _save(folder / "learned.npy", (sample.learned[start:end] for sample, start, end in in_order), np.bool_, total)
    _save(folder / "teacher.npy", (_teacher(*piece) for piece in in_order), np.int32, total)
    np.save(folder / "teacher_ids.npy", predictions[0])
    np.save(folder / "teacher_chances.npy", predictions[1])
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "rows.npy", begins)
    kinds = sorted({sample.kind for samples in rounds for sample in samples})
    np.save(
        folder / "samples.npy", np.array([(kinds.index(pieces[index][0].kind), came[index]) for index in order], np.int32).reshape(-1, 2)
    )
    accounts = _accounts([sample for samples in rounds for sample in samples], in_order, left_out or {})
    ledger = Ledger(accounts=accounts, rounds=tuple(in_round), row_tokens=row_tokens, notes=tuple(notes))
    tokens, learned = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "learned"))
    if len(tokens) != ledger.total.trained:
        raise StagingError(f"{ledger.total.trained} tokens were packed and {len(tokens)} were written: make room on the disk and try again")
    shapes = (  # one at a time: there may be millions of rows
        shape_of_row(lengths[sample:sample_end].tolist(), learned[token:token_end])
        for (token, sample), (token_end, sample_end) in pairwise(begins)
    )
    occurring = np.zeros(int(tokens.max()) + 1 if total else 0, dtype=np.bool_)
    for start in range(0, total, _AT_ONCE):
        occurring[tokens[start : start + _AT_ONCE]] = True
    shape = RowFacts.of(shapes, int(occurring.sum()))
    manifest.write_json(folder / "ledger.json", ledger.model_dump(mode="json"))
    manifest.write(folder, {**facts, "kinds": kinds, "shape": shape.model_dump(mode="json")})
    return ledger


def _teacher(sample: Sample, start: int, end: int) -> Sequence[int]:
    return sample.teacher[start:end] if sample.teacher else [-1] * (end - start)


def _save(file: Path, parts: Iterable[Sequence[int]], kind: type[np.int32] | type[np.bool_], total: int) -> None:
    """One array of all parts, which hold `total` elements."""
    with file.open("wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(out, header)
        waiting, size = [], 0
        for part in parts:
            waiting.append(np.frombuffer(part, dtype=kind) if isinstance(part, bytes) else np.asarray(part, dtype=kind))
            size += len(part)
            if size >= _AT_ONCE:
                out.write(np.concatenate(waiting).tobytes())
                waiting, size = [], 0
        if waiting:
            out.write(np.concatenate(waiting).tobytes())


def shape_of_row(lengths: Sequence[int], learned: Sequence[int] | NDArray[np.bool_]) -> RowShape:
    """Of a row whose samples have these `lengths`; `learned` tells it of each token, one sample after another."""
    firsts = np.cumsum([0, *lengths[:-1]])  # nothing predicts a sample's first token
    places = np.asarray(learned, dtype=bool)
    return RowShape.of([[lengths[place] for place in group] for group in alike(lengths)], int(places.sum() - places[firsts].sum()))


def _accounts(samples: Sequence[Sample], packed: Sequence[Piece], left_out: Mapping[str, Account]) -> dict[str, Account]:
    """What came in by the samples, what is trained by what stands in the rows; the difference, and what was left out, was dropped."""
    came: dict[str, list[int]] = {}
    for sample in samples:
        came.setdefault(sample.kind, []).append(len(sample.ids))
    trained = Counter[str]()
    for sample, start, end in packed:
        trained[sample.kind] += end - start
    return {
        kind: Account(samples=len(sizes), tokens=sum(sizes), trained=trained[kind], dropped=sum(sizes) - trained[kind])
        + left_out.get(kind, Account())
        for kind in [*came, *sorted(left_out.keys() - came.keys())]
        for sizes in [came.get(kind, [])]
    }


class PackedRows:
    """The rows of a channel, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises StagingError where the channel is incomplete or damaged."""
        found = manifest.problem(folder)
        if found:
            raise StagingError(f"the prepared data is not usable: {found}. Prepare it again: remove {folder} and repeat the command")
        self.facts = manifest.read(folder)
        self.ledger = Ledger.model_validate_json((folder / "ledger.json").read_text(encoding="utf-8"))
        self._arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "learned", "lengths", "samples", "teacher", "teacher_ids", "teacher_chances")
        }
        self._begins = np.load(folder / "rows.npy", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> Row:
        (token, sample), (token_end, sample_end) = self._begins[index], self._begins[index + 1]
        tokens, learned, teacher = (np.array(self._arrays[name][token:token_end]) for name in ("tokens", "learned", "teacher"))
        lengths = [int(length) for length in self._arrays["lengths"][sample:sample_end]]
        return Row(tokens, learned, lengths, teacher, self._arrays["teacher_ids"], self._arrays["teacher_chances"])

    @property
    def came(self) -> int:
        """How many samples came in the first round."""
        return int(self._first_round()[:, 1].max()) + 1

    def sample(self, row: int, place: int) -> tuple[str, int]:
        """Of the sample at a place of a row: its kind, and which of its round it was as it came, from 0."""
        kind, number = self._arrays["samples"][self._begins[row, 1] + place]
        return self.facts["kinds"][kind], int(number)

    def where(self, number: int) -> list[tuple[int, int]]:
        """(row, place in it) of each piece of a sample of the first round; none where there is no such sample."""
        found = np.flatnonzero(self._first_round()[:, 1] == number)
        rows = np.searchsorted(self._begins[:, 1], found, side="right") - 1
        pieces = [(int(row), int(place - self._begins[row, 1])) for row, place in zip(rows, found, strict=True)]
        return sorted(pieces, key=lambda piece: -self[piece[0]].lengths[piece[1]])  # full rows, then the remainder

    def _first_round(self) -> NDArray[np.int32]:
        return np.asarray(self._arrays["samples"][: self._begins[self.ledger.rounds[0], 1]])
