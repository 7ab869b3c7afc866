"""The fallback: transformers, on any model that it knows. What waits becomes one batch; what comes meanwhile waits for the next."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence

# threads that spin while they wait take a shared processor from the one that they wait for: 4 to 20 times the time for a token was
# seen with two processors and a load of 7. OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from trimtab.spec import ServeSpec
from trimtab_runtime.choices import Choice
from trimtab_runtime.engine import CACHE_BYTES, MAX_ROWS, Step, cache_bytes
from trimtab_runtime.engine import Engine as Model
from trimtab_runtime.engines import Emit, Facts, Reason, Request, check
from trimtab_runtime.engines.machine import processors
from trimtab_runtime.engines.tree import Tree
from trimtab_runtime.sampling import Sampling
from trimtab_runtime.xeon.allocator import keep_large_blocks

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TransformersEngine:
    """One batch at a time. `load` makes one."""

    def __init__(self, model: Model, facts: Facts, *, rows: int, budget: int) -> None:
        """`rows` and `budget`, in tokens of prompts and answers with their padding, are what a batch may have at most."""
        self.facts, self._model, self._rows, self._budget = facts, model, rows, budget
        self._waiting: dict[int, Request] = {}
        self._batch: list[Request] = []
        self._left: set[int] = set()  # rows of the batch that ended or that nobody waits for
        self._steps: Iterator[list[Step]] = iter(())

    @classmethod
    def load(cls, tree: Tree, spec: ServeSpec, dtype: Choice, reasons: Sequence[str] = ()) -> TransformersEngine:
        """Load a model and its adapters. Raises WeightsError for what transformers cannot load."""
        torch.set_num_threads(processors())
        keep_large_blocks()
        model = Model(tree.model, tree.adapters, _DTYPES[dtype.value], trust_remote_code=spec.trust_remote_code)
        loaded = model.model(model.names[0])
        context = min(model.context, spec.max_context or model.context)
        budget = int(spec.cache_gb * 1e9 if spec.cache_gb else CACHE_BYTES) // cache_bytes(loaded)
        choices = [*reasons, f"dtype {dtype.value}: {dtype.reason}"]
        if budget < context:
            choices.append(f"context {budget:,}: what the cache holds")
            context = budget
        if four_bit := tree.quantised():
            choices.append(f"{', '.join(four_bit)}: on the base as 4-bit quantisation left it, which is what was trained on")
        facts = Facts(tree.names, context, f"transformers {importlib.metadata.version('transformers')}", tuple(choices))
        return cls(model, facts, rows=min(spec.max_running, MAX_ROWS), budget=budget)

    def add(self, request: Request) -> None:
        """Take a request in. Raises EndpointError for one that does not fit these facts."""
        check(request, self.facts)
        self._waiting[request.id] = request

    def cancel(self, id: int) -> None:
        """Drop a request: one of the batch leaves it before the next token."""
        self._waiting.pop(id, None)
        self._left.update(row for row, request in enumerate(self._batch) if request.id == id)

    def step(self, emit: Emit) -> bool:
        """One forward pass of the batch; a batch that has ended is followed by what waits."""
        steps = next(self._steps, None)
        if steps is None:
            self._begin()
            steps = next(self._steps, None)
        for step in steps or []:
            if step.over:
                self._left.add(step.row)
            reason: Reason | None = None if not step.over else "stop" if step.token is None else "length"
            emit(self._batch[step.row].id, [] if step.token is None else [step.token], reason)
        return steps is not None

    def usage(self) -> float:
        """Share of the budget that the batch's rows can come to take."""
        running = [request for row, request in enumerate(self._batch) if row not in self._left]
        return min(1.0, _padded(running) / self._budget)

    def _begin(self) -> None:
        """Make a batch of the requests that wait for the model whose turn it is, in the order they came."""
        self._batch, self._left, self._steps = [], set(), iter(())
        for request in list(self._waiting.values()):
            if self._batch and request.model != self._batch[0].model:
                continue
            if len(self._batch) == self._rows or (self._batch and _padded([*self._batch, request]) > self._budget):
                break
            self._batch.append(self._waiting.pop(request.id))
        if self._batch:
            whole = self._batch[0].model if self._batch[0].model in self._model.names else "base"  # a merged model is one, too
            self._steps = self._model.stream(
                [request.ids for request in self._batch],
                [request.max_new_tokens for request in self._batch],
                [Sampling(request.temperature, request.top_p, request.seed, request.top_k) for request in self._batch],
                whole,
                left=self._left,
            )


def _padded(requests: Sequence[Request]) -> int:
    """Tokens that a batch of these comes to take: each row is as long as the longest."""
    if not requests:
        return 0
    return len(requests) * (max(len(request.ids) for request in requests) + max(request.max_new_tokens for request in requests))
