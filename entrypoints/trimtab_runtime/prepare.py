"""Documents to packed rows. No torch: it runs on any client, or in the image, in seconds.

Channel `documents` (documents.jsonl, examples.jsonl, either may be absent; losses.json: what the ledger notes as skipped), tokenizer of
channel `model`, and where there is one channel `generated` (samples.jsonl) -> channel `train`.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.counting import counted
from trimtab.errors import StagingError
from trimtab.layout import JobDir
from trimtab.ledger import Ledger
from trimtab.spec import TrainSpec
from trimtab_runtime import manifest
from trimtab_runtime.examples import Sample, conversation, is_statement, pieces, plain, sentences
from trimtab_runtime.json_lines import read_json_lines
from trimtab_runtime.objectives import Examples, example_samples, read_examples
from trimtab_runtime.questions import questions, with_hints
from trimtab_runtime.rows import NO_PREDICTIONS, write_rows
from trimtab_runtime.tokenizer import Tokenizer

WORDINGS = 4  # ways in which the question writer is asked for the same facts
CHAT_SHARE = 0.6  # of what a chat model rehearses; the rest is prose
_NO_NAMES = {"", "home", "homepage", "index", "welcome", "untitled", "news", "blog", "about us", "contact"}  # of sections, not of sites
TURNS = 3  # questions in one conversation: a chat template's opening is long, and is learned soon


def prepare(job: JobDir, spec: TrainSpec, say: Callable[[str], None]) -> Ledger:
    """Raises StagingError for a broken record, named by file and line, for an example that does not fit (`too_long`), and where no
    token is left to train on."""
    tokenizer = Tokenizer(job.channel("model"))
    documents, examples = read_data(job.channel("documents"), spec, tokenizer)
    generated = job.channel("generated") / "samples.jsonl"
    pools: list[list[Sample]] = []
    predictions = NO_PREDICTIONS
    if generated.is_file():
        records = list(read_records(generated, ("kind",)))
        replayed = with_teacher([generated_sample(record, tokenizer) for record in records])
        pools = [[one for one, record in zip(replayed, records, strict=True) if ("messages" in record) is chat] for chat in (True, False)]
        predictions = np.load(generated.parent / "teacher_ids.npy"), np.load(generated.parent / "teacher_chances.npy")
    rounds = list(in_rounds(documents, examples.samples, pools, spec, tokenizer, say))
    if not any(any(sample.learned[1:]) for sample in rounds[0] if sample.kind != "replay"):
        raise StagingError(nothing_to_learn(documents, examples))
    facts = {"preparation_digest": spec.preparation_digest(), "spec_version": spec.spec_version, "documents": len(documents)}
    losses = job.channel("documents") / "losses.json"
    notes = [*(json.loads(losses.read_bytes()) if losses.is_file() else ()), *examples.notes]
    ledger = write_rows(job.channel("train"), rounds, spec.max_seq_len, facts, predictions, left_out=examples.left_out, notes=notes)
    for line in ledger.lines():
        say(line)
    return ledger


def read_data(folder: Path, spec: TrainSpec, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], Examples]:
    """The documents and the examples of channel `documents`. Raises StagingError as `prepare` does, and where there is neither file."""
    texts, examples = folder / "documents.jsonl", folder / "examples.jsonl"
    documents = list(read_records(texts, ("title", "text"))) if texts.is_file() or not examples.is_file() else []
    return documents, example_samples(read_examples(examples), spec, tokenizer)


def nothing_to_learn(documents: list[dict[str, Any]], examples: Examples) -> str:
    """Why no token is left, and what to do."""
    accounts = examples.left_out.values()
    unanswered = sum(account.unanswered for account in accounts)
    long = sum(account.left_out for account in accounts) - unanswered
    if unanswered and not examples.samples:
        beside = f" and {counted(long, 'is', 'are')} longer than a row" if long else ""
        return (
            f"there is no token to train on: in {counted(unanswered, 'example')} nobody answers{beside}. "
            "Give records with answers, or learn all of them with  --objective all"
        )
    if long and not examples.samples:
        what = "the only example is" if long == 1 else f"all {long:,} examples are"
        return (
            f"there is no token to train on: {what} longer than a row and dropped. "
            "Give longer rows (--max-seq-len), or cut their ends (--too-long cut)"
        )
    return (
        f"there is no token to train on: the {counted(len(documents), 'document is', 'documents are')} empty. Give pages with text"
        if documents
        else "there is no token to train on: there are no documents and no examples. Give pages with text, or records"
    )


def in_rounds(
    documents: list[dict[str, Any]],
    examples: list[Sample],
    pools: list[list[Sample]],
    spec: TrainSpec,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> Iterator[list[Sample]]:
    """The samples of each round: every document and example, and what comes next in the pools of replay, chat and prose.

    One round where there is no replay; else as many as it takes to see all of it, at most one to an epoch.
    """
    first = [*document_samples(documents, spec, tokenizer, say if documents else lambda _: None), *examples]
    wanted = replay_wanted(first, spec, chat=bool(pools and pools[0]))
    turns = [in_turns(pool, tokens) for pool, tokens in zip(pools, wanted, strict=False)]
    needed = [math.ceil(count_tokens(pool) / tokens) for pool, tokens in zip(pools, wanted, strict=False) if pool and tokens]
    for turn in range(min(spec.epochs, max(needed, default=1))):
        again = spec.model_copy(update={"seed": spec.seed + turn})
        samples = [*document_samples(documents, again, tokenizer, lambda _: None), *examples] if turn else first
        yield samples + [sample for pool in turns for sample in next(pool)]


def replay_wanted(samples: list[Sample], spec: TrainSpec, *, chat: bool) -> tuple[float, float]:
    """Tokens of chat and of prose to rehearse in a round beside these samples."""
    wanted = spec.replay * count_tokens(samples)
    return (wanted * CHAT_SHARE, wanted * (1 - CHAT_SHARE)) if chat else (0.0, wanted)


def in_turns(pool: list[Sample], tokens: float) -> Iterator[list[Sample]]:
    """Each time the next samples, about so many tokens and none twice; after the last one it begins again."""
    place = 0
    while True:
        found: list[Sample] = []
        size = 0
        while size < tokens and len(found) < len(pool):
            found.append(pool[place % len(pool)])
            size += len(found[-1].ids)
            place += 1
        yield found


def count_tokens(samples: list[Sample]) -> int:
    return sum(len(sample.ids) for sample in samples)


def document_samples(
    documents: list[dict[str, Any]], spec: TrainSpec, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Iterator[Sample]:
    """Each document by each view, and for chat models as questions that its sentences answer; with objective all these are learned, too."""
    ask = spec.questions if tokenizer.chat_template else 0
    reason = "chat model" if ask else "not asked for" if tokenizer.chat_template else "this model has no chat template"
    say(f"questions {ask} to each sentence: {reason}")
    draw, site = random.Random(spec.seed), site_name([(document["title"], document["text"]) for document in documents])
    pairs: list[list[dict[str, str]]] = []
    for document in documents:
        title, text = document["title"], document["text"]
        for kind, piece in pieces(title, text, spec.views):
            yield plain(kind, piece, tokenizer)
        if ask:
            pairs += asked(text, ask, site, draw)
    draw.shuffle(pairs)  # turns of one conversation come from different pages and do not help each other
    for start in range(0, len(pairs), TURNS):
        talk = conversation("question", [message for pair in pairs[start : start + TURNS] for message in pair], tokenizer)
        yield replace(talk, learned=[True] * len(talk.ids)) if spec.objective == "all" else talk


def asked(text: str, count: int, site: str, draw: random.Random) -> Iterator[list[dict[str, str]]]:
    """Questions that the text's sentences answer, at most `count` to each, with the sentence itself as the answer."""
    for paragraph in text.split("\n"):
        for sentence, hint in with_hints(sentences(paragraph)):
            if not is_statement(sentence):
                continue
            found: dict[str, None] = {}
            for seed in range(WORDINGS):  # other seeds ask for the same facts in other words
                found |= dict.fromkeys(questions(sentence, subject_hint=hint, limit=count, seed=seed))
            for number, question in enumerate(list(found)[:count]):
                if number % 2:
                    question = placed(question, site, draw)
                answer = sentence.removeprefix("- ").strip()
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def site_name(pages: list[tuple[str, str]]) -> str:
    """What most titles end or begin with, as in "Opening hours | The Brine Mill"; empty when there is no such name.

    With "the" where the pages' texts say it so, or where none names it and a title does. `pages`: (title, text) of each.
    """
    parts = Counter(part for title, _ in pages for part in {part.strip() for part in re.split(r"\s[|–—·»:-]\s", title)})
    for part in list(parts):
        if part.lower() in _NO_NAMES:
            del parts[part]
    found, count = parts.most_common(1)[0] if parts else ("", 0)
    if not found or count < 3 or count <= len(pages) / 2:
        return ""
    name = re.sub(r"^[Tt]he ", "", found)
    articles = [bool(match[1]) for _, text in pages for match in re.finditer(rf"\b([Tt]he )?{re.escape(name)}\b", text)]
    return f"the {name}" if sum(articles) * 2 > len(articles) or (not articles and name != found) else name


