"""The base as qlora's adapters knew it: every linear layer but the head through NF4 and back (methods/qlora.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimtab_runtime.engines.mapped import Mapped

_LINEAR = "_proj.weight"  # what the names of the decoder's linear layers end in
_BYTES = {"bfloat16": 2, "float32": 4}


def round_trip(weights: Mapping[str, Mapped], dtype: str, folder: Path) -> dict[str, Mapped]:
    """The weights, linear layers of the decoder replaced by what is left of them, in `dtype`, in mapped files in `folder`.

    They are quantised from `dtype`, as training does. One layer at a time is in memory. Needs torch and bitsandbytes.
    """
    import torch

    from trimtab_runtime.methods.qlora import dequantised_nf4

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    name_of, bits = ("BF16", np.uint16) if dtype == "bfloat16" else ("F32", np.float32)
    found = dict(weights)
    for number, (name, weight) in enumerate(weights.items()):
        if not name.endswith(_LINEAR):
            continue
        source = torch.from_numpy(np.array(weight.array).view(np.int16 if weight.array.itemsize == 2 else np.float32))
        restored = dequantised_nf4(source.view(kinds[weight.dtype]).to(kinds[name_of]))
        kept = np.memmap(folder / f"layer-{number}.four-bit", mode="w+", dtype=bits, shape=weight.array.shape)
        kept[:] = restored.view(torch.int16).numpy().view(np.uint16) if name_of == "BF16" else restored.numpy()
        found[name] = Mapped(kept, name_of)
    return found


def disk_bytes(weights: Mapping[str, Mapped], dtype: str) -> int:
    """Bytes on disk while such a model loads: the layers that `round_trip` writes, and the copy of the whole model with them in it."""
    linear = [weight.array for name, weight in weights.items() if name.endswith(_LINEAR)]
    others = sum(weight.array.nbytes for weight in weights.values()) - sum(array.nbytes for array in linear)
    return others + 2 * _BYTES[dtype] * sum(array.size for array in linear)
