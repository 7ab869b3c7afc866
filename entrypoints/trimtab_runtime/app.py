"""The HTTP application around one engine: SageMaker's contract (GET /ping, POST /invocations) and OpenAI's.

One thread does all that touches the model or its tokenizer, request by request; the rest only waits, so /ping answers while
the model works. No prompt and no answer is ever written to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trimtab.errors import EndpointError
from trimtab_runtime.bodies import DEFAULT_NEW_TOKENS, Chat, Completions, Inputs, decode, parse
from trimtab_runtime.engine import Engine

MAX_BODY = 6 << 20  # bytes; what SageMaker's runtime passes on at most
MAX_WAITING = 64  # requests; more are told to come back

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Question:
    """What the model is asked: prompts as ids, and how to answer. `limit` None: as much as is usual and fits."""

    model: str | None
    prompts: list[list[int]]
    limit: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: list[str]


@dataclass(frozen=True)
class _Answer:
    text: str
    tokens: int
    reason: str  # stop: it ended by itself or at a stop text; length: it was cut off


class _Gone(Exception):
    """Nobody waits for this answer any more."""


class _Enough(Exception):
    """A stop text came."""


class _Service:
    def __init__(self, engine: Engine, alias: str | None) -> None:
        self.engine = engine
        self.aliases: dict[str, str] = {name: name for name in engine.names}
        if alias:
            self.aliases.setdefault(alias, "base")
        self.began = int(time.time())
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.waiting = 0
        self.closing = threading.Event()

    def close(self) -> None:
        self.closing.set()
        self.worker.shutdown(wait=True, cancel_futures=True)

    def name_of(self, asked: str | None) -> str:
        name = self.aliases.get(asked or self.engine.names[0])
        if name is None:
            raise HTTPException(404, f"there is no model {asked!r} here; ask for one of: {', '.join(self.aliases)}")
        return name

    async def ask(self, request: Request, question: _Question, say: Callable[[str], None] | None = None) -> list[_Answer]:
        """What the model answers. `say` gets the first prompt's text piece by piece, called from the engine's thread."""
        return await self.do(request, lambda gone: self._answer(question, gone, say))

    async def do(self, request: Request, work: Callable[[threading.Event], _T]) -> _T:
        """Do it on the engine's thread. The event is set when nobody waits any more."""
        if self.waiting >= MAX_WAITING:
            raise HTTPException(503, f"{self.waiting} requests are waiting already: try again in a moment")
        gone = threading.Event()
        self.waiting += 1
        answer = asyncio.get_running_loop().run_in_executor(self.worker, work, gone)
        try:
            while not (await asyncio.wait([answer], timeout=0.5))[0]:
                if await request.is_disconnected():
                    gone.set()
            return answer.result()
        finally:
            gone.set()
            answer.cancel()
            self.waiting -= 1

    def limit(self, question: _Question) -> int:
        room = self.engine.context - max(map(len, question.prompts))
        return question.limit or max(1, min(DEFAULT_NEW_TOKENS, room))

    def _answer(self, question: _Question, gone: threading.Event, say: Callable[[str], None] | None) -> list[_Answer]:
        """On the engine's thread."""
        ids: list[int] = []
        text = _Text(self.engine.decode, question.stops)

        def token(row: int, new: int) -> None:
            if gone.is_set() or self.closing.is_set():
                raise _Gone
            if say is None and (len(question.prompts) > 1 or not question.stops):
                return
            ids.append(new)
            piece = text.add(ids)
            if say is not None and piece:
                say(piece)
            if text.stopped:
                raise _Enough

        if gone.is_set() or self.closing.is_set():
            raise _Gone
        try:
            completions = self.engine.complete(
                question.prompts,
                model=question.model,
                max_new_tokens=self.limit(question),
                temperature=question.temperature,
                top_p=question.top_p,
                seed=question.seed,
                on_token=token,
            )
        except _Enough:
            return [_Answer(text.shown, len(ids), "stop")]
        if say is not None and (rest := text.add(ids, last=True)):
            say(rest)
        answers = []
        for one in completions:
            whole = self.engine.decode(one.ids)
            cut = _first(whole, question.stops)
            answers.append(_Answer(whole[:cut], len(one.ids), "stop" if one.ended or cut is not None else "length"))
        return answers


