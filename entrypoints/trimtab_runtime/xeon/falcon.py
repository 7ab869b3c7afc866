"""Falcon's attention on packed rows. transformers' own does not go through its attention interface, and would compute one dense mask
for the whole row, by a kernel that keeps every pair of places (71 query heads share one key head)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon import modeling_falcon

from trimtab_runtime.xeon.attention import NAME, packed_attention, plan_groups


class PackedFalconAttention(modeling_falcon.FalconAttention):
    """Multi-query or grouped attention with rotary positions; each sample attends to itself alone.

    The layer around it hands on no arguments of ours, so samples are found by their positions, which begin at 0.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, tokens, hidden] -> ([1, tokens, hidden], None). Raises ValueError for ALiBi positions, a cache, or rows side by side."""
        if alibi is not None or layer_past is not None or position_embeddings is None or position_ids is None or len(hidden_states) != 1:
            raise ValueError("packed attention takes one flattened row with rotary positions, and no cache")
        query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        out, _none = packed_attention(self, query, key, value, None, packed_groups=plan_groups(lengths_of(position_ids)))
        return self.dense(out.flatten(2)), None


def lengths_of(positions: Tensor) -> list[int]:
    """The lengths of the samples of a row, from `positions` [1, n] that restart with each."""
    starts = (positions[0] == 0).nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([positions.shape[1]])])
    return list((ends - starts).tolist())


def register() -> None:
    """Let Falcon models be made with `attn_implementation="trimtab_packed"`."""
    modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = PackedFalconAttention