def placed(question: str, site: str, draw: random.Random) -> str:
    """The question as somebody asks it who is not on the site: a site says "the bank" where others say its name."""
    if not site or site.removeprefix("the ").lower() in question.lower():
        return question
    words = site.removeprefix("the ").split()
    for begin in range(1, len(words)):
        short = re.compile(rf"\bthe {re.escape(' '.join(words[begin:]))}\b", re.IGNORECASE)
        if short.search(question):
            return short.sub(lambda _: site, question, count=1)
    plain = question[0].lower() + question[1:]
    return draw.choice([f"{question.rstrip('?')} at {site}?", f"At {site}, {plain}", f"A question about {site}: {plain}"])


def with_teacher(samples: list[Sample]) -> list[Sample]:
    """Each learned token of the samples, in order, has the next row of the predictions that were saved with them."""
    found, row = [], 0
    for sample in samples:
        rows = []
        for place, learned in enumerate(sample.learned):
            rows.append(row if learned and place else -1)
            row += rows[-1] >= 0
        found.append(replace(sample, teacher=rows))
    return found


def generated_sample(record: dict[str, Any], tokenizer: Tokenizer) -> Sample:
    """A sample to rehearse: a conversation or running text, with its end only where it ended by itself."""
    sample = (
        conversation(record["kind"], record["messages"], tokenizer)
        if "messages" in record
        else plain(record["kind"], record["text"], tokenizer)
    )
    if record.get("ended", True):
        return sample
    last = max((place for place, learned in enumerate(sample.learned) if learned), default=len(sample.ids))
    return replace(sample, ids=sample.ids[:last], learned=sample.learned[:last])


def read_records(file: Path, needed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file that have the `needed` texts. Raises StagingError that names file and line."""

    def problem(record: object) -> str:
        missing = [name for name in needed if not isinstance(record, dict) or not isinstance(record.get(name), str)]
        return f"lacks the text field {missing[0]!r}" if missing else ""

    return read_json_lines(file, problem)


def verify(job: JobDir, spec: TrainSpec) -> None:
    """Raises StagingError when channel `train` was prepared for other data, another model or other options."""
    found = manifest.read(job.channel("train")).get("preparation_digest")
    if found != spec.preparation_digest():
        raise StagingError("the prepared rows belong to other data, another model or other options: prepare them again for this job")
