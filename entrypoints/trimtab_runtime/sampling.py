"""How the next token is drawn from a model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trimtab.errors import EndpointError

NUCLEUS = 1024  # tokens looked at before a full sort


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; `seed` None draws anew each time; `top_k` 0 looks at all."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise EndpointError(f"temperature is {self.temperature}: give a number from 0 (the likeliest token) to 100")
        if not 0 < self.top_p <= 1:
            raise EndpointError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        if self.top_k < 0:
            raise EndpointError(f"top_k is {self.top_k}: give a whole number from 0 (all tokens) up")

    def for_row(self, row: int) -> Sampling:
        """The same with a seed of the row's own, which does not depend on the batch."""
        return self if self.seed is None else replace(self, seed=(self.seed + 1_000_003 * row) % 2**63)


class Draw:
    """Draws the next token of each row: the likeliest, or by temperature, the k likeliest and nucleus (Holtzman et al. 2020).

    A row's draws come from its own seed.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.samplings = samplings
        self.sources = {
            row: torch.Generator().manual_seed(torch.seed() if one.seed is None else one.seed)
            for row, one in enumerate(samplings)
            if one.temperature > 0
        }

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Token ids [rows] for logits [rows, vocabulary]."""
        drawn = [slot for slot, row in enumerate(rows) if row in self.sources]
        tokens = logits.argmax(-1)
        if drawn:
            tokens[drawn] = self._drawn(logits[drawn], [rows[slot] for slot in drawn])
        return tokens

    def _drawn(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        chosen = [self.samplings[row] for row in rows]
        size = logits.shape[-1]
        temperature, top_p = (
            torch.tensor(values)[:, None] for values in zip(*((one.temperature, one.top_p) for one in chosen), strict=True)
        )
        most = torch.tensor([min(one.top_k or size, size) for one in chosen])[:, None]
        likely = torch.softmax(logits.float() / temperature, -1)
        # sorting a whole vocabulary costs more than the model's step; the nucleus nearly always lies in the first few hundred
        ordered, tokens = likely.topk(min(NUCLEUS, size))
        if bool(((ordered.sum(-1, keepdim=True) < top_p) & (most > NUCLEUS)).any()):
            ordered, tokens = likely.sort(-1, descending=True)
        ordered = ordered * (torch.arange(ordered.shape[-1]) < most)
        # the nucleus is taken of what the k likeliest leave, as transformers does
        top_p = torch.where(most < size, top_p * ordered.sum(-1, keepdim=True), top_p)
        mass = ordered.cumsum(-1)
        inside = (mass - ordered < top_p) & (ordered > 0)  # the likeliest is always inside
        mass = (ordered * inside).cumsum(-1)
        chance = torch.stack([torch.rand(1, generator=self.sources[row]) for row in rows])
        place = torch.searchsorted(mass, chance * mass[:, -1:], right=True)
        last = inside.sum(-1, keepdim=True) - 1  # rounding may put the draw beyond the end
        return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)
