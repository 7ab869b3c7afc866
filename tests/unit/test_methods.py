"""What each method trains: which layers, how they begin, and that DoRA and rsLoRA are PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.job_tree import losses, make_job, run, train_here
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts
from trimtab.spec import TrainSpec
from trimtab_runtime import artifact, checkpoint
from trimtab_runtime.choices import method_line, schedule
from trimtab_runtime.methods import trained_parts
from trimtab_runtime.model import load_model, read_config
from trimtab_runtime.recipe import bytes_to_write, rows_of_step
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.xeon.attention import plan_groups
from trimtab_runtime.xeon.lora import weight_of

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(2))


def spec(**options: Any) -> TrainSpec:
    return TrainSpec(model="tiny", **{"method": "lora", "lora_rank": 4} | options)


def adapted(model: torch.nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ((), lambda name: True),
        (("q_proj", "v_proj"), lambda name: name.endswith(("q_proj", "v_proj"))),
        (("self_attn.o_proj", "layers.2.mlp.up_proj"), lambda name: "o_proj" in name or "2.mlp.up" in name),
    ],
)
def test_adapters_are_where_the_ends_of_the_names_say(tiny_model: Path, targets: tuple[str, ...], wanted: Callable[[str], bool]) -> None:
    for method, kind in (("lora", {}), ("qlora", {"use_dora": True})):
        asked = spec(method=method, lora_targets=targets, **kind)
        model = load_model(tiny_model, asked, torch.float32)
        layers = [name for name, _ in model.get_base_model().named_modules() if name.endswith("_proj")]
        assert adapted(model) == {name for name in layers if wanted(name)}
        trained = trained_parts(model, asked, torch.float32)
        facts = ModelFacts.from_config(read_config(tiny_model))
        assert facts is not None
        assert trained.size == facts.trained(asked)
        assert trained.of == facts.parameters + trained.size
        assert all(parameter.dtype == torch.float32 for parameter in trained.parameters.values())


@pytest.mark.parametrize(("target", "hint"), [("q_prj", "did you mean q_proj"), ("lm_head", "the head gets no adapters"), ("proj", "")])
def test_a_layer_that_there_is_not_is_refused_with_those_that_there_are(tiny_model: Path, target: str, hint: str) -> None:
    for method in ("lora", "qlora"):
        with pytest.raises(SpecError, match=rf"ends in '{target}'.*{hint}.*down_proj, gate_proj, .*v_proj"):
            load_model(tiny_model, spec(method=method, lora_targets=("q_proj", target)), torch.float32)


def test_adapters_of_any_kind_begin_as_the_same_model(tiny_model: Path) -> None:
    """As what quantisation took away from the layers that have any: scales and lengths of rows change nothing of it."""
    given = {"input_ids": IDS, "position_ids": torch.arange(40)[None], "packed_groups": plan_groups([40])}

    def states(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = load_model(tiny_model, spec(**options), torch.float32).get_base_model().eval()
        with torch.no_grad():
            return model.get_decoder()(**given).last_hidden_state

    both = {"use_rslora": True, "use_dora": True}
    torch.testing.assert_close(states(method="qlora", **both), states(method="qlora"), rtol=1e-3, atol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(states(**both), original.get_decoder()(input_ids=IDS).last_hidden_state, rtol=1e-3, atol=1e-4)

    some = load_model(tiny_model, spec(method="qlora", lora_targets=("o_proj",), **both), torch.float32).get_base_model()
    for number, layer in enumerate(some.model.layers):
        of_it, weight = layer.self_attn.o_proj, original.model.layers[number].self_attn.o_proj.weight.data
        assert of_it.scaling["default"] == 32.0
        product = of_it.lora_B["default"].weight.data @ of_it.lora_A["default"].weight.data * 32
        kept = weight_of(of_it.base_layer, torch.float32)
        assert (kept + product - weight).norm() < 0.98 * (kept - weight).norm()  # rank 4 of 192, of noise


def test_in_bf16_dora_learns_less_than_bf16_could_tell(tiny_model: Path) -> None:
    """3.5 thousandths of a magnitude change what the layer gives by as much: bf16's next number after 1 is 1.0078."""
    model = load_model(tiny_model, spec(use_dora=True, lora_targets=("up_proj",)), torch.bfloat16)
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(256, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        before = layer(x).float()
        layer.lora_magnitude_vector["default"].weight.data.mul_(1.0035)
        gain = (layer(x).float().norm() / before.norm()).item()
    assert 1.002 < gain < 1.005


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"use_rslora": True, "lora_targets": ("q_proj", "down_proj")}, {"use_dora": True, "lora_dropout": 1e-9}]
)
def test_five_steps_are_pefts(tmp_path: Path, tiny_model: Path, kind: dict[str, Any]) -> None:
    """Our loop and layers beside PEFT's own under a plain AdamW: same losses, same adapters. With dropout ours are PEFT's layers."""
    text = {f"Page {number}": "".join(chr(97 + (number * 7 + place) % 26) for place in range(70)) + "." for number in range(6)}
    steady = {"lr_schedule": "constant", "warmup_ratio": 0, "views": ("document",), "max_seq_len": 90}
    job = make_job(tmp_path / "job", tiny_model, text, **steady, max_steps=5, learning_rate=2e-3, **kind)
    run(job, "prepare")
    said = train_here(job)
    asked = TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))
    assert ("DoRA" in said) == asked.use_dora
    rows = PackedRows(job.channel("train"))

    torch.manual_seed(asked.seed)
    names = asked.lora_targets or ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    config = LoraConfig(
        r=asked.lora_rank, lora_alpha=asked.lora_alpha, lora_dropout=asked.lora_dropout, target_modules=sorted(names),
        use_rslora=asked.use_rslora, use_dora=asked.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=0.0)
    theirs = []
    for step in range(5):
        (row,) = (rows[index] for index in rows_of_step(step, rows.ledger.rounds, asked))
        ids = torch.from_numpy(row.tokens).long()[None]
        loss = model(input_ids=ids, labels=ids).loss
        theirs.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, asked.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert list(losses(job).values()) == pytest.approx(theirs, abs=1e-4)
    from safetensors.torch import load_file

    ours = load_file(job.model / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mine = ours[name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")]
            assert float((mine - parameter.detach()).norm() / parameter.detach().norm()) < 0.02, name


def test_what_is_said_of_a_method_and_a_schedule() -> None:
    said = method_line(TrainSpec(model="m", method="full"), 10, 10, "bfloat16")
    assert said == "method full: 10 of 10 parameters trained, kept in fp32, computed in bfloat16"
    said = method_line(spec(use_dora=True, use_rslora=True, method="qlora", lora_targets=("q_proj",)), 1000, 20_000, "float32")
    assert said == (
        "method qlora: 1,000 of 20,000 parameters trained, in fp32: rsDoRA of rank 4, alpha 64 on q_proj; "
        "base in 4-bit NF4, computed in float32"
    )
    found = schedule(spec(recipe="instruct", learning_rate=2e-5), 100, 8)
    assert f"schedule {found.value}: {found.reason}" == (
        "schedule cosine: 5 warm-up steps to 2e-05, then down to 0 at step 100; rows 8 a step (recipe instruct)"
    )
    assert schedule(spec(warmup_ratio=0, lr_schedule="constant"), 7, 1).reason.startswith("from 0.0007, then the same up to step 7")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lora_rank": 8}, "lora_rank is for adapters: leave it out"),
        ({"use_dora": True, "lora_targets": ["q_proj"], "lora_alpha": 3}, "lora_alpha, lora_targets and use_dora are .* leave them out"),
        ({"keep_merged": True}, "keep_merged"),
    ],
)
def test_options_of_adapters_are_refused_where_there_are_none(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=rf"method full .*{named}.*--method lora"):
        TrainSpec(model="m", method="full", **given)


@pytest.mark.parametrize("options", [{"method": "qlora"}, {"method": "lora", "use_dora": True, "keep_merged": True}, {"method": "full"}])
def test_what_a_run_will_write_is_known_before_its_model_is_loaded(tiny_model: Path, options: dict[str, Any]) -> None:
    asked = TrainSpec(model="tiny", **options, keep_checkpoints=3)
    trained = trained_parts(load_model(tiny_model, asked, torch.float32), asked, torch.float32)
    merged = (tiny_model / "model.safetensors").stat().st_size if asked.keep_merged else 0
    expected = 4 * checkpoint.size(trained.parameters) + artifact.size(asked, trained.size) + merged
    assert bytes_to_write(asked, read_config(tiny_model), tiny_model) == expected
    assert bytes_to_write(asked, {}, tiny_model) is None
