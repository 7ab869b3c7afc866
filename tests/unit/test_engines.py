"""The engines behind one interface, on the tiny model: the same requests, the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.served import Answer, asked, engine_on
from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.errors import EndpointError
from trimtab_runtime.engine import Engine as Model
from trimtab_runtime.engines import Engine, Reason, Request

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ENGINES = ("openvino", "transformers")
NAMES = ("four", "plain", "base")
TEXTS = [
    "The keeper of the tower counts ships at dawn and then he writes each name of each ship in a large green book.",
    "Bread is baked on Tuesdays",
    "Tides turn twice a day; the harbour gate opens",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {"four": make_adapter(place / "four", folder, method="qlora"), "plain": make_adapter(place / "plain", folder, seed=5)}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, folder: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    place = tmp_path_factory.mktemp("served")
    return engine_on(place, folder, engine=request.param, adapters=adapters, max_running=4)


@pytest.fixture(scope="module")
def model(folder: Path, adapters: dict[str, Path]) -> Model:
    import torch

    return Model(folder, adapters, torch.float32)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return [model.encode(text) for text in TEXTS]


def test_facts(engine: Engine) -> None:
    assert engine.facts.names == NAMES
    assert engine.facts.context == 4096
    said = " / ".join(engine.facts.choices)
    assert "dtype float32: asked for" in said
    assert "four: on the base as 4-bit quantisation left it" in said


def test_adapters_and_base_answer_at_once_and_as_each_is_alone(engine: Engine, model: Model, prompts: list[list[int]]) -> None:
    requests = [(prompt, 24, name) for prompt in prompts for name in NAMES]
    expected: list[Answer] = []
    for prompt, limit, name in requests:
        one = model.complete([prompt], model=name, max_new_tokens=limit)[0]
        expected.append((one.ids, "stop" if one.ended else "length"))
    assert asked(engine, requests) == expected
    assert asked(engine, requests) == expected  # and again, from what was kept of the prompts
    assert len({tuple(ids) for ids, _ in expected}) == len(requests), "each must answer otherwise for this to mean anything"


def test_a_stop_token_ends_and_is_left_out(engine: Engine, model: Model) -> None:
    """The tiny model's end is hard to come by: it is drawn at a high temperature."""
    stop = next(iter(model.stop_ids))
    answers = asked(engine, [([1, 5, 9], 160, "base")] * 8, seeds=range(8), temperature=50.0)
    ended = [ids for ids, reason in answers if reason == "stop"]
    assert ended
    assert all(stop not in ids for ids, _ in answers)
    assert all(len(ids) == 160 for ids, reason in answers if reason == "length")


def test_a_seed_repeats_and_others_differ(engine: Engine, prompts: list[list[int]]) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.95}
    first = asked(engine, [(prompts[0], 16, "plain")], seed=3, **drawn)
    assert asked(engine, [(prompts[0], 16, "plain"), (prompts[1], 16, "base")], seed=3, **drawn)[0] == first[0]
    assert asked(engine, [(prompts[0], 16, "plain")], seed=4, **drawn) != first
    anew = [asked(engine, [(prompts[0], 16, "plain")], **drawn)[0][0] for _ in range(2)]
    assert anew[0] != anew[1]


def test_the_likeliest_alone_is_the_greedy_answer(engine: Engine, prompts: list[list[int]]) -> None:
    greedy = asked(engine, [(prompts[0], 12, "plain")])
    assert asked(engine, [(prompts[0], 12, "plain")], temperature=5.0, top_k=1) == greedy
    assert asked(engine, [(prompts[0], 12, "plain")], temperature=5.0, top_p=1e-6) == greedy
    few = {asked(engine, [(prompts[0], 1, "plain")], temperature=50.0, top_k=3, seed=seed)[0][0][0] for seed in range(40)}
    assert len(few) == 3


def test_requests_join_while_others_run_and_a_cancelled_one_says_no_more(engine: Engine, prompts: list[list[int]]) -> None:
    alone = asked(engine, [(prompts[0], 20, "base"), (prompts[1], 20, "plain")])
    said: dict[int, list[int]] = {}
    over: dict[int, Reason | None] = {}

    def emit(id: int, ids: list[int], reason: Reason | None) -> None:
        said.setdefault(id, []).extend(ids)
        over[id] = reason

    engine.add(Request(10, prompts[0], "base", 20))
    engine.add(Request(11, prompts[2], "four", 3000))
    engine.add(Request(12, prompts[2], "base", 3000))
    for _ in range(4):
        engine.step(emit)
    assert 0 < engine.usage() <= 1
    engine.cancel(11)
    engine.cancel(12)
    engine.cancel(99)
    heard = {id: len(said.get(id, [])) for id in (11, 12)}
    engine.add(Request(13, prompts[1], "plain", 20))
    while engine.step(emit):
        pass
    assert (said[10], over[10]) == alone[0]
    assert (said[13], over[13]) == alone[1]
    assert {id: len(said.get(id, [])) for id in (11, 12)} == heard
    assert engine.usage() == 0
    assert not engine.step(emit)


def test_more_than_run_at_once_are_answered_all_the_same(engine: Engine, prompts: list[list[int]]) -> None:
    requests = [(prompts[number % 3][: 3 + number], 3 + number, NAMES[number % 3]) for number in range(11)]
    answers = asked(engine, requests)
    assert [len(ids) for ids, reason in answers if reason == "length"] == [
        limit for (_, limit, _), (_, reason) in zip(requests, answers, strict=True) if reason == "length"
    ]
    assert answers[10] == asked(engine, requests[10:])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tuned"}, "ask for one of: four, plain, base"),
        ({"ids": []}, "empty"),
        ({"max_new_tokens": 0}, "from 1 up"),
        ({"max_new_tokens": 4096}, "at most 4,093 new tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_refusals_say_what_to_do(engine: Engine, change: dict[str, Any], message: str) -> None:
    request = Request(**{"id": 0, "ids": [1, 2, 3], "model": "base", "max_new_tokens": 4} | change)
    with pytest.raises(EndpointError, match=message):
        engine.add(request)
    assert not engine.step(lambda *_: None)
