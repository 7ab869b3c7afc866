"""What computes answers: one small interface, and an engine a file behind it.

An engine lives in a process of its own (`worker`), which the server starts, watches and talks to (`process`): a step of the
model never holds up the server, and an engine that dies takes nobody along. It sees token ids only; text, chat templates and
stop texts are the server's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

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


Emit = Callable[[int, list[int], Reason | None], None]
"""Called with a request's id, its new token ids (no stop token among them), and why it ended, None while it goes on."""


class Engine(Protocol):
    """Answers many requests at once. Only one thread calls it."""

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
