"""Packed rows as a person reads them: the text of each token, whether it is learned, and where one sample ends. No torch."""

from __future__ import annotations

import json
from typing import Any

from trimtab.errors import StagingError
from trimtab.layout import JobDir
from trimtab_runtime import manifest
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.tokenizer import Tokenizer


def preview(job: JobDir) -> dict[str, Any]:
    """Write, and return, what `job.preview_asked` asks for: a `row`, or all that stands in the rows of a `sample`, counted from 1.

    Samples are counted in the order in which they came: those of the documents, then the examples; replay stands behind. Raises
    StagingError for a number that there is not.
    """
    asked = json.loads(job.preview_asked.read_text(encoding="utf-8"))
    rows, tokenizer = PackedRows(job.channel("train")), Tokenizer(job.channel("model"))
    places = _places(rows, asked)
    found = {
        "rows": len(rows),
        "row_tokens": rows.ledger.row_tokens,
        "row": places[0][0] + 1,
        "samples": [_sample(rows, tokenizer, row, place) for row, place in places],
        "ledger": rows.ledger.lines(),
    }
    manifest.write_json(job.preview, found)
    return found


def _places(rows: PackedRows, asked: dict[str, Any]) -> list[tuple[int, int]]:
    """(row, place in it) of each sample to show."""
    row, sample = asked.get("row"), asked.get("sample")
    if sample is not None:
        found = rows.where(sample - 1)
        if not found:
            raise StagingError(f"there is no sample {sample:,}: give  --sample N  with N from 1 to {rows.came:,}")
        return found
    if row is None:
        row = 1
    if not 1 <= row <= len(rows):
        raise StagingError(f"there is no row {row:,}: give  --row N  with N from 1 to {len(rows):,}")
    return [(row - 1, place) for place in range(len(rows[row - 1].lengths))]


def _sample(rows: PackedRows, tokenizer: Tokenizer, index: int, place: int) -> dict[str, Any]:
    row = rows[index]
    begin = sum(row.lengths[:place])
    piece = slice(begin, begin + row.lengths[place])
    ids = row.tokens[piece].tolist()
    kind, number = rows.sample(index, place)
    learned = row.learned[piece].tolist()
    return {
        "row": index + 1,
        "sample": number + 1,
        "kind": kind,
        "ids": ids,
        "texts": tokenizer.pieces(ids),
        "control": [id in tokenizer.control_ids for id in ids],
        "learned": [flag and at > 0 for at, flag in enumerate(learned)],  # nothing predicts a first token
        "taught": [at >= 0 for at in row.teacher[piece].tolist()],
    }
