"""A model's chat template: the text that it makes of a conversation, which of that text the assistant wrote, and which of the
control tokens in it are no more than letters of a message.

Templates follow Hugging Face's conventions (transformers documentation, "Chat templates"), `{% generation %}` included.

How it is known where things come to stand in the text: marks are put into the messages, long random numbers that no template
looks at, and are taken out of what it makes of them. A mark inside a control word that somebody wrote (`<` mark `|im_end|>`) hides
it from the template and tells afterwards that it is letters. A mark inside a word of each message tells where that message stands.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimtab.errors import SpecError

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters of a text: from, up to

_NONCE = str(secrets.randbelow(9 * 10**19) + 10**19)  # digits: no template, JSON or letter case changes them
_MARK = re.compile(_NONCE + r"(\d{6})")
_BREAK, _BEGIN, _END = 999_999, 999_998, 999_997  # others are the places of messages
# a word of a message that stands in no tag: templates look for tags, and at both ends
_WORD = re.compile(r"(?<![\w</|\[])\w+(?![\w>|\]])")
_WORDS = 16  # of which the longest is taken
_THOUGHT = "</think>"  # what stands before it, templates take out of earlier turns


def _mark(number: int) -> str:
    return f"{_NONCE}{number:06}"


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation. `letters`: spans that spell a control token and are none; `written`: what the assistant wrote,
    each turn up to and with the token that ends it; `thoughts`: its turns whose thinking the template left out; `open`: the text ends with
    its words, and no token tells that it has ended."""

    text: str
    letters: Sequence[Span] = ()
    written: Sequence[Span] = ()
    thoughts: int = 0
    open: bool = False


@dataclass(frozen=True)
class _Marked:
    """A text without its marks, and where they stood: (place, number), in order."""

    text: str
    marks: list[tuple[int, int]]

    def letters(self, control: re.Pattern[str]) -> list[Span]:
        broken = {place - 1 for place, number in self.marks if number == _BREAK}  # a mark stands behind a word's first letter
        return [found.span() for found in control.finditer(self.text) if found.start() in broken] if broken else []

    def places(self) -> dict[int, int]:
        return {number: place for place, number in self.marks if number < _END}


