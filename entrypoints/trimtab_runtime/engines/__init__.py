"""What computes answers: one small interface, and an engine a file behind it.

An engine lives in a process of its own (`worker`), which the server starts, watches and talks to (`process`): a step of the
model never holds up the server, and an engine that dies takes nobody along. It sees token ids only; text, chat templates and
stop texts are the server's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from trimtab.errors import EndpointError

Reason = Literal["stop", "length"]  # the model ended by itself; the limit cut it off


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and how to go on from it. Temperature 0 takes the likeliest token; `top_k` 0 looks at all."""

    id: int
    ids: list[int]
    model: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself when it is ready.

    `names` are the models that can be asked, the default first; `context` is how many tokens prompt and answer have together at most;
    `engine` is its name and version; `choices` are sentences, each an automatic choice with its reason.
    """

    names: tuple[str, ...]
    context: int
    engine: str
    choices: tuple[str, ...] = ()


def check(request: Request, facts: Facts) -> None:
    """Raise EndpointError for a request that no engine with these facts can take."""
    if request.model not in facts.names:
        raise EndpointError(f"there is no model {request.model!r} here; ask for one of: {', '.join(facts.names)}")
    if not request.ids:
        raise EndpointError("the prompt is empty: give at least one word")
    if request.max_new_tokens < 1:
        raise EndpointError(f"max_new_tokens is {request.max_new_tokens}: give a whole number from 1 up")
    if len(request.ids) + request.max_new_tokens > facts.context:
        raise EndpointError(
            f"the prompt's {len(request.ids):,} tokens and {request.max_new_tokens:,} new ones are more than the context of "
            f"{facts.context:,}: shorten the prompt, or ask for at most {max(0, facts.context - len(request.ids)):,} new tokens"
        )
    if not 0 <= request.temperature <= 100:
        raise EndpointError(f"temperature is {request.temperature}: give a number from 0 (the likeliest token) to 100")
    if not 0 < request.top_p <= 1:
        raise EndpointError(f"top_p is {request.top_p}: give a number above 0 and at most 1")
    if request.top_k < 0:
        raise EndpointError(f"top_k is {request.top_k}: give a whole number from 0 (all tokens) up")


Emit = Callable[[int, list[int], Reason | None], None]
"""Called with a request's id, its new token ids (no stop token among them), and why it ended, None while it goes on."""


class Engine(Protocol):
    """Answers many requests at once, which join and leave between steps. Only one thread calls it.

    Not `trimtab_runtime.engine.Engine`, which completes whole batches on transformers: that one has no server.
    """

    facts: Facts

    def add(self, request: Request) -> None:
        """Take a request in; it is worked on from the next step. Raises EndpointError for one that the engine cannot take."""
        ...

    def cancel(self, id: int) -> None:
        """Nobody waits for this answer any more: free what it takes. Quiet for a request that has ended."""
        ...

    def step(self, emit: Emit) -> bool:
        """Work on all running requests once, and tell what is new. False when there was nothing to do."""
        ...

    def usage(self) -> float:
        """Share of the memory for keys and values that is taken, 0 to 1."""
        ...
