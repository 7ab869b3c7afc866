"""A model's chat template: the text that it makes of a conversation, which of that text the assistant wrote, and which of the
control tokens in it are no more than letters of a message.

Templates follow Hugging Face's conventions (transformers documentation, "Chat templates"), `{% generation %}` included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimtab.errors import SpecError
from trimtab_runtime.marks import BEGIN, BREAK, END, MARK, Marked, Message, Rendered, Span, mark
from trimtab_runtime.turns import Turns

_TOO_DEEP = "what the conversation gives to a tool, or says of one, is nested too deeply: make it flatter, or leave the conversation out"


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

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        first: int = 0,
        unwanted: Callable[[Rendered], bool] = lambda shown: False,
    ) -> Rendered:
        """The whole conversation; what the assistant wrote from message `first` on is `written`.

        Where the template says by `{% generation %}` what the assistant writes, that is it. Else a turn begins where the prompt for it
        ends, and ends with the first token that ends turns. Where the text is `unwanted`, nobody's turns are looked for in it.

        Raises SpecError where the template refuses the conversation, ignores its tools, leaves out one of its messages or a part of a
        call of a tool, or does not let it be seen where a turn of the assistant begins and ends.
        """
        shown = self._plain(messages, tools)
        if unwanted(shown):
            return shown
        if tools and shown.text == self._plain(messages, None).text:
            raise SpecError('the chat template ignores tools: use a model whose template takes them, or remove "tools" from the records')
        try:
            turns = Turns(self, messages, tools, shown, first)
            found = turns.by_blocks() if self._by_blocks else turns.by_prompts()
        except RecursionError as exc:
            raise SpecError(_TOO_DEEP) from exc
        last = bool(found.written) and messages[-1].get("role") == "assistant"
        ended = last and any(True for _ in self.real(found.text, found.letters, found.written[-1][0]))
        return replace(found, open=last and not ended)

    def real(self, text: str, letters: Sequence[Span], start: int = 0) -> Iterator[tuple[int, int, str]]:
        """The control tokens of a text, from `start` on, without those that are letters: from, up to, which."""
        spelled = set(letters)
        return ((*one.span(), one[0]) for one in self.control.finditer(text, start) if one.span() not in spelled)

    def _plain(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, generation_prompt: bool = False) -> Rendered:
        found = self.marked(messages, tools, generation_prompt)
        return Rendered(found.text, found.letters(self.control))

    def marked(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation_prompt: bool) -> Marked:
        try:
            hidden = [
                {key: value if key == "role" else self._broken(value) for key, value in one.items() if value is not None}
                for one in messages
            ]
            described = self._broken(list(tools)) if tools else None
        except RecursionError as exc:
            raise SpecError(_TOO_DEEP) from exc
        text = self._render(hidden, described, generation_prompt)
        pieces = MARK.split(text)
        marks, place = [], 0
        for piece, number in zip(pieces[::2], pieces[1::2], strict=False):
            place += len(piece)
            marks.append((place, int(number)))
        return Marked("".join(pieces[::2]), marks)

    def _broken(self, value: Any) -> Any:
        """The same value with a mark in each control word of its texts."""
        if isinstance(value, str):
            return self.control.sub(lambda found: found[0][:1] + mark(BREAK) + found[0][1:], value)
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


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what stands in it, the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Macro) -> str:
        return f"{mark(BEGIN)}{caller()}{mark(END)}"


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
