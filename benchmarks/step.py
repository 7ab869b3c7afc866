"""A whole training step: ours, and others', on the same model and documents.  python benchmarks/step.py --check

Each variant is a process of its own that loads once and then takes one optimiser step whenever it is told, so that variants alternate
step by step in one run. A ratio compares tokens a second, of real tokens only (padding is not counted), within a round; the median
counts. Documents: peers/documents.py (log-normal lengths; the same for all). LoRA on all linear layers but the head, r = 16, alpha 32,
AdamW, gradients clipped, one row of 2,048 tokens or one batch a step.

  (a)  lora, qlora                  the product: python -m trimtab_runtime train, with all that it sets by itself
  (b)  trl-lora, trl-qlora          TRL's SFTTrainer, packing=True, as its documentation says: with gradient checkpointing, its default
  (b') ...-tuned                    the same with our allocator settings (GLIBC_TUNABLES, before the process starts)
       ...-kept                     that without gradient checkpointing: what it takes from them
  (c)  trainer                      transformers' Trainer + PEFT, batch of 8 padded to its longest
  (d)  plain                        R0's baseline: as (c), in fp32, all parameters trained, default allocator
       d1, d2, d3, d4               from (d) to us, one thing at a time: + allocator, + adapters instead of all parameters, + bf16,
                                    + packing (transformers' own); what is left to (a) are our kernels and our graph
       litgpt, llamafactory         LoRA as their documentation says, where they install

Models: SmolLM2-135M (`small`), and a random one of TinyLlama-1.1B's shape (`large`). (d) is measured on the small one alone: the large
one's fp32 weights, gradients and moments are 17.6 GB and its activations as many again. Memory holds a few variants, so they run in
sessions of some, each with ours. The first step of each warms up; those of padded batches do it with a short one.

Utilisation, of LoRA: what a step has to compute, at the rate of oneDNN's products of the model's own shapes (peers/products.py:
each linear map and the head, forward and backward, at the row's 2,048 tokens, measured in the same rounds and weighted by what each
computes), over the time it took. What it has to compute for a token: 4 N (2 forward, 2 back to the input) with N all weights of the
layers' linear maps and the head, embeddings not; 6 for each weight of the adapters; and attention inside documents, for each pair of
places of which the later one sees the earlier 12 d a layer and query head of width d (4 forward, 8 backward). What is computed again
is not counted, nor is anything but products.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engines import LARGE, tensors, write_random
from measure import Figure, Ratio, alternate, dtype_of, machine, parser, ratio, report
from peers import documents
from peers.environments import NotInstalled, python_of
from trimtab import weights
from trimtab.cache import cache_dir
from trimtab.estimate import ModelFacts

PEERS = Path(__file__).parent / "peers"
# what xeon/allocator.py sets by mallopt(3), and xeon/pages.py, for a process that knows nothing of it (glibc 2.35 or later)
TUNED = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.hugetlb=1"
RANK, ALPHA, RATE = 16, 32, 1e-4


@dataclass(frozen=True)
class Variant:
    """A program of peers/, in which environment (empty: ours), what it is told, and whether malloc is set for it."""

    program: str
    environment: str = ""
    told: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False


def _trainer(method: str, *, padded: bool = True, tuned: bool = True, **told: str) -> Variant:
    return Variant("by_transformers", told={"method": method, "padded": padded, **told}, tuned=tuned)


def _trl(method: str, *, recompute: bool = True, tuned: bool = False) -> Variant:
    return Variant("by_trl", "trl", {"method": method, "recompute": recompute}, tuned)


VARIANTS = {
    "lora": Variant("by_trimtab", told={"method": "lora"}),
    "qlora": Variant("by_trimtab", told={"method": "qlora"}),
    "products": Variant("products", tuned=True),
    "trl-lora": _trl("lora"),
    "trl-lora-tuned": _trl("lora", tuned=True),
    "trl-lora-kept": _trl("lora", tuned=True, recompute=False),
    "trl-qlora": _trl("qlora"),
    "trl-qlora-tuned": _trl("qlora", tuned=True),
    "trl-qlora-kept": _trl("qlora", tuned=True, recompute=False),
    "trainer": _trainer("lora", tuned=False),
    "plain": _trainer("full", dtype="float32", tuned=False),
    "d1": _trainer("full", dtype="float32"),
    "d2": _trainer("lora", dtype="float32"),
    "d3": _trainer("lora"),
    "d4": _trainer("lora", padded=False),
    "litgpt": Variant("by_litgpt", "litgpt"),
    "llamafactory": Variant("by_llamafactory", "llamafactory"),
}
LADDER = ("plain", "d1", "d2", "d3", "d4", "lora")
SAID = {
    "d1": "malloc keeps large blocks", "d2": "adapters, not all parameters", "d3": "bf16, not fp32", "d4": "packed, not padded",
    "lora": "kernels and graph",
}  # fmt: skip
# which run at once (ours first), and how many of the rounds are enough for the slow
SESSIONS: dict[str, list[tuple[tuple[str, ...], int]]] = {
    "large": [
        (("lora", "qlora", "products"), 9),
        (("lora", "trl-lora", "trl-lora-tuned"), 9),
        (("qlora", "trl-qlora", "trl-qlora-tuned"), 9),
    ],
    "small": [
        (("lora", "qlora", "products"), 9),
        (("lora", "trl-lora", "trl-lora-tuned", "trl-lora-kept"), 9),
        (("qlora", "trl-qlora", "trl-qlora-tuned"), 9),
        (("lora", "trainer", "d4"), 2),
        (("lora", "litgpt", "llamafactory"), 1),
        *((("lora", name), 1) for name in ("d3", "d2", "d1")),
        (("lora", "plain"), 2),
    ],
}


def sessions_of(kind: str, dtype: str) -> list[tuple[tuple[str, ...], int]]:
    """In fp32 without d3, which would be d2 again, and with one variant at a time beside ours: memory is short."""
    if dtype == "bfloat16":
        return SESSIONS[kind]
    return [((names[0], name), most) for names, most in SESSIONS[kind] for name in names[1:] if name != "d3"]


class Ended(Exception):
    """A variant is no more, and why."""


class Running:
    """A variant's process. `steps` is what it said of each step, the first of which warms up."""

    def __init__(self, name: str, python: str, told: dict[str, Any], threads: int, folder: Path) -> None:
        variant = VARIANTS[name]
        self.name, self.threads, self.log = name, threads, folder / f"{name}.log"
        self.steps: list[dict[str, Any]] = []
        tree = folder / name
        tree.mkdir()
        asked = folder / f"{name}.json"
        asked.write_text(json.dumps({**told, **variant.told, "folder": str(tree)}), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MALLOC_", "GLIBC_TUNABLES"))}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(tree)}
        environment |= {"GLIBC_TUNABLES": TUNED} if variant.tuned else {}
        self.process = subprocess.Popen(
            [python, str(PEERS / f"{variant.program}.py"), str(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), env=environment, text=True,
        )  # fmt: skip

    def ready(self) -> dict[str, Any]:
        """Facts of itself, once it has loaded."""
        facts: dict[str, Any] = self._hear()["ready"]
        return facts

    def step(self) -> float:
        """Seconds that one took for each real token: of the clock, with one thread of the processor."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._hear())
        return float(self.steps[-1]["processor" if self.threads == 1 else "wall"] / self.steps[-1]["tokens"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise Ended(f"{self.name}: " + ("killed, as where memory runs out" if code == -9 else (lines or [f"exit {code}"])[-1])[:300])
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass
class Session:
    """What some variants did in turns: seconds a token by round, what each said of itself and of its steps, and why others did not."""

    model: str
    seconds: dict[str, list[float]]
    facts: dict[str, dict[str, Any]]
    steps: dict[str, list[dict[str, Any]]]
    missing: dict[str, str]


def session(model: str, names: Sequence[str], told: dict[str, Any], rounds: int, threads: int) -> Session:
    """Load them, all at once; then steps in turns. One that does not load is left out; ours, or one that dies on its way, ends them all."""
    found = Session(model, {}, {}, {}, {})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started: dict[str, Running] = {}
        for name in names:
            try:
                wanted = VARIANTS[name].environment
                python = str(python_of(wanted, _say)) if wanted else sys.executable
                started[name] = stack.enter_context(_started(name, python, told, threads, Path(folder)))
            except NotInstalled as exc:
                found.missing[name] = f"not installed: {exc}"
        for name, one in started.items():
            try:
                found.facts[name] = one.ready()
                _say(f"{model} {name}: ready after {time.monotonic() - began:.0f} s; {found.facts[name]['packing']}")
            except Ended as exc:
                found.missing[name] = str(exc)
        running = {name: one for name, one in started.items() if name in found.facts}
        try:
            if names[0] not in running:
                raise Ended(f"without {names[0]} there is nothing to compare with")
            found.seconds = alternate({name: one.step for name, one in running.items()}, rounds=rounds, threads=threads)
        except Ended as exc:
            found.missing |= dict.fromkeys(running, str(exc))
        found.steps = {name: one.steps for name, one in running.items()}
    for name, why in found.missing.items():
        _say(f"{model} {name}: not measured: {why}")
    for name, each in found.seconds.items():
        _say(f"  {name}: {', '.join(f'{1 / one:,.0f}' for one in each)} tokens/s, peak {found.steps[name][-1]['memory']:,} MB")
    _say(f"  {rounds} rounds, and loading, in {time.monotonic() - began:.0f} s")
    return found


@contextmanager
def _started(name: str, python: str, told: dict[str, Any], threads: int, folder: Path) -> Iterator[Running]:
    one = Running(name, python, told, threads, folder)
    try:
        yield one
    finally:
        one.close()


def model_folder(kind: str, layers: int | None) -> Path:
    """The model, made at need: `large` of random weights, either cut to so many layers, with the tokenizer that trainers ask for."""
    known = weights.resolve("smollm2-135m-instruct", say=_say).folder
    if kind == "small" and layers is None:
        return known
    folder = cache_dir() / "benchmarks" / "models" / f"{kind}-{layers or LARGE['num_hidden_layers']}"
    if (folder / "config.json").exists():
        return folder
    _say(f"making {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((known / name).read_bytes())
    if kind == "small":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(known, num_hidden_layers=layers, dtype="bfloat16").save_pretrained(folder)
        return folder
    config = {**LARGE, "num_hidden_layers": layers or LARGE["num_hidden_layers"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    write_random(folder / "model.safetensors", tensors(config))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")  # last: what has one is whole
    return folder


def maps(facts: ModelFacts) -> list[tuple[int, int, int]]:
    """(how often, out, in) of each shape of linear map, and of the head."""
    query, keys = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
    layer = [(2, keys, facts.hidden), (1, query, facts.hidden), (1, facts.hidden, query)]
    layer += [(2, facts.intermediate, facts.hidden), (1, facts.hidden, facts.intermediate)]
    return [(times * facts.layers, out, inner) for times, out, inner in layer] + [(1, facts.vocabulary, facts.hidden)]


def flops(facts: ModelFacts, lengths: Sequence[int]) -> float:
    """What a step of LoRA on a row of such documents has to compute (see above)."""
    linear = facts.linear + facts.vocabulary * facts.hidden
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return sum(lengths) * (4 * linear + 6 * facts.adapter(RANK)) + 12 * facts.head_width * facts.heads * facts.layers * pairs


def utilisation(found: Session, facts: ModelFacts, rows: Sequence[Sequence[int]]) -> float:
    """The median over the rounds."""
    steps, rates = found.seconds["lora"], found.seconds["products"]
    needed = [flops(facts, rows[(turn + 1) % len(rows)]) for turn in range(len(steps))]  # a step that warmed up had the first
    products = documents.ROW_TOKENS * sum(4 * times * out * inner for times, out, inner in maps(facts))
    of_products = [products / (rate * documents.ROW_TOKENS) for rate in rates]
    shares = [work / (step * documents.ROW_TOKENS) / rate for work, step, rate in zip(needed, steps, of_products, strict=True)]
    return sorted(shares)[len(shares) // 2]


def main() -> int:
    options = parser(__doc__, "ratios, and utilisation of the large model", rounds=3)
    options.set_defaults(threads=len(os.sched_getaffinity(0)))
    options.add_argument("--model", choices=("both", *SESSIONS), default="both")
    options.add_argument("--only", default="", help="these variants, comma-separated, each beside ours")
    options.add_argument("--layers", type=int, help="cut the models to so many layers: a trial")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    on = machine("as each variant says", dtype_of(asked))
    drawn = documents.drawn()
    _say(drawn.line())
    only = {name for name in asked.only.split(",") if name}
    if unknown := only - VARIANTS.keys():
        options.error(f"there is no variant {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")

    sessions, figures, rows = [], [], []
    for kind in SESSIONS if asked.model == "both" else (asked.model,):
        folder = model_folder(kind, asked.layers)
        facts = ModelFacts.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        assert facts
        given = [documents.with_tokens(row, facts.vocabulary, seed) for seed, row in enumerate((*drawn.rows, drawn.batch))]
        told = {"model": str(folder), "rows": given[:-1], "batch": given[-1], "row_tokens": documents.ROW_TOKENS, "maps": maps(facts)}
        told |= {"rank": RANK, "alpha": ALPHA, "learning_rate": RATE, "dtype": on.dtype}
        planned = sessions_of(kind, on.dtype)
        planned += [(("lora", name), 9) for name in sorted(only - {name for names, _ in planned for name in names})]
        of_kind = []
        for names, most in planned:
            others = tuple(name for name in names[1:] if not only or name in only)
            if others:
                of_kind.append(session(kind, (names[0], *others), told, min(asked.rounds, most), asked.threads))
        sessions += of_kind
        rows += [*lines(kind, of_kind, facts, drawn.rows), *parts(kind, of_kind, on.dtype)]
        figures += judged(kind, of_kind, facts, drawn.rows)
    head = ("model, variant", "tokens/s", "us / it", "s a step", "real of places", "peak MB")
    return report(asked, on, head, rows, figures, {"documents": asdict(drawn), "sessions": [asdict(one) for one in sessions]})


def paired(found: Sequence[Session], name: str) -> Ratio | None:
    """How many times as many tokens a second ours made as `name`, in the first session that had both; None where it did not run."""
    for one in found:
        ours = next((mine for mine in ("lora", "qlora") if mine in one.seconds), name)
        if name in one.seconds and name != ours:
            return ratio(one.seconds[name], one.seconds[ours])
    return None


def lines(kind: str, found: Sequence[Session], facts: ModelFacts, rows: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
    """A row of the table for each variant of each session, and utilisation."""
    table: list[tuple[str, ...]] = []
    for one in found:
        for name, each in one.seconds.items():
            middle = sorted(one.steps[name][1:], key=lambda step: step["wall"])[(len(each) - 1) // 2]
            rate = sorted(1 / seconds for seconds in each)[len(each) // 2]
            share = f"{middle['tokens'] / middle['places']:.0%}" if name != "products" else ""
            against = str(paired([one], name) or "") if name != "products" else ""
            peak = one.steps[name][-1]["memory"]
            table.append((f"{kind} {name}", f"{rate:,.0f}", against, f"{middle['wall']:.2f}", share, f"{peak:,}"))
        if {"lora", "products"} <= one.seconds.keys():
            table.append((f"{kind} utilisation of lora", "", f"{utilisation(one, facts, rows):.3f}", *[""] * 3))
    return table


def parts(kind: str, found: Sequence[Session], dtype: str) -> list[tuple[str, ...]]:
    """What each step from (d) to us gives; no rows where one was not measured, for the next would be credited with its gain."""
    planned = {name for names, _ in sessions_of(kind, dtype) for name in names}
    way = [name for name in LADDER[:-1] if name in planned]
    times = {name: times.middle for name in way if (times := paired(found, name))}
    if not way or times.keys() != {*way}:
        return []
    gains = {after: times[before] / times.get(after, 1.0) for before, after in itertools.pairwise((*way, "lora"))}
    return [(f"{kind} from (d) to us, {name}: {SAID[name]}", "", f"{gain:.2f}", *[""] * 3) for name, gain in gains.items()]


def judged(kind: str, found: Sequence[Session], facts: ModelFacts, rows: Sequence[Sequence[int]]) -> list[Figure]:
    """The issue's bars, of what was measured."""
    bars = {
        "large": {
            "qlora": 0.92, "trl-lora": 1.6, "trl-qlora": 1.9, "trl-lora-tuned": 1.3, "trl-qlora-tuned": 1.3,
        },
        "small": {"trl-qlora": 2.0, "plain": 25.0},
    }[kind]  # fmt: skip
    figures = []
    for name, bar in bars.items():
        asked = [one for one in found if name in one.seconds or name in one.missing]
        if not asked:
            continue
        found_ratio = paired(asked, name)
        value = 0.0 if found_ratio is None else 1 / found_ratio.middle if name == "qlora" else found_ratio.middle
        said = "our qlora / our lora" if name == "qlora" else f"us / {name}"
        figures.append(Figure(f"{kind}: {said}, tokens/s", value, bar, least=True))
    asked = [one for one in found if "products" in one.seconds or "products" in one.missing]
    if asked and kind == "large":
        both = [one for one in asked if {"lora", "products"} <= one.seconds.keys()]
        figures.append(Figure("large: utilisation, lora", utilisation(both[0], facts, rows) if both else 0.0, 0.65, least=True))
    return figures


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