class _Text:
    """Text as it grows: only whole characters, and nothing that may turn out to begin a stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: list[str]) -> None:
        self._decode, self._stops, self.shown, self.stopped = decode, stops, "", False

    def add(self, ids: list[int], *, last: bool = False) -> str:
        """The piece that can be shown now, given all ids so far."""
        whole = self._decode(ids)
        cut = _first(whole, self._stops)
        self.stopped = cut is not None
        if cut is not None:
            whole = whole[:cut]
        elif not last:
            whole = whole.rstrip("\ufffd")
            held = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n]))
            whole = whole[: len(whole) - max(held, default=0)]
        piece = whole[len(self.shown) :]
        self.shown += piece
        return piece


def _first(text: str, stops: list[str]) -> int | None:
    """Where the first stop text begins."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def build(engine: Engine, alias: str | None = None) -> Starlette:
    """The application around an engine; `alias` is one more name for its base model."""
    service = _Service(engine, alias)

    async def ping(_: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def models(_: Request) -> Response:
        data = [{"id": name, "object": "model", "created": service.began, "owned_by": "trimtab"} for name in service.aliases]
        return JSONResponse({"object": "list", "data": data})

    async def invocations(request: Request) -> Response:
        body = await _body(request)
        values = decode(body)
        if "messages" in values:
            return await answer_chat(request, body)
        asked = parse(Inputs, body)
        own, name = asked.parameters, service.name_of(asked.model)
        ids = await service.do(request, lambda _: engine.encode(asked.inputs))
        question = _Question(name, [ids], own.max_new_tokens, own.drawn_at, own.top_p or 1.0, own.seed, own.stops)
        answers = await service.ask(request, question)
        return JSONResponse([{"generated_text": (asked.inputs if own.return_full_text else "") + answer.text} for answer in answers])

    async def chat(request: Request) -> Response:
        return await answer_chat(request, await _body(request))

    async def answer_chat(request: Request, body: bytes) -> Response:
        asked = parse(Chat, body)
        name = service.name_of(asked.model)
        prompts = [await service.do(request, lambda _: engine.chat_ids([message.plain() for message in asked.messages]))]
        question = _Question(name, prompts, asked.limit, asked.temperature or 0.0, asked.top_p or 1.0, asked.seed, asked.stops)
        return await _openai(service, request, question, "chat.completion", stream=bool(asked.stream))

    async def completions(request: Request) -> Response:
        asked = parse(Completions, await _body(request))
        name = service.name_of(asked.model)
        prompts = await service.do(request, lambda _: [engine.encode(text) for text in asked.prompts])
        question = _Question(name, prompts, asked.limit, asked.temperature or 0.0, asked.top_p or 1.0, asked.seed, asked.stops)
        if asked.stream and len(prompts) > 1:
            raise EndpointError("a stream answers one prompt: send one prompt, or leave out stream")
        return await _openai(service, request, question, "text_completion", stream=bool(asked.stream))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/ping", ping, methods=["GET"]),
            Route("/invocations", _logged(invocations), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/chat/completions", _logged(chat), methods=["POST"]),
            Route("/v1/completions", _logged(completions), methods=["POST"]),
        ],
        exception_handlers={EndpointError: _refused, HTTPException: _refused, _Gone: _refused, ClientDisconnect: _refused},
    )


async def _openai(service: _Service, request: Request, question: _Question, kind: str, *, stream: bool) -> Response:
    chat = kind == "chat.completion"
    head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
    if stream:
        service.engine.check(question.prompts[0], service.limit(question))  # refused while the status can still say so
        return StreamingResponse(_events(service, request, question, head, chat), media_type="text/event-stream")
    answers = await service.ask(request, question)
    choices = [
        {"index": index, "finish_reason": answer.reason, "logprobs": None}
        | ({"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text})
        for index, answer in enumerate(answers)
    ]
    given, made = sum(map(len, question.prompts)), sum(answer.tokens for answer in answers)
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    return JSONResponse({**head, "object": kind, "choices": choices, "usage": usage})


async def _events(service: _Service, request: Request, question: _Question, head: dict[str, Any], chat: bool) -> AsyncIterator[str]:
    """Server-sent events as OpenAI's streams: pieces of text, the reason it ended, then [DONE]. An error is an event too."""
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def event(piece: str | None, reason: str | None = None) -> str:
        delta = {"content": piece} if piece is not None else {}
        choice = {"index": 0, "finish_reason": reason} | ({"delta": delta} if chat else {"text": piece or ""})
        return _line({**head, "object": "chat.completion.chunk" if chat else "text_completion", "choices": [choice]})

    def say(piece: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    asking = asyncio.ensure_future(service.ask(request, question, say))
    asking.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield event(piece)
        answers = await asking
        yield event(None, answers[0].reason)
    except (EndpointError, HTTPException, _Gone) as exc:
        yield _line(_error(exc)[1])
    finally:
        asking.cancel()
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> bytes:
    """The whole body. Raises HTTPException 413 for one that is too big.

    What is too much is read and thrown away: a client that is still sending would never see the answer. There is an end to that, too.
    """
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MAX_BODY:
            body += piece
        elif size > 10 * MAX_BODY:
            break
    if size > MAX_BODY:
        raise HTTPException(413, f"the body is over {MAX_BODY >> 20} MB: send less text")
    return bytes(body)


def _error(exc: Exception) -> tuple[int, dict[str, Any]]:
    if isinstance(exc, HTTPException):
        status, message = exc.status_code, exc.detail
    elif isinstance(exc, EndpointError):
        status, message = 400, str(exc)
    else:  # whoever asked is gone, or the process is ending
        status, message = 503, "the answer was given up: ask again"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "code": status}}


async def _refused(_: Request, exc: Exception) -> Response:
    status, content = _error(exc)
    return JSONResponse(content, status_code=status, headers=getattr(exc, "headers", None))


def _logged(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """One line a request: path, status, seconds. Never what was asked or answered."""

    async def logged(request: Request) -> Response:
        began = time.monotonic()
        try:
            response = await answer(request)
        except (EndpointError, HTTPException, _Gone, ClientDisconnect) as exc:
            response = await _refused(request, exc)
        print(f"{request.url.path} {response.status_code} {time.monotonic() - began:.2f} s", flush=True)
        return response

    return logged
