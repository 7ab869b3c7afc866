"""What a server answers: SageMaker's contract (GET /ping, POST /invocations), OpenAI's interface, and what it counts.

It sees text and talks to one engine process in token ids. No prompt and no answer is ever written to the log.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence

from trimtab.counting import counted
from trimtab.errors import EndpointError
from trimtab.spec import ServeSpec
from trimtab_runtime.answers import Answer, Stream
from trimtab_runtime.bodies import DEFAULT_NEW_TOKENS, Chat, Completions, Inputs, Sampling, decode, parse
from trimtab_runtime.engines import Facts, Request, check
from trimtab_runtime.engines.process import EngineGone, EngineProcess
from trimtab_runtime.forms import Form, OpenAI, Tgi
from trimtab_runtime.http import JSON, Connection, Incoming, Refusal
from trimtab_runtime.metrics import CONTENT_TYPE, Metrics
from trimtab_runtime.prompts import Prompt, Prompts, Written

NO_BODY = 1024  # bytes that some send although there is nothing to say
COME_BACK, STARTING = 1, 2  # seconds told to who may try again: while it is full, while there is no engine


class App:
    """All routes around one engine. `aliases` are more names: what a model is also called, by its own name."""

    def __init__(
        self,
        engine: EngineProcess,
        prompts: Prompts,
        spec: ServeSpec,
        say: Callable[[str], None],
        *,
        key: str | None = None,
        aliases: dict[str, str] | None = None,
    ) -> None:
        self.engine, self.prompts, self.metrics = engine, prompts, Metrics()
        self.ending = ""  # why no more questions are taken
        self._say, self._spec, self._aliases = say, spec, aliases or {}
        self._key = None if key is None else f"Bearer {key}".encode()
        self._began = int(time.time())
        self._ids = itertools.count(1)
        self._encoding = 0  # prompts that are being read
        self._routes: dict[str, tuple[str, Callable[[Incoming, Connection], Awaitable[int]]]] = {
            "/ping": ("GET", self._ping),
            "/invocations": ("POST", self._invocations),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._completions),
            "/v1/models": ("GET", self._models),
            "/metrics": ("GET", self._metrics),
        }

    @property
    def names(self) -> dict[str, str]:
        """All names that can be asked, the default first, and the engine's name for each."""
        facts = self.engine.facts
        own = {name: name for name in facts.names} if facts else {}
        return own | {alias: name for alias, name in self._aliases.items() if alias not in own and name in own}

    def admit(self, head: Incoming) -> int | None:
        """Before a body is read: the key. Whoever has none learns nothing of what there is, but for GET /ping.

        Returns how many bytes of a body are read, None for as many as the server takes.
        """
        limit = None if head.method == "POST" else NO_BODY
        if self._key is None or (head.path == "/ping" and head.method == "GET"):
            return limit
        scheme, _, given = head.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(f"{scheme.capitalize()} {given.strip()}".encode(), self._key):
            self.metrics.requests[self._route(head), 401] += 1
            raise Refusal(401, "this needs the endpoint's API key: send it as  Authorization: Bearer KEY")
        return limit

    async def answer(self, asked: Incoming, client: Connection) -> None:
        """Answer one request, count it, and leave one line in the log: path, status, seconds. Never what was asked or answered."""
        began = time.monotonic()
        route, status = self._route(asked), 500
        try:
            status = await self._answer(asked, client)
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            self.metrics.requests[route, status] += 1
            if route not in ("/ping", "/metrics"):
                self._say(f"{route} {status} {time.monotonic() - began:.2f} s")

    async def _answer(self, asked: Incoming, client: Connection) -> int:
        try:
            method, answer = self._routes.get(asked.path, ("", self._nothing))
            if method and asked.method != method:
                raise Refusal(405, f"{asked.path} takes {method}, not {asked.method[:20]}")
            return await answer(asked, client)
        except EndpointError as exc:
            refusal = Refusal(400, str(exc))
        except EngineGone as exc:
            refusal = Refusal(503, f"{exc}: ask again in a moment", STARTING)
        except Refusal as exc:
            refusal = exc
        client.refuse(refusal)
        return refusal.status

    def _route(self, asked: Incoming) -> str:
        return asked.path if asked.path in self._routes else "other"

    async def _nothing(self, _: Incoming, __: Connection) -> int:
        raise Refusal(404, f"there is nothing here; there are: {', '.join(self._routes)}")

    async def _ping(self, _: Incoming, client: Connection) -> int:
        self._open()
        client.send(200, b'{"status": "ready"}')
        return 200

    async def _models(self, _: Incoming, client: Connection) -> int:
        data = [{"id": name, "object": "model", "created": self._began, "owned_by": "trimtab"} for name in self.names]
        client.send(200, json.dumps({"object": "list", "data": data}).encode())
        return 200

    async def _metrics(self, _: Incoming, client: Connection) -> int:
        engine = self.engine
        ready, waiting = engine.state == "ready" and not engine.hangs and not self.ending, engine.waiting + self._encoding
        text = self.metrics.text(ready=ready, running=engine.running, waiting=waiting, cache=engine.cache, restarts=engine.restarts)
        client.send(200, text.encode(), CONTENT_TYPE)
        return 200

    async def _invocations(self, asked: Incoming, client: Connection) -> int:
        """`inputs` is TGI's: a chat's prompt often comes so, with its control tokens in it. OpenAI's bodies are as on their own routes."""
        values = decode(asked.body)
        if "messages" in values:
            return await self._chat(asked, client)
        if "prompt" in values and "inputs" not in values:
            return await self._completions(asked, client)
        body = parse(Inputs, values)
        own = body.own
        name = self._name(body.model)
        form = Tgi(body.inputs if own.return_full_text else "", own.seed)
        return await self._generate(client, name, [Written(body.inputs)], own, own.max_new_tokens, form, stream=bool(body.stream))

    async def _chat(self, asked: Incoming, client: Connection) -> int:
        body = parse(Chat, decode(asked.body))
        name = self._name(body.model)
        form = OpenAI(name, chat=True, usage=body.tells_usage)
        talk = [[message.plain() for message in body.messages]]
        return await self._generate(client, name, talk, body, body.limit, form, stream=bool(body.stream))

    async def _completions(self, asked: Incoming, client: Connection) -> int:
        body = parse(Completions, decode(asked.body))
        name = self._name(body.model)
        if body.stream and len(body.prompts) > 1:
            raise EndpointError("a stream answers one prompt: send one prompt, or leave out stream")
        form = OpenAI(name, chat=False, usage=body.tells_usage)
        return await self._generate(client, name, body.prompts, body, body.limit, form, stream=bool(body.stream))

    async def _generate(
        self,
        client: Connection,
        name: str,
        prompts: Sequence[Prompt],
        how: Sampling,
        limit: int | None,
        form: Form,
        *,
        stream: bool,
    ) -> int:
        began = time.monotonic()
        requests = await self._requests(name, prompts, how, limit)
        given = sum(len(request.ids) for request in requests)
        self.metrics.tokens_in += given
        tokenizer, sink = self.prompts.tokenizer(name), Stream(client, form, given) if stream else None
        answers = [Answer(tokenizer, how.stops, self.metrics, began, sink) for _ in requests]
        try:
            for request, answer in zip(requests, answers, strict=True):
                answer.ask(self.engine, request)
            whole = [await answer.done for answer in answers]
        except (EndpointError, EngineGone) as exc:
            if not client.begun:
                raise
            client.finish(form.broken(Refusal(503, f"{exc}: ask again").content))
            return 503
        finally:
            for answer in answers:
                answer.drop()
        if sink is None:
            client.send(200, json.dumps(form.whole(whole, given)).encode(), JSON)
        return 200

    async def _requests(self, name: str, prompts: Sequence[Prompt], how: Sampling, limit: int | None) -> list[Request]:
        """What the engine is asked, a request for each prompt, if there is room. Raises EndpointError for what does not fit the model."""
        facts = self._open()
        taken, places = self.engine.running + self.engine.waiting + self._encoding, self._spec.max_running + self._spec.max_waiting
        if len(prompts) > places:
            raise EndpointError(f"{len(prompts)} prompts in one body are more than the {places} that are taken at once: send fewer")
        if taken + len(prompts) > places:
            waiting = counted(taken, "prompt is being answered or waits", "prompts are being answered or wait")
            raise Refusal(429, f"{waiting} already: try again in a moment", COME_BACK)
        self._encoding += len(prompts)
        try:
            ids = [await self.prompts.ids(name, prompt, facts.context) for prompt in prompts]
        finally:
            self._encoding -= len(prompts)
        room = facts.context - max(map(len, ids))
        new = limit if limit is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
        requests = [
            Request(
                id=next(self._ids),
                ids=one,
                model=name,
                max_new_tokens=new,
                temperature=how.drawn_at,
                top_p=how.share,
                top_k=max(0, how.top_k or 0),
                seed=None if how.seed is None else (how.seed + row) % 2**63,  # equal prompts in one body are drawn apart
            )
            for row, one in enumerate(ids)
        ]
        for request in requests:
            check(request, facts)
        return requests

    def _open(self) -> Facts:
        """What the engine says of itself. Raises Refusal while nothing is answered."""
        facts = self.engine.facts
        if self.ending:
            raise Refusal(503, self.ending, STARTING)
        if self.engine.state != "ready" or facts is None:
            raise EngineGone(self.engine.cause or "the model is loading")
        if self.engine.hangs:
            raise EngineGone("the engine does not get on")
        return facts

    def _name(self, asked: str | None) -> str:
        names = self.names
        if not names:
            self._open()
        name = names.get(asked or next(iter(names)))
        if name is None:
            raise Refusal(404, f"there is no model {str(asked)[:200]!r} here; ask for one of: {', '.join(names)}")
        return name
