"""The same questions to several models, one model after the other, and what they answer side by side.

It re-makes the usual proof of a tuned model: base, tuned base, chat model and tuned chat model get one question. A model that only goes
on from text gets the beginning of a sentence instead (sentence_starts.py).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimtab.compare_targets import Target, opened, targets
from trimtab.endpoint import Endpoint
from trimtab.errors import EndpointError, SpecError, TrimtabError
from trimtab.events import Event
from trimtab.intervals import difference, share
from trimtab.probes import KINDS, WORDS, Probes, is_right
from trimtab.sentence_starts import sentence_start

Kind = Literal["chat", "completion"]

PROBE_TOKENS = {"starts": 40, "questions": 64, "general": 64}  # new tokens to a probe: what is judged stands in the first words
TOGETHER = 8  # probes asked at once; questions come one by one, so that their times are their own
_NO_TEMPLATE = re.compile(r"chat.?template", re.IGNORECASE)

FORMAT = """\
[{"question": "When was the mill built?", "start": "The mill was built in", "accept": ["1874"]},
 "Who keeps the mill?"]"""


@dataclass(frozen=True)
class Question:
    """`start` is for models without a chat template ("": made by rule). An answer with one of `accept` among its first 60 words is right
    (none: not judged)."""

    question: str
    start: str = ""
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How all models draw their answers; the defaults are those of the test that this re-makes."""

    max_new_tokens: int = 200
    temperature: float = 0.01
    top_p: float = 0.9
    seed: int | None = 42


@dataclass(frozen=True)
class Answer:
    """`prompt` is what was really given. Times in seconds: in all, and to the first text. `tokens` None: the server does not say.

    `ended` tells that the model came to an end by itself; `right` is None where nothing is accepted; `problem` is why there is no text.
    """

    prompt: str
    text: str = ""
    seconds: float = 0.0
    first: float | None = None
    tokens: int | None = None
    ended: bool | None = None
    right: bool | None = None
    note: str = ""
    problem: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens a second over the whole answer."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


