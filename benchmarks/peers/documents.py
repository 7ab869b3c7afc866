"""The documents that all variants train on: random tokens in documents of log-normal lengths, a fixed seed.

Median 150 tokens, sigma 1 (so a mean of about 245, one in a hundred over 1,500), cut to 16 to 2,048: a long tail, as pages and
conversations have it. Token ids are random, for speed does not depend on them. Of 4,000 such documents all variants get the same
typical part:

rows   packed best-fit decreasing into rows of 2,048; of those that are full the three at the quartiles of what attention has to do
       (the sum of squared lengths), the most first: rows of few long documents, and of many short ones. Steps take them in turn
batch  drawn 8 at a time 2,000 times, the draw whose real tokens and whose padded places are together nearest to the means of all
       draws: so its share of padding is what an epoch of such batches has
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

from trimtab_runtime.packing import pack

ROW_TOKENS, BATCH = 2_048, 8
MEDIAN, SIGMA, SHORTEST = 150, 1.0, 16


@dataclass(frozen=True)
class Documents:
    """Lengths of the documents of the typical rows and of the typical batch; `fill` of all rows, `real` tokens of all batches' places."""

    rows: list[list[int]]
    batch: list[int]
    fill: float
    real: float

    def line(self) -> str:
        places = len(self.batch) * max(self.batch)
        return (
            f"documents: log-normal lengths, median {MEDIAN}, sigma {SIGMA:g}, {SHORTEST} to {ROW_TOKENS:,} tokens; packed rows are "
            f"{self.fill:.1%} full, batches of {BATCH} padded to their longest hold {self.real:.0%} real tokens\n"
            + "".join(f"row: {sum(row):,} tokens ({', '.join(map(str, row))})\n" for row in self.rows)
            + f"batch: {sum(self.batch):,} tokens in {places:,} places ({', '.join(map(str, self.batch))})"
        )


def drawn(seed: int = 7) -> Documents:
    source = random.Random(seed)
    lengths = [min(ROW_TOKENS, max(SHORTEST, round(MEDIAN * source.lognormvariate(0, SIGMA)))) for _ in range(4_000)]
    rows = [[lengths[index] for index in row] for row in pack(lengths, ROW_TOKENS)]
    full = sorted((row for row in rows if sum(row) == ROW_TOKENS), key=lambda row: sum(length**2 for length in row))
    batches = [source.sample(lengths, BATCH) for _ in range(2_000)]
    tokens, places = (statistics.mean(map(size, batches)) for size in (sum, _places))
    batch = min(batches, key=lambda one: abs(sum(one) / tokens - 1) + abs(_places(one) / places - 1))
    typical = [full[len(full) * quarter // 4] for quarter in (3, 2, 1)]
    return Documents(typical, batch, sum(lengths) / ROW_TOKENS / len(rows), tokens / places)


def with_tokens(lengths: list[int], vocabulary: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(100, vocabulary - 100) for _ in range(length)] for length in lengths]


def _places(batch: list[int]) -> int:
    return len(batch) * max(batch)
