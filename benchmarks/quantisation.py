"""What NF4 takes from the default model, and what adapters begun in two ways give back, before any training.

    python benchmarks/quantisation.py [--text FILE] [--rank 32]

Prints the perplexity of a text under the original weights, under NF4, and with adapters that begin by the weights alone or
also by how much each input varies on the project's own prose. Computes in fp32; about a minute on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from trimtab import weights
from trimtab.spec import TrainSpec
from trimtab_runtime import rehearsal
from trimtab_runtime.batch import Batch, as_batch
from trimtab_runtime.evaluate import perplexity
from trimtab_runtime.examples import plain
from trimtab_runtime.model import load_model
from trimtab_runtime.recipe import TYPICAL_ROWS
from trimtab_runtime.rows import PackedRows, write_rows
from trimtab_runtime.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity before training: original, NF4, and with adapters that restore it.")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "demo" / "unrelated.txt", help="text to predict")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    options = parser.parse_args()

    disable_progress_bar()
    folder = weights.resolve("smollm2-135m-instruct").folder
    tokenizer = Tokenizer(folder)
    ids = tokenizer.text(options.text.read_text(encoding="utf-8"))
    typical = typical_rows(tokenizer)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    print(f"original weights                            {perplexity(original.eval(), ids):.1f}", flush=True)
    for label, init, seen in (
        ("NF4", "zeros", None),
        (f"NF4, rank {options.rank}, by the weights alone", "qera", None),
        (f"NF4, rank {options.rank}, by weights and inputs", "qera", typical),
    ):
        torch.manual_seed(42)
        spec = TrainSpec(model=str(folder), method="qlora", lora_rank=options.rank, lora_init=init)
        model = load_model(folder, spec, torch.float32, typical=seen).get_base_model()
        model.set_attn_implementation("sdpa")
        print(f"{label:<44}{perplexity(model.eval(), ids):.1f}", flush=True)


def typical_rows(tokenizer: Tokenizer) -> Batch:
    """As many rows of 1,024 tokens as a run looks at, of the prose that is rehearsed."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [[plain("replay", text, tokenizer) for text in rehearsal.prose()]], 1024, {})
        rows = PackedRows(Path(folder))
        return as_batch([rows[index] for index in range(TYPICAL_ROWS)])


if __name__ == "__main__":
    main()
