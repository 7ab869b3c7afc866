"""Examples (records of prompts, conversations, Guanaco's texts) to samples: which tokens are learned, and what is too long for a row.

| form | tokens | learned, unless `objective` says otherwise |
| --- | --- | --- |
| completion | [bos] prompt completion eos | the completion and eos |
| completion with an instruction | a user's turn and an assistant's; without a chat template a plain prompt | as above |
| chat | as the chat template has it | every turn of the assistant with the token that ends it |
| guanaco | [bos] text eos | all, as in running text; with objective answers what the Assistant says |

Objective `all` learns every token of every form. A sample of these forms is never split over rows.
"""

from __future__ import annotations

import itertools
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.counting import counted
from trimtab.errors import SpecError, StagingError
from trimtab.families import refusal
from trimtab.ledger import Account
from trimtab.spec import TrainSpec
from trimtab_runtime.examples import Sample
from trimtab_runtime.json_lines import read_json_lines
from trimtab_runtime.marks import Rendered, Span
from trimtab_runtime.tokenizer import LONG, Flags, Ids, Tokenizer

BATCH = 512  # records that are tokenised at once
_NAMED = 5  # sources in a message
_SPEAKER = re.compile(r"### (Human|Assistant):")

Record = Mapping[str, Any]
Tokens = tuple[Ids, Flags]


@dataclass
class Examples:
    """The samples of all examples, in the data's order; what was left out of them, by kind; and what to say of them."""

    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, Account] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def example_samples(records: Iterable[Record], spec: TrainSpec, tokenizer: Tokenizer) -> Examples:
    """Raises StagingError, with the source, for an example that the chat template refuses, and for what is too long where
    `too_long` is fail: then it names the first of those, and says what would help. What has no learned token is left out and counted."""
    encoders = _encoders(spec, tokenizer)
    found, seen = Examples(), _Seen()
    room = _Room(spec, found, tokenizer.config)
    rest = iter(records)
    while batch := list(itertools.islice(rest, BATCH)):
        shaped = [_shape(record, tokenizer) for record in batch]
        made: dict[int, Tokens] = {}
        for shape in sorted(set(shaped)):
            numbers = [number for number, one in enumerate(shaped) if one == shape]
            made |= zip(numbers, encoders[shape]([batch[number] for number in numbers], seen), strict=True)
        for number, record in enumerate(batch):
            ids, learned = made[number]
            sample = Sample(record["form"], ids, learned)
            if kept := room.fit(sample, str(record.get("source") or "an example")):
                found.samples.append(kept)
                seen.add(shaped[number], kept)
    room.refuse()
    found.notes += seen.notes(spec, tokenizer)
    return found


def _shape(record: Record, tokenizer: Tokenizer) -> str:
    if "instruction" in record:
        return "turns" if tokenizer.chat_template is not None else "instruction"
    return str(record["form"])


def _encoders(spec: TrainSpec, tokenizer: Tokenizer) -> dict[str, Callable[[Sequence[Record], _Seen], list[Tokens]]]:
    """How each shape becomes tokens, and which of them are learned."""
    everything = spec.objective == "all"

    def all_or(found: list[Tokens]) -> list[Tokens]:
        return [(ids, b"\x01" * len(ids)) for ids, _ in found] if everything else found

    def chats(records: Sequence[Record], seen: _Seen) -> list[Tokens]:
        return all_or(_closed([_rendered(one, spec, tokenizer, seen) for one in records], tokenizer))

    return {
        "completion": lambda records, _: all_or(completions([(one["prompt"], one["completion"]) for one in records], tokenizer)),
        "instruction": lambda records, _: all_or(completions([(plain_prompt(one), one["completion"]) for one in records], tokenizer)),
        "turns": lambda records, seen: chats([_as_turns(one) for one in records], seen),
        "chat": chats,
        "guanaco": lambda records, _: guanaco([one["text"] for one in records], tokenizer, answers=spec.objective == "answers"),
    }


