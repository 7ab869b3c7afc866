"""What is rehearsed: each token has the base model's own prediction of it, and there is no more text than is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.tiny_adapter import make_lively_model
from trimtab_runtime import rehearsal
from trimtab_runtime.engine import Engine
from trimtab_runtime.examples import Sample, conversation, plain
from trimtab_runtime.generate import LIKELIEST, predictions, rehearsed_prose


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(make_lively_model(tmp_path_factory.mktemp("model")), dtype="float32")


def test_predictions_are_the_models_own_in_the_samples_order(engine: Engine) -> None:
    texts = ["A short one.", "A much longer text, which comes before the last one and after the first.", "Bread is baked on Tuesdays."] * 5
    talk = [{"role": "user", "content": "Who keeps the key?"}, {"role": "assistant", "content": "The keeper."}]
    samples = [*(plain("replay", text, engine.tokenizer) for text in texts), conversation("replay", talk, engine.tokenizer)]
    seen: list[int] = []
    ids, chances = predictions(engine, samples, seen.append)
    assert ids.shape == chances.shape == (sum(sum(sample.learned[1:]) for sample in samples), LIKELIEST)
    assert seen[-1] == len(samples)
    at = 0
    for sample in samples:
        with torch.no_grad():
            whole = torch.softmax(engine.model("base")(torch.tensor([sample.ids])).logits[0].float(), -1)
        for place in range(1, len(sample.ids)):
            if sample.learned[place]:
                wanted = whole[place - 1].topk(LIKELIEST)
                np.testing.assert_allclose(chances[at], wanted.values.numpy(), atol=2e-3)
                np.testing.assert_allclose(whole[place - 1][torch.from_numpy(ids[at]).long()].numpy(), wanted.values.numpy(), atol=2e-3)
                at += 1


def test_nothing_to_predict(engine: Engine) -> None:
    assert [len(part) for part in predictions(engine, [])] == [0, 0]
    assert [len(part) for part in predictions(engine, [Sample("replay", [5], [True])])] == [0, 0]


def test_as_much_prose_as_is_wanted_and_no_more_than_there_is(engine: Engine) -> None:
    every = rehearsal.prose()
    assert rehearsed_prose(0, engine.tokenizer, 0) == []
    some = rehearsed_prose(3000, engine.tokenizer, 0)
    assert sum(len(engine.tokenizer.text(text)) for text in some[:-1]) < 3000 <= sum(len(engine.tokenizer.text(text)) for text in some)
    assert sorted(rehearsed_prose(1e9, engine.tokenizer, 0)) == sorted(every)
    assert rehearsed_prose(3000, engine.tokenizer, 0) == some != rehearsed_prose(3000, engine.tokenizer, 1)
