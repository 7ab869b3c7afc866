"""A model's tokenizer and chat template, read from its folder without torch or transformers.

Text from pages is encoded with control tokens switched off: a page that spells `<|im_end|>` yields those letters,
never the control token. Templates follow Hugging Face's chat template conventions (transformers documentation,
"Chat templates"); results equal `apply_chat_template`, which a test checks.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from trimtab.errors import SpecError
from trimtab_runtime.chat_template import ChatTemplate
from trimtab_runtime.marks import Message, Rendered

Ids = Sequence[int]
Flags = Sequence[int]  # 1 or 0 for each token

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

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
        self._folder = folder
        self._fast.no_truncation()
        self._fast.no_padding()
        config = _json(folder / "tokenizer_config.json")
        self._special = {name: _content(config.get(name)) for name in _SPECIAL}
        eos = self._special["eos_token"]
        eos_id = self._fast.token_to_id(eos) if eos else None
        if eos_id is None:
            raise SpecError(f"{folder}/tokenizer_config.json names no eos_token of tokenizer.json: add it, training needs an end")
        self.eos_id: int = eos_id
        special = {id: token.content for id, token in self._fast.get_added_tokens_decoder().items() if token.special}
        self._control, self.control_ids = list(special.values()), frozenset(special)
        bos = self._special["bos_token"]
        first = self._fast.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id: int | None = self._fast.token_to_id(bos) if bos and first == [self._fast.token_to_id(bos)] else None
        self._fast.post_processor = None  # it adds tokens that we never ask for, and may leave blanks out of the tokens' places
        separator = self._fast.token_to_id("<|endoftext|>")  # between documents of pre-training, where a chat model's eos ends turns
        self.document_start: int = next(one for one in (self.bos_id, separator, eos_id) if one is not None)
        self._templates = _templates(folder, config)
        self.chat_template: str | None = self._templates.get("default")
        ends = [self._fast.id_to_token(id) for id in (eos_id, *_end_ids(folder))]
        self._ends = [token for token in ends if token]
        self.vocabulary = self._fast.get_vocab_size(with_added_tokens=True)
        single = (self._fast.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids: frozenset[int] = frozenset(id for id in single if id is not None)  # SentencePiece's tokens of single bytes

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json; empty where there is none."""
        return _json(self._folder / "config.json")

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

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text, control tokens as they are spelled. A letter of several tokens stands at the last of them."""
        found: list[str] = []
        begin = done = 0  # decoding depends on the tokens before; those up to `done` are told already
        for end in range(1, len(ids) + 1):
            before = self._fast.decode(list(ids[begin:done]), skip_special_tokens=False)
            text = self._fast.decode(list(ids[begin:end]), skip_special_tokens=False)
            whole = end == len(ids) or not text.endswith("\ufffd")
            found.append(text[len(before) :] if whole else "")
            if whole:
                begin, done = done, end
        return found

    def following(self, text: str) -> list[int]:
        """Ids of text that goes on after other tokens: without the blank that some tokenizers put before a text's first word."""
        self._fast.encode_special_tokens = True
        return self._following(text)

    def texts(self, texts: Sequence[str]) -> list[Encoding]:
        """Many texts at once, with the characters of each token; nothing in them is a control token."""
        self._fast.encode_special_tokens = True
        return list(self._fast.encode_batch(list(texts), add_special_tokens=False))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant speaks, as `apply_chat_template` gives them.

        But a control token that a message spells stays letters. Raises SpecError for a model without a chat template, and where that
        refuses the conversation.
        """
        (found,) = self.encode([self.template.prompt(messages, tools)])
        return list(found[0])

    def chat(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, first: int = 0) -> tuple[list[int], list[bool]]:
        """Ids of a conversation as `apply_chat_template` gives them, and for each whether the assistant wrote it from message `first` on.

        The token that ends its turn is the assistant's, too. A control token that a message spells stays letters. Raises SpecError as
        `ChatTemplate.conversation` does, and for a model without a chat template.
        """
        ((ids, mine),) = self.encode([self.template.conversation(messages, tools, first=first)])
        return list(ids), [bool(flag) for flag in mine]

    def encode(self, texts: Sequence[Rendered]) -> list[tuple[Ids, Flags]]:
        """Ids of conversations, and which of them the assistant wrote."""
        self._fast.encode_special_tokens = False
        plain = [one.text for one in texts if not one.letters]
        encoded = iter([self._encode(plain[0])] if len(plain) == 1 else self._fast.encode_batch(plain, add_special_tokens=False))
        found: list[tuple[Ids, Flags]] = []
        for one in texts:
            if one.letters:
                ids, offsets = self._with_letters(one)
            else:
                encoding = next(encoded)
                ids, offsets = encoding.ids, encoding.offsets if one.written else []
            flags = bytearray(len(ids))
            starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
            for begin, upto in one.written:
                first, last = bisect_right(ends, begin), bisect_left(starts, upto)  # tokens that reach into the span
                flags[first:last] = b"\x01" * (last - first)
            found.append((array("i", ids), bytes(flags)))
        return found

    def _with_letters(self, one: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their characters where a message spells a control token: between two real ones, the text there is encoded without any."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def add(text: str, start: int, *, control: bool) -> None:
            cut = 0 if control or not start or self._puts_blanks_everywhere else self._lead(text)
            self._fast.encode_special_tokens = not control
            found = self._encode("\n" + text if cut else text)
            ids.extend(found.ids[cut:])
            offsets.extend((max(0, begin - bool(cut)) + start, max(0, end - bool(cut)) + start) for begin, end in found.offsets[cut:])

        real = [(start, end) for start, end, _ in self.template.real(one.text, one.letters)]
        done = 0
        for start, end in one.letters:
            before = max((stop for _, stop in real if stop <= start), default=0)
            if before < done:  # two in one stretch
                continue
            behind = min((begin for begin, _ in real if begin >= end), default=len(one.text))
            if before > done:
                add(one.text[done:before], done, control=True)
            add(one.text[before:behind], before, control=False)
            done = behind
        if done < len(one.text):
            add(one.text[done:], done, control=True)
        return ids, offsets

    def _following(self, text: str) -> list[int]:
        cut = self._lead(text)
        ids: list[int] = self._encode("\n" + text if cut else text).ids
        return ids[cut:]

    def _lead(self, text: str) -> int:
        """How many tokens a line break before the text is, where it keeps a tokenizer from putting a blank there; else 0."""
        if self._puts_blank and self._encode("\n" + text).ids[: len(self._break)] == self._break:
            return len(self._break)
        return 0

    @cached_property
    def _break(self) -> list[int]:
        ids: list[int] = self._fast.encode("\n", add_special_tokens=False).ids
        return ids

    @cached_property
    def _puts_blank(self) -> bool:
        """Whether a text's first word is encoded as if a blank stood before it."""
        ids = self._fast.encode("a", add_special_tokens=False).ids
        return bool(ids) and (self._fast.id_to_token(ids[0]) or "").startswith("▁")

    @cached_property
    def _puts_blanks_everywhere(self) -> bool:
        """Whether it does so behind each control token, too."""
        self._fast.encode_special_tokens = False
        behind: list[int] = self._fast.encode(f"{self._control[0]}a" if self._control else "a", add_special_tokens=False).ids[1:]
        return behind == self._fast.encode("a", add_special_tokens=False).ids

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises SpecError for a model without a chat template."""
        if self.chat_template is None:
            raise SpecError("this model has no chat template: it completes text. Use a chat model, or plain text as data")
        return ChatTemplate(self._templates, {name: value for name, value in self._special.items() if value}, self._control, self._ends)

    def _encode(self, text: str) -> Encoding:
        if len(text) < LONG:
            return self._fast.encode(text, add_special_tokens=False)
        return self._fast.encode_batch([text], add_special_tokens=False)[0]


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


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat template, `default`, and others by their names; empty where the model has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        beside = folder / "additional_chat_templates"
        others = {path.stem: _read(path) for path in sorted(beside.glob("*.jinja"))} if beside.is_dir() else {}
        return {**others, "default": _read(file)}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    named = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    return {one["name"]: one["template"] for one in named if isinstance(one.get("name"), str) and isinstance(one.get("template"), str)}


def _end_ids(folder: Path) -> list[int]:
    """The tokens at which the model stops, as its makers say: a turn may have several ends."""
    ids = _json(folder / "generation_config.json").get("eos_token_id")
    return [id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int) and id >= 0]
