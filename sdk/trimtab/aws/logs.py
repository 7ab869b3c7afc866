"""CloudWatch Logs of a training job, followed: every line once, from every machine and every stream.

SageMaker writes the streams `<job>/<host>-<epoch>`, one for each life of a machine's container. GetLogEvents pages forward by tokens,
but a token forgets what arrives late behind it, and lines carry no id. So a look reads again what is at most a minute and 2,000 lines
older than the newest line, to the end of the stream, and tells what it holds more often than was told before. The end is where a
token comes back unchanged; an empty page is none (Amazon CloudWatch Logs API reference, GetLogEvents).
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from trimtab.aws.refusals import asking
from trimtab.errors import BackendError
from trimtab.secrets import redact

OVERLAP_MS, OVERLAP_LINES = 60_000, 2_000  # so late may a line come behind newer ones of its stream
LOOK_EVERY = 5.0  # seconds between two questions for new streams: an account may ask 25 a second
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 10.0  # seconds: while lines come, when none come
_EMPTY_PAGES, _EMPTY_PAGES_EAGER = 5, 100  # in a row, before the next look goes on behind them


class LogLine(NamedTuple):
    """A line of a machine's log. `host` is such as `algo-1`, `text` has no line end and no secret, `at` is in seconds since the epoch."""

    host: str
    text: str
    at: float


class _Told(NamedTuple):
    """A message as the service gave it: `at` in milliseconds."""

    at: int
    message: str


@dataclass
class _Stream:
    """A stream, and which of its newest messages were told. Pure: it decides, `LogReader` asks."""

    name: str
    host: str
    since: int = 0  # milliseconds: no message older than this is asked for again
    told: dict[int, Counter[str]] = field(default_factory=dict)  # by time, how often each message was told
    met: dict[int, Counter[str]] = field(default_factory=dict)  # the same of the look that is going on
    start: int = 0  # `since` when that look began; a token belongs to it
    token: str | None = None  # where that look goes on; None: a new one begins
    end: tuple[int, str] | None = None  # the start and the last token of the look before
    wait: float = 0.0
    due: float = 0.0

    def begin(self) -> None:
        self.met, self.start, self.token = {}, self.since, None

    def take(self, events: list[dict[str, Any]]) -> list[_Told]:
        """Those events of a page that were not told before. Pages come in the order of time."""
        new = []
        for event in events:
            at, message = int(event["timestamp"]), str(event["message"])
            mark = blake2b(message.encode(errors="surrogatepass"), digest_size=8).hexdigest()
            met, told = self.met.setdefault(at, Counter()), self.told.setdefault(at, Counter())
            met[mark] += 1
            if met[mark] > told[mark]:
                told[mark] = met[mark]
                new.append(_Told(at, message))
        if new:
            self._forget()
        return new

    def _forget(self) -> None:
        """Move `since` on: what is older can no more be told twice, because it is not asked for."""
        times = sorted(self.told, reverse=True)
        since, lines = times[0] - OVERLAP_MS, 0
        for at in times:
            lines += self.told[at].total()
            if lines >= OVERLAP_LINES:
                since = max(since, at)
                break
        self.since = max(self.since, since)
        for kept in (self.told, self.met):
            for at in [at for at in kept if at < self.since]:
                del kept[at]


