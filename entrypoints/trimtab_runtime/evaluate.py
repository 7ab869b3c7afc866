"""Many prompts to a model before and after tuning, in batches, and how well both predict a text.

Channel `evaluate` (requests.json), channel `model`, and the artifact in `model/` -> output/data/answers.json.

    requests.json   {"prompts": [{"id": str, "mode": "complete" | "chat", "prompt": str, "max_new_tokens": int}, ...],
                     "texts": {name: text}}
    answers.json    {model: {"answers": {id: {"text": str, "ended": bool}}, "perplexity": {name: float}, "seconds": float}}

`model` is "base" (the original weights) and "tuned". Both compute in fp32: small models' answers hang on less than
bf16's rounding, and that should not decide a comparison.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trimtab.counting import counted
from trimtab.errors import StagingError
from trimtab.layout import JobDir
from trimtab_runtime import manifest
from trimtab_runtime.engine import Engine

WINDOW = 512  # tokens a prediction can look back on, at most


def evaluate(job: JobDir, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Raises StagingError for requests that cannot be read, EndpointError for a prompt that the model cannot take."""
    file = job.channel("evaluate") / "requests.json"
    try:
        requests: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        prompts, texts = requests["prompts"], requests["texts"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StagingError(f"{file} holds no readable requests ({exc}): write prompts and texts as evaluate.py describes") from exc
    engine = Engine.load(job.channel("model"), job.model, dtype="float32")
    names = ("base", "tuned")
    ids = [
        engine.chat_ids([{"role": "user", "content": one["prompt"]}]) if one["mode"] == "chat" else engine.encode(one["prompt"])
        for one in prompts
    ]
    results = {}
    for number, name in enumerate(names):
        began = time.monotonic()
        completions = engine.complete(
            ids,
            model=name,
            max_new_tokens=[one["max_new_tokens"] for one in prompts],
            on_progress=_part(progress, number, len(names)),
        )
        answers = {
            one["id"]: {"text": engine.decode(done.ids), "ended": done.ended} for one, done in zip(prompts, completions, strict=True)
        }
        perplexities = {title: perplexity(engine.model(name), engine.encode(text)) for title, text in texts.items()}
        results[name] = {"answers": answers, "perplexity": perplexities, "seconds": round(time.monotonic() - began, 1)}
        say(f"{name}: {counted(len(answers), 'answer')} in {results[name]['seconds']:.0f} s")
    manifest.write_json(job.events.parent / "answers.json", results)


def _part(progress: Callable[[int, int], None], number: int, parts: int) -> Callable[[int, int], None]:
    """Part `number` (from 0) of `parts` equal ones, as progress of the whole."""
    return lambda done, of: progress(number * of + done, parts * of)


def perplexity(model: nn.Module, ids: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of each token given up to `WINDOW` - 1 before it in its window."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.tensor([list(ids[start : start + WINDOW])])
            if window.shape[1] < 2:
                break
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return math.exp(total / count) if count else math.nan
