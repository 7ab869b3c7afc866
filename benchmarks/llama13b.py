"""qLoRA of a model of Llama-2-13B's shape in 16 GB:  python benchmarks/llama13b.py --check

Random weights (40 layers of 5120 and 13824, vocabulary 32,000: 26 GB in bf16) are written shard by shard in the Hub's layout. A process
of its own loads them through the product's loader, which puts them into NF4 layer by layer and keeps that for later, and trains two
packed rows of 2,048 tokens, each a step; as many layers are recomputed as the run's own policy says for 16 GB. A second process loads
again, from the NF4 cache, and takes one step. The files' pages are dropped from the system's cache before each, so the disk is read.

Utilisation is (4 N + LoRA + attention within each document) FLOPs a token, N the weights of the layers' maps and the head, LoRA 6 for each
weight of the adapters, attention 12 for each visible pair, head and number of its width; the recomputed forward passes are not counted.
Over the rate of oneDNN's bf16 products of the same shapes, forward and backward, measured in the same process after the steps.

Everything is deleted at the end; --keep FOLDER keeps the weights there, and finds them again. --layers 4 is a trial of minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from trimtab_runtime.xeon import pages

HIDDEN, INNER, HEADS, VOCABULARY, LAYERS = 5120, 13824, 40, 32_000, 40
RANK, TOKENS = 16, 2048
ROWS = ((1100, 500, 300, 148), (900, 600, 400, 148))  # samples of the two rows
PEAK_BAR, FIRST_BAR, LATER_BAR, UTILISATION_BAR = 16.0, 360.0, 60.0, 0.6
_SHARD = 4  # layers in one file
_POOL = (1 << 24) + 43  # random numbers that all tensors are cut from; odd, so that no rows of a matrix are alike
_SPARE = 2 << 30
_NF4 = 0.53


def shapes(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """(file, its tensors) in the Hub's layout."""
    maps = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    maps |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    of_layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in maps.items()}
    of_layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    files = [
        {f"model.layers.{number}.{name}": shape for number in range(first, min(layers, first + _SHARD)) for name, shape in of_layer.items()}
        for first in range(0, layers, _SHARD)
    ]
    files.append(
        {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    )
    for number, tensors in enumerate(files, 1):
        yield f"model-{number:05}-of-{len(files):05}.safetensors", tensors


def make_weights(folder: Path, layers: int) -> None:
    """Random weights of that many layers, and config.json, last. Raises SystemExit where the disk has no room for them."""
    if (folder / "config.json").is_file():
        return
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    numbers = sum(math.prod(shape) for _, tensors in shapes(layers) for shape in tensors.values())
    needed, free = int((2 + _NF4) * numbers) + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free and {needed / 1e9:.0f} are needed: name another disk with --keep FOLDER")
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16).view(torch.uint8).numpy()
    index, turn = {}, 0
    for file, tensors in shapes(layers):
        header, place = {}, 0
        for name, shape in tensors.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            for name, shape in tensors.items():
                index[name] = file
                if len(shape) == 1:
                    written.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
                    continue
                left = 2 * math.prod(shape)
                while left:
                    turn = (turn + 7_368_787) % _POOL
                    piece = pool[2 * turn : 2 * turn + left]
                    written.write(piece.data)
                    left -= len(piece)
            written.flush()
            os.fsync(written.fileno())
        print(f"wrote {file}", file=sys.stderr, flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 2 * numbers}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16", "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@dataclass
class Watch(threading.Thread):
    """How much anonymous memory the process held at most (RssAnon, looked at 20 times a second; Linux keeps no peak of it)."""

    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, measure.resident("RssAnon"))
            time.sleep(0.05)


def flops_a_token(layers: int, row: tuple[int, ...]) -> float:
    """Of a row with these samples; forward and backward, nothing counted twice."""
    a_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    adapters = RANK * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
    pairs = sum(length * (length + 1) / 2 for length in row)
    return 4 * (layers * a_layer + VOCABULARY * HIDDEN) + 6 * layers * adapters + 12 * layers * HIDDEN * pairs / TOKENS


