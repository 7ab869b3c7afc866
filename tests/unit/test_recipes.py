"""Named sets of values: each a job that can be written down, what is given comes first, and every value has its source."""

from __future__ import annotations

import re

import pytest

from trimtab import Job
from trimtab.errors import SpecError
from trimtab.recipes import LORA_OPTIONS, explained, recipes, with_recipe
from trimtab.spec import TrainSpec


def spec(**given: object) -> TrainSpec:
    return TrainSpec(model="smollm2-135m-instruct", **with_recipe(given))


def test_the_spec_names_every_recipe_and_the_first_is_the_default_and_changes_nothing() -> None:
    assert list(recipes()) == list(TrainSpec.model_fields["recipe"].annotation.__args__)  # type: ignore[union-attr]
    assert next(iter(recipes())) == TrainSpec.model_fields["recipe"].default
    assert spec() == TrainSpec(model="smollm2-135m-instruct")
    assert set(TrainSpec.model_fields) >= LORA_OPTIONS


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_a_whole_spec_that_crosses_and_comes_back(name: str) -> None:
    found = spec(recipe=name)
    for option, value in recipes()[name].values.items():
        assert getattr(found, option) == value
    assert TrainSpec.from_hyperparameters(found.to_hyperparameters()) == found


@pytest.mark.parametrize("name", recipes())
def test_every_value_is_explained_once(name: str) -> None:
    found = spec(recipe=name, epochs=7, seed=1)
    lines = explained(found)
    assert all(line.startswith("recipe ") for line in lines), "the plan puts them where they belong by their first word"
    said = "\n".join(line for line in lines if re.match(r"recipe (gives|leaves|is set aside)", line))
    shown = set(TrainSpec.model_fields) - {"spec_version", "model", "model_digest", "data_digest", "recipe", "seed", "keep_merged"}
    quiet = {option for option in shown if TrainSpec.model_fields[option].default in (None, False, ()) and not getattr(found, option)}
    if found.method == "full":
        quiet |= LORA_OPTIONS
    for option in shown:
        assert len(re.findall(rf"(?<![\w-]){option} ", said)) == (option not in quiet), option
    assert re.search(r"set aside for what was given: .*epochs 7", said)


def test_what_the_published_recipes_say_is_what_they_give() -> None:
    instruct = spec(recipe="instruct")
    assert (instruct.learning_rate, instruct.warmup_ratio, instruct.lr_schedule) == (2e-5, 0.05, "cosine")
    assert (instruct.objective, instruct.epochs, instruct.max_seq_len) == ("answers", 2, 4096)
    knowledge = spec(recipe="knowledge")
    assert (knowledge.method, knowledge.epochs, knowledge.max_seq_len, knowledge.replay) == ("qlora", 20, 2048, 0)
    text = spec(recipe="full-text")
    assert (text.method, text.max_seq_len, text.dtype) == ("full", 512, "bfloat16")
    chat = spec(recipe="domain-chat")
    assert (chat.method, chat.learning_rate, chat.epochs, chat.batch_rows, chat.keep_checkpoints) == ("lora", 2e-5, 3, 8, 2)


def test_what_is_given_comes_before_the_recipe() -> None:
    job = Job(model="smollm2-135m-instruct", data="notes.txt", recipe="knowledge", epochs=2, lora_rank=8)
    assert (job.spec.train.epochs, job.spec.train.lora_rank, job.spec.train.max_seq_len) == (2, 8, 2048)
    assert not LORA_OPTIONS & set(with_recipe({"recipe": "knowledge", "method": "full"})), "they would be refused beside it"


def test_all_parameters_are_never_trained_at_a_rate_for_adapters_unless_it_is_asked_for() -> None:
    assert spec(method="full").learning_rate == 2e-5
    assert "learning_rate 2e-05: as instruct has it" in "\n".join(explained(spec(method="full")))
    assert spec(method="full", recipe="full-text").learning_rate == 5e-5
    assert spec(method="full", learning_rate=7e-4).learning_rate == 7e-4
    assert spec(method="lora").learning_rate == TrainSpec.model_fields["learning_rate"].default


@pytest.mark.parametrize("name", ["instrukt", "", 3, None])
def test_a_recipe_that_there_is_not_is_refused(name: object) -> None:
    with pytest.raises(SpecError, match="did you mean instruct" if name == "instrukt" else "recipe"):
        Job(model="smollm2-135m-instruct", data="notes.txt", recipe=name)
