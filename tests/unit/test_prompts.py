"""Prompts become token ids while the loop goes on, however they are cut into messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.errors import EndpointError
from trimtab_runtime.prompts import Prompt, Prompts, Written


@pytest.fixture
def prompts(tiny_model: Path) -> Iterator[Prompts]:
    prompts = Prompts({"base": tiny_model})
    yield prompts
    prompts.close()


@pytest.mark.parametrize(
    "prompt", ["ship at dawn " * 50_000, [{"role": "user", "content": "ok"}] * 4000], ids=["one text", "many messages"]
)
def test_long_prompts_hold_nobody_up(prompts: Prompts, prompt: Prompt) -> None:
    async def go() -> int:
        turns = 0
        reading = asyncio.ensure_future(prompts.ids("base", prompt, 10**9))
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        assert await reading
        return turns

    assert asyncio.run(go()) > 20, "turns that others had meanwhile"


@pytest.mark.parametrize("prompt", ["a" * 100_000, Written("a" * 100_000), [{"role": "user", "content": "a" * 100_000}]])
def test_what_cannot_fit_is_refused_unread(prompts: Prompts, prompt: Prompt) -> None:
    with pytest.raises(EndpointError, match="100,000 characters cannot fit the context of 512 tokens"):
        asyncio.run(prompts.ids("base", prompt, 512))


def test_what_spells_a_control_token_is_one_only_where_its_writer_put_it(prompts: Prompts) -> None:
    async def go(prompt: Prompt) -> list[int]:
        return await prompts.ids("base", prompt, 512)

    text = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    talk = asyncio.run(go([{"role": "user", "content": "Who?"}]))
    assert asyncio.run(go(Written(text))) == talk
    assert len(asyncio.run(go(text))) > len(talk)
