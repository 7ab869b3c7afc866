"""Each family of models: what its config.json says, that its packed samples are apart, that it trains and goes on, and what serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.job_tree import losses, make_job
from support.packed_rows import LENGTHS, drawn, furthest, parts, row, states
from support.tiny_families import SHAPES, WINDOW, config_of, make_model
from trimtab import families
from trimtab.errors import SpecError
from trimtab.events import EventLog
from trimtab.layout import JobDir
from trimtab.spec import JobSpec, TrainSpec
from trimtab.staging import stage
from trimtab_runtime import recipe
from trimtab_runtime.batch import as_batch, batch_loss
from trimtab_runtime.engine import Engine
from trimtab_runtime.engines import families as openvino
from trimtab_runtime.methods.lora import linear_layers
from trimtab_runtime.model import load_model
from trimtab_runtime.prepare import prepare
from trimtab_runtime.rows import Row

# PEFT still asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ALL = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else make_model(root / name, config_of(name))

    return folder


def loaded(folder: Path, method: str = "lora", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With adapters that do something, as after some training."""
    torch.manual_seed(0)
    model = load_model(folder, TrainSpec(model="tiny", method=method, lora_rank=4, max_seq_len=512), dtype)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


# what config.json says ------------------------------------------------------------------------------------------------------------------


def rope(positions: int, kind: str, factor: float | None = None, before: int | None = None) -> dict[str, Any]:
    settings = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": before}
    return {"max_position_embeddings": positions, "rope_parameters": {name: value for name, value in settings.items() if value}}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
        ({"model_type": "falcon"}, 2048),  # Falcon's config.json leaves it to transformers
        ({"model_type": "someone's"}, None),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        (rope(131072, "llama3", 8.0, 8192), 131072),
        (rope(32768, "yarn", 4.0, 32768), 131072),
        (rope(131072, "yarn", 4.0, 32768), 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),  # as it was written once
        (rope(4096, "dynamic", 4.0), 4096),  # a longer sample would change the others in its row
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
    ],
)
def test_the_context_is_that_of_the_rotary_embedding_too(config: Mapping[str, Any], context: int | None) -> None:
    assert families.context_of(config) == context
    if context is not None:
        assert not families.refusal(config, context)
        assert f"choose {context} or less" in families.refusal(config, context + 1)