def rate_of_products() -> float:
    """FLOP/s of oneDNN's bf16 products of a layer's shapes, forward and towards the input: the median of five rounds after one."""
    import statistics

    import torch

    weights = [torch.rand(out, inner).sub_(0.5).bfloat16() for out, inner in ((HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))]
    times = (4, 2, 1)  # in a layer
    inputs = {width: torch.rand(TOKENS, width).bfloat16() for width in (HIDDEN, INNER)}
    taken = []
    for _ in range(6):
        total = 0.0
        for weight, count in zip(weights, times, strict=True):
            out, inner = weight.shape
            began = time.perf_counter()
            torch.mm(inputs[inner], weight.t())
            torch.mm(inputs[out], weight)
            total += count * (time.perf_counter() - began)
        taken.append(total)
    return 4 * TOKENS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) / statistics.median(taken[1:])


def run_here(folder: Path, cache: Path, steps: int) -> dict[str, Any]:
    """Load and train in this process."""
    from trimtab_runtime.xeon.allocator import keep_large_blocks

    allocator = keep_large_blocks()
    watch = Watch()
    watch.start()
    import torch

    from trimtab.estimate import ModelFacts, RowFacts, peak_memory, recompute_layers
    from trimtab.spec import TrainSpec
    from trimtab_runtime.batch import as_batch, batch_loss
    from trimtab_runtime.examples import Sample
    from trimtab_runtime.methods import trained_parts
    from trimtab_runtime.model import load_model, read_config
    from trimtab_runtime.nf4_cache import VARIABLE
    from trimtab_runtime.rows import PackedRows, write_rows
    from trimtab_runtime.xeon.block import set_recompute

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    os.environ[VARIABLE] = str(cache)
    draw = torch.Generator().manual_seed(1)
    data = folder.parent / "rows"
    # a round of its own for each row, which packs its samples into that row and no other
    rounds = [[Sample("document", torch.randint(10, VOCABULARY, (n,), generator=draw).tolist(), [True] * n) for n in row] for row in ROWS]
    write_rows(data, rounds, TOKENS, {})
    rows = PackedRows(data)
    held = [len(rows[index].tokens) for index in range(len(rows))]
    if held != [TOKENS] * len(ROWS):
        raise SystemExit(f"the rows hold {held} tokens")
    config = read_config(folder)
    facts, shape = ModelFacts.from_config(config), RowFacts.from_manifest(rows.facts)
    if facts is None or shape is None:
        raise SystemExit("the model or its rows do not name their sizes")
    spec = TrainSpec(
        model="llama13b", method="qlora", lora_rank=RANK, max_seq_len=TOKENS, model_digest=f"{config['num_hidden_layers']:064}"
    )
    again = recompute_layers(spec, facts, "bfloat16", shape, int(PEAK_BAR * 1e9) >> 20)
    expected = peak_memory(spec, facts, "bfloat16", shape, again=again.layers)
    say(f"recompute {again.layers}: {again.reason}\nexpected {expected.total:,} MB: {expected}")
    torch.manual_seed(spec.seed)

    began = time.perf_counter()
    model = load_model(folder, spec, torch.bfloat16, typical=as_batch([rows[0], rows[1]]), say=say, to_write=0)
    loaded = time.perf_counter() - began
    peak_of_load = measure.resident("VmHWM")
    model.train()
    set_recompute(model, range(again.layers))
    trained = trained_parts(model, spec, torch.bfloat16)
    optimizer = torch.optim.AdamW(trained.groups(spec.weight_decay), lr=spec.learning_rate, fused=True)
    seconds, losses, without = [], [], []
    for step in range(steps):
        began = time.perf_counter()
        batch = as_batch([rows[step % len(rows)]])
        loss = batch_loss(model, batch, scale=1 / batch.learned)
        loss.backward()
        without += [
            name for name, one in trained.parameters.items() if one.grad is None or not one.grad.isfinite().all() or not one.grad.any()
        ]
        torch.nn.utils.clip_grad_norm_(trained.parameters.values(), spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        say(f"step {step + 1}: {seconds[-1]:.1f} s, loss {losses[-1]:.3f}")
    peak = measure.resident("VmHWM")
    return {
        "load_seconds": loaded,
        "step_seconds": seconds,
        "losses": losses,
        "adapters": len(trained.parameters),
        "without_gradient": sorted(set(without)),
        "recomputed": again.layers,
        "expected_gb": expected.total * 2**20 / 1e9,
        "peak_gb": peak / 1e9,
        "peak_of_load_gb": peak_of_load / 1e9,
        "anonymous_gb": watch.peak / 1e9,
        "flops_a_token": flops_a_token(config["num_hidden_layers"], ROWS[(steps - 1) % len(ROWS)]),
        "products_flops": rate_of_products(),
        "allocator": allocator,
    }


def in_a_process(folder: Path, cache: Path, steps: int) -> dict[str, Any]:
    """`run_here` in a process of its own, after the files' pages were dropped from the system's cache."""
    os.sync()
    for path in (*folder.glob("*.safetensors"), *cache.glob("*.safetensors")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", str(folder), str(cache), str(steps)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"the run ended with {told.returncode}")
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def utilisation(found: dict[str, Any]) -> float:
    """Of the last step, whose kernels oneDNN has made in those before."""
    return float(found["flops_a_token"] * TOKENS / found["step_seconds"][-1] / found["products_flops"])


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        pages.begin_again(["train"])  # as the product's command does
        print(json.dumps(run_here(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 where a bar is missed")
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of a table")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYERS}; fewer for a trial  [default: {LAYERS}]")
    parser.add_argument("--keep", type=Path, help="a folder where the weights stay for another run")
    asked = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=asked.keep.parent if asked.keep else None) as scratch:
        folder = (asked.keep or Path(scratch)).absolute() / f"llama-{asked.layers}-layers"
        began = time.perf_counter()
        make_weights(folder, asked.layers)
        print(f"weights in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        cache = Path(scratch) / "nf4"
        cache.mkdir()
        first = in_a_process(folder, cache, 2)
        later = in_a_process(folder, cache, 1)
    on = measure.machine(first["allocator"], "bfloat16")
    rows = [
        [name, *(f"{run[key]:.2f}" for run in (first, later))]
        for name, key in (
            ("load, s", "load_seconds"), ("peak RSS, GB", "peak_gb"), ("anonymous, GB", "anonymous_gb"),
            ("peak while loading, GB", "peak_of_load_gb"), ("expected, GB", "expected_gb"),
        )
    ]  # fmt: skip
    rows += [
        ["layers recomputed", *(f"{run['recomputed']} of {asked.layers}" for run in (first, later))],
        ["steps, s", *(", ".join(f"{one:.1f}" for one in run["step_seconds"]) for run in (first, later))],
        ["tokens/s, last step", *(f"{TOKENS / run['step_seconds'][-1]:.1f}" for run in (first, later))],
        ["losses", *(", ".join(f"{one:.3f}" for one in run["losses"]) for run in (first, later))],
        ["products, GFLOP/s", *(f"{run['products_flops'] / 1e9:,.0f}" for run in (first, later))],
        ["adapters with a gradient", *(f"{run['adapters'] - len(run['without_gradient'])} of {run['adapters']}" for run in (first, later))],
    ]
    whole = all(math.isfinite(one) for run in (first, later) for one in run["losses"])
    whole = whole and not first["without_gradient"] and not later["without_gradient"]
    figures = [
        measure.Figure("peak RSS, GB", max(first["peak_gb"], later["peak_gb"]), PEAK_BAR),
        measure.Figure("first load, s", first["load_seconds"], FIRST_BAR),
        measure.Figure("later load, s", later["load_seconds"], LATER_BAR),
        measure.Figure("utilisation", utilisation(first), UTILISATION_BAR, least=True),
        measure.Figure("losses finite and a gradient on every adapter", float(whole), 1, least=True),
    ]
    return measure.report(asked, on, ["", "first", "later"], rows, figures, {"first": first, "later": later})


if __name__ == "__main__":
    sys.exit(main())
