"""A container's lines on their way to CloudWatch Logs.

Limits of PutLogEvents (its API reference): a batch has at most 10,000 events and 1,048,576 bytes, where an event counts its UTF-8 bytes
and 26 more, in order of time; an event has 1 to 262,144 bytes, these 26 among them. A longer line becomes several events, an empty none.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

TRAINING = "/aws/sagemaker/TrainingJobs"
OVERHEAD, LONGEST, BATCH_BYTES, BATCH_EVENTS = 26, 262_144 - 26, 1_048_576, 10_000
Event = tuple[int, str]  # milliseconds since 1970, and the message


def pieces(line: str) -> Iterator[str]:
    """A line in parts of at most LONGEST bytes, cut between characters. Pure."""
    data = line.encode()
    while data:
        end = min(len(data), LONGEST)
        while end < len(data) and data[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        yield data[:end].decode()
        data = data[end:]


def batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Events in the fewest batches that the API takes, in order. Pure."""
    batch: list[Event] = []
    size = 0
    for event in events:
        weight = len(event[1].encode()) + OVERHEAD
        if batch and (len(batch) == BATCH_EVENTS or size + weight > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += weight
    if batch:
        yield batch


class LogStream:
    """One stream, written to as bytes come, sent every `interval` seconds by a thread of its own. `observe` is told each whole line."""

    def __init__(
        self, client: Any, group: str, name: str, observe: Callable[[str], None] = lambda line: None, interval: float = 0.3
    ) -> None:
        self.group, self.name = group, name
        self._client, self._observe, self._interval = client, observe, interval
        self._lock = threading.Lock()
        self._waiting: list[Event] = []
        self._rest = b""
        self._latest = 0
        self._closing = threading.Event()
        for make, named in ((client.create_log_group, {}), (client.create_log_stream, {"logStreamName": name})):
            with contextlib.suppress(client.exceptions.ResourceAlreadyExistsException):
                make(logGroupName=group, **named)
        self._thread = threading.Thread(target=self._send_on, name=f"log {name}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """What the container printed, in any pieces."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """Sends what is left, and returns when all has been sent, or cannot be."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        self._closing.set()
        self._thread.join()

    def _line(self, data: bytes) -> None:
        text = data.decode("utf-8", errors="replace").rstrip("\r")
        if not text:
            return
        self._observe(text)
        with self._lock:
            self._latest = max(self._latest, time.time_ns() // 1_000_000)
            self._waiting += [(self._latest, piece) for piece in pieces(text)]

    def _send_on(self) -> None:
        tries = 0
        while True:
            last = self._closing.wait(self._interval)
            with self._lock:
                events, self._waiting = self._waiting, []
            unsent = self._send(events)
            with self._lock:
                self._waiting = unsent + self._waiting
            tries = tries + 1 if unsent else 0
            if last and (not self._waiting or tries > 3):
                if self._waiting:
                    print(f"{len(self._waiting)} events of the log stream {self.name} could not be sent", file=sys.stderr)
                return

    def _send(self, events: list[Event]) -> list[Event]:
        """What could not be sent."""
        sent = 0
        for batch in batches(events):
            named = [{"timestamp": at, "message": text} for at, text in batch]
            try:
                self._client.put_log_events(logGroupName=self.group, logStreamName=self.name, logEvents=named)
            except (BotoCoreError, ClientError) as exc:
                print(f"{self.group} {self.name}: {exc}", file=sys.stderr)
                return events[sent:]
            sent += len(batch)
        return []
