"""Answers as they grow: token ids into text, piece by piece, and each piece to whoever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from trimtab_runtime.engines import Reason, Request
from trimtab_runtime.engines.process import EngineProcess
from trimtab_runtime.forms import Answered, Finish, Form
from trimtab_runtime.http import Connection
from trimtab_runtime.metrics import Metrics
from trimtab_runtime.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what bytes that are no whole character are decoded to
_OFTEN = 16  # ids up to which an unfinished end is looked at for each new one


class Text:
    """Text as it grows: only whole characters, and nothing that may turn out to begin a stop text.

    The pieces together are what decoding all ids at once gives, up to the first stop text. Only a few ids are decoded for each new one:
    those since the last place where the text was whole, behind some that have text of their own, because decoders treat the beginning of
    a text in their own way. `byte_ids` are tokens that are single bytes: a run of them is decoded as one (SentencePiece's byte fallback).
    """

    __slots__ = ("_byte_ids", "_decode", "_held", "_ids", "_known", "_next", "_read", "_stops", "stopped")

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), byte_ids: frozenset[int] = frozenset()) -> None:
        self._decode, self._stops, self._byte_ids = decode, stops, byte_ids
        self._ids: list[int] = []  # some that have been read, and what came since
        self._read, self._known = 0, ""  # how many of them have been read, and their text
        self._next = _OFTEN  # ids, the number from which an unfinished end is looked at again
        self._held = ""  # read, and may begin a stop text
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The piece of text that can be shown now, given more ids; with `last` all that is left."""
        self._ids += ids
        return self._until_stop(self._whole(len(ids), last), last)

    def _whole(self, new: int, last: bool) -> str:
        ids, end = self._ids, len(self._ids)
        if not last:
            end = self._look(new)
        text = self._decode(ids[:end])
        if not end or (not last and self._is_open(text, ids[end - 1])):
            return ""
        piece = text[len(self._known) :]
        known = self._decode(ids[self._read : end])
        if known:
            self._ids, self._known, self._read = ids[self._read :], known, end - self._read
        else:
            self._known, self._read = text, end
        return piece

    def _look(self, new: int) -> int:
        """How many ids to decode, because their text may be whole: of several new ones up to the last that ends no run. None: not now."""
        ids, count = self._ids, len(self._ids)
        for end in range(count, count - new if new > 1 else count, -1):
            if not self._is_open(self._decode(ids[end - 1 : end]), ids[end - 1]):
                return end
        if _OFTEN < count < self._next and self._is_open(self._decode(ids[-1:]), ids[-1]):
            return 0
        self._next = 2 * count  # each look decodes all of them: a run that goes on is looked at as it doubles
        return count

    def _is_open(self, text: str, id: int) -> bool:
        """Whether another id after this one could change this text's end."""
        if not text or text[-1] == UNFINISHED:
            return True
        # a token without text of its own may be skipped: the bytes before and after it are one run
        return bool(self._byte_ids) and (id in self._byte_ids or not self._decode([id]))

    def _until_stop(self, piece: str, last: bool) -> str:
        if not self._stops:
            return piece
        text = self._held + piece
        places = [at for at in map(text.find, self._stops) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else max(_overlap(text, stop) for stop in self._stops)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may begin the stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Stream:
    """The way of one answer to its client in pieces, in a form, and how many tokens it was asked with."""

    def __init__(self, client: Connection, form: Form, given: int) -> None:
        self.client, self.form, self.given = client, form, given


class Answer:
    """One prompt's answer as it comes; it listens to the engine. `done` is all of it, or why there is none.

    With a stream each piece goes out at once; a client that takes nothing gets them together, once it does.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], metrics: Metrics, began: float, stream: Stream | None = None) -> None:
        self.done: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._tokenizer, self._metrics, self._began, self._stream = tokenizer, metrics, began, stream
        # without a reader and without stop texts nobody needs the text before its end
        self._text = Text(tokenizer.decode, stops, tokenizer.byte_ids) if stops or stream else None
        self._pieces: list[str] = []
        self._ids: list[int] = []  # not yet text
        self._tokens, self._id = 0, 0
        self._first = self._last = 0.0
        self._request: Request | None = None

    def ask(self, engine: EngineProcess, request: Request) -> None:
        """Have the engine answer. Raises EngineGone while there is none."""
        self._engine, self._request = engine, request
        engine.ask(request, self)

    def new(self, ids: list[int], reason: Reason | None) -> None:
        if ids:
            self._last = time.monotonic()
            if not self._tokens:
                self._first = self._last
                self._metrics.to_first.observe(self._first - self._began)
            self._tokens += len(ids)
            self._metrics.tokens_out += len(ids)
            self._id = ids[-1]
        text, stream = self._text, self._stream
        if text is None:
            self._ids += ids
            if reason is not None:
                self._finish(self._tokenizer.decode(self._ids), reason)
            return
        if self._ids or (reason is None and stream is not None and stream.client.blocked):
            self._ids += ids
            if reason is None and stream is not None and stream.client.blocked:
                return
            ids, self._ids = self._ids, []
        piece = text.add(ids, last=reason is not None)
        if text.stopped:
            self.drop()
            self._finish(piece, "stop_text")
        elif reason is not None:
            self._finish(piece, reason)
        elif stream is None:
            self._pieces.append(piece)
        elif piece:
            stream.client.write(stream.form.piece(piece, self._tokens, self._id))

    def failed(self, problem: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(problem)

    def drop(self) -> None:
        """Nobody waits any more: the engine need not go on. Quiet when it has ended."""
        if self._request is not None:
            self._engine.cancel(self._request.id)
        if self.done.done() and not self.done.cancelled():
            self.done.exception()  # seen: of several failures one is told

    def _finish(self, rest: str, finish: Finish) -> None:
        if self._tokens > 1:
            self._metrics.per_token.observe((self._last - self._first) / (self._tokens - 1))
        if self._stream is not None:
            self._stream.client.finish(self._stream.form.end(rest, self._tokens, self._id, finish, self._stream.given))
        if not self.done.done():
            self.done.set_result(Answered("".join(self._pieces) + rest, self._tokens, finish))
