"""A model's tokenizer and chat template, read from its folder without torch or transformers.

Text from pages is encoded with control tokens switched off: a page that spells `<|im_end|>` yields those letters,
never the control token. Templates follow Hugging Face's chat template conventions (transformers documentation,
"Chat templates"); results equal `apply_chat_template`, which a test checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from trimtab.errors import SpecError

Message = Mapping[str, str]


class Tokenizer:
    """Token ids of plain text, and of conversations with the places the assistant wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises SpecError where the folder lacks tokenizer.json or names no end-of-sequence token."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise SpecError(f"{folder} has no tokenizer.json: save the model with a fast tokenizer (tokenizer.save_pretrained)")
        self._fast = FastTokenizer.from_file(str(file))
        self._fast.no_truncation()
        self._fast.no_padding()
        config = _json(folder / "tokenizer_config.json")
        self._special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        eos = self._special["eos_token"]
        eos_id = self._fast.token_to_id(eos) if eos else None
        if eos_id is None:
            raise SpecError(f"{folder}/tokenizer_config.json names no eos_token of tokenizer.json: add it, training needs an end")
        self.eos_id: int = eos_id
        bos = self._special["bos_token"]
        first = self._fast.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id: int | None = self._fast.token_to_id(bos) if bos and first == [self._fast.token_to_id(bos)] else None
        separator = self._fast.token_to_id("<|endoftext|>")  # between documents of pre-training, where a chat model's eos ends turns
        self.document_start: int = next(one for one in (self.bos_id, separator, eos_id) if one is not None)
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self.vocabulary = self._fast.get_vocab_size(with_added_tokens=True)

    def text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        self._fast.encode_special_tokens = True
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether the assistant wrote it (its end-of-turn token included).

        Raises SpecError for a model without a chat template or a template that refuses the roles.
        """
        if self.chat_template is None:
            raise SpecError("this model has no chat template: it completes text. Use a chat model, or plain text as data")
        # contents go in as marks, so that a content's letters can never become control tokens of the template
        marks = [f"\x02{index}\x03" for index in range(len(messages))]
        rendered = self._render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], generation_prompt)
        ids: list[int] = []
        mine: list[bool] = []
        rest, ends_turn = rendered, False
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise SpecError(
                    f"the chat template leaves out or reorders a {message.get('role')} message: change the conversation's roles"
                )
            self._append_template(before, ids, mine, ends_turn)
            content = self.text(message["content"].strip())
            ends_turn = message["role"] == "assistant"
            ids += content
            mine += [ends_turn] * len(content)
        self._append_template(rest, ids, mine, ends_turn)
        return ids, mine

    def _append_template(self, text: str, ids: list[int], mine: list[bool], ends_turn: bool) -> None:
        """The template's own text; the first token after an assistant's words ends its turn and is the assistant's."""
        self._fast.encode_special_tokens = False
        part = self._fast.encode(text, add_special_tokens=False).ids
        ids += part
        mine += [ends_turn and place == 0 for place in range(len(part))]

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self.chat_template or "")
            tokens = {name: value for name, value in self._special.items() if value}
            return template.render(messages=messages, add_generation_prompt=generation_prompt, **tokens)
        except TemplateError as exc:
            raise SpecError(f"the model's chat template refuses this conversation: {exc}") from exc


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _content(token: object) -> str | None:
    """A special token is a string, or a dictionary with its settings."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
