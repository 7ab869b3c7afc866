"""How much a page may cost. Pure: the fetcher enforces it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class FetchLimits(BaseModel):
    """Limits for each page; times in seconds, sizes in bytes after decompression.

    `max_bytes` holds for local pages too, and for records that are fetched by their address; a file of records on this machine is
    read a record at a time and may be of any size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_s: PositiveFloat = 10.0
    read_s: PositiveFloat = 20.0  # between two packets
    total_s: PositiveFloat = 60.0  # the whole page: redirects, retries and pauses included
    max_bytes: PositiveInt = 10_000_000
    redirects: NonNegativeInt = 5
    retries: NonNegativeInt = 2
    backoff_s: NonNegativeFloat = 0.5  # before the first retry; doubles
    retry_after_s: NonNegativeFloat = 30.0  # a server that asks for a longer pause is given up
    parallel: PositiveInt = 8
    per_host: PositiveInt = 2
