"""What the base model says by itself, to be rehearsed beside the new text so that it is not forgotten.

Three kinds: its answers to everyday prompts (rehearsal.py); conversations of which it writes both sides (Xu et al. 2024,
"Magpie", arXiv:2406.08464); short texts on everyday subjects, learned as plain text. No outside data is needed (compare Huang et al. 2024,
"self-synthesized rehearsal", arXiv:2403.01244). With each token goes the base model's own prediction there, its
likeliest tokens and their probabilities: training matches these instead of the drawn token (Hinton et al. 2015,
arXiv:1503.02531), which says more by each token and also heals what 4-bit quantisation takes away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest, rehearsal
from trimtab_runtime.engine import Engine
from trimtab_runtime.prepare import document_samples, generated_sample, read_records
from trimtab_runtime.rows import Predictions
from trimtab_runtime.tokenizer import Tokenizer

LIKELIEST = 64  # tokens of a prediction that are kept
_SHARES = {"everyday": 0.45, "chat": 0.1, "prose": 0.45}  # of the tokens wanted
_TOKENS = {"everyday": 70, "chat": 115, "prose": 150}  # what a sample brings into the rows, for planning how many
_LIMIT = {"everyday": 48, "chat": 72, "prose": 160, "asking": 36}  # new tokens

# how users begin; without them a model's own users ask mostly for essays and code
_OPENINGS = (
    *("", "What is", "What are", "Who", "How many", "How", "Why", "Where", "When", "Which", "Name", "Is", "Can you", "Tell me", "Give me"),
    *("Explain", "Write", "What does", "Describe", "I"),
)


def generate(job: JobDir, spec: TrainSpec, say: Callable[[str], None], progress: Callable[[int, int], None]) -> int:
    """Write channel `generated`: about `replay` times the documents' tokens. Returns the number of samples."""
    tokenizer = Tokenizer(job.channel("model"))
    documents = list(read_records(job.channel("documents") / "documents.jsonl", ("title", "text")))
    wanted = spec.replay * sum(len(sample.ids) for sample in document_samples(documents, spec, tokenizer, lambda _: None))
    engine = Engine.load(job.channel("model"), dtype=spec.dtype)
    if tokenizer.chat_template is None:
        counts = {"everyday": 0, "chat": 0, "prose": round(wanted / _TOKENS["prose"])}
    else:
        counts = {kind: round(wanted * share / _TOKENS[kind]) for kind, share in _SHARES.items()}
    everyday = rehearsal.prompts(counts["everyday"], spec.seed)
    total = len(everyday) + 2 * counts["chat"] + counts["prose"]
    done = 0

    def complete(prompts: list[list[int]], kind: str, **how: Any) -> list[Any]:
        nonlocal done
        found = engine.complete(prompts, max_new_tokens=_LIMIT[kind], on_progress=lambda part, _: progress(done + part, total), **how)
        done += len(prompts)
        return found

    def answer(users: list[str], kind: str) -> list[dict[str, Any]]:
        answers = complete([engine.chat_ids([{"role": "user", "content": user}]) for user in users], kind)
        said = [(user, engine.decode(one.ids).strip(), one.ended) for user, one in zip(users, answers, strict=True)]
        return [
            {"kind": "replay", "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": text}], "ended": ended}
            for user, text, ended in said
            if text
        ]

    records = answer(everyday, "everyday")
    if counts["chat"]:
        before, drawn = user_prefix(tokenizer), {"temperature": 0.9, "top_p": 0.9}
        openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(counts["chat"])]
        asked = complete([before + tokenizer.text(words) for words in openings], "asking", seed=spec.seed + 1, **drawn)
        users = [(words + engine.decode(one.ids)).strip().split("\n")[0] for words, one in zip(openings, asked, strict=True) if one.ended]
        records += answer([text for text in dict.fromkeys(users) if len(text) > 8], "chat")
    # prose is what a chat model writes when asked for a text: from nothing it writes little that makes sense
    if tokenizer.chat_template is None:
        beginnings = [[tokenizer.document_start]] * counts["prose"]
    else:
        beginnings = [engine.chat_ids([{"role": "user", "content": user}]) for user in rehearsal.essays(counts["prose"], spec.seed)]
    prose = complete(beginnings, "prose", seed=spec.seed, temperature=0.8, top_p=0.95)
    records += [{"kind": "replay", "text": text, "ended": one.ended} for one in prose if (text := engine.decode(one.ids).strip())]
    progress(total, total)

    folder = job.channel("generated")
    folder.mkdir(parents=True, exist_ok=True)
    ids, chances = predictions(engine, records, tokenizer)
    np.save(folder / "teacher_ids.npy", ids)
    np.save(folder / "teacher_chances.npy", chances)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    manifest.write(folder, {"preparation_digest": spec.preparation_digest()})
    say(f"replay: {len(records)} samples of the base model's own chat and prose")
    return len(records)


def predictions(engine: Engine, records: list[dict[str, Any]], tokenizer: Tokenizer) -> Predictions:
    """The base model's prediction of each learned token of each record, in order: likeliest tokens and probabilities."""
    all_ids, all_chances = [], []
    model = engine.model("base")
    with torch.inference_mode():
        for record in records:
            sample = generated_sample(record, tokenizer)
            places = [place - 1 for place in range(1, len(sample.ids)) if sample.learned[place]]
            logits = model(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0, places].float()
            chances, ids = torch.softmax(logits, -1).topk(min(LIKELIEST, logits.shape[-1]))
            all_ids.append(ids.numpy().astype(np.int32))
            all_chances.append(chances.numpy().astype(np.float16))
    if not all_ids:
        return np.zeros((0, 1), dtype=np.int32), np.zeros((0, 1), dtype=np.float16)
    return np.concatenate(all_ids), np.concatenate(all_chances)


def user_prefix(tokenizer: Tokenizer) -> list[int]:
    """The template up to where the user's first word stands: what two conversations begin with alike."""
    one, other = (tokenizer.chat([{"role": "user", "content": word}])[0] for word in ("a", "The"))
    return one[: next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]
