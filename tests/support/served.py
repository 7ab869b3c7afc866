"""An engine on a folder, and asking it: what the server does, without the server."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.layout import JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.engines import Engine, Reason, Request
from trimtab_runtime.engines.choose import load

END = 1  # the token that ends an answer, in folders that get their tokenizer here
Answer = tuple[list[int], Reason | None]


def tree_of(place: Path, base: Path, adapters: Mapping[str, Path] | None = None, *, tuned: Path | None = None) -> JobDir:
    """A job's folders with a base model and adapters beside it."""
    job = JobDir(place / "tree")
    shutil.rmtree(job.root, ignore_errors=True)
    job.channel("model").parent.mkdir(parents=True)
    job.channel("model").symlink_to(base)
    if tuned is not None:
        job.model.symlink_to(tuned)
    for name, folder in (adapters or {}).items():
        job.adapters.mkdir(exist_ok=True)
        (job.adapters / name).symlink_to(folder)
    return job


def engine_on(place: Path, base: Path, *, engine: str = "openvino", adapters: Mapping[str, Path] | None = None, **spec: Any) -> Engine:
    """The engine on a plain folder; `cache_gb` is small where nothing else is said."""
    from tokenizers import Tokenizer, models

    if not (base / "tokenizer.json").is_file():
        Tokenizer(models.BPE(vocab={"a": 0, "<end>": END}, merges=[], unk_token="a")).save(str(base / "tokenizer.json"))
        (base / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return load(tree_of(place, base, adapters), ServeSpec(**{"engine": engine, "dtype": "float32", "cache_gb": 0.2, **spec}))


def asked(engine: Engine, requests: Sequence[tuple[list[int], int, str]], seeds: Sequence[int] = (), **how: Any) -> list[Answer]:
    """Answers to (prompt, limit, model), all added at once, in order."""
    tokens: dict[int, list[int]] = {id: [] for id in range(len(requests))}
    reasons: dict[int, Reason | None] = {}

    def emit(id: int, ids: list[int], reason: Reason | None) -> None:
        assert reasons.get(id) is None, "an answer that has ended goes on"
        tokens[id] += ids
        reasons[id] = reason

    for id, (ids, limit, model) in enumerate(requests):
        engine.add(Request(id, ids, model, limit, **how | ({"seed": seeds[id]} if seeds else {})))
    while engine.step(emit):
        pass
    return [(tokens[id], reasons[id]) for id in range(len(requests))]
