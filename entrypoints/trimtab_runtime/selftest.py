"""Proves an image on the machine where it is: `python -m trimtab_runtime.selftest [--gpu]`.

The same three pieces of work on the CPU or, with --gpu, on the first GPU, each compared with what must come out: a product in bf16,
weights to NF4 and back, and a few steps of training adapters on a 4-bit model. Each piece prints one JSON line with `check`, `ok`,
`found` and `device`; the exit code is 0 when all is well. No network, no file and no job's tree is needed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

STEPS = 5

Outcome = tuple[bool, str]


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--gpu"}:
        print("usage: python -m trimtab_runtime.selftest [--gpu]", file=sys.stderr)
        return 2
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for a kernel from a hub, and does without
    device = "cuda" if "--gpu" in arguments else "cpu"
    if device == "cuda" and not tell("gpu", "none", gpu):
        return 1
    checks: dict[str, Callable[[str], Outcome]] = {"product": product, "nf4": nf4, "training": training}
    fine = [tell(name, device, lambda check=check: check(device)) for name, check in checks.items()]
    return 0 if all(fine) else 1


def tell(name: str, device: str, check: Callable[[], Outcome]) -> bool:
    """Run a check and print what it found. What it raises is a finding, too: the next check may tell more."""
    began = time.monotonic()
    try:
        ok, found = check()
    except (RuntimeError, ImportError, OSError, ValueError, AssertionError) as exc:  # what torch and bitsandbytes raise
        ok, found = False, f"{type(exc).__name__}: {exc}"
    facts = {"check": name, "ok": ok, "found": found, "device": device, "seconds": round(time.monotonic() - began, 2)}
    print(json.dumps(facts), flush=True)
    return ok


def gpu() -> Outcome:
    """Whether torch sees a GPU, and which."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old; said here in one line
        there = torch.cuda.is_available()
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    if not there:
        return False, f"no GPU ran: torch.cuda.is_available() is False ({built})"
    facts = torch.cuda.get_device_properties(0)
    memory = f"{facts.total_memory / 1e9:.0f} GB"
    return True, f"{facts.name}, {memory}, compute capability {facts.major}.{facts.minor}, {torch.cuda.device_count()} in all; {built}"


def product(device: str) -> Outcome:
    """A product of two matrices in bf16 against the same in fp64."""
    import torch

    torch.manual_seed(0)
    left, right = torch.randn(512, 384), torch.randn(384, 256)
    exact = left.double() @ right.double()
    found = (left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)).double().cpu()
    error = float((found - exact).norm() / exact.norm())
    return error < 0.01, f"bf16 product off by {error:.2%} (at most 1 %)"


def nf4(device: str) -> Outcome:
    """Weights to NF4 and back. Normal weights lose about a tenth of their norm (Dettmers et al. 2023, arXiv:2305.14314)."""
    import torch

    from trimtab_runtime.methods.qlora import dequantised_nf4

    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    found = dequantised_nf4(weight.to(device)).cpu()
    error, kinds = float((found - weight).norm() / weight.norm()), len((found / weight.abs().amax()).unique())
    return 0.05 < error < 0.12 and kinds > 16, f"NF4 off by {error:.1%} (5 to 12 %)"


def training(device: str) -> Outcome:
    """Adapters on a random 4-bit Llama learn a sequence by heart: the loss falls with each step, and the base stays as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.spec import TrainSpec
    from trimtab_runtime.methods.lora import add_adapters
    from trimtab_runtime.methods.qlora import quantise

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    base = LlamaForCausalLM(config).to(device, torch.bfloat16)
    quantise(base, torch.bfloat16)
    frozen = {name: value.detach().clone() for name, value in base.named_parameters()}
    model: Any = add_adapters(base, TrainSpec(model="selftest", lora_rank=8, lora_alpha=8))
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    tokens = torch.randint(0, config.vocab_size, (1, 64), device=device)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    now = {name.replace("base_layer.", "").removeprefix("base_model.model."): value for name, value in model.named_parameters()}
    same = all(torch.equal(value, now[name]) for name, value in frozen.items())
    falls = all(later < earlier for earlier, later in itertools.pairwise(losses))
    said = f"{STEPS} qLoRA steps on {learned[0].device}, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    return falls and same, said if same else f"{said}; the frozen weights changed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
