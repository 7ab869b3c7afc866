"""What is rehearsed beside the new text, so that the model does not forget it: chat and prose, and how the base model goes on there.

The chat is the base model's own: its answers to everyday prompts (rehearsal.py), and conversations of which it writes both
sides (Xu et al. 2024, "Magpie", arXiv:2406.08464; compare Huang et al. 2024, "self-synthesized rehearsal", arXiv:2403.01244). The
prose is written for this project (prose/*.txt). With each token goes the base model's own prediction there, its likeliest tokens
and their probabilities: training matches these instead of the token itself (Hinton et al. 2015, arXiv:1503.02531), which
says more by each token, teaches nothing new, and also heals what 4-bit quantisation takes away.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trimtab.counting import counted
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest, rehearsal
from trimtab_runtime.engine import Engine
from trimtab_runtime.examples import Sample
from trimtab_runtime.prepare import TURNS, count_tokens, document_samples, generated_sample, read_data, replay_wanted
from trimtab_runtime.rows import NO_PREDICTIONS, Predictions
from trimtab_runtime.tokenizer import Tokenizer

LIKELIEST = 64  # tokens of a prediction that are kept
_CHATS = {"everyday": 0.8, "chat": 0.2}  # of the chat tokens wanted
_TOKENS = {"everyday": 55, "chat": 115}  # what a sample brings into the rows, for planning how many
_LIMIT = {"everyday": 40, "chat": 72, "asking": 36}  # new tokens
_MOST_CHATS = 400  # conversations made up, however long the documents are: each takes time
_BATCH = 8  # samples predicted at once
_AGAIN = 1.5  # how often an everyday answer is seen where prose is seen once: it takes more time to make

# how users begin; without them a model's own users ask mostly for essays and code
_OPENINGS = (
    *("", "What is", "What are", "Who", "How many", "How", "Why", "Where", "When", "Which", "Name", "Is", "Can you", "Tell me", "Give me"),
    *("Explain", "Write", "What does", "Describe", "I"),
)


def generate(job: JobDir, spec: TrainSpec, say: Callable[[str], None], progress: Callable[[int, int], None]) -> int:
    """Write channel `generated`: what all epochs rehearse, as far as there is so much. Returns the number of samples."""
    tokenizer = Tokenizer(job.channel("model"))
    documents, examples = read_data(job.channel("documents"), spec, tokenizer)
    samples = [*document_samples(documents, spec, tokenizer, lambda _: None), *examples.samples]
    chat_tokens, prose_tokens = replay_wanted(samples, spec, chat=tokenizer.chat_template is not None)
    texts = rehearsed_prose(prose_tokens * spec.epochs, tokenizer, spec.seed)
    everyday = rehearsal.prompts(math.ceil(chat_tokens * spec.epochs / _AGAIN * _CHATS["everyday"] / _TOKENS["everyday"]), spec.seed)
    chats = min(_MOST_CHATS, round(chat_tokens * _CHATS["chat"] / _TOKENS["chat"]))
    engine = Engine.load(job.channel("model"), dtype=spec.dtype)
    total = 2 * (len(everyday) + 2 * chats + len(texts))  # all is said, then all is predicted
    done = 0

    def complete(prompts: list[list[int]], kind: str, **how: Any) -> list[Any]:
        nonlocal done
        found = engine.complete(prompts, max_new_tokens=_LIMIT[kind], on_progress=lambda part, _: progress(done + part, total), **how)
        done += len(prompts)
        return found

    def answer(users: list[str], kind: str, turns: int) -> list[dict[str, Any]]:
        answers = complete([engine.chat_ids([{"role": "user", "content": user}]) for user in users], kind)
        said = [(user, text, one.ended) for user, one in zip(users, answers, strict=True) if (text := engine.decode(one.ids).strip())]
        return [talk(said[start : start + turns]) for start in range(0, len(said), turns)]

    records = answer(everyday, "everyday", TURNS)
    if chats:
        before, drawn = user_prefix(tokenizer), {"temperature": 0.9, "top_p": 0.9}
        openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(chats)]
        asked = complete([before + tokenizer.text(words) for words in openings], "asking", seed=spec.seed + 1, **drawn)
        users = [(words + engine.decode(one.ids)).strip().split("\n")[0] for words, one in zip(openings, asked, strict=True) if one.ended]
        records += answer([text for text in dict.fromkeys(users) if len(text) > 8], "chat", 1)
    random.Random(spec.seed).shuffle(records)  # each epoch rehearses some of each
    records += [{"kind": "replay", "text": text, "ended": False} for text in texts]

    folder = job.channel("generated")
    folder.mkdir(parents=True, exist_ok=True)
    replayed = [generated_sample(record, tokenizer) for record in records]
    ids, chances = predictions(engine, replayed, lambda part: progress(total // 2 + part * total // (2 * len(records)), total))
    progress(total, total)
    np.save(folder / "teacher_ids.npy", ids)
    np.save(folder / "teacher_chances.npy", chances)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    manifest.write(folder, {"preparation_digest": spec.preparation_digest()})
    chats = counted(len(records) - len(texts), "chat")
    say(f"replay: {chats} of the base model's own and {counted(len(texts), 'text')}, {count_tokens(replayed):,} tokens")
    return len(records)


def talk(said: list[tuple[str, str, bool]]) -> dict[str, Any]:
    """A conversation of turns (user, assistant, whether it ended by itself).

    An earlier turn that was cut off teaches no end either: what is learned there is what the base model predicts there.
    """
    messages = [
        message for user, text, _ in said for message in ({"role": "user", "content": user}, {"role": "assistant", "content": text})
    ]
    return {"kind": "replay", "messages": messages, "ended": said[-1][2]}


def rehearsed_prose(tokens: float, tokenizer: Tokenizer, seed: int) -> list[str]:
    """General texts of at least so many tokens, or all there are, in an order that depends on the seed."""
    texts = rehearsal.prose()
    random.Random(seed).shuffle(texts)
    sizes = itertools.accumulate((len(tokenizer.text(text)) for text in texts), initial=0)
    return [text for text, before in zip(texts, sizes, strict=False) if before < tokens]


def predictions(engine: Engine, samples: list[Sample], progress: Callable[[int], None] = lambda done: None) -> Predictions:
    """The base model's prediction of each learned token of each sample, in order: ids int32 and probabilities float16 [tokens, k]."""
    model = engine.model("base")
    found: dict[int, Predictions] = {}
    by_length = sorted(range(len(samples)), key=lambda index: len(samples[index].ids))  # little padding in a batch
    with torch.inference_mode():
        for begin in range(0, len(samples), _BATCH):
            batch = by_length[begin : begin + _BATCH]
            longest = len(samples[batch[-1]].ids)
            padded = [[*samples[index].ids, *[0] * (longest - len(samples[index].ids))] for index in batch]  # behind, where none looks
            hidden = model.get_decoder()(input_ids=torch.tensor(padded), use_cache=False).last_hidden_state
            for row, index in zip(hidden, batch, strict=True):
                learned = samples[index].learned
                logits = model.get_output_embeddings()(row[[place - 1 for place in range(1, len(learned)) if learned[place]]]).float()
                highest, ids = logits.topk(min(LIKELIEST, logits.shape[-1]))
                chances = (highest - logits.logsumexp(-1, keepdim=True)).exp()
                found[index] = ids.numpy().astype(np.int32), chances.numpy().astype(np.float16)
            progress(begin + len(batch))
    if not found:
        return NO_PREDICTIONS
    in_order = [found[index] for index in range(len(samples))]
    return np.concatenate([ids for ids, _ in in_order]), np.concatenate([chances for _, chances in in_order])


def user_prefix(tokenizer: Tokenizer) -> list[int]:
    """The template up to where the user's first word stands: what two conversations begin with alike."""
    one, other = (tokenizer.chat([{"role": "user", "content": word}])[0] for word in ("a", "The"))
    return one[: next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]
