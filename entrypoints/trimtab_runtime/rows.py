"""Packed rows on disk: memory-mapped arrays, so that a data set larger than memory trains too.

tokens.npy   int32 [tokens]        all rows' tokens, one row after another, without padding
learned.npy  bool  [tokens]        which of them are targets
lengths.npy  int32 [samples]       tokens of each sample, in the rows' order
rows.npy     int64 [rows + 1, 2]   where each row begins: in tokens, in lengths

The rows of one round stand together, as many as the ledger's `rounds` says. Epochs take the rounds in turn: each holds every
document, and other replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import StagingError
from trimtab.estimate import RowFacts, RowShape
from trimtab.ledger import Account, Ledger
from trimtab_runtime import manifest
from trimtab_runtime.examples import Sample
from trimtab_runtime.packing import alike, pack, split


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
Piece = tuple[str, list[int], list[bool], list[int]]  # a sample that fits into a row: kind, tokens, which are learned, the teacher's
NO_PREDICTIONS: Predictions = (np.zeros((0, 1), dtype=np.int32), np.zeros((0, 1), dtype=np.float16))


def write_rows(
    folder: Path, rounds: Sequence[Sequence[Sample]], row_tokens: int, facts: dict[str, object], predictions: Predictions = NO_PREDICTIONS
) -> Ledger:
    """Split, pack and write the samples of each round; the manifest comes last. Returns the account of every token."""
    pieces: list[Piece] = []
    rows: list[list[int]] = []
    in_round = []
    for samples in rounds:
        first = len(pieces)
        for sample in samples:
            for part in split(len(sample.ids), row_tokens):
                teacher = sample.teacher[part.start : part.stop] if sample.teacher else [-1] * len(part)
                pieces.append((sample.kind, sample.ids[part.start : part.stop], sample.learned[part.start : part.stop], teacher))
        packed = pack([len(ids) for _, ids, _, _ in pieces[first:]], row_tokens)
        rows += [[first + index for index in row] for row in packed]
        in_round.append(len(packed))
    order = [index for row in rows for index in row]
    lengths = np.array([len(pieces[index][1]) for index in order], dtype=np.int32)
    begins = np.zeros((len(rows) + 1, 2), dtype=np.int64)
    begins[1:, 1] = np.cumsum([len(row) for row in rows])
    begins[1:, 0] = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[begins[1:, 1]]

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.array([token for index in order for token in pieces[index][1]], dtype=np.int32))
    np.save(folder / "learned.npy", np.array([flag for index in order for flag in pieces[index][2]], dtype=np.bool_))
    np.save(folder / "teacher.npy", np.array([place for index in order for place in pieces[index][3]], dtype=np.int32))
    np.save(folder / "teacher_ids.npy", predictions[0])
    np.save(folder / "teacher_chances.npy", predictions[1])
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "rows.npy", begins)
    came = [sample for samples in rounds for sample in samples]
    accounts = _accounts(came, [(pieces[index][0], len(pieces[index][1])) for index in order])
    ledger = Ledger(accounts=accounts, rounds=tuple(in_round), row_tokens=row_tokens)
    written = len(np.load(folder / "tokens.npy", mmap_mode="r"))
    if written != ledger.total.trained:
        raise StagingError(f"{ledger.total.trained} tokens were packed and {written} were written: make room on the disk and try again")
    manifest.write_json(folder / "ledger.json", ledger.model_dump(mode="json"))
    manifest.write(folder, {**facts, "shape": shape_of(pieces, rows).model_dump(mode="json")})
    return ledger


def shape_of_row(lengths: Sequence[int], learned: Sequence[bool] | NDArray[np.bool_]) -> RowShape:
    """Of a row whose samples have these `lengths`; `learned` tells it of each token, one sample after another."""
    firsts = np.cumsum([0, *lengths[:-1]])  # nothing predicts a sample's first token
    places = np.asarray(learned, dtype=bool)
    return RowShape.of([[lengths[place] for place in group] for group in alike(lengths)], int(places.sum() - places[firsts].sum()))


def shape_of(pieces: Sequence[Piece], rows: Sequence[Sequence[int]]) -> RowFacts:
    """What memory and time depend on: of rows of these pieces, which they name."""
    shapes = [shape_of_row([len(pieces[i][1]) for i in row], [flag for i in row for flag in pieces[i][2]]) for row in rows]
    return RowFacts.of(shapes, len({token for _, ids, _, _ in pieces for token in ids}))


def _accounts(samples: Sequence[Sample], packed: Sequence[tuple[str, int]]) -> dict[str, Account]:
    """What came in by the samples, what is trained by what stands in the rows; the difference was dropped."""
    came: dict[str, list[int]] = {}
    for sample in samples:
        came.setdefault(sample.kind, []).append(len(sample.ids))
    trained = Counter[str]()
    for kind, length in packed:
        trained[kind] += length
    return {
        kind: Account(samples=len(sizes), tokens=sum(sizes), trained=trained[kind], dropped=sum(sizes) - trained[kind])
        for kind, sizes in came.items()
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
            for name in ("tokens", "learned", "lengths", "teacher", "teacher_ids", "teacher_chances")
        }
        self._begins = np.load(folder / "rows.npy", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> Row:
        (token, sample), (token_end, sample_end) = self._begins[index], self._begins[index + 1]
        tokens, learned, teacher = (np.array(self._arrays[name][token:token_end]) for name in ("tokens", "learned", "teacher"))
        lengths = [int(length) for length in self._arrays["lengths"][sample:sample_end]]
        return Row(tokens, learned, lengths, teacher, self._arrays["teacher_ids"], self._arrays["teacher_chances"])
