"""Prompts as token ids, by the tokenizer of the model that is asked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import EndpointError, SpecError
from trimtab_runtime.tokenizer import LONG, Tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_AROUND = 64  # characters that a template puts around a message, about

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Written:
    """A text in which its writer has put control tokens: they are what they spell."""

    text: str = field(repr=False)


Prompt = str | Written | Conversation


class Prompts:
    """The tokenizers of all models by name; models with the same files share one.

    What is long is encoded by a thread with tokenizers of its own, so that the others' answers go on meanwhile.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """Raises SpecError for a folder without a tokenizer."""
        self._folders = {name: (_digest(folder), folder) for name, folder in folders.items()}
        self._here = self._load()
        self._there: dict[str, Tokenizer] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="long-prompts")

    def tokenizer(self, name: str) -> Tokenizer:
        return self._here[name]

    async def ids(self, name: str, prompt: Prompt, context: int) -> list[int]:
        """Token ids of a text, with the model's first token where it wants one, or of a conversation up to where the assistant speaks.

        What spells a control token in a `str` or in a message stays letters; in `Written` it is that token. Raises EndpointError for
        what cannot fit `context` tokens, before it is encoded, for a conversation without a chat template, and where that refuses.
        """
        size, work = _size(prompt)
        tokenizer = self._here[name]
        if size > context * tokenizer.longest:
            raise EndpointError(f"the prompt's {size:,} characters cannot fit the context of {context:,} tokens: shorten the prompt")
        if work < LONG:
            return _ids(tokenizer, prompt)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: _ids(self._tokenizer_there(name), prompt))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tokenizer_there(self, name: str) -> Tokenizer:
        if not self._there:
            self._there = self._load()
        return self._there[name]

    def _load(self) -> dict[str, Tokenizer]:
        loaded: dict[str, Tokenizer] = {}
        for digest, folder in self._folders.values():
            if digest not in loaded:
                loaded[digest] = Tokenizer(folder)
        return {name: loaded[digest] for name, (digest, _) in self._folders.items()}


def _size(prompt: Prompt) -> tuple[int, int]:
    """Characters that become tokens, and as many as take as long to encode."""
    if isinstance(prompt, Written):
        prompt = prompt.text
    if isinstance(prompt, str):
        return len(prompt), len(prompt)
    size = sum(len(message["content"].strip()) for message in prompt)  # a template may strip them
    return size, sum(len(message["content"]) + _AROUND for message in prompt)


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, Written):
        ids = tokenizer.text(prompt.text, control=True)
    elif isinstance(prompt, str):
        ids = tokenizer.text(prompt)
    else:
        return _chat(tokenizer, prompt)
    return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _chat(tokenizer: Tokenizer, messages: Conversation) -> list[int]:
    if tokenizer.chat_template is None:
        raise EndpointError("this model has no chat template, it only completes text: use generate() or /v1/completions")
    try:
        return tokenizer.prompt(messages)
    except SpecError as exc:
        raise EndpointError(f"{exc}; change the messages' roles or their order") from exc


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _FILES:
        file = folder / name
        digest.update(f"{name} {file.stat().st_size if file.is_file() else None}\n".encode())
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
