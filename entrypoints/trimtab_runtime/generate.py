"""What the base model says by itself, to be rehearsed beside the new text so that it is not forgotten.

The model writes the user's turn and then answers it (Xu et al. 2024, "Magpie", arXiv:2406.08464), and continues from
nothing for prose. No outside data is needed, and what is rehearsed is the model's own distribution
(Huang et al. 2024, self-synthesised rehearsal, arXiv:2403.01244).
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable

from trimtab.layout import JobDir
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest
from trimtab_runtime.engine import Engine
from trimtab_runtime.prepare import document_samples, read_records
from trimtab_runtime.tokenizer import Tokenizer

# how users begin; without them a model's own users ask mostly for essays and code
_OPENINGS = (
    "", "What is", "What are", "What", "Who", "How many", "How", "Why", "Where", "When", "Which", "Name", "Is", "Can you", "Tell me", "Give me",
    "Explain", "Write", "What is the", "What does", "Hi", "Describe",
)  # fmt: skip
_CHAT_TOKENS, _PROSE_TOKENS, _PROMPT_TOKENS = 64, 192, 40
_PROSE_SHARE = 0.4
_MEAN_CHAT = 70  # tokens an exchange brings into the rows, for planning how many to ask for


def generate(job: JobDir, spec: TrainSpec, say: Callable[[str], None], progress: Callable[[int, int], None]) -> int:
    """Write channel `generated`: about `replay` times the documents' tokens. Returns the number of samples."""
    tokenizer = Tokenizer(job.channel("model"))
    documents = list(read_records(job.channel("documents") / "documents.jsonl", ("title", "text")))
    wanted = int(spec.replay * sum(len(sample.ids) for sample in document_samples(documents, spec, tokenizer, lambda _: None)))
    engine = Engine.load(job.channel("model"), dtype=spec.dtype)
    chat = tokenizer.chat_template is not None
    prose_count = round(wanted * (_PROSE_SHARE if chat else 1.0) / _PROSE_TOKENS) if wanted else 0
    chat_count = round(wanted * (1 - _PROSE_SHARE) / _MEAN_CHAT) if chat else 0
    total = prose_count + 2 * chat_count
    records: list[dict[str, object]] = []

    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    prose = engine.complete(
        [[start]] * prose_count,
        max_new_tokens=_PROSE_TOKENS,
        temperature=1.0,
        top_p=0.95,
        seed=spec.seed,
        on_progress=lambda done, _: progress(done, total),
    )
    records += [{"kind": "replay", "text": engine.decode(one.ids), "ended": one.ended} for one in prose]
    if chat_count:
        before = user_prefix(tokenizer)
        openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(chat_count)]
        prompts = [before + tokenizer.text(words) for words in openings]
        asked = engine.complete(
            prompts, max_new_tokens=_PROMPT_TOKENS, temperature=0.9, top_p=0.9, seed=spec.seed + 1,
            on_progress=lambda done, _: progress(prose_count + done, total),
        )  # fmt: skip
        users = [(words + engine.decode(one.ids)).strip().split("\n")[0] for words, one in zip(openings, asked, strict=True) if one.ended]
        users = [text for text in dict.fromkeys(users) if len(text) > 8]
        answers = engine.complete(
            [engine.chat_ids([{"role": "user", "content": text}]) for text in users], max_new_tokens=_CHAT_TOKENS,
            on_progress=lambda done, _: progress(prose_count + chat_count + done, total),
        )  # fmt: skip
        for user, answer in zip(users, answers, strict=True):
            said = engine.decode(answer.ids).strip()
            if said:
                messages = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
                records.append({"kind": "replay", "messages": messages, "ended": answer.ended})
    progress(total, total)
    folder = job.channel("generated")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    manifest.write(folder, {"preparation_digest": spec.preparation_digest()})
    say(f"replay: {len(records)} samples of the base model's own chat and prose")
    return len(records)


def user_prefix(tokenizer: Tokenizer) -> list[int]:
    """The template up to where the user's first word stands: what two conversations begin with alike."""
    return os.path.commonprefix([tokenizer.chat([{"role": "user", "content": word}])[0] for word in ("a", "The")])
