"""A model's tokenizer and chat template, read from its folder without torch or transformers.

Text from pages is encoded with control tokens switched off: a page that spells `<|im_end|>` yields those letters,
never the control token. Templates follow Hugging Face's chat template conventions (transformers documentation,
"Chat templates"); results equal `apply_chat_template`, which a test checks.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from trimtab.errors import SpecError

Message = Mapping[str, str]

LONG = 20_000  # characters from which encoding lets other threads run meanwhile, which costs a little


class Tokenizer:
    """Token ids of plain text, and of conversations with the places the assistant wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises SpecError where the folder lacks tokenizer.json or names no end-of-sequence token, or a file of the two is damaged."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise SpecError(f"{folder} has no tokenizer.json: save the model with a fast tokenizer (tokenizer.save_pretrained)")
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as exc:  # the library raises nothing narrower
            raise SpecError(f"{file} is damaged ({exc}): copy the model's files again") from exc
        self._fast.no_truncation()
        self._fast.no_padding()
        config = _json(folder / "tokenizer_config.json")
        self._special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        eos = self._special["eos_token"]
        eos_id = self._fast.token_to_id(eos) if eos else None
        if eos_id is None:
            raise SpecError(f"{folder}/tokenizer_config.json names no eos_token of tokenizer.json: add it, training needs an end")
        self.eos_id: int = eos_id
        self._control = [token.content for token in self._fast.get_added_tokens_decoder().values() if token.special]
        bos = self._special["bos_token"]
        first = self._fast.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id: int | None = self._fast.token_to_id(bos) if bos and first == [self._fast.token_to_id(bos)] else None
        separator = self._fast.token_to_id("<|endoftext|>")  # between documents of pre-training, where a chat model's eos ends turns
        self.document_start: int = next(one for one in (self.bos_id, separator, eos_id) if one is not None)
        template_file = folder / "chat_template.jinja"
        template = _read(template_file) if template_file.is_file() else config.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self.vocabulary = self._fast.get_vocab_size(with_added_tokens=True)
        single = (self._fast.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids: frozenset[int] = frozenset(id for id in single if id is not None)  # SentencePiece's tokens of single bytes

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._fast.get_vocab(with_added_tokens=True)))

    def text(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of text in which nothing is a control token; with `control` what spells one is one."""
        self._fast.encode_special_tokens = not control
        ids: list[int] = self._encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks, as `apply_chat_template` gives them.

        But a control token that a message spells stays letters. Raises SpecError as `chat` does.
        """
        if self.chat_template is None:
            raise SpecError("this model has no chat template: it completes text")
        spelled = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or r"(?!)")
        mark = f"\x02{secrets.token_hex(8)}-"  # stands for such letters, which the template then handles like others
        hidden = [
            {**one, "content": spelled.sub(lambda found: f"{mark}{self._control.index(found[0])}\x03", one["content"])} for one in messages
        ]
        texts = re.split(f"{mark}([0-9]+)\x03", self._render(hidden, True))
        if len(texts) == 1:
            self._fast.encode_special_tokens = False
            whole: list[int] = self._encode(texts[0]).ids
            return whole
        between = self._all(texts[::2], control=True)
        letters = self._all([self._control[int(index)] for index in texts[1::2]], control=False)
        return [id for ids, spelled_ids in zip(between, [*letters, []], strict=True) for id in ids + spelled_ids]

    def _all(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        self._fast.encode_special_tokens = not control
        return [encoding.ids for encoding in self._fast.encode_batch(list(texts), add_special_tokens=False)]

    def chat(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether the assistant wrote it (its end-of-turn token included).

        Raises SpecError for a model without a chat template or a template that refuses the roles.
        """
        if self.chat_template is None:
            raise SpecError("this model has no chat template: it completes text. Use a chat model, or plain text as data")
        # marks stand for the contents, so that it is known where the template puts them
        marks = [f"\x02{index}\x03" for index in range(len(messages))]
        rest = self._render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], generation_prompt)
        place = 0
        parts: list[tuple[str, bool, bool]] = []  # text, whether it is a content, whether the assistant wrote it
        wrote = False
        for message, mark in zip(messages, marks, strict=True):
            found = rest.find(mark, place)
            if found < 0:
                raise SpecError(f"the chat template leaves out or reorders a {message.get('role')} message: change the roles")
            parts += self._closing(rest[place:found], wrote)
            place = found + len(mark)
            wrote = message["role"] == "assistant"
            parts.append((message["content"].strip(), True, wrote))
        parts += self._closing(rest[place:], wrote)
        if any(word in text for text, content, _ in parts if content for word in self._control):
            return self._piecewise(parts)
        # as the template's own tokenizer does it: the whole conversation at once
        self._fast.encode_special_tokens = False
        encoding = self._encode("".join(text for text, _, _ in parts))
        written, place = [], 0
        for text, _, own in parts:
            if own and text:
                written.append((place, place + len(text)))
            place += len(text)
        lasts = [last for _, last in written]

        def mine(start: int, end: int) -> bool:
            span = bisect_right(lasts, start)  # the first that goes beyond it
            return span < len(written) and end > written[span][0]

        return encoding.ids, [mine(start, end) for start, end in encoding.offsets]

    def _closing(self, text: str, wrote: bool) -> list[tuple[str, bool, bool]]:
        """The template's text behind a content: up to its first control token it ends the turn, and is whose turn it was."""
        ends = [text.index(word) + len(word) for word in self._control if word in text] if wrote else []
        cut = min(ends, default=0)
        return [(text[:cut], False, True), (text[cut:], False, False)]

    def _piecewise(self, parts: list[tuple[str, bool, bool]]) -> tuple[list[int], list[bool]]:
        """Part by part, where a content spells a control token: there it must yield letters."""
        ids: list[int] = []
        mine: list[bool] = []
        for text, content, wrote in parts:
            self._fast.encode_special_tokens = content
            part = self._encode(text).ids
            ids += part
            mine += [wrote] * len(part)
        return ids, mine

    def _encode(self, text: str) -> Encoding:
        if len(text) < LONG:
            return self._fast.encode(text, add_special_tokens=False)
        return self._fast.encode_batch([text], add_special_tokens=False)[0]

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _tojson
        return environment.from_string(self.chat_template or "")

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            tokens = {name: value for name, value in self._special.items() if value}
            return self._template.render(messages=messages, add_generation_prompt=generation_prompt, **tokens)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
            raise SpecError(f"the model's chat template refuses this conversation: {exc}") from exc


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _tojson(value: object, indent: int | None = None) -> str:
    """As transformers has it: no HTML escapes, letters as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"{file} cannot be read ({exc}): copy the model's files again") from exc


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read(file))
    except (ValueError, RecursionError) as exc:
        raise SpecError(f"{file} is not JSON ({exc}): copy the model's files again") from exc
    return value if isinstance(value, dict) else {}


def _content(token: object) -> str | None:
    """A special token is a string, or a dictionary with its settings."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
