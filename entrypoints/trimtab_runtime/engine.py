"""A small engine on transformers: token ids in, token ids out, many at once. It makes and judges answers where there is no server.

A server's engines are behind another interface, `engines.Engine`, which requests join and leave between steps; one of them,
`engines.transformers`, steps this class.

Made for a CPU: rows are left padded, what all prompts of a batch begin with is computed once, keys and values go into
buffers made once (concatenating them took half of a step's time), and finished rows leave the batch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

from trimtab.errors import EndpointError, SpecError, WeightsError
from trimtab_runtime.choices import cpu_flags, pick_dtype
from trimtab_runtime.sampling import Draw, Sampling
from trimtab_runtime.tokenizer import Tokenizer

MAX_ROWS = 64  # more rows cost as much more time as they bring
CACHE_BYTES = 1 << 30  # keys and values of one batch
SHARED_PREFIX = 8  # tokens from which computing a common beginning once is worth its extra pass


@dataclass(frozen=True)
class Completion:
    """New token ids without the stop token. `ended` is false where the limit cut the answer off."""

    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Step:
    """What one forward pass brought one prompt: a token, or none where it was a stop token; `over` when it was the last."""

    row: int
    token: int | None
    over: bool


class Engine:
    """One base model, and what was trained from it where there is any, answering whole batches on this machine's processors.

    Not the protocol `engines.Engine` of the server's engines.

    `names` are the models that can be asked: the adapters' (first, the default) and "base". An adapter may be a whole model (method full).
    """

    def __init__(self, folder: Path, adapters: Mapping[str, Path], dtype: torch.dtype, *, trust_remote_code: bool = False) -> None:
        self.folder, self.adapters, self.dtype, self.trust_remote_code = folder, dict(adapters), dtype, trust_remote_code
        self.names = (*self.adapters, "base")
        own = (artifact for artifact in self.adapters.values() if (artifact / "tokenizer.json").is_file())
        self.tokenizer = Tokenizer(next(own, folder))
        self._models: dict[str, PreTrainedModel] = {}
        model = self.model(self.names[0])
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.stop_ids = frozenset([self.tokenizer.eos_id, *([ends] if isinstance(ends, int) else ends or [])])

    @classmethod
    def load(cls, model: Path, artifact: Path | None = None, *, dtype: Literal["auto", "bfloat16", "float32"] = "auto") -> Engine:
        """Load a plain Hugging Face folder, and an artifact: an adapter (PEFT's files and `trimtab.json`) on it, or a model beside it.

        Reads local files only, and weights from safetensors only. `dtype` "auto" is the one the adapter was trained in, else
        bfloat16 where the processor computes in it. Raises WeightsError, and SpecError for a tokenizer that cannot be read.
        """
        disable_progress_bar()
        spec: dict[str, Any] = _manifest(artifact).get("spec", {}) if artifact else {}
        choice = pick_dtype(dtype if dtype != "auto" else spec.get("dtype", "auto"), cpu_flags())
        return cls(model, {"tuned": artifact} if artifact else {}, {"bfloat16": torch.bfloat16, "float32": torch.float32}[choice.value])

    def model(self, name: str | None = None) -> PreTrainedModel:
        """The model of that name, loaded when first asked for. Raises EndpointError for an unknown name."""
        name = name or self.names[0]
        if name not in self.names:
            raise EndpointError(f"there is no model {name!r} here; ask for one of: {', '.join(self.names)}")
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def _load(self, name: str) -> PreTrainedModel:
        whole = name in self.adapters and _manifest(self.adapters[name]).get("spec", {}).get("method") == "full"
        folder = self.adapters[name] if whole else self.folder
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.dtype, local_files_only=True, trust_remote_code=self.trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError) as exc:
            raise WeightsError(
                f"{folder} holds no model that can be loaded: {exc}. Give a Hugging Face folder with safetensors weights"
            ) from exc
        if name in self.adapters and not whole:
            artifact = self.adapters[name]
            if _manifest(artifact).get("spec", {}).get("method") == "qlora":
                _quantise_once(model)
            from peft import PeftModel

            with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 for a name that is about to go
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
                model = PeftModel.from_pretrained(model, str(artifact), is_trainable=False)
        return model.eval()

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks. Raises EndpointError without a chat template."""
        if self.tokenizer.chat_template is None:
            raise EndpointError("this model has no chat template, it only completes text: use generate() or /v1/completions")
        try:
            return self.tokenizer.prompt(messages)
        except SpecError as exc:
            raise EndpointError(f"{exc}; change the messages' roles or their order") from exc

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the model's first token where it wants one. What spells a control token stays letters."""
        ids = self.tokenizer.text(text)
        return ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        model: str | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop_ids: Collection[int] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt; results in the prompts' order.

        `max_new_tokens` is one limit or one for each prompt; `stop_ids` None means the model's own. With a seed, a prompt's
        draws depend on the seed and its place in `prompts` only, not on the batch it falls in. `on_progress(done, of)` counts
        finished prompts; `on_token(prompt, id)` sees each new token as it comes. Raises EndpointError for an empty prompt, a
        limit below 1, or more tokens than the model's context.
        """
        weights = self.model(model)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for prompt, limit in zip(prompts, limits, strict=True):
            self.check(prompt, limit)
        sampling = Sampling(temperature, top_p, seed, top_k)
        new: list[list[int]] = [[] for _ in prompts]
        results: list[Completion | None] = [None] * len(prompts)
        done = 0
        for batch in plan_batches([len(p) for p in prompts], limits, CACHE_BYTES // cache_bytes(weights)):
            samplings = [sampling.for_row(row) for row in batch]
            for steps in self.stream([prompts[row] for row in batch], [limits[row] for row in batch], samplings, model, stop_ids):
                for step in steps:
                    row = batch[step.row]
                    if step.token is not None:
                        new[row].append(step.token)
                        if on_token is not None:
                            on_token(row, step.token)
                    if step.over:
                        results[row] = Completion(new[row], step.token is None)
                        done += 1
                        if on_progress is not None:
                            on_progress(done, len(prompts))
        return [result for result in results if result is not None]

    def check(self, prompt: Sequence[int], limit: int) -> None:
        """Raise EndpointError for an empty prompt, a limit below 1, or more tokens than the model's context."""
        if not prompt:
            raise EndpointError("the prompt is empty: give at least one word")
        if limit < 1:
            raise EndpointError(f"max_new_tokens is {limit}: give a whole number from 1 up")
        if len(prompt) + limit > self.context:
            raise EndpointError(
                f"the prompt's {len(prompt):,} tokens and {limit:,} new ones are more than the model's context of {self.context:,}: "
                f"shorten the prompt, or ask for at most {max(0, self.context - len(prompt)):,} new tokens"
            )

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        samplings: Sequence[Sampling],
        model: str | None = None,
        stop_ids: Collection[int] | None = None,
        left: Collection[int] = (),
    ) -> Iterator[list[Step]]:
        """Work on all prompts as one batch, a forward pass at a time, and yield what each pass brought to the prompts that run.

        Rows that the caller puts into `left` are dropped before the next pass. A slot is a row of the tensors; `rows` says whose
        prompt it works on.
        """
        weights, stop = self.model(model), frozenset(self.stop_ids if stop_ids is None else stop_ids)
        rows = list(range(len(prompts)))
        logits, cache, mask, positions = self._prefill(weights, prompts, max(map(len, prompts)) + max(limits))
        draw = Draw(samplings)
        count = [0] * len(prompts)
        running = set(rows)
        while True:
            tokens = draw(logits, rows)
            steps = []
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in running and row not in left:
                    ended = token in stop
                    count[row] += not ended
                    steps.append(Step(row, None if ended else token, ended or count[row] == limits[row]))
            running -= {step.row for step in steps if step.over}
            yield steps
            running.difference_update(left)
            if not running:
                return
            if len(running) <= 0.75 * len(rows):  # not at each end: leaving copies the other rows' keys and values
                keep = torch.tensor([slot for slot, row in enumerate(rows) if row in running])
                rows = [row for row in rows if row in running]
                cache.batch_select_indices(keep)
                mask, positions, tokens = mask[keep], positions[keep], tokens[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions + 1
            output = weights(tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]

    def _prefill(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor, torch.Tensor]:
        """Logits [rows, vocabulary] after each prompt, the cache, its mask [rows, columns] and the last positions [rows, 1].

        Columns are: what all prompts begin with, padding, the rest of each prompt. Attention goes by the mask and positions
        are counted without padding, so a row sees what it would see alone.
        """
        cache = DynamicCache(config=model.config)
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        cache.layers = [_Reserved(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        shared = _shared_prefix(prompts) if plain and len(prompts) > 1 else 0
        if shared:
            beginning = torch.tensor([list(prompts[0][:shared])])
            model(beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long))
        width = max(map(len, prompts)) - shared
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), shared + width, dtype=torch.long)
        mask[:, :shared] = 1
        for slot, prompt in enumerate(prompts):
            rest = torch.tensor(list(prompt[shared:]))
            ids[slot, width - len(rest) :] = rest
            mask[slot, shared + width - len(rest) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            ids, attention_mask=mask, position_ids=positions[:, shared:], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        return logits, cache, mask, positions[:, -1:]


class _Reserved(DynamicLayer):
    """One layer's keys and values [rows, heads, columns, width] in buffers with room for `capacity` columns."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.used = capacity, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (self._room(key_states), self._room(value_states))
        end = self.used + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        return self._show()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        old = self._buffers
        self._buffers = (self._room(old[0], len(indices)), self._room(old[1], len(indices)))
        for buffer, states in zip(self._buffers, old, strict=True):
            buffer[:, :, : self.used] = states[indices, :, : self.used]
        self._show()

    def _room(self, like: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        return like.new_empty(rows or like.shape[0], like.shape[1], self.capacity, like.shape[3])

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[:, :, : self.used] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def plan_batches(lengths: Sequence[int], limits: Sequence[int], budget: int, max_rows: int = MAX_ROWS) -> list[list[int]]:
    """Group prompts of like length: at most `max_rows`, and rows x (longest prompt + largest limit) at most `budget` tokens.

    Longest first, so that what does not fit fails at once and time left is not underestimated. A prompt beyond the budget
    goes alone.
    """
    batches: list[list[int]] = []
    longest = limit = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], -limits[row])):
        longest, limit = max(longest, lengths[row]), max(limit, limits[row])
        if batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * (longest + limit) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest, limit = lengths[row], limits[row]
    return batches


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values for one token, in all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, 0 when too few to matter; each prompt keeps one of its own to go on from."""
    first, last = min(prompts, key=list), max(prompts, key=list)  # what the extremes share, all share
    longest = min(map(len, prompts)) - 1
    differ = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), longest)
    return min(differ, longest) if min(differ, longest) >= SHARED_PREFIX else 0


def _quantise_once(model: PreTrainedModel) -> None:
    """Give every linear layer but the head the weights that the adapter was trained on: through NF4 and back."""
    from trimtab_runtime.methods.lora import linear_layers
    from trimtab_runtime.methods.qlora import dequantised_nf4

    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight.copy_(dequantised_nf4(layer.weight))


def _manifest(artifact: Path) -> dict[str, Any]:
    """What `trimtab.json` says. Raises WeightsError for a folder that is no artifact."""
    try:
        manifest: dict[str, Any] = json.loads((artifact / "trimtab.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        manifest = {}
    except json.JSONDecodeError as exc:
        raise WeightsError(f"{artifact / 'trimtab.json'} is damaged ({exc}): copy the artifact again") from exc
    whole = manifest.get("spec", {}).get("method") == "full"
    for name in ("trimtab.json", *(("config.json",) if whole else ("adapter_config.json", "adapter_model.safetensors"))):
        if not (artifact / name).is_file():
            raise WeightsError(f"{artifact} holds no {name}: give the model folder of a run that succeeded")
    return manifest
