"""Where the assistant's turns stand in the text that a chat template makes of a conversation, and that nothing of it was left out."""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError
from trimtab_runtime.marks import END, MARK, Marked, Message, Rendered, Span, mark

if TYPE_CHECKING:
    from trimtab_runtime.chat_template import ChatTemplate

# a word of a message that stands in no tag: templates look for tags, and at both ends
_WORD = re.compile(r"(?<![\w</|\[])\w+(?![\w>|\]])")
_WORDS = 16  # of which the longest is taken
_THOUGHT = "</think>"  # what stands before it, templates take out of earlier turns


class Turns:
    """Where the assistant's turns stand in a conversation's text, `shown`."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, shown: Rendered, first: int
    ) -> None:
        self._template, self._messages, self._tools, self._shown, self._first = template, messages, tools, shown, first
        self._own = [number for number, one in enumerate(messages) if one.get("role") == "assistant"]
        self._given, self._full = self._marked()
        self._places = self._full.places()
        self._thoughts: list[int] = []

    def by_blocks(self) -> Rendered:
        written = self._full.blocks()
        if self._first and len(written) != len(self._own):
            raise SpecError(
                f"the chat template marks {len(written)} turns of the assistant's {len(self._own)}: give only the turns to learn"
            )
        if not written and any(number >= self._first for number in self._own):
            raise SpecError("the chat template marks nothing that the assistant says as its own: correct its {% generation %} blocks")
        self._refuse_without()
        for number in self._own:  # a block may be less than a turn, or more
            self._refuse_changed(number, self._between(number))
        kept = [span for span, number in zip(written, self._own, strict=True) if number >= self._first] if self._first else written
        return self._rendered(kept)

    def by_prompts(self) -> Rendered:
        self._refuse_without()
        begins = [self._begin(number) for number in self._own]
        controls = list(self._controls(self._full))
        written = []
        for turn, number in enumerate(self._own):
            after = begins[turn + 1] if turn + 1 < len(begins) else len(self._full.text)
            span = begins[turn], self._end(number, begins[turn], after, controls)
            self._refuse_changed(number, span)
            if number >= self._first:
                written.append(span)
        return self._rendered(written)

    def _rendered(self, written: Sequence[Span]) -> Rendered:
        last = bool(self._thoughts) and self._thoughts[-1] == self._own[-1]
        return Rendered(self._shown.text, self._shown.letters, written, len(self._thoughts), last)

    def _marked(self) -> tuple[list[Message], Marked]:
        """The messages with as many marks as the template does not look at, and the text made of them."""
        said = [self._with_mark(number, one) for number, one in enumerate(self._messages)]
        numbers = itertools.count(len(said))
        tries = [said, list(self._messages)]  # without any, what stands where is less sure
        if any(one.get("tool_calls") for one in said):
            tries.insert(0, [self._with_calls_marked(one, numbers) for one in said])
        for given in tries[:-1]:
            full = self._template.marked(given, self._tools, False)
            if full.text == self._shown.text:
                return given, full
        return tries[-1], self._template.marked(tries[-1], self._tools, False)

    def _refuse_without(self) -> None:
        """Raise SpecError where the text lacks a message."""
        for number, (one, plain) in enumerate(zip(self._given, self._messages, strict=True)):
            if number in self._places or one.get("content") == plain.get("content"):
                continue
            if number in self._own:
                raise SpecError(_left_out(plain))
            raise SpecError(f"the chat template leaves out a {plain.get('role')} message: remove it, or change its role")

    def _between(self, number: int) -> Span:
        """From the message before to the one behind, as far as is seen where they stand."""
        before = next((self._places[one] for one in range(number - 1, -1, -1) if one in self._places), 0)
        behind = range(number + 1, len(self._messages))
        after = next((self._places[one] for one in behind if one in self._places), len(self._full.text))
        return (before, after) if before < after else (0, len(self._full.text))

    def _with_mark(self, number: int, message: Message) -> Message:
        """The message with a mark inside a long word; of what the assistant says, where every template leaves it in."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        at = content.rfind(_THOUGHT) + len(_THOUGHT) if message.get("role") == "assistant" and _THOUGHT in content else 0
        return {**message, "content": self._with_word_marked(number, content, at)}

    def _with_calls_marked(self, message: Message, numbers: Iterator[int]) -> Message:
        """The message with a mark in the name of each tool that it calls, and in each text that it gives to it."""
        if not message.get("tool_calls"):
            return message

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return self._with_word_marked(next(numbers), value, 0)
            if isinstance(value, Mapping):
                return {key: marked(one) for key, one in value.items()}
            return [marked(one) for one in value] if isinstance(value, list | tuple) else value

        def called(call: Any) -> Any:
            if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
                return {**call, "function": called(call["function"])}
            if not isinstance(call, Mapping):
                return call
            return {**call, **{key: marked(call[key]) for key in ("name", "arguments") if key in call}}

        return {**message, "tool_calls": [called(call) for call in message["tool_calls"]]}

    def _with_word_marked(self, number: int, text: str, at: int) -> str:
        """A mark inside a long word from `at` on; the text as it is where no word is free."""
        taken = [found.span() for found in self._template.control.finditer(text)]
        words = (one.span() for one in itertools.islice(_WORD.finditer(text, at), _WORDS))
        free = [(start - end, start) for start, end in words if not any(begin < end and start < upto for begin, upto in taken)]
        if not free or number >= END:
            return text
        behind = min(free)[1] + 1
        return text[:behind] + mark(number) + text[behind:]

    def _controls(self, found: Marked) -> Iterator[tuple[int, int, str]]:
        return self._template.real(found.text, found.letters(self._template.control))

    def _begin(self, number: int) -> int:
        """Where turn `number` begins. Found by its own question first, so that long conversations are not rendered once for each turn."""
        asked = next((one for one in range(number - 1, -1, -1) if self._messages[one].get("role") == "user"), 0)
        opening = next((one for one, message in enumerate(self._messages) if message.get("role") != "system"), 0)
        if asked > opening and number - 1 in self._places:
            try:
                short = self._template.marked([*self._given[:opening], *self._given[asked:number]], self._tools, True)
            except SpecError:
                short = Marked("", [])
            here, tail = self._tail(short)
            if tail and here >= self._places[number - 1] and self._full.text.startswith(tail, here):
                return here + len(tail)
        return self._begin_after_all(number)

    def _tail(self, before: Marked) -> tuple[int, str]:
        """Of a prompt what stands behind the last message that the whole text holds, too; and where that is there."""
        there, here = next(((place, self._places[one]) for place, one in reversed(before.marks) if one in self._places), (0, 0))
        return here, before.text[there:]

    def _begin_after_all(self, number: int) -> int:
        """Where turn `number` begins: behind what the prompt for it has after the last message that both texts hold.

        A prompt may go on into the turn (`<think>`), where the text of an earlier turn does not.
        """
        full = self._full
        try:
            before = self._template.marked(self._given[:number], self._tools, True)
        except SpecError:
            if number:
                raise
            return self._first_begin()
        here, tail = self._tail(before)
        if full.text.startswith(tail, here):
            return here + len(tail)
        pairs = zip(tail, full.text[here:], strict=False)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(full.text) - here)
        last = max((end for _, end, _ in self._controls(before)), default=len(before.text) + 1) - len(before.text) + len(tail)
        if not 0 < last <= same:
            raise SpecError(
                "the chat template lays the conversation out in another way before the assistant's turn than with it, "
                "so it cannot be seen where the turn begins: use a template with {% generation %}, or let the conversation end there"
            )
        said = self._said(number)
        found = full.text.find(said, here + last) if said else -1
        return min(here + same, found) if found >= 0 else here + same

    def _first_begin(self) -> int:
        """Of a conversation that the assistant begins, and whose template can prompt for no such turn: behind the first such header."""
        header = self._template.marked(self._given, self._tools, True).text.removeprefix(self._full.text)
        at = self._full.text.find(header) if header else -1
        if at < 0:
            raise SpecError("the chat template cannot begin with the assistant: begin the conversation with a user's message")
        return at + len(header)

    def _end(self, number: int, begin: int, after: int, controls: Sequence[tuple[int, int, str]]) -> int:
        """Behind the token that ends turn `number`: of those that end turns the first; else the first control token after its words."""
        text, places = self._full.text, self._places
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

    def _refuse_changed(self, number: int, span: Span) -> None:
        """Raise SpecError where what the assistant said, or a part of a call, does not stand in its turn."""
        message, turn = self._messages[number], self._full.text[slice(*span)]
        inside = span[0] < self._places[number] <= span[1] if number in self._places else self._said(number) in turn
        if not inside:
            raise SpecError(_left_out(message))
        for one in self._given[number].get("tool_calls") or ():
            call = one.get("function", one) if isinstance(one, Mapping) else {}
            name, given = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
            if isinstance(name, str) and not self._holds(name, span, turn):
                raise SpecError("the chat template leaves out a tool call: use a model whose template takes tools, or remove the calls")
            if not all(self._holds(leaf, span, turn) for leaf in _leaves(given)):
                raise SpecError(
                    f"the chat template leaves out what is given to {MARK.sub('', str(name))}() in a tool call: use a model whose template "
                    "takes tools, or remove the calls"
                )
        content = message.get("content")
        if isinstance(content, str) and _THOUGHT in content and _THOUGHT not in turn and number >= self._first:
            self._thoughts.append(number)

    def _holds(self, leaf: Any, span: Span, turn: str) -> bool:
        """Whether a text or a number that a call gives stands in its turn, by its mark or as one of its spellings."""
        if isinstance(leaf, str) and (found := MARK.search(leaf)):
            return span[0] < self._places.get(int(found[1]), -1) <= span[1]
        spellings = [json.dumps(leaf), json.dumps(leaf, ensure_ascii=False), repr(leaf)]
        if isinstance(leaf, str):
            spellings = [leaf.strip(), *(one[1:-1] for one in spellings)]
        return any(one in turn for one in spellings)


def _leaves(value: Any) -> Iterator[Any]:
    """The texts and numbers in what is given to a tool; one that is null may be left out."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif value is not None:
        yield value


def _left_out(message: Message) -> str:
    if message.get("tool_calls"):
        return "the chat template leaves out what the assistant says beside a tool call: remove the text, or the call"
    return "the chat template leaves out or moves a turn of the assistant: remove it, or change the order of the roles"
