"""Names of layers that a known family does not have are refused before anything is prepared or paid."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import families
from trimtab.errors import SpecError
from trimtab.spec import JobSpec
from trimtab.staging import stage


@pytest.mark.parametrize(
    ("model_type", "target", "said"),
    [
        ("llama", "q_prj", "no linear layer ends in 'q_prj'; did you mean q_proj? There are: q_proj, k_proj, "),
        ("qwen3", "lm_head", "no linear layer ends in 'lm_head'; the head gets no adapters; There are: "),
        ("falcon", "q_proj", "There are: query_key_value, dense, dense_h_to_4h, dense_4h_to_h"),
        ("mixtral", "gate_proj", "There are: q_proj, k_proj, v_proj, o_proj"),
    ],
)
def test_a_layer_that_a_family_does_not_have_is_named(model_type: str, target: str, said: str) -> None:
    assert said in families.missing_target({"model_type": model_type}, (target,))


def test_what_there_is_and_what_nobody_knows_goes_on() -> None:
    for family in families.FAMILIES.values():
        assert not families.missing_target({"model_type": family.model_type}, (*family.targets, f"model.layers.1.{family.targets[0]}"))
    assert not families.missing_target({"model_type": "new"}, ("anything",))


def test_it_is_refused_before_the_data_is_read(small_job: JobSpec, tmp_path: Path) -> None:
    train = small_job.train.model_copy(update={"lora_targets": ("q_proj", "up_prj")})
    job = small_job.model_copy(update={"train": train, "data": (str(tmp_path / "there is no such file"),)})
    with pytest.raises(SpecError, match=r"no linear layer ends in 'up_prj'; did you mean up_proj\?"):
        stage(job, cache=tmp_path / "cache", say=lambda line: None)
    assert not (tmp_path / "cache" / "data").exists()