@pytest.mark.parametrize(
    ("config", "max_seq_len", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, 128, "sequence to sequence"),
        ({"model_type": "falcon", "alibi": True}, 128, "ALiBi"),
        ({"model_type": "phi3", **rope(131072, "longrope", None, 4096)}, 4097, "--max-seq-len 4096"),
        ({"model_type": "gemma3_text", "max_position_embeddings": 32768, "sliding_window": 512}, 513, "sliding window of 512"),
        ({"model_type": "llama4_text", "max_position_embeddings": 32768, "attention_chunk_size": 256}, 257, "sliding window of 256"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_config(config: Mapping[str, Any], max_seq_len: int, said: str) -> None:
    assert said in families.refusal(config, max_seq_len)


def test_a_window_that_is_not_used_or_is_known_refuses_nothing() -> None:
    sizes = {"max_position_embeddings": 32768, "sliding_window": 4096}
    assert not families.refusal({"model_type": "mistral", **sizes}, 8192)
    assert not families.refusal({"model_type": "qwen2_moe", "use_sliding_window": False, **sizes}, 8192)


def test_a_row_beyond_the_model_is_refused_once_its_config_is_known(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """Before the data is looked at: that there is none is not said."""
    spec = JobSpec(train=TrainSpec(model=str(folders("qwen3")), max_seq_len=1024, replay=0), data=(str(tmp_path / "nothing.txt"),))
    with pytest.raises(SpecError, match=r"max_seq_len 1,024 is beyond this model's 512 positions: .*--max-seq-len 512"):
        stage(spec, cache=tmp_path / "cache", say=lambda line: None)
    with pytest.raises(SpecError, match="beyond this model's 512 positions"):  # whoever prepared the rows
        load_model(folders("qwen3"), spec.train, torch.float32)


# what serves it -------------------------------------------------------------------------------------------------------------------------


@ALL
def test_the_table_of_engines_is_what_the_engines_say(name: str) -> None:
    config = config_of(name).to_dict() | {"architectures": [type(AutoModelForCausalLM.from_config(config_of(name))).__name__]}
    family = families.family_of(config)
    assert family is not None
    assert config["architectures"] == [family.architecture]
    assert ("openvino" in family.engines) == (family.architecture in openvino.FAMILIES)
    if "openvino" in family.engines:
        assert openvino.refusal(config) == ""
    assert family.engines[-2:] == ("vllm", "transformers")


def test_every_family_of_the_openvino_graph_is_in_the_table() -> None:
    assert {
        family.architecture: family.model_type for family in families.FAMILIES.values() if "openvino" in family.engines
    } == openvino.FAMILIES


@pytest.mark.parametrize("name", [name for name in SHAPES if "openvino" not in families.FAMILIES[SHAPES[name][0]].engines])
def test_what_the_graph_does_not_know_transformers_serves(name: str, folders: Callable[[str], Path]) -> None:
    """Prompts of different lengths in one batch, as transformers goes on with each alone."""
    prompts = [drawn()[:length].tolist() for length in (9, 23, 4)]
    model = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32)
    answers = Engine.load(folders(name), dtype="float32").complete(prompts, max_new_tokens=8, stop_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([prompt])
        whole = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False, eos_token_id=-1)
        assert answer.ids == whole[0, len(prompt) :].tolist()


# packed samples are apart ---------------------------------------------------------------------------------------------------------------


@ALL
def test_packed_samples_are_what_the_models_own_attention_makes_of_them_alone(name: str, folders: Callable[[str], Path]) -> None:
    """States and logits; the reference is transformers' attention, with its sliding window, on one sample after another."""
    tokens = drawn()
    base = load_model(folders(name), TrainSpec(model="tiny", method="lora", lora_rank=4, max_seq_len=512), torch.float32).get_base_model()
    reference = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32)
    batch = as_batch([row(tokens, LENGTHS)])
    with torch.inference_mode():
        packed = base.get_decoder()(**batch.inputs()).last_hidden_state[0]
        logits = base.get_output_embeddings()(packed)
        for place in parts():
            alone = reference.model if hasattr(reference, "model") else reference.transformer
            given = torch.from_numpy(tokens[place])[None]
            assert furthest(packed[place], alone(input_ids=given).last_hidden_state[0]) < 1e-5
            assert furthest(logits[place], reference(input_ids=given).logits[0]) < 1e-5


@ALL
@pytest.mark.parametrize(("method", "dtype", "within"), [("lora", torch.bfloat16, 2e-2), ("qlora", torch.float32, 1e-5)])
def test_another_sample_changes_no_bit_of_its_neighbours(
    name: str, folders: Callable[[str], Path], method: str, dtype: torch.dtype, within: float
) -> None:
    model, tokens = loaded(folders(name), method, dtype), drawn()
    before = states(model, as_batch([row(tokens, LENGTHS)]))
    changed = parts()[3]
    other = tokens.copy()
    other[changed] = (tokens[changed] + 7) % 297 + 3
    after = states(model, as_batch([row(other, LENGTHS)]))
    assert furthest(after[changed], before[changed]) > 0.1
    for place in parts():
        if place != changed:
            assert torch.equal(before[place], after[place])
        assert furthest(before[place], states(model, as_batch([row(tokens[place], [place.stop - place.start])]))) < within


@ALL
def test_gradients_of_a_row_are_the_sum_of_its_samples_gradients(name: str, folders: Callable[[str], Path]) -> None:
    model, tokens = loaded(folders(name)), drawn()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradient(*rows: Row) -> list[torch.Tensor]:
        for one in rows:
            batch_loss(model, as_batch([one]), scale=1.0).backward()
        found = [parameter.grad.clone() for parameter in trained]
        model.zero_grad()
        return found

    together = gradient(row(tokens, LENGTHS))
    apart = gradient(*(row(tokens[place], [place.stop - place.start]) for place in parts() if place.stop - place.start > 1))
    assert all(float(one.norm()) > 0 for one in together)
    for one, other in zip(together, apart, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_a_window_is_a_window(name: str, folders: Callable[[str], Path]) -> None:
    """With every layer's window two layers reach back twice as far, less the place itself; a layer without one reaches everywhere."""
    model, tokens = loaded(folders(name)), drawn()[:90]
    before = states(model, as_batch([row(tokens, [90])]))
    other = tokens.copy()
    other[0] = tokens[0] + 1
    differs = (states(model, as_batch([row(other, [90])])) != before).any(-1).nonzero().squeeze(1)
    assert int(differs.max()) == (2 * (WINDOW - 1) if name == "mistral" else 89)


@ALL
def test_adapters_go_where_the_table_says(name: str, folders: Callable[[str], Path]) -> None:
    model = loaded(folders(name))
    family = families.family_of(model.get_base_model().config.to_dict())
    assert family is not None
    adapted = {key.split(".lora_A")[0].rsplit(".", 1)[-1] for key, _ in model.named_parameters() if "lora_A" in key}
    assert adapted == set(family.targets)


def test_what_stays_of_a_mixture_is_said(folders: Callable[[str], Path]) -> None:
    said: list[str] = []
    model = load_model(folders("mixtral"), TrainSpec(model="tiny", lora_rank=4, max_seq_len=512), torch.float32, say=said.append)
    said = [line for line in said if not line.startswith(("base ", "fused "))]
    assert said[0].startswith("family mixtral: adapters go on the attention layers alone")
    experts = 2 * 4 * 3 * 64 * 128  # layers, experts, maps
    assert f"{experts:,} of" in said[1]
    frozen = dict(model.get_base_model().named_parameters())
    assert not any(parameter.requires_grad for key, parameter in frozen.items() if "experts" in key or key.endswith("gate.weight"))
    assert all(parameter.dtype is torch.float32 for key, parameter in frozen.items() if "experts" in key)
    said.clear()
    load_model(folders("mixtral"), TrainSpec(model="tiny", method="full", max_seq_len=512), torch.float32, say=said.append)
    assert "trained as all others, and the router by the loss of the tokens alone" in " ".join(said)
    assert "adapters" not in " ".join(said)


# training -------------------------------------------------------------------------------------------------------------------------------


STEPS = 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Path:
    """The rows, which are the same for all: they have one tokenizer."""
    job = job_for(tmp_path_factory.mktemp("prepared") / "job", folders("llama2"))
    prepare(job, spec_of(job), lambda line: None)
    return job.channel("train")


def job_for(root: Path, model: Path, rows: Path | None = None) -> JobDir:
    job = make_job(root, model, max_steps=STEPS, epochs=100, max_seq_len=48, learning_rate=1e-2, warmup_ratio=0, lr_schedule="constant")
    if rows is not None:
        shutil.copytree(rows, job.channel("train"))
    return job


def spec_of(job: JobDir) -> TrainSpec:
    return TrainSpec.from_hyperparameters(json.loads(job.hyperparameters.read_text()))


def train(job: JobDir, stop: Callable[[], bool]) -> str:
    events = EventLog(job.events)
    try:
        return recipe.train(job, spec_of(job), events, lambda line: None, stop)
    finally:
        events.close()


@ALL
def test_it_trains_and_goes_on_as_if_it_had_not_stopped(name: str, folders: Callable[[str], Path], prepared: Path, tmp_path: Path) -> None:
    straight, stopped = (job_for(tmp_path / root, folders(name), prepared) for root in ("straight", "stopped"))
    assert train(straight, lambda: False) == "succeeded"
    course = losses(straight)
    assert len(course) == STEPS
    assert np.mean([course[step] for step in (STEPS - 1, STEPS)]) < np.mean([course[step] for step in (1, 2)])

    assert train(stopped, lambda: len(losses(stopped)) == 3) == "stopped"
    assert list(losses(stopped)) == [1, 2, 3]
    assert train(stopped, lambda: False) == "succeeded"
    assert losses(stopped) == course
    adapter = "adapter_model.safetensors"
    assert (stopped.model / adapter).read_bytes() == (straight.model / adapter).read_bytes()


def test_every_layer_that_adapters_can_be_on_is_found(folders: Callable[[str], Path]) -> None:
    falcon = AutoModelForCausalLM.from_pretrained(folders("falcon"))
    assert sorted({name.rsplit(".", 1)[-1] for name in linear_layers(falcon)}) == sorted(families.FAMILIES["falcon"].targets)
