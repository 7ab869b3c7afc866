from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.tiny_adapter import make_adapter, make_lively_model
from trimtab.errors import EndpointError, TrimtabError, WeightsError
from trimtab_runtime.engine import MAX_ROWS, Engine, plan_batches

# PEFT 0.21 asks transformers 5.23 for a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = [
    "The",
    "The keeper of the tower counts ships at dawn and then he writes each name of each ship in a large green book.",
    "Bread is baked on Tuesdays",
    "Tides turn twice a day; the harbour gate opens",
    "The lighthouse keeper keeps the key on a brass hook, and",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    return [engine.encode(text) for text in TEXTS]


def test_greedy_equals_transformers_generate(engine: Engine, folder: Path, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, ours in zip(prompts, engine.complete(prompts, max_new_tokens=24), strict=True):
        whole = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False)
        theirs = whole[0, len(prompt) :].tolist()
        assert ours.ids == [token for token in theirs if token not in engine.stop_ids]
        assert ours.ended == (theirs[-1] in engine.stop_ids)


def test_a_batch_answers_as_each_alone_with_different_limits(engine: Engine, prompts: list[list[int]]) -> None:
    limits = [30, 3, 17, 1, 25]  # rows leave one by one, so the batch is cut down several times
    alone = [engine.complete([prompt], max_new_tokens=limit)[0] for prompt, limit in zip(prompts, limits, strict=True)]
    assert engine.complete(prompts, max_new_tokens=limits) == alone
    assert len({tuple(one.ids[:1]) for one in alone}) >= 3, "the answers must depend on the prompts for this to mean anything"


def test_a_shared_beginning_changes_no_answer(engine: Engine) -> None:
    talks = [engine.chat_ids([{"role": "system", "content": TEXTS[1]}, {"role": "user", "content": text}]) for text in TEXTS]
    alone = [engine.complete([talk], max_new_tokens=16)[0] for talk in talks]
    assert engine.complete(talks, max_new_tokens=16) == alone
    same = engine.complete([talks[0]] * 3, max_new_tokens=16)  # nothing differs but the last token is each one's own
    assert same == [alone[0]] * 3
    longer = [talks[0][:20], talks[0]]  # one prompt begins with the other
    assert engine.complete(longer, max_new_tokens=8) == [engine.complete([one], max_new_tokens=8)[0] for one in longer]


def test_more_prompts_than_a_batch_takes_come_back_in_order(engine: Engine, prompts: list[list[int]]) -> None:
    many = [prompts[index % len(prompts)] for index in range(MAX_ROWS + 6)]
    seen: list[tuple[int, int]] = []
    found = engine.complete(many, max_new_tokens=4, on_progress=lambda done, of: seen.append((done, of)))
    five = engine.complete(prompts, max_new_tokens=4)
    assert found == [five[index % len(prompts)] for index in range(MAX_ROWS + 6)]
    assert seen == [(done, len(many)) for done in range(1, len(many) + 1)]


def test_a_stop_token_ends_and_is_left_out(engine: Engine, prompts: list[list[int]]) -> None:
    free = engine.complete([prompts[1]], max_new_tokens=12)[0]
    assert not free.ended
    last = free.ids[-1]
    place = free.ids.index(last)
    ended = engine.complete([prompts[1]], max_new_tokens=12, stop_ids={last})[0]
    assert (ended.ids, ended.ended) == (free.ids[:place], True)


def test_on_token_sees_what_comes(engine: Engine, prompts: list[list[int]]) -> None:
    seen: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    found = engine.complete(prompts, max_new_tokens=6, on_token=lambda row, token: seen[row].append(token))
    assert seen == {row: one.ids for row, one in enumerate(found)}


def test_a_seed_repeats_whatever_the_batch(engine: Engine, prompts: list[list[int]]) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 7}
    found = engine.complete(prompts, **options)
    assert engine.complete(prompts, **options) == found
    assert engine.complete(prompts[:2], **options) == found[:2]
    assert engine.complete(prompts, **{**options, "seed": 8}) != found


