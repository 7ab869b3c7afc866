"""What answers fastest on this machine: OpenVINO GenAI, vLLM's CPU build and transformers, in alternation.

    python benchmarks/engines.py [--vllm-python VENV/bin/python] [--model small|large] [--clients 1 8 32] [--rounds 3] [--json FILE]

Each engine runs as the server runs it (trimtab_runtime.engines.worker), all loaded at once, and one after the other is asked the same:
so many clients at once, prompts of 130 random tokens that share nothing, greedy answers that never end early. Figures are medians
over the rounds; on a machine that others use, compare within a round only. `small` is the default model (135 million parameters),
`large` a random Llama of 1.1 billion (22 layers of 2,048, 32 heads, 4 of them for keys), for speed needs no training.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import weights
from trimtab.layout import ROOT_VARIABLE, SERVE_VARIABLE
from trimtab.spec import ServeSpec

SOURCES = Path(__file__).parent.parent
PROMPT = 130
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Round:
    """`rate` in new tokens a second over all clients, `first` the median time to a client's first token in seconds."""

    engine: str
    clients: int
    rate: float
    first: float
    load: float


class Worker:
    """One engine in its process, from before it loads until it is closed."""

    def __init__(self, name: str, python: str, tree: Path, spec: ServeSpec, log: Path, preload: str = "") -> None:
        self.name, self.log = name, log
        environment = os.environ | {
            ROOT_VARIABLE: str(tree),
            SERVE_VARIABLE: spec.to_text(),
            "PYTHONPATH": f"{SOURCES / 'sdk'}:{SOURCES / 'entrypoints'}",
        }
        if name == "vllm" and preload:
            environment["LD_PRELOAD"] = preload
        begun = time.monotonic()
        self.process = subprocess.Popen(
            [python, "-P", "-m", "trimtab_runtime.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
        )
        first = self._hear()
        self.started = time.monotonic() - begun
        if "facts" not in first:
            raise SystemExit(f"{name}: {first.get('failed') or log.read_text()[-2000:]}")
        self.version = first["facts"]["engine"]
        self.model = first["facts"]["names"][0]
        self._count = 0

    def ask(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Answer all at once: new tokens a second, and the median time to the first of each in seconds."""
        begun = time.monotonic()
        first: dict[int, float] = {}
        ids = range(self._count, self._count + len(prompts))
        self._count += len(prompts)
        running = set(ids)
        for id, prompt in zip(ids, prompts, strict=True):
            self._say({"ask": {"id": id, "ids": prompt, "model": self.model, "max_new_tokens": new}})
        tokens = 0
        while running:
            for id, came, reason in self._hear().get("new", []):
                tokens += len(came)
                if came:
                    first.setdefault(id, time.monotonic() - begun)
                if reason:
                    running.discard(id)
        if tokens != new * len(prompts):
            raise SystemExit(f"{self.name}: {tokens} tokens came, {new * len(prompts)} were asked for")
        return tokens / (time.monotonic() - begun), statistics.median(first.values())

    def memory_mb(self) -> tuple[int, int]:
        """Peak of the resident set, and what of it is the process' own now and not mapped files, in MB (2^20 bytes)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        peak, own = (re.search(rf"{name}:\s+(\d+)", status) for name in ("VmHWM", "RssAnon"))
        assert peak
        assert own
        return int(peak[1]) >> 10, int(own[1]) >> 10

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def _say(self, message: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: {self.log.read_text()[-2000:]}")
        message: dict[str, Any] = json.loads(line)
        return message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-preload", default="", help="libraries to load before vLLM: it advises tcmalloc and Intel's OpenMP")
    parser.add_argument("--model", choices=("small", "large"), default="small")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64, help="tokens in an answer")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--engines", nargs="+", choices=("openvino", "vllm", "transformers"), default=["openvino", "vllm", "transformers"])
    parser.add_argument("--json", type=Path, help="also write every round there")
    options = parser.parse_args()
    pythons = dict.fromkeys(options.engines, sys.executable) | ({"vllm": options.vllm_python} if "vllm" in options.engines else {})
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder, size = endless_model(Path(place), options.model)
        workers = [
            stack.enter_context(running(name, python, folder, options, Path(place) / f"{name}.log"))
            for name, python in pythons.items()
            if python
        ]
        source = np.random.default_rng(0)
        for number in range(options.rounds):
            for clients in options.clients:
                for worker in workers if number % 2 == 0 else reversed(workers):
                    prompts = source.integers(100, size - 100, (clients, PROMPT)).tolist()
                    rate, first = worker.ask(prompts, options.new)
                    rounds.append(Round(worker.name, clients, rate, first, os.getloadavg()[0]))
                    print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
        print(table(workers, rounds))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rounds], indent=1) + "\n")


