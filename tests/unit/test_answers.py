"""Answers as they grow: the pieces together are what decoding everything at once gives."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trimtab_runtime.answers import Answer, Stream, Text
from trimtab_runtime.forms import OpenAI
from trimtab_runtime.http import Connection, Incoming, Server
from trimtab_runtime.metrics import Metrics
from trimtab_runtime.tokenizer import Tokenizer as OurTokenizer

Decode = Callable[[Sequence[int]], str]


def byte_level() -> Tokenizer:
    """Tokens are bytes, and pieces of UTF-8 that end in the middle of characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = [bytes_ for text in ("né", "東京 ", "👩‍🚀", " ship") for bytes_ in (text.encode()[:2], text.encode()[1:])]
    words = [_as_letters(word) for word in split]
    vocabulary = {word: id for id, word in enumerate(dict.fromkeys([*letters, *words, "a ship", "Ġthe"]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer.add_tokens([AddedToken("añadido", normalized=False)])
    return tokenizer


def _as_letters(data: bytes) -> str:
    """Bytes as GPT-2's vocabulary spells them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept} | {
        byte: chr(256 + place) for place, byte in enumerate(b for b in range(256) if b not in kept)
    }
    return "".join(table[byte] for byte in data)


def byte_fallback() -> Tokenizer:
    """As SentencePiece's models do it: a blank is ▁, the first one is left out, unknown characters are single bytes."""
    words = ["▁", "▁the", "▁▁", "ship", "▁ship", "é", "東", ".", "▁.", "s", "\ufffd"]
    vocabulary = {word: id for id, word in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["▁", "▁the", "▁▁", "ship", "▁ship", "é", "."]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace)}


def singles(tokenizer: Tokenizer) -> frozenset[int]:
    found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id for id in found if id is not None)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=400)
def test_the_pieces_are_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.sampled_from(range(max(0, size - 16), size)), max_size=60))
    steps = data.draw(st.lists(st.integers(1, 4) | st.just(25), min_size=len(ids), max_size=len(ids)))
    text, shown, at = Text(tokenizer.decode, (), singles(tokenizer)), "", 0
    for step in steps:
        shown += text.add(ids[at : at + step])
        at += step
        assert tokenizer.decode(ids).startswith(shown), "what is shown stays"
    shown += text.add(ids[at:], last=True)
    assert shown == tokenizer.decode(ids)


def test_bytes_around_a_token_that_is_skipped_are_one_run() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.token_to_id(token) for token in ("<0xE6>", "<0x9D>", "<0xB1>", "<s>", "<0xFF>", "▁ship")]
    text = Text(tokenizer.decode, (), singles(tokenizer))
    pieces = [text.add([id]) for id in ids]
    assert pieces == ["", "", "", "", "", tokenizer.decode(ids)]


def test_of_many_tokens_at_once_what_is_whole_is_shown() -> None:
    """However many come together, and wherever they break off."""
    tokenizer = TOKENIZERS["byte_fallback"]
    word, first = tokenizer.token_to_id("▁ship"), tokenizer.token_to_id("<0xE6>")
    text = Text(tokenizer.decode, (), singles(tokenizer))
    assert text.add([word] * 40 + [first]) == tokenizer.decode([word] * 40)
    assert text.add([word] * 30 + [first]) == "\ufffd" + tokenizer.decode([word] * 31)[4:]
    assert text.add([], last=True) == "\ufffd"


@given(st.text(alphabet="abé東👩 .", max_size=80), st.lists(st.text(alphabet="abé東. ", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300)
def test_the_first_stop_text_to_be_whole_ends_it(written: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_to_id(_as_letters(bytes([byte]))) for byte in written.encode()]
    text, shown = Text(tokenizer.decode, stops), ""
    for id in ids:
        shown += text.add([id])
        assert not any(stop in shown for stop in stops)
        if text.stopped:
            break
    else:
        shown += text.add([], last=True)
    ends = [written.index(stop) + len(stop) for stop in stops if stop in written]
    assert text.stopped == bool(ends)
    if not ends:
        assert shown == written
        return
    first = min(ends)  # a byte a time: the text is cut before the longest stop text that is whole there
    assert shown == written[: min(first - len(stop) for stop in stops if written[:first].endswith(stop))]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_what_is_never_a_character_costs_no_more_each_time(name: str) -> None:
    """A thousand halves of characters: decoding all of them for each new one would be half a million."""
    tokenizer = TOKENIZERS[name]
    half = tokenizer.token_to_id(_as_letters(b"\xf0") if name == "byte_level" else "<0xF0>")
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(tokenizer.decode(ids))

    text = Text(counting, (), singles(tokenizer))
    pieces = [text.add([half]) for _ in range(1000)]
    assert "".join(pieces) + text.add([], last=True) == tokenizer.decode([half] * 1000)
    assert decoded < 20_000


def test_an_ordinary_text_costs_a_few_tokens_each(tiny_model: Path) -> None:
    tokenizer = OurTokenizer(tiny_model)
    ids = tokenizer.text("The lighthouse keeper counts ships at dawn. " * 50)
    decoded = 0

    def counting(some: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return tokenizer.decode(some)

    text = Text(counting, (), tokenizer.byte_ids)
    assert "".join(text.add([id]) for id in ids) + text.add([], last=True) == tokenizer.decode(ids)
    assert decoded < 4 * len(ids)


def test_an_answer_without_a_reader_is_the_decoded_whole(tiny_model: Path) -> None:
    tokenizer = OurTokenizer(tiny_model)
    ids = random.Random(1).choices(range(tokenizer.vocabulary), k=200)

    async def collect(stops: list[str]) -> tuple[str, int, str]:
        answer = Answer(tokenizer, stops, Metrics(), 0.0)
        for start in range(0, 200, 3):
            answer.new(ids[start : start + 3], None if start + 3 < 200 else "length")
        done = await answer.done
        return done.text, done.tokens, done.finish

    whole = tokenizer.decode(ids)
    assert asyncio.run(collect([])) == asyncio.run(collect(["never in it"])) == (whole, 200, "length")
    stop = whole[40:44]
    text, tokens, finish = asyncio.run(collect([stop]))
    assert (text, finish) == (whole[: whole.index(stop)], "stop_text")
    assert tokens < 200


def test_a_reader_that_takes_nothing_gets_what_was_made_meanwhile_at_once(tiny_model: Path) -> None:
    tokenizer = OurTokenizer(tiny_model)
    ids = tokenizer.text("The lighthouse keeper counts ships at dawn. ") * 8000
    blocked = asyncio.Event()

    async def pour(_: Incoming, client: Connection) -> None:
        answer = Answer(tokenizer, (), Metrics(), 0.0, Stream(client, OpenAI("tuned", chat=False), 1))
        for id in ids[:-1]:
            answer.new([id], None)
            if client.blocked:
                blocked.set()
        answer.new(ids[-1:], "length")

    async def ask() -> tuple[int, list[str]]:
        server = Server(lambda _: None, pour, print)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await server.start(listener)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            await asyncio.wait_for(blocked.wait(), 20)
            (connection,) = server.connections
            unsent = connection.unsent
            _, _, events = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            await server.close()
        return unsent, [event.removeprefix("data: ") for event in events.decode().split("\n\n") if event]

    unsent, events = asyncio.run(ask())
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == tokenizer.decode(ids)
    assert len(events) < len(ids) / 2
    assert unsent < 1_000_000, "of events of 12 megabytes in all"