def completions(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Tokens]:
    """[bos] prompt completion eos, of which the completion and eos are learned.

    The tokens are those of both texts as one where these begin with the prompt's own. Where a token would reach over the border (as
    after a blank at the prompt's end) both are encoded apart, since whoever asks the model gives it the prompt's own tokens.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    wholes = tokenizer.texts([prompt + completion for prompt, completion in pairs])
    prompts = tokenizer.texts([prompt for prompt, _ in pairs])
    found: list[Tokens] = []
    for whole, before, (_, completion) in zip(wholes, prompts, pairs, strict=True):
        ids, given = whole.ids, before.ids
        if ids[: len(given)] != given:
            ids = given + tokenizer.following(completion)
        asked = len(start) + len(given)
        ids = [*start, *ids, tokenizer.eos_id]
        found.append((array("i", ids), bytes(asked) + b"\x01" * (len(ids) - asked)))
    return found


def guanaco(texts: Sequence[str], tokenizer: Tokenizer, *, answers: bool = False) -> list[Tokens]:
    """[bos] text eos, all learned; with `answers` what follows each "### Assistant:", and eos where the text ends so."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found: list[Tokens] = []
    for encoding, text in zip(tokenizer.texts(texts), texts, strict=True):
        ids = [*start, *encoding.ids, tokenizer.eos_id]
        if not answers:
            found.append((array("i", ids), b"\x01" * len(ids)))
            continue
        spans = said_by_assistant(text)
        inside = (any(first < end and begin < last for first, last in spans) for begin, end in encoding.offsets)
        ends = bool(spans) and spans[-1][1] == len(text)
        found.append((array("i", ids), bytes([*bytes(len(start)), *inside, ends])))
    return found


def said_by_assistant(text: str) -> list[Span]:
    """What stands behind each "### Assistant:", up to the next to speak, without the blanks before that."""
    speakers = list(_SPEAKER.finditer(text))
    spans = []
    for one, following in itertools.zip_longest(speakers, speakers[1:]):
        if one[1] == "Assistant":
            begin = one.end()
            spans.append((begin, begin + len(text[begin : following.start()].rstrip()) if following else len(text)))
    return spans


def plain_prompt(record: Record) -> str:
    """An Alpaca record's prompt for a model without a chat template.

    Source: R. Taori et al., "Stanford Alpaca" (2023), without the sentence before it.
    """
    given = f"\n\n### Input:\n{record['input']}" if record.get("input", "").strip() else ""
    return f"### Instruction:\n{record['instruction']}{given}\n\n### Response:\n"


def _as_turns(record: Record) -> Record:
    asked = "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part.strip())
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["completion"]}]
    return {"messages": messages, "source": record.get("source")}


def _rendered(record: Record, spec: TrainSpec, tokenizer: Tokenizer, seen: _Seen) -> Rendered:
    """The conversation's text; the turns of one are not looked for that will not go into a row, since that takes longest of all."""

    def unwanted(shown: Rendered) -> bool:
        if spec.too_long == "cut" or len(shown.text) < LONG:
            return False
        ((ids, _),) = tokenizer.encode([shown])
        return len(ids) > spec.max_seq_len

    messages, learn_last = record["messages"], record.get("learn_last")
    asked = max((number for number, one in enumerate(messages) if one.get("role") in {"user", "system"}), default=-1)
    first = record.get("learn_from", asked + 1) if learn_last else 0  # a prompt may end with a tool's turn, and not the last question
    try:
        found = tokenizer.template.conversation(messages, record.get("tools"), first=first, unwanted=unwanted)
    except SpecError as exc:
        raise StagingError(f"{record.get('source') or 'a conversation'}: {exc}") from exc
    seen.thoughts += found.thoughts - found.last_thought
    seen.last_thoughts += found.last_thought
    return found


def _closed(texts: Sequence[Rendered], tokenizer: Tokenizer) -> list[Tokens]:
    """The tokens of conversations. Where a template puts no end behind the assistant's last words, eos is put there and learned."""
    found: list[Tokens] = []
    for one, (ids, learned) in zip(texts, tokenizer.encode(texts), strict=True):
        found.append((array("i", [*ids, tokenizer.eos_id]), bytes([*learned, 1])) if one.open else (ids, learned))
    return found


