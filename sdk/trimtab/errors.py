"""The one error tree. Catch `TrimtabError` to catch them all; each message ends with what to do next.

TrimtabError
    SpecError
    DataError
    WeightsError
        LicenceRequired
    StagingError
    BackendError
        BackendUnavailable
        RunNotFound
        RunFailed
        WaitTimeout
    EndpointError
"""

from __future__ import annotations

from collections.abc import Iterable


class TrimtabError(Exception):
    """Anything trimtab refuses or cannot do. The message is meant to be read by the person who typed the command."""


class SpecError(TrimtabError, ValueError):
    """A job that cannot run as asked: an unknown name, a value out of range, a version that does not match."""


class DataError(TrimtabError):
    """A source of training data that could not be read, was refused, or holds no text."""


class WeightsError(TrimtabError):
    """A base model that could not be found, fetched, or verified."""


class LicenceRequired(WeightsError):
    """A gated model without a token, or a token without access."""


class StagingError(TrimtabError):
    """Data that could not be prepared or copied to where the job runs, or that does not match its digests."""


class BackendError(TrimtabError):
    """A place to run jobs that refused or failed."""


class BackendUnavailable(BackendError):
    """A backend whose software or service is not there; the message is the remedy."""


class RunNotFound(BackendError, LookupError):
    """A handle to which no run belongs."""


class RunFailed(BackendError):
    """A run that ended badly, with the reason the container gave.

    `handle` is the run's handle, `reason` the cause that its failure file names (at most 1,024 characters),
    `log_tail` the last lines that it printed.
    """

    def __init__(self, handle: object, reason: str, log_tail: Iterable[str] = ()) -> None:
        self.handle, self.reason, self.log_tail = handle, reason, tuple(log_tail)
        super().__init__(f"{handle} failed: {reason}\nSee the whole log with:  trimtab logs {handle}")


class WaitTimeout(BackendError, TimeoutError):
    """A wait that ended before the run did. The run goes on."""


class EndpointError(TrimtabError):
    """An endpoint that did not start, does not answer, or refused a request."""
