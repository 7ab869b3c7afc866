"""Prompts as token ids, by the tokenizer of the model that is asked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trimtab.errors import EndpointError, SpecError
from trimtab_runtime.tokenizer import LONG, Tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Conversation = Sequence[Mapping[str, str]]


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

    async def text(self, name: str, text: str) -> list[int]:
        """Ids of a text, with the model's first token where it wants one. What spells a control token stays letters."""
        if len(text) < LONG:
            return _text(self._here[name], text)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: _text(self._tokenizer_there(name), text))

    async def chat(self, name: str, messages: Conversation) -> list[int]:
        """Ids of a conversation up to where the assistant speaks. Raises EndpointError without a chat template, or where it refuses."""
        if sum(len(message["content"]) for message in messages) < LONG:
            return _chat(self._here[name], messages)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: _chat(self._tokenizer_there(name), messages))

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


def _text(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.text(text)
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def _chat(tokenizer: Tokenizer, messages: Conversation) -> list[int]:
    if tokenizer.chat_template is None:
        raise EndpointError("this model has no chat template, it only completes text: use generate() or /v1/completions")
    try:
        return tokenizer.chat(messages, generation_prompt=True)[0]
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
