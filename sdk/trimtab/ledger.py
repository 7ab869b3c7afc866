"""The account of every token: what came in was trained on or was dropped, and nothing else happened to it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.counting import counted

KINDS = ("document", "paragraph", "sentence", "question", "completion", "chat", "guanaco", "replay")


class Account(BaseModel):
    """Tokens of one kind of sample. `trained` counts tokens that stand in packed rows, special tokens included.

    `samples` counts those that were dropped, too: `left_out` of them whole, `unanswered` of these since nothing in them is learned, the
    others since they are longer than a row; and of `cut` ones the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    trained: int = Field(0, ge=0)
    dropped: int = Field(0, ge=0)
    left_out: int = Field(0, ge=0)
    unanswered: int = Field(0, ge=0)
    cut: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _balances(self) -> Account:
        if self.tokens != self.trained + self.dropped:
            raise ValueError(f"{self.tokens} tokens in, but {self.trained} trained + {self.dropped} dropped")
        if self.left_out > self.samples:
            raise ValueError(f"{self.samples} samples, but {self.left_out} left out")
        if self.unanswered > self.left_out:
            raise ValueError(f"{self.left_out} samples left out, but {self.unanswered} of them unanswered")
        return self

    def __add__(self, other: Account) -> Account:
        return Account(
            samples=self.samples + other.samples,
            tokens=self.tokens + other.tokens,
            trained=self.trained + other.trained,
            dropped=self.dropped + other.dropped,
            left_out=self.left_out + other.left_out,
            unanswered=self.unanswered + other.unanswered,
            cut=self.cut + other.cut,
        )


class Ledger(BaseModel):
    """An account for each kind of sample, and how full the rows are. In = trained + dropped, in each and in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accounts: dict[str, Account]
    rounds: tuple[int, ...] = Field(min_length=1, description="rows of each round; epochs take the rounds in turn")
    row_tokens: int = Field(ge=1, description="tokens in a full row")
    notes: tuple[str, ...] = Field((), description="what was made of the data, and which of it is learned, in sentences")

    @model_validator(mode="after")
    def _fits(self) -> Ledger:
        if self.total.trained > self.capacity:
            raise ValueError(f"{self.total.trained} tokens cannot stand in {self.rows} rows of {self.row_tokens}")
        return self

    @property
    def total(self) -> Account:
        return sum(self.accounts.values(), Account())

    @property
    def rows(self) -> int:
        return sum(self.rounds)

    @property
    def capacity(self) -> int:
        return self.rows * self.row_tokens

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token, 0 to 1."""
        return self.total.trained / self.capacity if self.rows else 0.0

    def lines(self) -> list[str]:
        """The account as a person reads it."""
        total = self.total
        parts = ", ".join(f"{name} {account.tokens:,}" for name, account in self.accounts.items() if account.samples)
        lines = [
            *self.notes,
            f"ledger: {total.tokens:,} tokens in = {total.trained:,} trained + {total.dropped:,} dropped ({parts})",
        ]
        if total.left_out or total.cut:
            found = []
            if total.left_out > total.unanswered or total.cut:
                long = total.left_out - total.unanswered
                found.append(f"longer than a row of {self.row_tokens:,}: {counted(long, 'example')} dropped, {total.cut:,} cut")
            if total.unanswered:
                found.append(f"nobody answers in {counted(total.unanswered, 'example')}: left out")
            lines.append(f"{'; '.join(found)}; {counted(total.dropped, 'token of them is', 'tokens of them are')} not trained on")
        rounds = f"; {len(self.rounds)} rounds, each with all the data and other replay" if len(self.rounds) > 1 else ""
        kept = total.samples - total.left_out
        return [*lines, f"rows: {self.rows:,} of {self.row_tokens:,} tokens, {self.fill:.1%} full, from {counted(kept, 'sample')}{rounds}"]