class LogReader:
    """Reads the log of one training job, from its beginning. `client` is boto3's client of `logs`."""

    def __init__(self, client: Any, group: str, job_name: str) -> None:
        self._client, self._group, self._job = client, group, job_name
        self._streams: dict[str, _Stream] = {}
        self._ready: list[LogLine] = []  # read, and not yet returned
        self._looked = -LOOK_EVERY

    def read(self, *, eager: bool = True) -> list[LogLine]:
        """The lines since the last time, of all hosts and streams, by time; those of a host and of one moment as they came.

        With `eager` every stream is asked, else those whose turn it is: a stream that says nothing is asked less and less often,
        every ten seconds at last. A watcher may so call this often, and at the end with `eager` until nothing comes.

        A group or a stream that is not there has no lines yet. Raises BackendError when AWS refuses or does not answer, after the
        client's own retries. No line is lost by that: what was read before it is returned, and the next call meets it again.
        """
        found: list[tuple[int, str, int, LogLine]] = []
        try:
            self._look_for_streams()
            for number, stream in enumerate(self._streams.values()):
                if eager or time.monotonic() >= stream.due:
                    came = self._scan(stream, found, number, _EMPTY_PAGES_EAGER if eager else _EMPTY_PAGES)
                    stream.wait = next_wait(stream.wait, came=came)
                    stream.due = time.monotonic() + (0.0 if came else stream.wait)
        except BackendError:
            if not found:
                raise  # else it comes again with the next question
        finally:  # also when it is interrupted: what was read counts as told
            self._ready += [line for *_, line in sorted(found, key=lambda each: each[:3])]
        lines, self._ready = self._ready, []
        return lines

    def _look_for_streams(self) -> None:
        now = time.monotonic()
        if self._streams and now - self._looked < LOOK_EVERY:
            return
        with asking(f"for the log streams of {self._job}", action="logs:DescribeLogStreams"):
            try:
                pages = self._client.get_paginator("describe_log_streams").paginate(
                    logGroupName=self._group, logStreamNamePrefix=f"{self._job}/", orderBy="LogStreamName"
                )
                names = [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
            except self._client.exceptions.ResourceNotFoundException:
                names = []  # the first job of an account and region makes the group
        for name in names:
            self._streams.setdefault(name, _Stream(name, self._host(name)))
        self._looked = now

    def _scan(self, stream: _Stream, found: list[tuple[int, str, int, LogLine]], number: int, empty_pages: int) -> bool:
        """Append the stream's new lines, up to its end or to so many empty pages, to `found`. Whether there were any."""
        before, empty = len(found), 0
        if stream.token is None:
            stream.begin()
        while True:
            page = self._page(stream)
            if page is None:
                return len(found) > before
            for told in stream.take(page["events"]):
                for text in redact(told.message).removesuffix("\n").split("\n"):
                    found.append((told.at, stream.host, number, LogLine(stream.host, text.rstrip("\r"), told.at / 1000)))
            token = str(page["nextForwardToken"])
            if token == stream.token or (stream.token is None and (stream.start, token) == stream.end):
                stream.end, stream.token = (stream.start, token), None
                return len(found) > before
            stream.token = token
            empty = 0 if page["events"] else empty + 1
            if empty >= empty_pages:
                return len(found) > before  # a gap in time; the next look goes on behind it

    def _page(self, stream: _Stream) -> dict[str, Any] | None:
        """The stream's next page; None for a stream that is gone, or whose look has to begin anew."""
        place = {} if stream.token is None else {"nextToken": stream.token}
        with asking(f"for the log of {self._job}", action="logs:GetLogEvents"):
            try:
                page: dict[str, Any] = self._client.get_log_events(
                    logGroupName=self._group, logStreamName=stream.name, startFromHead=True, startTime=stream.start, **place
                )
            except self._client.exceptions.ResourceNotFoundException:
                stream.token = None
                return None
            except self._client.exceptions.InvalidParameterException:
                if stream.token is None:
                    raise
                stream.token = None  # a token lives for 24 hours, a suspended laptop longer
                return None
        return page

    def _host(self, name: str) -> str:
        match = re.fullmatch(r"(.+?)-\d+", name.removeprefix(f"{self._job}/"))
        return match[1] if match else name.removeprefix(f"{self._job}/")


def next_wait(wait: float, *, came: bool) -> float:
    """Seconds until the next question: short while lines come, longer while none come, longest after failures. Pure."""
    if came:
        return SHORTEST_WAIT
    return min(max(wait * 1.5, SHORTEST_WAIT), LONGEST_WAIT)


def jittered(wait: float) -> float:
    """Between three quarters of a wait and all of it, so that many who follow do not ask together."""
    return wait * random.uniform(0.75, 1.0)
