"""Base and tuned model are asked the same, in one go; what comes back tells them apart and is the same the next time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from support.job_tree import PAGES, make_job, run
from trimtab import weights
from trimtab.artifact import Artifact
from trimtab.errors import StagingError, WeightsError
from trimtab.evaluation import Prompt, evaluate
from trimtab.events import Event, Progress

PROMPTS = [
    Prompt("start", "complete", "The Brine Mill was built in", 8),
    Prompt("question", "chat", "Who keeps the key of the tower?", 12),
    Prompt("short", "complete", "Tides", 1),
]
TEXTS = {"learned": " ".join(PAGES.values()), "other": "A bicycle has two wheels and a saddle. " * 40}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """Sixty steps on four short pages."""
    digest = weights.resolve(str(tiny_model), say=lambda line: None).digest
    root = tmp_path_factory.mktemp("evaluate") / "job"
    job = make_job(root, tiny_model, model=str(tiny_model), model_digest=digest, max_steps=60, epochs=60)
    run(job, "prepare")
    run(job, "train")
    return Artifact(job.model)


def test_both_models_answer_every_prompt_and_the_tuned_one_knows_its_pages(artifact: Artifact) -> None:
    seen: list[Event] = []
    results = evaluate(artifact, PROMPTS, TEXTS, show=seen.append)
    assert set(results) == {"base", "tuned"}
    for result in results.values():
        assert set(result["answers"]) == {"start", "question", "short"}
        assert set(result["perplexity"]) == {"learned", "other"}
        assert all(math.isfinite(value) and value > 1 for value in result["perplexity"].values())
        assert result["seconds"] > 0
        assert all(set(answer) == {"text", "ended"} for answer in result["answers"].values())
    base, tuned = results["base"], results["tuned"]
    assert tuned["answers"]["start"]["text"] != base["answers"]["start"]["text"]
    assert tuned["perplexity"]["learned"] < 0.5 * base["perplexity"]["learned"]

    done = [event.done for event in seen if isinstance(event, Progress)]
    assert done == sorted(done)
    assert done[-1] == next(event.of for event in seen if isinstance(event, Progress)) == 2 * len(PROMPTS)

    again = evaluate(artifact, PROMPTS, TEXTS)
    assert [again[name]["answers"] for name in again] == [results[name]["answers"] for name in again]
    assert [again[name]["perplexity"] for name in again] == [results[name]["perplexity"] for name in again]
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted([*artifact.manifest["files"], "trimtab.json"])


def test_a_prompt_that_the_model_cannot_take_is_refused_with_the_reason(artifact: Artifact) -> None:
    with pytest.raises(StagingError, match=r"the prompts could not be put to the models: .*token"):
        evaluate(artifact, [Prompt("long", "complete", "word " * 5000, 8)], {})


def test_another_base_model_than_the_trained_one_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    from support.tiny_model import make_tiny_model

    other = make_tiny_model(tmp_path / "other", seed=1)
    changed = tmp_path / "artifact"
    changed.mkdir()
    text = (artifact.path / "trimtab.json").read_text()
    (changed / "trimtab.json").write_text(text.replace(artifact.spec.model, str(other)))
    with pytest.raises(WeightsError, match="is not the model that was tuned"):
        evaluate(Artifact(changed), PROMPTS, {})
