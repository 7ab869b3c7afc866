"""A GGUF file of the Llama architecture -> a plain Hugging Face folder (safetensors in bfloat16, config, tokenizer).

Formats: the GGUF specification (ggml-org/ggml, docs/gguf.md) and the safetensors format description. Neither torch nor
transformers is needed. What a quantised file holds is dequantised first: the result has the precision of the GGUF file, not that
of the weights it was made from.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import WeightsError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray

REMEDY = "pip install 'trimtab[weights]'"

_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type: a token that text can never spell out by itself

_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file `source` into the existing folder `folder`.

    Raises WeightsError when a package of the extra `weights` is missing, and when the file is not a Llama-architecture model with
    the byte-level BPE tokenizer of the SmolLM family (the only kind whose word splitting is known here).
    """
    try:
        import gguf
        import tokenizers  # noqa: F401  (asked for before the long work, not after it)
    except ImportError as exc:
        raise WeightsError(f"{exc.name} is needed to convert {source.name}:  {REMEDY}") from exc

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as exc:
        raise WeightsError(f"{source} is not a readable GGUF file ({exc}). Delete it and run the same command again.") from exc
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    for name, known in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if facts.get(name) != known:
            raise WeightsError(
                f"{source.name}: {name} is {facts.get(name)!r}, and only {known!r} can be converted. "
                "Give the folder of a Hugging Face model (config.json, safetensors, tokenizer.json) instead."
            )

    _write_weights(reader, facts, folder / "model.safetensors", source)
    _write_json(folder / "config.json", model_config(facts, tied=all(tensor.name != "output.weight" for tensor in reader.tensors)))
    _write_json(folder / "generation_config.json", _token_ids(facts))
    _write_tokenizer(facts, folder)


def split_rotary_halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key projection, shape (heads * head_dim, hidden), for rotation by halves.

    GGUF stores each head's rows in rotating pairs (0, h/2, 1, h/2 + 1, ...); Hugging Face rotates row i with row i + h/2, so the
    pairs are pulled apart again: rows 0, 2, 4, ... of a head first, then 1, 3, 5, ...
    """
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, ties to even; the bits come back as unsigned integers of the same shape."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    return rounded


def model_config(facts: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The `config.json` of a LlamaForCausalLM from GGUF's metadata."""
    rope_theta = float(facts["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": facts["llama.embedding_length"] ** -0.5,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        # GGUF holds a float32; seven significant digits give back the number that was written (1e-05, not 9.99999974e-06).
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        # transformers 4 reads the first spelling and silently falls back to 10000 without it; transformers 5 reads the second.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
        **_token_ids(facts),
    }


def _write_weights(reader: GGUFReader, facts: dict[str, Any], path: Path, source: Path) -> None:
    """One tensor after the other, so that memory holds one dequantised tensor at a time.

    A safetensors file is the length of its header (64 bits, little endian), the header as JSON padded with spaces to a multiple of
    8 bytes, and the tensors' bytes.
    """
    import gguf

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest axis first
        header[_hugging_face_name(tensor.name, source)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                values = split_rotary_halves(values, heads[kind])
            file.write(to_bfloat16(values).tobytes())


def _token_ids(facts: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _hugging_face_name(name: str, source: Path) -> str:
    if name in _TOP_TENSORS:
        return _TOP_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise WeightsError(
            f"{source.name} has a tensor {name} that a plain Llama model does not have. "
            "Give the folder of a Hugging Face model (config.json, safetensors, tokenizer.json) instead."
        )
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight"


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # The `smollm` splitting: every digit stands alone, then words as in GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": [tokens[facts["tokenizer.ggml.bos_token_id"]], tokens[facts["tokenizer.ggml.eos_token_id"]]],
            "chat_template": facts["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts["llama.context_length"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
