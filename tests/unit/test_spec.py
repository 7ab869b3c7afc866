"""What crosses the wall crosses whole, and what cannot is refused before it costs anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.spec import SPEC_VERSION, JobSpec, TrainSpec

MODEL = "smollm2-135m-instruct"


@given(
    model=st.text(min_size=1, max_size=60).filter(str.strip),
    rank=st.integers(1, 1024),
    rate=st.floats(1e-8, 1, allow_nan=False),
    epochs=st.integers(1, 10_000),
    steps=st.none() | st.integers(1, 10**6),
    views=st.sets(st.sampled_from(["document", "paragraph", "sentence"]), min_size=1),
)
def test_hyperparameters_come_back_as_the_same_spec(
    model: str, rank: int, rate: float, epochs: int, steps: int | None, views: set[str]
) -> None:
    spec = TrainSpec(model=model, lora_rank=rank, learning_rate=rate, epochs=epochs, max_steps=steps, views=tuple(sorted(views)))
    pairs = spec.to_hyperparameters()
    assert all("\n" not in value and json.dumps(json.loads(value)) == value for value in pairs.values())
    assert TrainSpec.from_hyperparameters(pairs) == spec


def test_what_the_platform_adds_is_left_out_and_nothing_else() -> None:
    pairs = TrainSpec(model=MODEL).to_hyperparameters()
    assert TrainSpec.from_hyperparameters({**pairs, "sagemaker_region": "x", "_tuning_objective_metric": "loss"}).model == MODEL
    with pytest.raises(SpecError, match="did you mean lora_rank"):
        TrainSpec.from_hyperparameters({**pairs, "lora_rnk": "8"})


def test_a_bare_string_is_refused_rather_than_guessed() -> None:
    with pytest.raises(SpecError, match="method is not JSON"):
        TrainSpec.from_hyperparameters({**TrainSpec(model=MODEL).to_hyperparameters(), "method": "qlora"})


def test_another_spec_version_is_refused_with_the_remedy_before_anything_else() -> None:
    pairs = {**TrainSpec(model=MODEL).to_hyperparameters(), "spec_version": str(SPEC_VERSION + 1), "an_option_of_the_future": "1"}
    with pytest.raises(SpecError, match=r"same trimtab version on both sides \(pip install"):
        TrainSpec.from_hyperparameters(pairs)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SpecError, match=r"lora_rank.*; epochs"):
        TrainSpec(model=MODEL, lora_rank=0, epochs=0)


def test_a_check_of_ours_is_said_in_its_own_words() -> None:
    with pytest.raises(SpecError, match=r"^model: is empty: give a catalog alias, a Hub id or a folder \(given: ''\)"):
        TrainSpec(model="")
    with pytest.raises(SpecError, match=r"^several machines with GPUs cannot train together yet: .*--device xeon$"):
        JobSpec(train=TrainSpec(model=MODEL), data=("x",), device="gpu", nodes=2)


def test_a_token_is_not_sent_as_a_hyperparameter() -> None:
    with pytest.raises(SpecError, match="HF_TOKEN"):
        TrainSpec(model="hf_" + "a" * 30).to_hyperparameters()


def test_a_value_beyond_the_platforms_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="2,500"):
        TrainSpec(model="x" * 2_600).to_hyperparameters()


def test_rows_are_shared_by_jobs_that_only_train_differently() -> None:
    one, other = TrainSpec(model=MODEL), TrainSpec(model=MODEL, learning_rate=1e-5, lora_rank=4)
    assert one.digest() != other.digest()
    assert one.preparation_digest() == other.preparation_digest()
    longer = {"epochs": one.epochs + 1}  # which rehearses more text, where any is rehearsed
    assert one.preparation_digest() != one.model_copy(update=longer).preparation_digest()
    plain = TrainSpec(model=MODEL, replay=0)
    assert plain.preparation_digest() == plain.model_copy(update=longer).preparation_digest()
    assert one.preparation_digest() != TrainSpec(model=MODEL, max_seq_len=64).preparation_digest()


def test_a_job_needs_data() -> None:
    with pytest.raises(SpecError, match="data"):
        JobSpec(train=TrainSpec(model=MODEL), data=())