def test_sampling_follows_the_model_and_top_p_cuts_its_tail(engine: Engine, prompts: list[list[int]]) -> None:
    count, temperature = 1500, 3.0
    with torch.inference_mode():
        chances = torch.softmax(engine.model()(torch.tensor([prompts[1]])).logits[0, -1] / temperature, -1)
    likeliest = int(chances.argmax())
    draws = [
        engine.complete([prompts[1]] * 50, max_new_tokens=1, temperature=temperature, seed=seed, stop_ids=()) for seed in range(count // 50)
    ]
    share = Counter(one.ids[0] for some in draws for one in some)[likeliest] / count
    expected = float(chances[likeliest])
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    narrow = engine.complete([prompts[1]] * 40, max_new_tokens=1, temperature=temperature, top_p=expected * 0.9, seed=0, stop_ids=())
    assert {one.ids[0] for one in narrow} == {likeliest}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "from 1 up"),
        ({"max_new_tokens": 10**12}, "context of 4,096"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"model": "tuned"}, "ask for one of: base"),
    ],
)
def test_refusals_say_what_to_do(engine: Engine, prompts: list[list[int]], options: dict[str, object], message: str) -> None:
    with pytest.raises(EndpointError, match=message):
        engine.complete(prompts[:1], **options)  # type: ignore[arg-type]
    with pytest.raises(EndpointError, match="empty"):
        engine.complete([[]])


def test_chat_ids_are_the_templates(engine: Engine, folder: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Who keeps the key?"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert engine.chat_ids(talk) == theirs
    assert engine.decode(engine.encode("Bread, oil and salt")) == "Bread, oil and salt"
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(EndpointError, match="no chat template"):
        Engine.load(tmp_path, dtype="float32").chat_ids(talk)


def test_an_adapter_answers_as_tuned_and_the_base_stays(engine: Engine, folder: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    both = Engine.load(folder, make_adapter(tmp_path / "artifact", folder))
    assert both.names == ("tuned", "base")
    assert both.dtype == torch.float32, "the artifact says so"
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "artifact"))
    ids = torch.tensor([prompts[1]])
    with torch.inference_mode():
        assert torch.equal(both.model()(ids).logits, peft(ids).logits)
    base = engine.complete(prompts, max_new_tokens=8)
    assert both.complete(prompts, model="base", max_new_tokens=8) == base
    assert both.complete(prompts, max_new_tokens=8) != base


def test_qlora_serves_the_weights_it_was_trained_on(folder: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from trimtab.spec import TrainSpec
    from trimtab_runtime.model import load_model
    from trimtab_runtime.xeon import attention

    artifact = make_adapter(tmp_path / "artifact", folder, method="qlora")
    trained = load_model(folder, TrainSpec(model="tiny", method="qlora", lora_rank=4, lora_alpha=8), torch.float32).eval()
    set_peft_model_state_dict(trained, load_file(artifact / "adapter_model.safetensors"))
    engine = Engine.load(folder, artifact)
    ids = torch.tensor([prompts[1]])
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1])[None]
        expected = trained(input_ids=ids, position_ids=positions, packed_groups=attention.plan_groups([ids.shape[1]])).logits
        found = engine.model()(ids).logits
        plain = Engine.load(folder, make_adapter(tmp_path / "plain", folder, method="lora")).model()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 0.05, "quantising must matter for this to mean anything"


def test_what_cannot_be_loaded_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with pytest.raises(WeightsError, match=r"holds no trimtab\.json"):
        Engine.load(folder, tmp_path / "artifact")
    with pytest.raises(TrimtabError):
        Engine.load(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").symlink_to(folder / "tokenizer_config.json")
    with pytest.raises(WeightsError, match="safetensors"):
        Engine.load(tmp_path)


def test_batches_keep_like_with_like_and_within_the_budget() -> None:
    lengths, limits = [5, 50, 6, 48, 900], [10] * 5
    assert plan_batches(lengths, limits, budget=130) == [[4], [1, 3], [2, 0]]
    assert plan_batches([4] * 5, [1] * 5, budget=1000, max_rows=2) == [[0, 1], [2, 3], [4]]
    assert plan_batches([], [], budget=10) == []
    for batch in plan_batches(list(range(1, 200)), [7] * 199, budget=500):
        assert len(batch) == 1 or len(batch) * (max(batch) + 1 + 7) <= 500