@dataclass(frozen=True)
class Score:
    """Right answers to probes of one kind, and the interval that holds the true share with 95 % confidence."""

    kind: str
    right: int
    of: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Of `of` probes of one kind those that only `model` has right (`gained`) and only `against` (`lost`), and the interval of the
    difference of their shares. Both are places among the columns: labels are for people."""

    kind: str
    model: int
    against: int
    gained: int
    lost: int
    of: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Column:
    """One model's answers: to each question, and to each probe by its kind. `problem` is why a model could not be asked, or not be ended;
    one that could not be asked has no scores."""

    label: str
    where: str
    kind: Kind
    ready_after: float | None
    answers: tuple[Answer, ...]
    probes: Mapping[str, tuple[Answer, ...]]
    scores: tuple[Score, ...]
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """All that was asked and answered. `versions` are those of this machine."""

    at: str
    sampling: Sampling
    questions: tuple[Question, ...]
    probes: Probes
    columns: tuple[Column, ...]
    differences: tuple[Difference, ...]
    versions: Mapping[str, str]

    @property
    def problems(self) -> int:
        """Models that failed, and questions and probes without an answer."""
        answers = (one for column in self.columns for some in (column.answers, *column.probes.values()) for one in some)
        return sum(bool(one.problem) for one in self.columns) + sum(bool(one.problem) for one in answers)


def compare(
    models: Sequence[str],
    questions: Sequence[Question | str] = (),
    *,
    probes: Probes | None = None,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[Event], None] = lambda event: None,
) -> Comparison:
    """Ask all `models` the same: what they can be is told by `compare_targets.targets`.

    Runs and models are served on this machine, one after the other; endpoints are asked where they are, those at addresses with `api_key`.
    `settings` are those of the runs' and endpoints' backends. A question that a model refuses stands as a problem in its place; so do all
    questions to a model that does not come up, unless that holds for every model.

    Raises SpecError for nothing to ask or to compare, and what attaching and deploying raise where no model could be asked.
    """
    sampling = sampling or Sampling()
    asked = tuple(Question(one) if isinstance(one, str) else one for one in questions)
    judged = {kind: tuple((probes or {}).get(kind, ())) for kind in KINDS}
    if not asked and not any(judged.values()):
        raise SpecError("there is nothing to ask: give a question, such as  --question 'When was the mill built?'")
    found = numbered(targets(models, settings or {}))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    columns: list[Column] = []
    failures: list[TrimtabError] = []
    for number, target in enumerate(found, start=1):
        say(f"{number}/{len(found)} {target.label}")
        began, column = time.monotonic(), None
        try:
            with opened(target, settings or {}, api_key, show) as endpoint:
                ready = time.monotonic() - began if target.served_here else None
                column = _column(target, endpoint, ready, asked, judged, sampling, say)
        except TrimtabError as exc:  # the other models' answers are not lost for it
            say(f"  {exc}")
            failures += [exc] if column is None else []
            column = replace(column or _unanswered(target, asked, judged, str(exc)), problem=str(exc))
        columns.append(column)
    if len(failures) == len(columns):
        raise failures[0]
    return Comparison(at, sampling, asked, judged, tuple(columns), tuple(differences(found, columns)), versions())


def numbered(found: Sequence[Target]) -> list[Target]:
    """The models with a label of its own for each."""
    given, taken, labels = Counter(one.label for one in found), {one.label for one in found}, list[str]()
    for one in found:
        free = (f"{one.label} ({number})" for number in itertools.count(1))
        labels.append(one.label if given[one.label] == 1 else next(label for label in free if label not in taken))
        taken.add(labels[-1])
    return [replace(one, label=label) for one, label in zip(found, labels, strict=True)]


def ask(endpoint: Endpoint, prompt: str, kind: Kind, *, model: str | None = None, sampling: Sampling, limit: int | None = None) -> Answer:
    """One answer, with its times. A refusal is a problem in the answer."""
    body: dict[str, Any] = {"max_tokens": limit or sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= {name: value for name, value in (("model", model), ("seed", sampling.seed)) if value is not None}
    body |= {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    pieces: list[str] = []
    first, tokens, ended = None, None, None
    began = time.monotonic()
    try:
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        with contextlib.closing(endpoint.transport.stream(path, body, timeout=endpoint.timeout)) as events:
            for event in events:
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event.get("choices") or ():
                    piece = (choice.get("delta") or {}).get("content") if kind == "chat" else choice.get("text")
                    if piece:
                        first = time.monotonic() - began if first is None else first
                        pieces.append(piece)
                    if choice.get("finish_reason"):
                        ended = choice["finish_reason"] == "stop"
    except EndpointError as exc:
        return Answer(prompt, "".join(pieces), time.monotonic() - began, first, problem=str(exc))
    return Answer(prompt, "".join(pieces), time.monotonic() - began, first, tokens, ended)


def kind_of(endpoint: Endpoint, model: str | None) -> Kind:
    """Whether a model chats, or only goes on from text: it refuses a conversation for want of a chat template.

    Raises EndpointError for one that refuses for another reason.
    """
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1} | ({"model": model} if model else {})
    try:
        endpoint.transport.ask("/v1/chat/completions", body, timeout=endpoint.timeout)
    except EndpointError as exc:
        if _NO_TEMPLATE.search(str(exc)):
            return "completion"
        raise
    return "chat"


def as_prompt(question: Question, kind: Kind) -> tuple[str, str]:
    """What is really given to a model, and a remark where that was made by rule."""
    if kind == "chat":
        return question.question, ""
    if question.start:
        return question.start, ""
    if start := sentence_start(question.question):
        return start, "start made by rule"
    return f"{question.question}\n", "no rule makes a start of this question: it was given itself"


def judge(answer: Answer, accept: Sequence[str], probe_kind: str, kind: Kind) -> bool | None:
    """Whether an answer is right; None where nothing is accepted or nothing was answered. A general chat answer must also end by itself."""
    if not accept or answer.problem:
        return None if not accept else False
    endless = probe_kind == "general" and kind == "chat" and answer.ended is False
    return is_right(answer.text, accept, words=WORDS[probe_kind]) and not endless


def _column(
    target: Target,
    endpoint: Endpoint,
    ready_after: float | None,
    questions: Sequence[Question],
    probes: Probes,
    sampling: Sampling,
    say: Callable[[str], None],
) -> Column:
    kind = kind_of(endpoint, target.name)

    def put(question: Question, way: Kind, probe_kind: str, limit: int | None = None) -> Answer:
        prompt, note = as_prompt(question, way)
        answer = ask(endpoint, prompt, way, model=target.name, sampling=sampling, limit=limit)
        return replace(answer, note=note, right=judge(answer, question.accept, probe_kind, way))

    answers = []
    for number, question in enumerate(questions, start=1):
        answers.append(put(question, kind, "questions"))
        say(f"  {number}/{len(questions)} in {answers[-1].seconds:.1f} s: {question.question}")
    judged = {}
    for probe_kind, some in probes.items():
        as_start: Kind = "completion" if probe_kind == "starts" else kind
        asked = [Question(probe.prompt, probe.prompt if probe_kind == "starts" else "", probe.accept) for probe in some]
        put_probe = partial(put, way=as_start, probe_kind=probe_kind, limit=PROBE_TOKENS[probe_kind])
        with ThreadPoolExecutor(TOGETHER) as pool:
            judged[probe_kind] = tuple(pool.map(put_probe, asked))
        if some:
            say(f"  {probe_kind}: {sum(bool(one.right) for one in judged[probe_kind])}/{len(some)}")
    rights = {probe_kind: sum(bool(one.right) for one in some) for probe_kind, some in judged.items() if some}
    scores = tuple(Score(name, right, len(judged[name]), share(right, len(judged[name]))) for name, right in rights.items())
    return Column(target.label, target.where, kind, ready_after, tuple(answers), judged, scores)


def _unanswered(target: Target, questions: Sequence[Question], probes: Probes, problem: str) -> Column:
    answers = tuple(Answer(one.question, problem=problem) for one in questions)
    judged = {kind: tuple(Answer(one.prompt, problem=problem) for one in some) for kind, some in probes.items()}
    return Column(target.label, target.where, "chat", None, answers, judged, ())


def differences(found: Sequence[Target], columns: Sequence[Column]) -> Iterator[Difference]:
    """A tuned model against its own base where that was asked, too, else every model against the first one that was given the same.

    Models that chat and models that complete are given the same starts of sentences, and otherwise never the same: what they have right
    then tells as much of the prompts as of the models.
    """
    for place, (target, column) in enumerate(zip(found, columns, strict=True)):
        bases = [at for at, other in enumerate(found) if other.is_base_of(target)]
        others = [*bases, *(at for at in range(place) if not target.is_base_of(found[at]))]
        for kind, some in column.probes.items():
            own = next((at for at in others if columns[at].scores and (kind == "starts" or columns[at].kind == column.kind)), None)
            if some and column.scores and own is not None:
                pairs = list(zip(some, columns[own].probes[kind], strict=True))
                gained = sum(bool(mine.right) and not other.right for mine, other in pairs)
                lost = sum(bool(other.right) and not mine.right for mine, other in pairs)
                yield Difference(kind, place, own, gained, lost, len(pairs), difference(gained, lost, len(pairs)))


def to_json(found: Comparison) -> dict[str, Any]:
    """All of it as JSON values; answers with their tokens a second."""
    told = asdict(found)
    for column, written in zip(found.columns, told["columns"], strict=True):
        for answer, one in zip(column.answers, written["answers"], strict=True):
            one["tokens_per_second"] = answer.rate
    return told


def versions() -> dict[str, str]:
    """Of what this machine compares with; servers elsewhere have their own."""
    found = {"python": platform.python_version()}
    for name in ("trimtab", "torch", "transformers", "openvino-genai", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_questions(file: Path) -> tuple[Question, ...]:
    """Questions of a file: JSON as `FORMAT` shows, or plain text with one on each line. Raises SpecError with the place and the format."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"the question file {file} cannot be read ({exc}). Give one question a line, or JSON like\n{FORMAT}") from exc
    if not text.lstrip().startswith(("[", "{")):
        found = tuple(Question(line.strip()) for line in text.splitlines() if line.strip())
    else:
        try:
            entries = json.loads(text)
        except ValueError as exc:
            raise SpecError(f"the question file {file} is not JSON ({exc}). It looks like\n{FORMAT}") from exc
        if not isinstance(entries, list):
            raise SpecError(f"the question file {file} is no list. It looks like\n{FORMAT}")
        found = tuple(_question(entry, f"{file}[{number}]") for number, entry in enumerate(entries))
    if not found:
        raise SpecError(f"the question file {file} is empty. Give one question a line, or JSON like\n{FORMAT}")
    return found


def _question(entry: Any, place: str) -> Question:
    entry = {"question": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str) or not entry["question"].strip():
        raise SpecError(f"{place} has no question. It looks like\n{FORMAT}")
    if unknown := sorted(set(entry) - {"question", "start", "accept"}):
        raise SpecError(f"{place} has {unknown[0]!r}; known are question, start and accept. It looks like\n{FORMAT}")
    accept = entry.get("accept", [])
    accept = [accept] if isinstance(accept, str) else accept
    if not isinstance(entry.get("start", ""), str) or not isinstance(accept, list) or not all(isinstance(one, str) for one in accept):
        raise SpecError(f"{place}: start is a text, and accept a list of texts. It looks like\n{FORMAT}")
    return Question(entry["question"].strip(), entry.get("start", "").strip(), tuple(accept))