class _Room:
    """What to do with an example that is longer than a row, and with one that teaches nothing."""

    def __init__(self, spec: TrainSpec, found: Examples, config: Mapping[str, Any]) -> None:
        self._spec, self._found, self._config = spec, found, config
        self._long: list[str] = []
        self._sizes = array("q")

    def fit(self, sample: Sample, source: str) -> Sample | None:
        """The sample as it goes into a row; None for one that does not."""
        size, most = len(sample.ids), self._spec.max_seq_len
        if size <= most:
            if any(sample.learned[1:]):
                return sample
            self._leave(sample.kind, Account(samples=1, tokens=size, dropped=size, left_out=1, unanswered=1))
            return None
        self._sizes.append(size)
        if len(self._long) < _NAMED:
            self._long.append(f"{source} ({size:,} tokens)")
        if self._spec.too_long == "cut" and any(sample.learned[1:most]):
            # as a sample it is counted where it is trained on
            self._leave(sample.kind, Account(tokens=size - most, dropped=size - most, cut=1))
            return replace(sample, ids=sample.ids[:most], learned=sample.learned[:most])
        self._leave(sample.kind, Account(samples=1, tokens=size, dropped=size, left_out=1))
        return None

    def _leave(self, kind: str, account: Account) -> None:
        self._found.left_out[kind] = self._found.left_out.get(kind, Account()) + account

    def refuse(self) -> None:
        """Raises StagingError where there was one and none may be left out."""
        count = len(self._sizes)
        if not count or self._spec.too_long != "fail":
            return
        do = "does" if count == 1 else "do"
        more = f" and {count - len(self._long):,} more" if count > len(self._long) else ""
        raise StagingError(
            f"{count:,} of the examples {do} not fit a row of {self._spec.max_seq_len:,} tokens: {', '.join(self._long)}{more}. "
            f"{self._longer_rows()} leave these out (--too-long drop), or their ends (--too-long cut)"
        )

    def _longer_rows(self) -> str:
        """What longer rows would help, as far as the model takes them."""
        longest, now = max(self._sizes), self._spec.max_seq_len
        refused = bisect_left(range(longest + 1), True, now, key=lambda size: bool(refusal(self._config, size)))
        if refused > longest:
            return f"Give longer rows (--max-seq-len {longest}), or"
        still = sum(size >= refused for size in self._sizes)
        does = "does" if still == 1 else "do"
        if still == len(self._sizes):
            return f"None fits the {max(now, refused - 1):,} tokens that a row of this model may have:"
        return (
            f"Rows of this model may have {refused - 1:,} tokens (--max-seq-len {refused - 1}), in which {still:,} still {does} not fit; or"
        )


@dataclass
class _Seen:
    """What to say of the examples, by shape: how many, their tokens, and those that are learned."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    learned: Counter[str] = field(default_factory=Counter)
    thoughts: int = 0
    last_thoughts: int = 0

    def add(self, shape: str, sample: Sample) -> None:
        self.counts[shape] += 1
        self.tokens[shape] += len(sample.ids)
        self.learned[shape] += sum(sample.learned)

    def notes(self, spec: TrainSpec, tokenizer: Tokenizer) -> Iterator[str]:
        for shape, (one, many, learned) in _SAID.items():
            if not self.counts[shape]:
                continue
            if spec.objective == "all":
                learned = "all {learned} tokens, as objective all asks"
            elif shape == "guanaco" and spec.objective == "answers":
                learned = "{learned} tokens of {tokens}: what the Assistant says, as objective answers asks"
            said = learned.format(learned=f"{self.learned[shape]:,}", tokens=f"{self.tokens[shape]:,}")
            yield f"{counted(self.counts[shape], one, many)}: loss on {said}"
        if self.thoughts:
            yield f"thinking is left out of {counted(self.thoughts, 'earlier turn')}, as the chat template does: it is not learned"
        if self.last_thoughts:
            yield (
                f"thinking is left out of {counted(self.last_thoughts, 'last turn')}, too, as the chat template does: no thought there is "
                "learned; to learn it use a model whose template keeps it, or records of prompt and completion"
            )


_SAID = {
    "completion": (
        "example of prompt and completion",
        "examples of prompt and completion",
        "{learned} completion tokens of {tokens}; the prompts stand in no chat template",
    ),
    "instruction": (
        "instruction, as a plain prompt, since the model has no chat template",
        "instructions, as plain prompts, since the model has no chat template",
        "{learned} answer tokens of {tokens}",
    ),
    "turns": (
        "instruction, a conversation in the model's chat template",
        "instructions, each a conversation in the model's chat template",
        "{learned} answer tokens of {tokens}",
    ),
    "chat": (
        "conversation in the model's chat template",
        "conversations in the model's chat template",
        "{learned} tokens of {tokens}: the assistant's turns and their ends",
    ),
    "guanaco": (
        "text of ### Human and ### Assistant, as it stands",
        "texts of ### Human and ### Assistant, as they stand",
        "all {learned} tokens, as in running text",
    ),
}


def read_examples(file: Path) -> Iterator[dict[str, Any]]:
    """The examples of a JSON lines file; none where there is no file. Raises StagingError that names file and line."""
    if file.is_file():
        yield from read_json_lines(file, _problem)


_TEXTS = {"guanaco": ("text",), "completion": ("prompt", "completion"), "instruction": ("instruction", "input", "completion")}


def _problem(record: object) -> str:
    """What a record lacks to be an example; empty where it is one."""
    if not isinstance(record, dict) or record.get("form") not in ("completion", "chat", "guanaco"):
        return "is no example: its form is none of completion, chat, guanaco"
    if record["form"] == "chat":
        messages = record.get("messages")
        whole = (
            isinstance(messages, list) and messages and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages)
        )
        return "" if whole else "lacks messages with roles"
    needed = _TEXTS["instruction" if "instruction" in record else record["form"]]
    missing = [name for name in needed if not isinstance(record.get(name), str)]
    return f"lacks the text field {missing[0]!r}" if missing else ""