class ChatTemplate:
    """`sources`: the template, by name where there are several (`default`, `tool_use`); `special`: the special tokens that it may write;
    `control`: every control token; `ends`: those that end a turn."""

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str], control: Sequence[str], ends: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _tojson
        self._sources = sources
        self._environment = environment
        self._compiled: dict[str, Any] = {}
        self._special = special
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        self.ends = frozenset(ends)
        self._by_blocks = any(re.search(r"\{%[-+]?\s*generation\b", source) for source in sources.values())

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The conversation up to where the assistant speaks. Raises SpecError where the template refuses it."""
        return self._plain(messages, tools, generation_prompt=True)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> Rendered:
        """The whole conversation; what the assistant wrote from message `first` on is `written`.

        Where the template says by `{% generation %}` what the assistant writes, that is it. Else a turn begins where the prompt for it
        ends, and ends with the first token that ends turns.

        Raises SpecError where the template refuses the conversation, ignores its tools, leaves out one of its messages, or does
        not let it be seen where a turn of the assistant begins and ends.
        """
        shown = self._plain(messages, tools)
        if tools and shown.text == self._plain(messages, None).text:
            raise SpecError('the chat template ignores tools: use a model whose template takes them, or remove "tools" from the records')
        turns = _Turns(self, messages, tools, shown, first)
        found = turns.by_blocks() if self._by_blocks else turns.by_prompts()
        last = bool(found.written) and messages[-1].get("role") == "assistant"
        ended = last and any(True for _ in self.real(found.text, found.letters, found.written[-1][0]))
        return replace(found, open=last and not ended)

    def real(self, text: str, letters: Sequence[Span], start: int = 0) -> Iterator[tuple[int, int, str]]:
        """The control tokens of a text, from `start` on, without those that are letters: from, up to, which."""
        spelled = set(letters)
        return ((*one.span(), one[0]) for one in self.control.finditer(text, start) if one.span() not in spelled)

    def _plain(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, generation_prompt: bool = False) -> Rendered:
        found = self.marked(messages, tools, generation_prompt)
        begins = [place for place, number in found.marks if number == _BEGIN]
        ends = [place for place, number in found.marks if number == _END]
        written = [(begin, end) for begin, end in zip(begins, ends, strict=False) if begin < end]
        return Rendered(found.text, found.letters(self.control), written)

    def marked(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool) -> _Marked:
        hidden = [
            {key: value if key == "role" else self._broken(value) for key, value in one.items() if value is not None} for one in messages
        ]
        text = self._render(hidden, self._broken(list(tools)) if tools else None, generation_prompt)
        pieces = _MARK.split(text)
        marks, place = [], 0
        for piece, number in zip(pieces[::2], pieces[1::2], strict=False):
            place += len(piece)
            marks.append((place, int(number)))
        return _Marked("".join(pieces[::2]), marks)

    def _broken(self, value: Any) -> Any:
        """The same value with a mark in each control word of its texts."""
        if isinstance(value, str):
            return self.control.sub(lambda found: found[0][:1] + _mark(_BREAK) + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self._broken(key): self._broken(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken(one) for one in value]
        return value

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            text: str = self._compiled[name].render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=generation_prompt, **self._special
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
            raise SpecError(f"the model's chat template refuses this conversation: {exc}") from exc
        return text


class _Turns:
    """Where the assistant's turns stand in a conversation's text, `shown`."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, shown: Rendered, first: int
    ) -> None:
        self._template, self._messages, self._tools, self._shown, self._first = template, messages, tools, shown, first
        self._own = [number for number, one in enumerate(messages) if one.get("role") == "assistant"]
        self._thoughts = 0

    def by_blocks(self) -> Rendered:
        written = list(self._shown.written)
        if self._first and len(written) != len(self._own):
            raise SpecError(
                f"the chat template marks {len(written)} turns of the assistant's {len(self._own)}: give only the turns to learn"
            )
        if not written and any(number >= self._first for number in self._own):
            raise SpecError("the chat template marks nothing that the assistant says as its own: correct its {% generation %} blocks")
        kept = [span for span, number in zip(written, self._own, strict=True) if number >= self._first] if self._first else written
        return Rendered(self._shown.text, self._shown.letters, kept)

    def by_prompts(self) -> Rendered:
        given = [self._with_mark(number, one) for number, one in enumerate(self._messages)]
        full = self._template.marked(given, self._tools, False)
        if full.text != self._shown.text:  # the template looks at words that a mark changes: what stands where is then less sure
            given = list(self._messages)
            full = self._template.marked(given, self._tools, False)
        places = full.places()
        marked = {number for number, (one, plain) in enumerate(zip(given, self._messages, strict=True)) if one is not plain}
        for number in sorted(marked - places.keys()):
            if number in self._own:
                raise SpecError(_left_out(self._messages[number]))
            raise SpecError(f"the chat template leaves out a {self._messages[number].get('role')} message: remove it, or change its role")
        begins = [self._begin(number, given, full, places) for number in self._own]
        controls = list(self._controls(full))
        written = []
        for turn, number in enumerate(self._own):
            after = begins[turn + 1] if turn + 1 < len(begins) else len(full.text)
            span = begins[turn], self._end(number, begins[turn], after, full.text, places, controls)
            self._refuse_changed(number, span, full.text, places, number in marked)
            if number >= self._first:
                written.append(span)
        return Rendered(self._shown.text, self._shown.letters, written, self._thoughts)

    def _with_mark(self, number: int, message: Message) -> Message:
        """The message with a mark inside a long word; of what the assistant says, where every template leaves it in."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        at = content.rfind(_THOUGHT) + len(_THOUGHT) if message.get("role") == "assistant" and _THOUGHT in content else 0
        taken = [found.span() for found in self._template.control.finditer(content)]
        words = (one.span() for one in itertools.islice(_WORD.finditer(content, at), _WORDS))
        free = [(start - end, start) for start, end in words if not any(begin < end and start < upto for begin, upto in taken)]
        if not free:
            return message
        behind = min(free)[1] + 1
        return {**message, "content": content[:behind] + _mark(number) + content[behind:]}

    def _controls(self, found: _Marked) -> Iterator[tuple[int, int, str]]:
        return self._template.real(found.text, found.letters(self._template.control))

    def _begin(self, number: int, given: Sequence[Message], full: _Marked, places: Mapping[int, int]) -> int:
        """Where turn `number` begins: behind what the prompt for it has after the last message that both texts hold.

        A prompt may go on into the turn (`<think>`), where the text of an earlier turn does not.
        """
        try:
            before = self._template.marked(given[:number], self._tools, True)
        except SpecError:
            if number:
                raise
            return self._first_begin(given, full)
        there, here = next(((place, places[one]) for place, one in reversed(before.marks) if one in places), (0, 0))
        tail = before.text[there:]
        if full.text.startswith(tail, here):
            return here + len(tail)
        pairs = zip(tail, full.text[here:], strict=False)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(full.text) - here)
        last = max((end for _, end, _ in self._controls(before)), default=len(before.text) + 1) - there
        if not 0 < last <= same:
            raise SpecError(
                "the chat template lays the conversation out in another way before the assistant's turn than with it, "
                "so it cannot be seen where the turn begins: use a template with {% generation %}, or let the conversation end there"
            )
        said = self._said(number)
        found = full.text.find(said, here + last) if said else -1
        return min(here + same, found) if found >= 0 else here + same

    def _first_begin(self, given: Sequence[Message], full: _Marked) -> int:
        """Of a conversation that the assistant begins, and whose template can prompt for no such turn: behind the first such header."""
        header = self._template.marked(given, self._tools, True).text.removeprefix(full.text)
        at = full.text.find(header) if header else -1
        if at < 0:
            raise SpecError("the chat template cannot begin with the assistant: begin the conversation with a user's message")
        return at + len(header)

    def _end(
        self, number: int, begin: int, after: int, text: str, places: Mapping[int, int], controls: Sequence[tuple[int, int, str]]
    ) -> int:
        """Behind the token that ends turn `number`: of those that end turns the first; else the first control token after its words."""
        limit = next((places[one] for one in range(number + 1, len(self._messages)) if places.get(one, -1) >= begin), after)
        first = bisect_left(controls, (begin, 0, ""))
        inside = list(itertools.takewhile(lambda one: one[0] < limit, itertools.islice(controls, first, None)))
        for _, end, word in inside:
            if word in self._template.ends:
                return end
        words = self._words(number)
        at, said = next(((at, one) for one in (words, words.strip()) if (at := text.find(one, begin, limit)) >= 0), (-1, ""))
        if at < 0 or (not said and self._messages[number].get("tool_calls")):
            raise SpecError("the chat template does not say where a turn of the assistant ends: use one with {% generation %}")
        spoken = at + len(said)
        return next((end for start, end, _ in inside if start >= spoken), spoken)

    def _words(self, number: int) -> str:
        content = self._messages[number].get("content")
        return content.rpartition(_THOUGHT)[2] if isinstance(content, str) else ""

    def _said(self, number: int) -> str:
        return self._words(number).strip()

    def _refuse_changed(self, number: int, span: Span, text: str, places: Mapping[int, int], marked: bool) -> None:
        """Raise SpecError where what the assistant said does not stand in its turn."""
        message = self._messages[number]
        inside = span[0] < places[number] <= span[1] if number in places else not marked and self._said(number) in text[slice(*span)]
        if not inside:
            raise SpecError(_left_out(message))
        names = [call.get("function", call).get("name") for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        if any(isinstance(name, str) and name not in text[slice(*span)] for name in names):
            raise SpecError("the chat template leaves out a tool call: use a model whose template takes tools, or remove the calls")
        content = message.get("content")
        if isinstance(content, str) and _THOUGHT in content and _THOUGHT not in text[slice(*span)]:
            self._thoughts += number >= self._first


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what stands in it, the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Macro) -> str:
        return f"{_mark(_BEGIN)}{caller()}{_mark(_END)}"


def _left_out(message: Message) -> str:
    if message.get("tool_calls"):
        return "the chat template leaves out what the assistant says beside a tool call: remove the text, or the call"
    return "the chat template leaves out or moves a turn of the assistant: remove it, or change the order of the roles"


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes, letters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
