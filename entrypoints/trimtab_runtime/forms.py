"""The forms of TGI's and OpenAI's interfaces in which answers go out, whole or in pieces (server-sent events).

Sources: "Text Generation Inference" (`/generate`, `/generate_stream`), OpenAI API reference (completions, chat completions, streaming).
Events are made of bytes by hand: with many clients they are most of what a server does for a token.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted  # ASCII: some clients split lines at U+2028 and the like
from typing import Any, Literal

Finish = Literal["stop", "length", "stop_text"]  # the model ended by itself; the limit cut it off; one of the stop texts came


@dataclass(frozen=True)
class Answered:
    """One whole answer. `tokens` counts what the model made, without the token that ends an answer."""

    text: str
    tokens: int
    finish: Finish


class Tgi:
    """`/invocations` with `inputs`. `full` is put before the text of the whole answer (return_full_text)."""

    def __init__(self, full: str = "", seed: int | None = None) -> None:
        self._full, self._seed = full, seed
        self._texts: list[str] = []

    def whole(self, answers: Sequence[Answered], _given: int) -> list[dict[str, Any]]:
        return [{"generated_text": self._full + answer.text} for answer in answers]

    def piece(self, text: str, tokens: int, id: int) -> bytes:
        self._texts.append(text)
        return b'data:{"index":%d,"token":{"id":%d,"text":%b,"logprob":null,"special":false},"generated_text":null,"details":null}\n\n' % (
            tokens,
            id,
            quoted(text).encode(),
        )

    def end(self, text: str, tokens: int, id: int, finish: Finish, _given: int) -> bytes:
        reason = {"stop": "eos_token", "length": "length", "stop_text": "stop_sequence"}[finish]
        value = {
            "index": tokens,
            "token": {"id": id, "text": text, "logprob": None, "special": False},
            "generated_text": self._full + "".join(self._texts) + text,
            "details": {"finish_reason": reason, "generated_tokens": tokens, "seed": self._seed},
        }
        return b"data:%b\n\n" % json.dumps(value).encode()

    def broken(self, error: dict[str, Any]) -> bytes:
        return b"data:%b\n\n" % json.dumps(error).encode()


class OpenAI:
    """`/v1/completions`, and `/v1/chat/completions` with `chat`. With `usage` a stream ends with the number of tokens."""

    def __init__(self, model: str, *, chat: bool, usage: bool = False) -> None:
        self._chat, self._usage = chat, usage
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._before, self._after = self._frame(None, None)
        self._first = chat

    def whole(self, answers: Sequence[Answered], given: int) -> dict[str, Any]:
        choices = [
            {"index": index, "finish_reason": "length" if answer.finish == "length" else "stop", "logprobs": None}
            | ({"message": {"role": "assistant", "content": answer.text}} if self._chat else {"text": answer.text})
            for index, answer in enumerate(answers)
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": _usage(given, sum(answer.tokens for answer in answers))}

    def piece(self, text: str, _tokens: int, _id: int) -> bytes:
        if self._first:
            self._first = False
            before, after = self._frame("assistant", None)
            return before + quoted(text).encode() + after
        return self._before + quoted(text).encode() + self._after

    def end(self, text: str, tokens: int, id: int, finish: Finish, given: int) -> bytes:
        rest = self.piece(text, tokens, id) if text or self._first else b""
        reason = "length" if finish == "length" else "stop"
        ended: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        choice = {"index": 0, "finish_reason": reason, "logprobs": None} | ended
        events = [rest, self._event([choice], None)]
        if self._usage:
            events.append(self._event([], _usage(given, tokens)))
        return b"".join([*events, b"data: [DONE]\n\n"])

    def broken(self, error: dict[str, Any]) -> bytes:
        return b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(error).encode()

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        value = {**self._head, "object": kind, "choices": choices} | ({"usage": usage} if self._usage else {})
        return b"data: %b\n\n" % json.dumps(value).encode()

    def _frame(self, role: str | None, reason: str | None) -> tuple[bytes, bytes]:
        """What stands before and after the text of a piece."""
        mark = uuid.uuid4().hex
        delta = ({"role": role} if role else {}) | {"content": mark}
        choice = {"index": 0, "finish_reason": reason, "logprobs": None} | ({"delta": delta} if self._chat else {"text": mark})
        before, _, after = self._event([choice], None).partition(b'"%b"' % mark.encode())
        return before, after


Form = Tgi | OpenAI


def _usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
