"""How packed samples are kept apart in a model of a family, and the proof for one that is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import SpecError
from trimtab.families import FAMILIES, family_of
from trimtab_runtime.xeon import attention

_LENGTHS = (7, 5)  # of the samples that an unknown model is tried with
_WITHIN = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of a state's norm; two kernels round so differently
_TRIES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)


def implementation(config: Mapping[str, Any]) -> str | None:
    """What to load a model of this config.json with as its attention: ours for a known family; None, its own, for others."""
    family = family_of(config)
    if family is None:
        return None
    attention.register()
    if family.model_type == "falcon":
        from trimtab_runtime.xeon import falcon  # its modules take a while to load

        falcon.register()
    return attention.NAME


def is_masked(base: PreTrainedModel) -> bool:
    """Whether samples are kept apart by a mask over the whole row, and not by our attention."""
    return bool(base.config._attn_implementation != attention.NAME)


def mask_dtype(base: PreTrainedModel) -> torch.dtype | None:
    """The dtype of the mask that the model needs; None for one that needs none."""
    return base.get_input_embeddings().weight.dtype if is_masked(base) else None


def sayings(base: PreTrainedModel, method: str, dtype: torch.dtype) -> list[str]:
    """What to say of the family of a model that is about to be trained, a sentence each; none for one without peculiarities."""
    config = base.config.to_dict()
    family, name, said = family_of(config), config.get("model_type"), list[str]()
    if family is None:
        said.append(
            f"family {name}: not one of {', '.join(FAMILIES)}; its own attention with a mask over the whole row keeps samples apart, which "
            "was tried out just now; that takes longer, and memory by the square of a row"
        )
    elif family.note and method != "full":
        said.append(f"family {name}: {family.note}")
    if experts := sum(parameter.numel() for parameter in base.parameters() if parameter.dim() == 3):
        kept = (
            "trained as all others, and the router by the loss of the tokens alone, without one that balances the experts"
            if method == "full"
            else f"kept in {str(dtype).removeprefix('torch.')}"
        )
        said.append(f"family {name}: {experts:,} of {base.num_parameters():,} weights are the experts', {kept}")
    return said


@torch.no_grad()
def prove(base: PreTrainedModel) -> None:
    """Try out that a model of an unknown type computes packed samples, kept apart by a mask, as it computes them alone; that no place
    sees what comes after it; and that its logits are its head's product with its last states, as the loss takes them to be.

    Three passes of at most 12 tokens. Raises SpecError, which names the type, where that is not so.
    """
    name, vocabulary = base.config.model_type, base.get_input_embeddings().num_embeddings
    base.eval()
    tokens = torch.arange(100, 100 + sum(_LENGTHS), device=base.device)[None] % vocabulary
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None].to(base.device)
    other = tokens.clone()
    other[:, : _LENGTHS[0]] = (tokens[:, : _LENGTHS[0]] + 31) % vocabulary
    other[:, -1] = (tokens[:, -1] + 31) % vocabulary
    try:
        packed, changed = (_states(base, each, positions) for each in (tokens, other))
        begin, middle = 0, _LENGTHS[0]
        alone = []
        for length in _LENGTHS:
            places = slice(begin, begin + length)
            alone.append(base.get_decoder()(input_ids=tokens[:, places], use_cache=False).last_hidden_state[0])
            begin += length
        logits = base(input_ids=tokens[:, middle:], use_cache=False).logits[0]
        head = base.get_output_embeddings().weight
        by_head = torch.nn.functional.linear(alone[1].to(head.dtype), head)
    except _TRIES as exc:
        raise SpecError(f"models of type {name} cannot be trained on packed rows: {_first_line(exc)}. {_REMEDY}") from exc
    if far := _apart(packed, torch.cat(alone)):
        raise SpecError(f"models of type {name} cannot be trained on packed rows: a sample in a row {far} the sample alone. {_REMEDY}")
    if far := _apart(packed[middle:-1], changed[middle:-1]):
        raise SpecError(
            f"models of type {name} cannot be trained: with other tokens before and behind it, a text's state {far} its own. {_REMEDY}"
        )
    if far := _apart(by_head, logits):
        raise SpecError(f"models of type {name} change their logits behind the head, which {far} what is learned here. {_REMEDY}")


_REMEDY = "Choose a model of one of these types: " + ", ".join(FAMILIES)


def _states(base: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    mask = attention.block_diagonal(positions, mask_dtype(base))
    states: Tensor = base.get_decoder()(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
    return states[0]


def _apart(one: Tensor, other: Tensor) -> str:
    """How far the furthest row of `one` [n, width] is from that of `other`, as the middle of a sentence; empty where they are equal
    but for rounding."""
    within = _WITHIN.get(one.dtype, 1e-3)  # of the dtype that was computed in, before both become fp32
    one, other = one.float(), other.float()
    furthest = float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-9)).max())
    return "" if furthest < within else f"differs by {100 * furthest:{'.2g' if furthest < 0.1 else '.0f'}}% from"


def _first_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}".rstrip(": ")