@contextmanager
def running(name: str, python: str, folder: Path, options: argparse.Namespace, log: Path) -> Iterator[Worker]:
    spec = ServeSpec(engine=name, dtype=options.dtype, max_running=max(options.clients), max_context=512, cache_gb=2.0)
    worker = Worker(name, python, folder, spec, log, options.vllm_preload)
    print(f"{worker.version} started in {worker.started:.0f} s", file=sys.stderr, flush=True)
    try:
        yield worker
    finally:
        worker.close()


def table(workers: list[Worker], rounds: list[Round]) -> str:
    """Medians over the rounds, and each engine's rate as a share of the first engine's, round by round."""
    lines = [f"{'engine':<42}{'clients':>8}{'tokens/s':>10}{'of first':>10}{'first token s':>15}"]
    for worker in workers:
        for clients in sorted({one.clients for one in rounds}):
            own, reference = (
                [one for one in rounds if one.engine == name and one.clients == clients] for name in (worker.name, workers[0].name)
            )
            ratio = statistics.median(mine.rate / its.rate for mine, its in zip(own, reference, strict=True))
            rate, first = (statistics.median(getattr(one, field) for one in own) for field in ("rate", "first"))
            lines.append(f"{worker.version:<42}{clients:>8}{rate:>10.1f}{ratio:>10.2f}{first:>15.2f}")
        peak, own_mb = worker.memory_mb()
        lines.append(f"{'':<8}started in {worker.started:.1f} s; memory at most {peak:,} MB, {own_mb:,} MB of it its own")
    loads = [one.load for one in rounds]
    return "\n".join([*lines, f"load of the machine {min(loads):.1f} to {max(loads):.1f}, on {os.cpu_count()} processors"])


def endless_model(place: Path, kind: str) -> tuple[Path, int]:
    """A job's tree with a model that has no end within its reach, and the size of its vocabulary."""
    known = weights.resolve("smollm2-135m-instruct", say=lambda line: print(line, file=sys.stderr)).folder
    folder = place / "tree" / "input" / "data" / "model"
    folder.mkdir(parents=True)
    config = json.loads((known / "config.json").read_text())
    if kind == "large":
        config = dict(LARGE)
        write_random(folder / "model.safetensors", tensors(config))
    else:
        (folder / "model.safetensors").symlink_to(known / "model.safetensors")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((known / "tokenizer.json").read_text())
    known_tokens = 1 + max(*tokenizer["model"]["vocab"].values(), *(one["id"] for one in tokenizer["added_tokens"]))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": known_tokens, "content": "<never>"})  # beyond the model's
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<never>"}))
    return place / "tree", config["vocab_size"]


def tensors(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's weights."""
    sizes = {name: int(str(config[name])) for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")}
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    kept = hidden * int(str(config["num_key_value_heads"])) // int(str(config["num_attention_heads"]))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{name}.self_attn.{one}_proj.weight": (hidden if one in "qo" else kept, hidden) for one in "qkvo"}
        found |= {f"{name}.mlp.{one}_proj.weight": (wide, hidden) for one in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (hidden, wide)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (sizes["vocab_size"], hidden)}


def write_random(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """bfloat16 weights in safetensors: matrices of normal numbers with deviation 0.02, norms of ones."""
    source = np.random.default_rng(0)
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = np.ones(shape, np.float32) if len(shape) == 1 else source.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            opened.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
