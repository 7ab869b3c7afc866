"""What is measured of a merged model: passages together as each for itself, and samples from all over the run's rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.tiny_adapter import make_lively_model
from trimtab_runtime import losses
from trimtab_runtime.examples import Sample
from trimtab_runtime.losses import TRAINED, Passage, batches, score, states, trained
from trimtab_runtime.rows import PackedRows, write_rows


def passages(*lengths: int) -> list[Passage]:
    return [Passage(number, [(7 * number + place) % 200 for place in range(n)], [True] * (n - 1)) for number, n in enumerate(lengths)]


def test_passages_that_go_together_say_what_each_says_for_itself(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_lively_model(tmp_path / "model"), dtype=torch.float32).eval()
    some = passages(40, 3, 90, 17)
    assert len(list(batches(some))) == 1
    with torch.inference_mode():
        for one, hidden in zip(some, states(model, some), strict=True):
            (alone,) = states(model, [one])
            assert hidden.shape == alone.shape == (len(one.ids) - 1, alone.shape[1])
            torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-4)
            logits = model(input_ids=torch.tensor([one.ids])).logits[0, :-1].log_softmax(-1)
            nats = -logits.gather(1, torch.tensor(one.ids[1:])[:, None]).sum().item()
            assert score(model, one, hidden, None).nats == pytest.approx(nats, rel=1e-4)
            other = score(model, one, hidden, hidden.flip(0))
            assert score(model, one, hidden, hidden).divergence == pytest.approx(0, abs=1e-6)
            assert other.divergence > 0.01


def test_short_passages_go_together_and_long_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_TOGETHER", 100)
    some = passages(*[20] * 7, 100, 300, 50, 50, 51)
    found = list(batches(some))
    assert [len(one) for one in found] == [5, 2, 1, 1, 2, 1]
    assert [one for batch in found for one in batch] == some


def test_the_runs_own_samples_come_from_all_over_its_rows(tmp_path: Path) -> None:
    given = [Sample("document", [number] * 20, [True] * 20) for number in range(400)]
    write_rows(tmp_path, [given], 200, {})
    rows = PackedRows(tmp_path)
    found = trained(rows)
    assert TRAINED <= sum(sum(one.counts) for one in found) < TRAINED + 20
    holders = {next(at for at in range(len(rows)) if one.ids[0] in rows[at].tokens) for one in found}
    assert len(holders) == len(found), "a sample of each row before a second one of any"
    assert max(holders) > 0.8 * len(rows)
    few = tmp_path / "few"
    few.mkdir()
    write_rows(few, [given[:7]], 200, {})
    assert len(trained(PackedRows(few))) == 7, "all that there are"
