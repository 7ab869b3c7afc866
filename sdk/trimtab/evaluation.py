"""Many prompts put to a model before and after tuning, in one go on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab import weights
from trimtab.artifact import Artifact
from trimtab.events import Event
from trimtab.layout import JobDir
from trimtab.staging import link_model, run_verb


@dataclass(frozen=True)
class Prompt:
    """`mode` complete: the text is continued; chat: it is a user's turn in the model's chat template."""

    id: str
    mode: Literal["complete", "chat"]
    prompt: str
    max_new_tokens: int


def evaluate(
    artifact: Artifact, prompts: Sequence[Prompt], texts: Mapping[str, str], *, show: Callable[[Event], None] = lambda event: None
) -> dict[str, Any]:
    """Greedy answers and perplexities of the original base model and of the tuned one.

    Returns {"base" | "tuned": {"answers": {id: {"text", "ended"}}, "perplexity": {name: float}, "seconds": float}}.
    Raises WeightsError when the base model is not the one that was trained, StagingError with the runtime's reason.
    """
    base = weights.resolve_trained(artifact)
    with tempfile.TemporaryDirectory(prefix="trimtab-evaluate-") as folder:
        job = JobDir(Path(folder)).make()
        link_model(base, job.channel("model"))
        job.model.rmdir()
        job.model.symlink_to(artifact.path.absolute(), target_is_directory=True)
        job.channel("evaluate").mkdir()
        requests = {"prompts": [asdict(prompt) for prompt in prompts], "texts": dict(texts)}
        (job.channel("evaluate") / "requests.json").write_text(json.dumps(requests, ensure_ascii=False), encoding="utf-8")
        run_verb("evaluate", job, show, doing="the prompts could not be put to the models")
        answers: dict[str, Any] = json.loads((job.events.parent / "answers.json").read_text(encoding="utf-8"))
    return answers
